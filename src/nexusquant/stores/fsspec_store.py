"""What fsspec opens as a store: S3, Google Cloud Storage, Azure, SFTP, memory and more."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nexusquant.errors import ConfigError, StoreError
from nexusquant.stores.base import Store, is_key
from nexusquant.stores.urls import without_password

# Writing a whole object is one step there, and a rename would be a copy.
_ATOMIC = {"abfs", "abfss", "adl", "az", "gcs", "gs", "memory", "oci", "oss", "s3", "s3a"}


class FsspecStore(Store):
    """One object or file per value, `URL/KEY`.

    Object stores and memory show an object only when all of it has been written. Elsewhere a value
    is written as `.part-...` beside its place and moved there, in one step wherever fsspec's
    `mv` is a rename that replaces: local files, SFTP. A failed write removes its temporary; one of
    a killed process stays, invisible to the store, until somebody removes `.part-*`.

    There is no size limit: use the bucket's lifecycle rules, or `DirectoryStore` for local files.
    Every file in the place that is named like a key is taken for a value. Time limits and retries
    are those of the fsspec backend, which must be installed (`s3fs` for `s3://`, ...); its
    credentials come from its own environment variables or configuration, or from `options`.

    Args:
        url: of the place, a bucket or a folder in it.
        options: of the fsspec backend, such as `endpoint_url` for S3.
    """

    def __init__(self, url: str, **options: Any) -> None:
        if not isinstance(url, str) or not url:  # "" would be the current directory
            raise ConfigError(f"a URL of type {type(url).__name__}: give text that is not empty.")
        self.where = without_password(url)
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise StoreError(
                f'{self.where} needs fsspec: pip install "nexusquant[store]".'
            ) from error
        try:
            self._fs, root = url_to_fs(url, **options)
        except ImportError as error:  # says which package
            raise StoreError(f"{self.where}: {error}") from error
        except (ValueError, TypeError) as error:  # unknown scheme; unknown option
            raise ConfigError(
                f"{self.where} with options {sorted(options)} is not a place that fsspec opens"
                f" ({error})."
            ) from error
        # Backends that connect here raise what their libraries raise, no closed list. The cause
        # stays attached.
        except Exception as error:
            raise self._failed("cannot open the store", error) from error
        self._root = str(root).rstrip("/")
        protocol = self._fs.protocol
        self._atomic = not _ATOMIC.isdisjoint([protocol] if isinstance(protocol, str) else protocol)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _read(self, key: str, start: int, stop: int | None) -> bytes | None:
        if start == stop:
            return None if self._size(key) is None else b""
        with self._errors(f"cannot read {key}"):
            try:
                # With a start it is one request; s3fs reads large objects in several without.
                return bytes(self._fs.cat_file(self._path(key), start=start, end=stop))
            except FileNotFoundError:
                return None
            # Many backends refuse to begin at the end, each with an error of its own. All others
            # are raised again.
            except Exception:
                size = self._size(key)
                if size is not None and start >= size:
                    return b""
                raise

    def _read_many(self, keys: list[str]) -> list[bytes | None]:
        with self._errors(f"cannot read {len(keys)} values"):
            found = self._fs.cat_ranges([self._path(key) for key in keys], 0, None)
        clear = (bytes, FileNotFoundError)  # what failed is read again: an empty value, or an error
        return [
            _missing_is_none(value) if isinstance(value, clear) else self._read(key, 0, None)
            for key, value in zip(keys, found, strict=True)
        ]

    def _size(self, key: str) -> int | None:
        with self._errors(f"cannot look for {key}"):
            self._fs.invalidate_cache()  # of listings, which other processes change
            try:
                return int(self._fs.info(self._path(key))["size"])
            except FileNotFoundError:
                return None

    def _contains_many(self, keys: list[str]) -> list[bool]:
        if not self._fs.async_impl:
            return super()._contains_many(keys)
        from fsspec.asyn import sync

        async def infos() -> list[Any]:
            calls = (self._fs._info(self._path(key)) for key in keys)
            return await asyncio.gather(*calls, return_exceptions=True)

        with self._errors(f"cannot look for {len(keys)} values"):
            self._fs.invalidate_cache()
            return [_missing_is_none(info) is not None for info in sync(self._fs.loop, infos)]

    def _put(self, key: str, data: memoryview) -> None:
        target = self._path(key)
        with self._errors(f"cannot write {key} ({len(data)} bytes)"):
            if self._atomic:
                self._fs.pipe_file(target, bytes(data))
                return
            self._fs.makedirs(self._root, exist_ok=True)
            part = self._path(f".part-{uuid.uuid4().hex}")
            try:
                self._fs.pipe_file(part, bytes(data))
                self._fs.mv(part, target)
            except BaseException:
                with suppress(Exception):  # the first error says more, whatever this one is
                    self._fs.rm_file(part)
                raise

    def _delete(self, key: str) -> None:
        with self._errors(f"cannot delete {key}"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def _keys(self) -> Iterator[str]:
        with self._errors("cannot list the keys"):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return iter(())
            files = [entry["name"] for entry in entries if entry["type"] == "file"]
        names = (name.rstrip("/").rpartition("/")[2] for name in files)
        return (name for name in names if is_key(name))

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        # Every backend raises what its own library raises, no closed list. The cause stays
        # attached.
        except Exception as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: Exception) -> StoreError:
        return StoreError(
            f"{self.where}: {what} ({type(error).__name__}: {error}). Check that the place exists,"
            " can be reached and takes these credentials."
        )


def _missing_is_none(result: Any) -> Any:
    """A result, None for a missing file; other exceptions are raised."""
    if isinstance(result, FileNotFoundError):
        return None
    if isinstance(result, BaseException):
        raise result
    return result
