"""What is compressed of which model, told from its config alone: the one table of model types.

Every decoder that transformers can build is covered by a rule or by an entry of a table below; the
tests build each type and compare. A type that is nowhere here goes by the rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache

from nexusquant.hf.refusals import refusal_of
from nexusquant.hf.transformers_private import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    STOCK_HYBRID,
    STOCK_HYBRID_SLIDING,
    STOCK_LINEAR,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    up_to,
)
from nexusquant.math.e8 import GROUP

CODES = "attention on codes"
DECODED = "decoded for each pass"
WHOLE = "decoded for each pass, nothing evicted"
KEPT = "attention on codes, nothing evicted"
EXACT = "exact"
STATE = "state, exact"
NOTHING = "keeps nothing"

_MULTIPLIES = "the model multiplies queries, keys and values itself"
_LATENTS = "the model keeps latents (MLA) and expands them for attention"
_BIAS = "the model adds a position bias of its own"

_TREATMENT: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            "big_bird", "bloom", "codegen", "cpmant", "git", "gpt_neo", "gpt_neox_japanese", "gptj",
            "megatron-bert", "mpt", "mvp", "rembert", "roformer", "trocr", "xglm",
        ),
        (DECODED, _MULTIPLIES),
    ),
    **dict.fromkeys(
        (
            "axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "dots3_note", "dots3_note_text",
            "glm4_moe_lite", "kimi_linear", "longcat_flash", "minicpm3", "sarvam_mla", "youtu",
        ),
        (WHOLE, _LATENTS),
    ),
    "diffllama": (WHOLE, "the model splits and repeats its values"),
    "doge": (KEPT, "the model computes its masks from all values"),
    "jetmoe": (WHOLE, "the model repeats keys and values for its experts"),
    "prophetnet": (WHOLE, "the model predicts several tokens from one set of keys"),
    **dict.fromkeys(("inkling_text", "inkling2_text", "inkling2_loop_text"), (EXACT, _BIAS)),
}  # fmt: skip
"""Model type to what becomes of its attention layers, where that is not "attention on codes"."""
if not up_to("5.23.99"):  # which rewrote them
    for _name in ("codegen", "gptj"):
        del _TREATMENT[_name]

_NOTES: dict[str, str] = {
    "DynamicIndexedLayer": "attention looks tokens up by index",
    "DeepseekV4CSACache": "the model compresses its cache itself",
    "DeepseekV4HCACache": "the model compresses its cache itself",
    "MiniMaxM3VLSparseCacheLayer": "attention looks tokens up by block",
}


_UNFIT = (StrictDataclassError, AttributeError, ImportError, KeyError, TypeError, ValueError)
"""What transformers raises for configs that lack something, contradict themselves or need a package
that is not there."""


@dataclass(frozen=True)
class LayerCoverage:
    """One layer of a cache.

    Attributes:
        kind: "full", "sliding", "state", "state and full", "state and sliding" or another class.
        treatment: one of this module's constants.
        reason: why it is not `CODES`, else "".
        kv_heads, key_dim, value_dim: what a token takes; 0 if that is unknown.
        window: tokens that a sliding layer holds, None without a limit.
    """

    kind: str
    treatment: str
    reason: str = ""
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int | None = None

    @property
    def elements(self) -> int:
        """Of K and V, per token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class Coverage:
    """What is compressed of a model.

    Attributes:
        model_type: as transformers names it.
        layers: of its cache; none if it is refused.
        refused: why no cache of it can be compressed, else "".
        positions: most that the model was made for, if the config says.
    """

    model_type: str
    layers: tuple[LayerCoverage, ...]
    refused: str = ""
    positions: int | None = None

    @property
    def status(self) -> str:
        """ "compressed", "compressed except some layers", "exact" or "refused"."""
        if self.refused:
            return "refused"
        holding = [x for x in self.layers if x.treatment not in (STATE, NOTHING)]
        coded = [x for x in holding if x.treatment != EXACT]
        if not coded:
            return "exact"
        return "compressed" if len(coded) == len(holding) else "compressed except some layers"

    @property
    def reasons(self) -> str:
        """Everything that is not attention on codes, in a line."""
        if self.refused:
            return self.refused
        found: dict[str, int] = {}
        for layer in self.layers:
            if layer.reason:
                text = f"{layer.treatment}: {layer.reason}"
                found[text] = found.get(text, 0) + 1
        total = len(self.layers)
        return "; ".join(
            text if count == total else f"{text} ({count} of {total} layers)"
            for text, count in found.items()
        )


