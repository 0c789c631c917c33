"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from nexusquant.errors import StoreError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new binary file that takes its place, synced to disk, when the block ends.

    If the block raises, or the disk does not take it, nothing is left of it and the old file, if
    there was one, is still there. The new one has its permissions; a symbolic link stays one. A
    process that is killed leaves `.NAME.*.part` behind.

    Raises:
        StoreError: the file cannot be written, or it is something else, as a device.
    """
    try:
        target = Path(os.path.realpath(path))
        mode = target.stat().st_mode if target.exists() else None
    except (TypeError, ValueError, OSError) as error:  # ValueError: a NUL in it
        raise StoreError(f"{path!r}: not written, this is not the path of a file.") from error
    if not Path(path).name or (mode is not None and not stat.S_ISREG(mode)):
        raise StoreError(f"{str(path)!r}: not written, this is not the path of a file.")
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                if mode is not None:
                    part.chmod(stat.S_IMODE(mode))
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path}: not written ({error}). What was there before still is."
        ) from error
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename survive a crash."""
    with suppress(OSError):  # Windows and some network file systems cannot sync folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
