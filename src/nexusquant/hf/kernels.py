"""Which kernels a model's cache needs, from its config."""

from __future__ import annotations

from typing import Any

from nexusquant.hf.coverage import CODES, KEPT, cover


def query_groups(config: Any) -> list[int] | None:
    """Query heads per KV head, of every kind of layer that attends to codes.

    Args:
        config: a transformers `PreTrainedConfig`.

    Returns:
        Different numbers, ascending; None if the config does not say.
    """
    heads = getattr(config.get_text_config(decoder=True), "num_attention_heads", None)
    layers = [x for x in cover(config).layers if x.treatment in (CODES, KEPT)]
    counts = {x.kv_heads for x in layers}
    if not isinstance(heads, int) or any(n < 1 or heads % n for n in counts):
        return None
    return sorted({heads // n for n in counts})
