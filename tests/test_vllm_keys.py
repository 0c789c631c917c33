"""Names of blocks: the same for the same, others for anything that keys and values depend on."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexusquant.stores.base import is_key
from nexusquant.vllm.identity import identity
from nexusquant.vllm.keys import Namespace, chain, shard, store_key

SPACE = Namespace(
    model={"name": "model", "revision": "main"},
    dtype="bfloat16",
    cache_dtype="auto",
    block_size=4,
    codec={"name": "raw", "version": 1},
)
TOKENS = list(range(100, 118))


def digests(space: Namespace = SPACE, tokens: list[int] = TOKENS, salt: str | None = None) -> Any:
    return chain(space.seed(), tokens, space.block_size, salt)


def test_full_blocks_only() -> None:
    assert [len(digests(tokens=TOKENS[:n])) for n in (0, 3, 4, 7, 8, 18)] == [0, 0, 1, 1, 2, 4]


def test_a_digest_is_of_the_block_and_all_before_it() -> None:
    whole, other = digests(), digests(tokens=[1, *TOKENS[1:]])
    assert digests(tokens=TOKENS[:9]) == whole[:2]
    assert not set(whole) & set(other)
    changed = digests(tokens=[*TOKENS[:8], 1, *TOKENS[9:]])
    assert changed[:2] == whole[:2]
    assert not set(changed[2:]) & set(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"name": "model", "revision": "other"}},
        {"dtype": "float16"},
        {"cache_dtype": "fp8"},
        {"codec": {"name": "raw", "version": 2}},
        {"tensor_parallel": 2},
        {"pipeline_parallel": 2},
    ],
    ids=str,
)
def test_everything_else_is_part_of_it(change: dict[str, Any]) -> None:
    assert not set(digests(replace(SPACE, **change))) & set(digests())


def test_block_sizes_do_not_meet() -> None:
    assert not set(digests(replace(SPACE, block_size=8))) & set(digests())


def test_salts_separate() -> None:
    found = [digests(), digests(salt="a"), digests(salt="b")]
    assert len({digest for one in found for digest in one}) == 12
    assert digests(salt="") == digests()


def test_every_process_finds_the_same() -> None:
    code = f"from nexusquant.vllm.keys import *; s = {SPACE!r}; print(s.seed().hex())"
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "src"},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == SPACE.seed().hex()


def test_the_format_is_pinned() -> None:
    """Changing what is hashed makes all stored blocks misses: raise `FORMAT` and this."""
    assert digests()[0].hex() == PINNED


PINNED = "0e65d8d8e991e2b5aa734a035358229409dd45c22697a4d681fa56fd06a7f4b6"


def test_keys_are_keys_of_stores_and_ranks_have_their_own() -> None:
    space = replace(SPACE, tensor_parallel=2, pipeline_parallel=2)
    assert space.shards() == ["t0p0", "t1p0", "t0p1", "t1p1"]
    assert shard(1, 0) in space.shards()
    keys = {store_key(digest, suffix) for digest in digests() for suffix in space.shards()}
    assert len(keys) == 16
    assert all(map(is_key, keys))


def test_folders_are_told_by_their_weights(tmp_path: Path) -> None:
    def of(folder: str, weights: bytes, **config: Any) -> Any:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "model.safetensors").write_bytes(weights)
        entries = {"_name_or_path": folder, "layers": 2, "scale": 0.5, "torch_dtype": "x", **config}
        return identity(str(tmp_path / folder), None, entries, None)

    same = of("a", bytes(100_000))
    assert of("b", bytes(100_000)) == same
    assert of("b", bytes(99_999)) != same
    assert of("b", bytes(99_999) + b"x") != same
    assert of("b", bytes(100_000), layers=3) != same
    assert identity(str(tmp_path / "a"), None, {"layers": 2}, "gptq") != same


def test_hub_ids_are_told_by_their_commit() -> None:
    class Config:
        _commit_hash: str | None = "abc"

        def to_dict(self) -> dict[str, Any]:
            return {"layers": 2}

    config = Config()
    assert identity("owner/name", None, config, None)["revision"] == "abc"
    config._commit_hash = None
    assert identity("owner/name", "main", config, None)["revision"] == "main"
