"""Which configurations of vLLM the connector works with: the others are refused when it starts."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from nexusquant.errors import ConfigError, UnsupportedError
from nexusquant.vllm.identity import identity
from nexusquant.vllm.keys import Namespace
from nexusquant.vllm.profiles import Served
from nexusquant.vllm.settings import Settings


def check(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse what blocks of keys and values alone do not carry, or what is not tested.

    Raises:
        UnsupportedError: says what of the configuration it is.
        ConfigError: loads that fail would end requests.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise UnsupportedError("context parallelism splits blocks: run without it.")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise UnsupportedError(
            f"speculative decoding with {speculative.method} keeps keys and values of its own: run"
            ' without it, or with "ngram".'
        )
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if cache.cache_dtype not in ("auto", dtype):
        raise UnsupportedError(
            f"--kv-cache-dtype {cache.cache_dtype}: the KV cache must have the model's dtype."
        )
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedError(
            f"the model has {len(groups)} groups of KV caches (hybrid or sliding-window layers);"
            " only models whose layers all have full attention are supported."
        )
    spec(kv_cache_config)
    transfer = vllm_config.kv_transfer_config
    if transfer.is_kv_consumer and transfer.kv_load_failure_policy != "recompute":
        raise ConfigError(
            'add "kv_load_failure_policy": "recompute" to --kv-transfer-config: with'
            f' "{transfer.kv_load_failure_policy}" a block that cannot be loaded ends its request.'
        )


def spec(kv_cache_config: Any) -> AttentionSpec:
    """What vLLM says of the layers' caches.

    Raises:
        UnsupportedError: they are not plain keys and values of full attention.
    """
    found = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    if type(found) is not FullAttentionSpec or found.kv_quant_mode.name != "NONE":
        raise UnsupportedError(
            f"a KV cache of {type(found).__name__} (latents, windows, states or quantized): only"
            " keys and values of full attention, in the model's dtype, are supported."
        )
    return found


def namespace(vllm_config: Any, settings: Settings, codec: dict[str, Any]) -> Namespace:
    """What the blocks of this server depend on besides tokens."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    told = identity(model.model, model.revision, model.hf_config, model.quantization)
    if settings.model is not None:
        told = {"config": told["config"], "named": settings.model}
    return Namespace(
        model=told,
        dtype=str(model.dtype).removeprefix("torch."),
        cache_dtype=vllm_config.cache_config.cache_dtype,
        block_size=vllm_config.cache_config.block_size,
        codec=codec,
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
    )


def served(vllm_config: Any) -> Served:
    """What codecs may ask about the model."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return Served(
        model=model.model,
        config=model.hf_config,
        revision=model.revision,
        download_dir=vllm_config.load_config.download_dir,
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
    )
