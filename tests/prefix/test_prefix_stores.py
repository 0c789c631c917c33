"""Disks that are full, writers that are killed, servers that go away: all or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nexusquant import FormatError, StoreError, load, save
from nexusquant.prefix.loading import open_prefix
from nexusquant.stores import DirectoryStore, RedisStore, Store, open_store
from tests.prefix.stored_cases import case, divergence, ids, pairs, read
from tests.stores.servers import HalfAnswers, RedisServer, running

TOKENS = 300

_WRITERS = """
import os, resource, signal, sys
os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process with a pool of threads hangs
from nexusquant import StoreError, save
from nexusquant.stores import open_store
from tests.prefix.stored_cases import case, ids, read

file, folder = sys.argv[1:]
model, profile = case("llama")
cache = read(model, ids(3000))

def write():
    options = {"model": model, "tokens": ids(3000), "profile": profile,
               "embed_profile": False}
    for target, key in ((file, None), (open_store(folder), "p")):
        try:
            save(cache, target, key=key, **options)
        except StoreError as error:
            yield error

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))
assert len(list(write())) == 2
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
print("full", sorted(os.listdir(os.path.dirname(file))), flush=True)
for one in (1, 2):
    child = os.fork()
    if not child:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        if one == 2:
            file = os.devnull + "/x"  # go on to the store
        list(write())
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


@pytest.fixture(scope="module")
def stock() -> Any:
    return read(case("llama")[0], ids(TOKENS))


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with running() as server:
        yield server


def put(stock: Any, target: Any, **options: Any) -> Any:
    model, profile = case("llama")
    options = {"model": model, "tokens": ids(TOKENS), "profile": profile, **options}
    return save(stock, target, **{"embed_profile": False, **options})


def get(place: Any, key: str | None = None) -> Any:
    model, profile = case("llama")
    return load(place, model, key=key, store_profile=profile)


def visible(path: Path) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in path.iterdir() if x.is_file()}


def test_writers_that_fail(tmp_path: Path, stock: Any) -> None:
    """First the disk is full, then they are killed before anything is sure to be on disk."""
    folder = tmp_path / "store"
    put(stock, tmp_path / "p")
    put(stock, DirectoryStore(folder), key="p")
    before = [visible(x) for x in (tmp_path, folder)]
    command = [sys.executable, "-c", _WRITERS, str(tmp_path / "p"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "full ['p', 'store']\n"
    left = [x for x in tmp_path.iterdir() if x.name.startswith(".p.")]
    assert [x.suffix for x in left] == [".part"]
    left[0].unlink()
    assert [visible(x) for x in (tmp_path, folder)] == before
    assert get(tmp_path / "p").get_seq_length() == TOKENS
    assert get(DirectoryStore(folder), "p").get_seq_length() == TOKENS


def test_saving_into_every_kind_of_store(tmp_path: Path, stock: Any, server: RedisServer) -> None:
    put(stock, tmp_path / "p")
    expected = get(tmp_path / "p")
    for place in (str(tmp_path / "s"), f"{server.url}?ttl=60", "memory://prefixes"):
        with open_store(place) as store:
            saved = put(stock, store)
            assert (saved.key, saved.nbytes) == (put(stock, store).key, store.size(saved.key))
            assert all(torch.equal(*x) for x in pairs(get(store, saved.key), expected))
            store.delete(saved.key)
            with pytest.raises(StoreError, match=f"has no {saved.key}"):
                get(store, saved.key)


class Stopping(RedisStore):
    """Its server is killed once so many values were asked for."""

    left = 0
    server: RedisServer

    def _read(self, key: str, start: int, stop: int | None) -> bytes | None:
        if self.left == 0:
            self.server.stop()
        self.left -= 1
        return super()._read(key, start, stop)


@pytest.mark.parametrize("requests", [0, 1, 2, 3])
def test_a_server_that_is_killed_in_the_middle(
    stock: Any, server: RedisServer, requests: int
) -> None:
    with Stopping(server.url, timeout=1) as store:
        store.left, store.server = requests, server
        put(stock, store, key="p")
        with pytest.raises(StoreError):
            get(store, "p")
        with pytest.raises(StoreError):
            put(stock, store, key="p")
        server.start()
        with pytest.raises(StoreError, match="has no p"):  # it keeps nothing on disk
            get(store, "p")
        store.left = -1
        put(stock, store, key="p")
        assert get(store, "p").get_seq_length() == TOKENS


def test_a_server_that_breaks_off() -> None:
    broken = (StoreError, FormatError)
    with HalfAnswers() as half, RedisStore(half.url, timeout=1) as store, pytest.raises(broken):
        get(store, "p")


def test_readers_meet_whole_prefixes_only(tmp_path: Path) -> None:
    """Two prefixes take turns under one name: a reader gets one, or is told that it changed."""
    model, profile = case("llama")
    caches = {tokens: read(model, ids(tokens)) for tokens in (200, 600)}
    target, done = tmp_path / "p", threading.Event()
    store = DirectoryStore(tmp_path / "s", sync=False)

    def write(tokens: int) -> None:
        options: Any = {"model": model, "profile": profile, "bits": 8}
        save(caches[tokens], target, **options)
        save(caches[tokens], store, key="p", **options)

    def go_on() -> None:
        while not done.is_set():
            for tokens in caches:
                write(tokens)

    write(200)
    writer = threading.Thread(target=go_on)
    writer.start()
    try:
        seen = set()
        for _ in range(30):
            found = get(target)
            assert divergence(model, caches[found.get_seq_length()], found) < 1e-5
            seen.add(found.get_seq_length())
            try:
                found = get(store, "p")
            except FormatError:
                continue
            assert divergence(model, caches[found.get_seq_length()], found) < 1e-5
    finally:
        done.set()
        writer.join()
    assert seen == {200, 600}


def test_many_prefixes_in_one_store(tmp_path: Path) -> None:
    model, profile = case("llama")
    store: Store = DirectoryStore(tmp_path, 40_000)
    keys = {}
    for seed in range(12):
        cache = read(model, ids(200, seed))
        keys[seed] = save(
            cache, store, model=model, tokens=ids(200, seed), profile=profile, embed_profile=False
        ).key
    left = [seed for seed, key in keys.items() if store.contains(key)]
    assert left == list(range(12))[-len(left) :]
    assert 2 < len(left) < 12
    for seed in left:
        with open_prefix(store, keys[seed]) as reader:
            assert reader.meta["tokens"] == 200
