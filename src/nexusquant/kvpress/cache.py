"""`PressedCache`: a press prunes the prompt with its own hooks, the rest is stored in codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nexusquant.config import CompressionConfig
from nexusquant.errors import UnsupportedError
from nexusquant.hf.cache import NexusCache
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.profiles import ProfileLike
from nexusquant.hf.tail import Call
from nexusquant.kvpress.choice import chosen
from nexusquant.scorers import ScoreInputs, checked_scores, get_scorer


class PressedCache(NexusCache):
    """A compressed cache for use under a kvpress press, which decides what of the prompt stays.

    Every full-attention layer leaves a prompt uncoded until the press's own hook has pruned it,
    right behind the layer's attention, and then stores in codes what is left. Positions stay those
    of the whole prompt, so `generate` goes on as if nothing had been pruned. Presses that keep
    another number of tokens in every layer, or (by masking, as AdaKV does) in every head, work,
    too. Importance among the tokens that stay, for the tiers, is up to `scorer`.

    Args:
        model: the causal LM that will use it.
        quality: a preset or a `CompressionConfig`, as for `NexusCache`.
        profile: as for `NexusCache`.
        **overrides: fields of `CompressionConfig`. `evict_ratio`, 0 unless given, is for prompts
            that no press prunes.

    Raises:
        ConfigError, ProfileError, UnsupportedError: as `NexusCache`. During the forward pass,
            UnsupportedError for a press that changes keys or values instead of choosing tokens
            (KeyRerotationPress, CAMPress), that prunes twice (ComposedPress), that drops every
            token of a layer, whose heads' mean number of tokens is no integer or differs between
            batch rows, and for batches with padding.

    Example:
        With `press = kvpress.SnapKVPress(compression_ratio=0.5)` instead of a context that does
        nothing:

        >>> from contextlib import nullcontext as press
        >>> from nexusquant.kvpress import PressedCache
        >>> cache = PressedCache(model, quality="high")
        >>> with press(model):
        ...     output = model.generate(input_ids, cache=cache, max_new_tokens=8)
        >>> cache.get_seq_length() == output.shape[1] - 1
        True
    """

    def __init__(
        self,
        model: nn.Module,
        quality: str | CompressionConfig = "balanced",
        *,
        profile: ProfileLike = None,
        **overrides: Any,
    ) -> None:
        if not isinstance(quality, CompressionConfig):
            overrides = {"evict_ratio": 0.0, **overrides}
        super().__init__(model, quality, profile=profile, **overrides)
        layers: list[Any] = list(vars(self)["layers"])
        self.layers = [_PressedLayer.of(x) if type(x) is CompactLayer else x for x in layers]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `DynamicCache.update`; prompts that no press came for are compressed before."""
        if getattr(self.layers[layer_idx], "deferred", None) is not None:
            for layer in self.layers:
                if isinstance(layer, _PressedLayer):
                    layer.finish()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class _PressedLayer(CompactLayer):
    """Holds a prompt until a press assigns the keys and values that it leaves."""

    given: Tensor | None = None  # keys that a press left; its values come next
    pressed = False  # in the latest forward pass

    @classmethod
    def of(cls, layer: CompactLayer) -> _PressedLayer:
        """An empty layer like `layer`."""
        new = cls(layer.config, layer.layer_idx, layer.notices)
        new.book, new.lease, new.profiles = layer.book, layer.lease, layer.profiles
        return new

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As before; what a press has left is final now."""
        self.pressed = False
        return super().update(*args, **kwargs)

    def finish(self) -> None:
        """Compress a prompt that no press came for."""
        if not self.record_past:
            self.crop(0)

    def absorb(self, call: Call) -> None:
        """Let the first prompt wait for a press."""
        recording = self.record_past
        self.record_past = recording or call.query.shape[2] == self.length
        try:
            super().absorb(call)
        finally:
            self.record_past = recording

    def _read(self, which: int) -> Tensor | None:
        # A waiting prompt is a plain tensor; reading it must not count as the model's reading.
        if self.deferred is not None and self.tail is not None:
            return (self.tail.keys, self.tail.values)[which]
        if self.pressed:
            self._refuse()
        return self._peek(which)

    def _take_keys(self, keys: Tensor | None) -> None:
        self.given = keys

    def _take_values(self, values: Tensor | None) -> None:
        keys, self.given = self.given, None
        if keys is None or values is None or not getattr(self, "is_initialized", False):
            return  # transformers initialises both to None
        if self.deferred is None or self.tail is None:
            self._refuse()
        if self.deferred.valid is not None:
            raise UnsupportedError(
                "presses know no padding: use rows of the same length, without padding."
            )
        kept = chosen(self.tail.keys, self.tail.values, keys, values, self.layer_idx)
        self._drop(kept & ~self._masked(kept))
        self.pressed = True

    def _refuse(self) -> NoReturn:
        raise UnsupportedError(
            f"layer {self.layer_idx} is compressed already, so no press can prune it: only presses"
            " that prune once, right behind the attention over the prompt, work."
        )

    keys = property(lambda self: self._read(0), _take_keys)
    values = property(lambda self: self._read(1), _take_values)

    def _masked(self, like: Tensor) -> Tensor:
        """(batch, kv_heads, tokens) bool: what the press wants to be hidden from attention."""
        masked = torch.zeros_like(like)
        model = self.lease.model if self.lease is not None else None
        modules: Iterable[Any] = model.modules() if model is not None else ()
        for module in modules:
            hidden = getattr(module, "masked_key_indices", None)
            if hidden is not None and getattr(module, "layer_idx", None) == self.layer_idx:
                masked[tuple(index.to(masked.device) for index in hidden)] = True
                # These tokens will be gone, so there is nothing left for kvpress to hide.
                module.masked_key_indices = None
        return masked

    def _drop(self, kept: Tensor) -> None:
        """Compress the waiting prompt, less what is not in `kept` (batch, kv_heads, tokens)."""
        tail, call, config = self.tail, self.deferred, self.config
        assert tail is not None
        assert call is not None
        heads, tokens = kept.shape[1:]
        rows = kept.sum((1, 2)).tolist()
        if rows[0] == heads * tokens == min(rows):
            self.crop(0)
            return
        if self.exact or tokens < config.least_scored:
            raise UnsupportedError(
                f"layer {self.layer_idx} holds {tokens} tokens that cannot be coded, so none can"
                f" be pruned: give prompts of at least {config.least_scored} tokens"
                " (`recent`, `residual_length`) and heads whose dimension is a multiple of 8."
            )
        if not rows[0] or min(rows) != max(rows) or rows[0] % heads:
            raise UnsupportedError(
                f"a press left {rows} entries of layer {self.layer_idx} (one number per batch row,"
                f" over {heads} KV heads): it must be the same multiple of {heads} in every row,"
                " and not 0."
            )
        inputs = ScoreInputs(
            call.query, tail.keys, tail.values, None, call.scaling, call.softcap, config.sinks,
            seed=config.seed, layer_idx=self.layer_idx,
        )  # fmt: skip
        scores = get_scorer(config.scorer).score(inputs)
        scores = checked_scores(scores, inputs, config.scorer)
        scores = scores / scores.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        everywhere = kept.all(1).all(0)  # sinks are what all heads have, from the start on
        sinks = min(int(everywhere.long().cumprod(0).sum()), config.sinks)
        uneven = kept.sum(-1)
        # "kvzip" takes the scores as they come; those that stay are all above those that go.
        self.deferred = replace(call, received=scores + 4.0 * kept)
        self.config = config.replace(
            scorer="kvzip", evict_ratio=1 - rows[0] / (heads * tokens), sinks=sinks, recent=0,
            per_head=True, head_safeguard=1.0 if bool((uneven == uneven[0, 0]).all()) else 1e-9,
        )  # fmt: skip
        try:
            self.crop(0)
        finally:
            self.config = config