def cover(config: Any) -> Coverage:
    """What is compressed of a model with this config, without building it.

    Args:
        config: a transformers `PreTrainedConfig`. One that transformers cannot make a cache from is
            refused.
    """
    try:
        refused = refusal_of(config)  # first: models, once imported, register layers of their own
        text = config.get_text_config(decoder=True)
        stock = DynamicCache(config=text).layers
    except _UNFIT as error:
        reason = f"cannot be told from its config ({_first_line(error)})"
        return Coverage(config.model_type, (), reason)
    positions = getattr(text, "max_position_embeddings", None)
    if refused:
        return Coverage(config.model_type, (), refused, positions)
    own = getattr(text, "per_layer_config", None)
    crossed = cross_attention(config)
    layers = tuple(
        LayerCoverage("cross", EXACT, "cross-attention")
        if i in crossed
        else _layer(stock[i], config.model_type, text.model_type, own[i] if own else text)
        for i in (*range(len(stock)), *_looped(text))
    )
    return Coverage(config.model_type, layers, "", positions)


def cover_types() -> dict[str, Coverage]:
    """Every causal LM type of the installed transformers, by its default config.

    Types without a usable default config are refused with that reason.
    """
    return {name: _by_default(name) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}


def _by_default(model_type: str) -> Coverage:
    try:
        config = CONFIG_MAPPING[model_type]()
    except _UNFIT as error:
        reason = f"has no default config to tell from ({_first_line(error)})"
        return Coverage(model_type, (), reason)
    return cover(config)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), repr(error))


def cross_attention(config: Any) -> tuple[int, ...]:
    """Layers of the cache that are about something else than the text (Mllama)."""
    text = config.get_text_config(decoder=True)
    return tuple(getattr(text, "cross_attention_layers", None) or ())


def _looped(config: Any) -> list[int]:
    """Layers that a model goes through again (Dory, Inkling 2): it appends another of each to its
    cache for every further loop, in this order."""
    if getattr(config, "recurrent_kv_cache_mode", "") == "per_loop":
        first, count, loops = (
            config.n_input_layers,
            config.n_recurrent_layers,
            config.n_recurrent_loops,
        )
    elif hasattr(config, "loop_num_passes"):
        first, loops = config.loop_layer_index_start, config.loop_num_passes
        count = config.loop_layer_index_end - first
    else:
        return []
    return [*range(first, first + count)] * (loops - 1)


_KINDS: tuple[tuple[Any, str], ...] = (
    (DynamicLayer, "full"),
    (DynamicSlidingWindowLayer, "sliding"),
    (STOCK_LINEAR, "state"),
    (STOCK_HYBRID, "state and full"),
    (STOCK_HYBRID_SLIDING, "state and sliding"),
)


def _layer(stock: Any, model_type: str, text_type: str, config: Any) -> LayerCoverage:
    name = type(stock).__name__
    kind = next((kind for known, kind in _KINDS if type(stock) is known), name)
    if kind == "state":
        return LayerCoverage(kind, STATE, "linear attention or convolution: a state of fixed size")
    if name == "DummyLayer":
        return LayerCoverage(kind, NOTHING, "uses another layer's keys and values, or none")
    window = getattr(stock, "sliding_window", None)
    heads, key_dim, value_dim = _shape(config, window is not None)
    shape: dict[str, Any] = {
        "kv_heads": heads,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "window": window,
    }
    if kind == name:
        reason = _NOTES.get(name, "transformers keeps it in a form of its own")
        return LayerCoverage(kind, EXACT, reason, **shape)
    if key_dim % GROUP or value_dim % GROUP:
        return LayerCoverage(kind, EXACT, f"head_dim {key_dim} is no multiple of {GROUP}", **shape)
    treatment, reason = _TREATMENT.get(model_type, _TREATMENT.get(text_type, (CODES, "")))
    return LayerCoverage(kind, treatment, reason, **shape)


def _shape(config: Any, sliding: bool) -> tuple[int, int, int]:
    """KV heads and the dimensions of keys and values, by the names that configs use."""

    def first(*names: str) -> int:
        values = (getattr(config, name, None) for name in names)
        return next((x for x in values if isinstance(x, int) and not isinstance(x, bool)), 0)

    latent = first("kv_lora_rank")
    if latent:
        return 1, latent, first("qk_rope_head_dim")
    heads = first(
        "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
        "decoder_attention_heads",
    )  # fmt: skip
    hidden = first("hidden_size", "n_embd", "d_model")
    kv_heads = first("num_key_value_heads", "num_kv_heads") or heads
    if sliding and getattr(config, "model_type", "") == "mimo_v2_flash":
        kv_heads *= 2
    if sliding and first("swa_num_key_value_heads"):  # Inkling
        return first("swa_num_key_value_heads"), first("swa_head_dim"), first("swa_head_dim")
    dim = first("head_dim", "kv_channels", "attention_head_dim") or hidden // max(heads, 1)
    if getattr(config, "new_decoder_architecture", False):
        kv_heads = heads  # Falcon repeats its KV heads before they are cached
    elif getattr(config, "multi_query", False):
        kv_heads = 1  # Falcon, GPT-BigCode
    return kv_heads, dim, first("v_head_dim") or dim
