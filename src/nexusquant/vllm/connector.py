"""vLLM's interface in front of `Planner` (the scheduler's side) and `Transfer` (the worker's).

Loads are asynchronous: vLLM keeps the request, and blocks for it, until all ranks report it, and
runs others meanwhile. Saves copy full blocks when the step's forward pass is over, and encode and
store the copies behind the next steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger

from nexusquant.errors import UnsupportedError
from nexusquant.stores import open_store
from nexusquant.vllm import keys, support
from nexusquant.vllm.codecs import make_codec
from nexusquant.vllm.counters import Counters
from nexusquant.vllm.guard import Guard
from nexusquant.vllm.layouts import find_layout
from nexusquant.vllm.lookup import Lookup
from nexusquant.vllm.metrics import NexusQuantPromMetrics, NexusQuantStats, take
from nexusquant.vllm.planner import Planner, Scheduled, Step
from nexusquant.vllm.settings import Settings
from nexusquant.vllm.transfer import Transfer

# Below "vllm.", which vLLM configures logging for.
logger = init_logger("vllm.nexusquant")


@dataclass
class StepMetadata(KVConnectorMetadata):
    """From the scheduler to the workers."""

    step: Step


@dataclass
class Unsaved(KVConnectorWorkerMetadata):
    """From the workers to the scheduler: blocks that the store did not take."""

    digests: set[bytes] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Unsaved:
        """Of all ranks."""
        assert isinstance(other, Unsaved)
        return Unsaved(self.digests | other.digests)


class NexusQuantConnector(KVConnectorBase_V1):
    """Compressed KV blocks in a store, for `--kv-transfer-config` (docs/guides/vllm.md).

    Raises:
        ConfigError: `kv_connector_extra_config` (see `Settings`), the store's URL.
        UnsupportedError: a model or configuration that it does not work with.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        support.check(vllm_config, kv_cache_config)
        transfer = self._kv_transfer_config
        self._settings = settings = Settings.read(transfer.kv_connector_extra_config)
        self._codec = make_codec(
            settings.codec, settings.codec_options, support.served(vllm_config)
        )
        self._namespace = support.namespace(vllm_config, settings, self._codec.identity())
        self._seed = self._namespace.seed()
        self._counters = Counters()
        self._guard = Guard(
            lambda: open_store(settings.store), self._counters, logger, settings.retry_seconds
        )
        self._guard.contains_many([])  # a URL that is wrong ends the start, a dead server does not
        if role is KVConnectorRole.SCHEDULER:
            flush = settings.wait_for_save
            self._lookup = Lookup(self._guard, self._namespace.shards(), self._counters, logger)
            self._planner = Planner(
                self._namespace.block_size,
                self._lookup.start,
                loads=transfer.is_kv_consumer,
                saves=transfer.is_kv_producer,
                flush=not transfer.is_kv_consumer if flush is None else flush,
                lookup_seconds=settings.lookup_seconds,
                retry_seconds=settings.retry_seconds,
            )
        else:
            self._transfer = Transfer(
                self._codec,
                self._guard,
                keys.shard(get_tp_group().rank_in_group, get_pp_group().rank_in_group),
                self._namespace.block_size,
                self._counters,
                logger,
                settings.threads,
                settings.queue_bytes,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that is not stored is a miss later, nothing more."""
        return False

    # The scheduler's side.

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that the store has beyond those that vLLM has; None while it is being asked."""
        self._add(request)
        if request.skip_reading_prefix_cache:
            return 0, False
        tokens = self._planner.matched(request.request_id, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note the blocks that are to be loaded."""
        self._add(request)
        self._planner.allocated(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """What the workers do in this step."""
        return StepMetadata(self._planner.step(_scheduled(scheduler_output)))

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers did."""
        self._planner.loaded(
            connector_output.finished_recving or (), connector_output.invalid_block_ids
        )
        unsaved = connector_output.kv_connector_worker_meta
        if isinstance(unsaved, Unsaved):
            self._planner.unsaved(unsaved.digests)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The blocks may go: what is saved of them was copied."""
        self._planner.finished(request.request_id)
        return False, None

    def _add(self, request: Any) -> None:
        if self._planner.knows(request.request_id):
            return
        tokens = request.prompt_token_ids
        plain = tokens is not None and not (
            request.lora_request or request.mm_features or request.prompt_embeds is not None
        )
        digests = (
            keys.chain(self._seed, tokens, self._namespace.block_size, request.cache_salt)
            if plain
            else []
        )
        self._planner.add(request.request_id, digests, request.num_prompt_tokens)

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find out how the attention backend keeps keys and values."""
        spec = support.spec(self._kv_cache_config)
        layers = self._vllm_config.compilation_config.static_forward_context
        caches, layouts, seen = [], [], set()
        for name in sorted(kv_caches, key=_by_number):
            cache = kv_caches[name]
            if cache.data_ptr() in seen:  # a layer that shares the cache of an earlier one
                continue
            seen.add(cache.data_ptr())
            if cache.shape[2] != self._namespace.block_size:
                raise UnsupportedError(
                    f"the attention backend has blocks of {cache.shape[2]} tokens, vLLM of"
                    f" {self._namespace.block_size}: set --block-size {cache.shape[2]}."
                )
            caches.append(cache)
            layouts.append(_layout(layers[name], cache, spec))
        self._transfer.register(caches, layouts)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin this step's loads."""
        for load in self._step().loads:
            self._transfer.load(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no forward pass reads blocks that are being loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: blocks are saved with all layers."""

    def wait_for_save(self) -> None:
        """Copy this step's full blocks; a producer also waits until a prompt's are stored."""
        step = self._step()
        if step.saves:
            self._transfer.save(step.saves)
        if step.flush:
            self._transfer.flush()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads are over."""
        finished, self._failed = self._transfer.finished(self._step().idle)
        return None, finished or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of these requests that vLLM has to compute."""
        failed, self._failed = self._failed, set()
        return failed

    def build_connector_worker_meta(self) -> Unsaved | None:
        """What the store did not take."""
        unsaved = self._transfer.unsaved()
        return Unsaved(unsaved) if unsaved else None

    def _step(self) -> Step:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.step

    # Both sides.

    def shutdown(self) -> None:
        """Finish what is being saved."""
        if self.role is KVConnectorRole.SCHEDULER:
            self._lookup.close()
            self._guard.close()
        else:
            self._transfer.close()

    def get_kv_connector_stats(self) -> NexusQuantStats | None:
        """What was counted since the last call."""
        return take(self._counters)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> NexusQuantStats:
        """From what another process counted."""
        return NexusQuantStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> NexusQuantPromMetrics:
        """Counters for /metrics."""
        return NexusQuantPromMetrics(*args)


def _scheduled(output: Any) -> Iterator[Scheduled]:
    """The requests of a step, from vLLM's `SchedulerOutput`."""
    tokens = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        yield Scheduled(
            new.req_id, new.block_ids[0], True, new.num_computed_tokens, tokens[new.req_id]
        )
    cached = output.scheduled_cached_reqs
    for request, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        ids = blocks[0] if blocks else []
        yield Scheduled(request, ids, request in cached.resumed_req_ids, computed, tokens[request])


def _by_number(name: str) -> list[int]:
    """Layers in the order of the model."""
    return [int(part) for part in name.split(".") if part.isdigit()]


def _layout(layer: Any, cache: torch.Tensor, spec: Any) -> Any:
    write = getattr(layer.impl, "do_kv_cache_update", None)
    if write is None:
        raise UnsupportedError(
            f"the attention backend {type(layer.impl).__name__} writes its KV cache in the forward"
            " pass; choose another one (--attention-backend)."
        )
    return find_layout(
        lambda k, v, scratch, slots: write(layer, k, v, scratch, slots),
        cache,
        spec.head_size,
        spec.head_size_v,
    )
