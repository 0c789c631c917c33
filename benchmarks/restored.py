"""KL of prefixes that come back from a file, beside caches that read the prompt.

    python -m benchmarks.restored MODEL --text a.txt --calibrate b.txt --tokens 2048 --pieces 8

Both profiles are built from the calibration text first: how much of it they need is shown by
`--tokens` and `--pieces`.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from nexusquant import NexusCache, calibrate, calibrate_store, load, save
from nexusquant.hf.cache import plain_cache
from nexusquant.hf.cache_names import cache_argument
from nexusquant.hf.collecting import read_prompt
from nexusquant.loading import load_model


@torch.inference_mode()
def main(
    model: Path,
    text: Annotated[list[Path], typer.Option(help="Scored; repeatable.")],
    calibration: Annotated[list[Path], typer.Option("--calibrate", help="Other text.")],
    prefix: int = 2048,
    continuation: int = 256,
    bits: float = 1.5,
    tokens: Annotated[int, typer.Option(help="Per piece of calibration text.")] = 2048,
    pieces: int = 8,
) -> None:
    """Print a line per text and kind of cache: KL in nats, and the ratio."""
    network, tokenizer = load_model(model, "float32", "cpu")
    known = [path.read_text() for path in calibration]
    calibrate(network, tokenizer, known, tokens=tokens, pieces=pieces)
    calibrate_store(network, tokenizer, known, tokens=tokens, pieces=pieces)
    for path in text:
        ids = tokenizer(path.read_text(), return_tensors="pt", verbose=False).input_ids
        first, more = ids[:, :prefix], ids[:, prefix : prefix + continuation]

        rows: list[tuple[str, Any, float]] = []
        with TemporaryDirectory() as folder:
            stock, file = _read(network, plain_cache(network), first), Path(folder) / "prefix.nxq"
            saved = save(stock, file, model=network, bits=bits, embed_profile=False)
            exact = _scored(network, stock, more)
            rows.append((f"file, {bits} bits", load(file, network), saved.ratio))
            for preset in ("lossless", "high", "balanced", "max"):
                restored = load(file, network, quality=preset)
                direct = _read(network, NexusCache(network, preset), first)
                for what, cache in (("from the file", restored), ("read", direct)):
                    rows.append((f"{preset}, {what}", cache, cache.compression_ratio))
        for what, cache, ratio in rows:
            kl = (exact.exp() * (exact - _scored(network, cache, more))).sum(-1).mean()
            typer.echo(f"{path.stem:20}{what:26}{float(kl):8.4f} nats {ratio:6.2f}x")


def _read(model: Any, cache: Any, ids: Tensor) -> Any:
    read_prompt(model, ids, cache)
    return cache


def _scored(model: Any, cache: Any, ids: Tensor) -> Tensor:
    scores: Tensor = model(ids, **cache_argument(model, cache)).logits[0].float().log_softmax(-1)
    return scores


if __name__ == "__main__":
    typer.run(main)
