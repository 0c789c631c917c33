"""Every kind of store, empty; a Redis server of this test session."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import fsspec
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.memory import MemoryFileSystem

from nexusquant.stores import DirectoryStore, FsspecStore, RedisStore, Store
from tests.stores.servers import RedisServer, running


class AsyncMemory(AsyncFileSystemWrapper):
    """fsspec's memory behind its asynchronous interface, as S3 and others have it."""

    protocol = ("nqasync", "memory")
    cachable = False

    def __init__(self, **options: Any) -> None:
        super().__init__(fs=MemoryFileSystem(), asynchronous=False, **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.removeprefix("nqasync://")))


fsspec.register_implementation("nqasync", AsyncMemory, clobber=True)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with running() as server:
        yield server


@pytest.fixture(
    scope="module", params=["directory", "limited", "redis", "local", "memory", "async"]
)
def fresh(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Store]]:
    """Makes an empty store of one kind."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url
    with ExitStack() as opened:

        def make() -> Store:
            folder, name = tmp_path_factory.mktemp("store"), uuid.uuid4().hex
            stores: dict[str, Callable[[], Store]] = {
                "directory": lambda: DirectoryStore(folder, sync=False),
                "limited": lambda: DirectoryStore(folder / "new" / "ly made", 2**30),
                "redis": lambda: RedisStore(url, 100, prefix=f"[{name}]*"),
                "local": lambda: FsspecStore(f"local://{folder}/newly/made"),
                "memory": lambda: FsspecStore(f"memory://{name}"),
                "async": lambda: FsspecStore(f"nqasync://{name}"),
            }
            return opened.enter_context(stores[request.param]())

        yield make


@pytest.fixture
def store(fresh: Callable[[], Store]) -> Store:
    return fresh()
