"""Codecs of vLLM blocks beside each other: bytes, what they do to the next tokens, time per block.

    python -m benchmarks.blocks                        # SmolLM2-135M-Instruct, Python's help texts
    python -m benchmarks.blocks MODEL --text a.txt --profile FILE

The model reads a prefix exactly, its blocks go through the codec, and the rest of the text is read
behind what comes back, teacher-forced. KL is of all tokens' distributions, from the exact cache, in
the model's dtype. Bytes and times are of blocks in bf16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nexusquant.calibration import ensure_store_profile
from nexusquant.demo import calibration_text, demo_text
from nexusquant.hf.cache_names import cache_argument
from nexusquant.hf.store_profiles import load_store_profile
from nexusquant.loading import demo_model, load_model
from nexusquant.vllm.blocks import BlockCodec, RawCodec
from nexusquant.vllm.e8 import E8Codec
from nexusquant.vllm.entropy import EntropyCodec
from nexusquant.vllm.rotary import check_rotation, frequencies

PREFIX, BEHIND = 576, 64  # tokens
Layers = list[tuple[Tensor, Tensor]]


def main() -> None:
    """A line per codec."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="folder, .gguf file or hub id")
    parser.add_argument("--text", type=Path, action="append", help="repeatable")
    parser.add_argument("--profile", type=Path, help="storage profile; default: found or built")
    parser.add_argument("--block-size", type=int, default=32)
    given = parser.parse_args()
    model, tokenizer = load_model(given.model or demo_model())
    profile = (
        load_store_profile(given.profile)
        if given.profile
        else ensure_store_profile(model, tokenizer, calibration_text())
    )
    rope = frequencies(model.config)
    check_rotation(model.config, rope)
    codecs: dict[str, BlockCodec] = {"raw": RawCodec()}
    codecs |= {f"e8, {bits} bits": E8Codec(bits) for bits in (8, 6)}
    codecs |= {f"entropy, {bits} bits": EntropyCodec(profile, rope, bits) for bits in (6, 5, 4)}
    texts = [path.read_text("utf-8") for path in given.text or []] or [demo_text()]
    pieces = [piece for text in texts for piece in _pieces(tokenizer, text)]
    sys.stdout.write(f"{len(pieces)} texts of {PREFIX} + {BEHIND} tokens\n")
    for name, codec in codecs.items():
        told = _line(codec, model, pieces, given.block_size)
        sys.stdout.write(f"{name:18} {told}\n")


def _pieces(tokenizer: Any, text: str) -> list[Tensor]:
    """Up to three of each text, (1, tokens)."""
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    return [x for x in ids.split(PREFIX + BEHIND, 1) if x.shape[1] == PREFIX + BEHIND][:3]


@torch.no_grad()
def _line(codec: BlockCodec, model: Any, pieces: list[Tensor], size: int) -> str:
    divergences, encoding, decoding = [], [], []
    stored = raw = 0
    for ids in pieces:
        exact = DynamicCache(config=model.config)
        model(ids[:, :PREFIX], **cache_argument(model, exact))
        layers = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in exact.layers]
        expected = _behind(model, ids, exact)
        blocks = []
        for at in range(0, PREFIX, size):
            block = [tuple(x[:, at : at + size] for x in layer) for layer in layers]
            narrow = [tuple(x.bfloat16() for x in layer) for layer in block]
            started = time.perf_counter()
            blob = codec.encode(*map(list, zip(*narrow, strict=True)), at)
            encoded = time.perf_counter()
            _through(codec, blob, narrow, at)
            encoding.append(encoded - started)
            decoding.append(time.perf_counter() - encoded)
            stored, raw = stored + len(blob), raw + sum(x.nbytes for y in narrow for x in y)
            blob = codec.encode(*map(list, zip(*block, strict=True)), at)
            blocks.append(_through(codec, blob, block, at))
        coded = DynamicCache(config=model.config)
        for index in range(len(layers)):
            k, v = (torch.cat([block[index][side] for block in blocks], 1) for side in (0, 1))
            coded.update(k[None], v[None], index)
        found = _behind(model, ids, coded)
        divergences.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    return (
        f"{raw / stored:5.2f} times below bf16   KL {statistics.mean(divergences):.1e},"
        f" worst text {max(divergences):.1e}   encode {1e3 * statistics.median(encoding):.0f} ms,"
        f" decode {1e3 * statistics.median(decoding):.0f} ms"
    )


def _through(codec: BlockCodec, blob: bytes, block: Any, at: int) -> Layers:
    shapes: Any = [tuple(tuple(x.shape) for x in layer) for layer in block]
    return list(zip(*codec.decode(blob, at, shapes, block[0][0][:0]), strict=True))


def _behind(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Log-probabilities behind a prefix."""
    logits: Tensor = model(ids[:, PREFIX:], **cache_argument(model, cache)).logits[0]
    return logits.double().log_softmax(-1)


if __name__ == "__main__":
    main()
