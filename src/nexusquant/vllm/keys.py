"""The names of blocks: a hash chain over tokens, seeded with all that keys and values depend on.

Not vLLM's own block hashes: each server chooses their algorithm, some with a random seed, and they
know nothing of the model, the block size or the codec. What they cover beyond tokens is left out
here (LoRA, multimodal inputs, embeddings as prompts: such requests are neither looked up nor
stored), but for the cache salt, which separates tenants and is hashed in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FORMAT = 1
"""Of keys and of what a value is; a change of either makes all stored blocks misses."""


@dataclass(frozen=True)
class Namespace:
    """Everything but the tokens that a block's keys and values depend on.

    Attributes:
        model: which weights (`nexusquant.vllm.identity`).
        dtype: of the model.
        cache_dtype: of the KV cache.
        block_size: tokens per block.
        codec: `BlockCodec.identity`: name, version, rate, profile.
        tensor_parallel, pipeline_parallel: numbers of ranks.
    """

    model: Mapping[str, Any]
    dtype: str
    cache_dtype: str
    block_size: int
    codec: Mapping[str, Any]
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    def seed(self) -> bytes:
        """What every chain of this namespace begins with."""
        return hashlib.sha256(canonical({"format": FORMAT, **asdict(self)})).digest()

    def shards(self) -> list[str]:
        """The suffix of each rank's keys."""
        return [
            shard(tensor, pipeline)
            for pipeline in range(self.pipeline_parallel)
            for tensor in range(self.tensor_parallel)
        ]


def shard(tensor_rank: int, pipeline_rank: int) -> str:
    """The suffix of the keys of one rank, whose heads and layers no other has."""
    return f"t{tensor_rank}p{pipeline_rank}"


def chain(
    seed: bytes, tokens: Sequence[int], block_size: int, salt: str | None = None
) -> list[bytes]:
    """A digest for every full block of a prompt: of this block and all before it.

    Args:
        salt: of the request; blocks of one salt are not found with another.
    """
    if salt:
        seed = hashlib.sha256(seed + canonical({"salt": salt})).digest()
    return list(_links(seed, np.asarray(tokens, dtype="<u4"), block_size))


def _links(link: bytes, tokens: np.ndarray, block_size: int) -> Iterator[bytes]:
    for start in range(0, len(tokens) - block_size + 1, block_size):
        link = hashlib.sha256(link + tokens[start : start + block_size].tobytes()).digest()
        yield link


def store_key(digest: bytes, suffix: str) -> str:
    """Where a store has the block of this digest, one rank's part of it."""
    return f"kv{FORMAT}-{digest.hex()}-{suffix}"


def canonical(thing: Any) -> bytes:
    """JSON with one spelling."""
    return json.dumps(thing, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
