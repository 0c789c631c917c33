"""One row per model type: stock against exact codes, and the bytes of real ones.

`python -m tests.zoo.matrix` prints the table as Markdown.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from nexusquant import CompressionConfig, UnsupportedError, nexusquant_evict
from nexusquant.accounting import storage_bytes
from nexusquant.config import PRESETS
from nexusquant.hf.coverage import EXACT as EXACT_LAYER
from nexusquant.hf.coverage import STATE, Coverage, cover
from nexusquant.hf.expected import expected_bytes
from nexusquant.hf.layer import CompactLayer
from tests.zoo.builders import ZOO, build, quiet

NEW_TOKENS = 6
EXACT = CompressionConfig(codec="exact")
CODES = PRESETS["high"]
LONG = 320


@dataclass
class Row:
    """What was seen of one model type.

    Attributes:
        refused: the message of `UnsupportedError`, "" if the type can be compressed.
        error, scale: largest difference and largest size of logits with exact codes, left-padded
            batch of two.
        same_tokens: whether greedy decoding chose the same ones.
        finite: whether all logits with real codes were finite.
        layers: of the cache with real codes; None where a layer is not ours.
        nbytes, expected: of our layers behind `LONG` tokens, measured and told from the config.
        ratio: fp16 bytes of what our layers hold over `nbytes`.
    """

    model_type: str
    coverage: Coverage
    refused: str = ""
    error: float = 0.0
    scale: float = 0.0
    same_tokens: bool = False
    finite: bool = False
    layers: list[Any] = field(default_factory=list)
    nbytes: int = 0
    expected: int = 0
    ratio: float = 1.0


def measure(model_type: str) -> Row:
    """Build the model and run it: stock, with exact codes, and with real ones."""
    with quiet():
        model = build(model_type)
        row = Row(model_type, cover(model.config))
        try:
            with nexusquant_evict(model, EXACT):
                mine = _generate(model, _prompts(80, 13))
        except UnsupportedError as refusal:
            row.refused = str(refusal)
            return row
        stock = _generate(model, _prompts(80, 13))
        with nexusquant_evict(model, CODES):
            coded = _generate(model, _prompts(LONG), new=2)
    row.error = max(
        float((a - b).abs().max()) for a, b in zip(mine.logits, stock.logits, strict=True)
    )
    row.scale = max(float(x.abs().max()) for x in stock.logits)
    row.same_tokens = torch.equal(mine.sequences, stock.sequences)
    row.finite = all(bool(x.isfinite().all()) for x in coded.logits)
    row.layers = [
        layer if isinstance(layer, CompactLayer) else None for layer in coded.cache.layers
    ]
    ours = [layer for layer in row.layers if layer is not None and layer.tail is not None]
    tensors = [CompactLayer.tensors(layer) for layer in ours]
    elements = sum(_attention_elements(layer) for layer in ours)
    row.nbytes = storage_bytes(tensors)
    if row.nbytes:
        row.ratio = 2 * elements / row.nbytes
    coded_layers = [x for x in row.coverage.layers if x.treatment not in (EXACT_LAYER, STATE)]
    row.expected = expected_bytes(CODES, coded_layers, LONG + 1, tail=2)  # one token in fp32
    return row


def _attention_elements(layer: CompactLayer) -> int:
    tokens = layer.length - layer.first_visible
    return tokens * sum(
        b * h * d for b, h, _, d in (layer.tail.keys.shape, layer.tail.values.shape)
    )


def _prompts(tokens: int, pads: int | None = None) -> dict[str, torch.Tensor]:
    """One prompt, or two of which the second has `pads` pads on the left."""
    rows = 1 if pads is None else 2
    ids = torch.randint(3, 100, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if pads:
        ids[1, :pads] = mask[1, :pads] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def _generate(model: Any, inputs: dict[str, torch.Tensor], new: int = NEW_TOKENS) -> Any:
    return model.generate(
        **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


def table() -> str:
    """The rows of all types, in Markdown."""
    lines = [
        "| type | cache | exact codes: largest logit difference | tokens | `high`: smaller"
        " | measured / expected bytes | what is different |",
        "|---|---|---|---|---|---|---|",
    ]
    for model_type in ZOO:
        row = measure(model_type)
        if row.refused:
            lines.append(f"| {model_type} | refused | | | | | {row.coverage.refused} |")
            continue
        share = f"{row.nbytes / row.expected:.2f}" if row.expected else ""
        lines.append(
            f"| {model_type} | {row.coverage.status} | {row.error:.1e} of {row.scale:.2g}"
            f" | {'same' if row.same_tokens else 'different'} | {row.ratio:.2f}x | {share}"
            f" | {row.coverage.reasons} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    versions = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
    sys.stdout.write(f"{versions}\n\n{table()}\n")
