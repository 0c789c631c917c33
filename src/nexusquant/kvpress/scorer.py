"""`PressScorer`: the scores of a press, for our cache."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nexusquant.errors import ConfigError, UnsupportedError
from nexusquant.hf.cache import checked_model
from nexusquant.hf.quirks import attention_modules
from nexusquant.scorers import ScoreInputs


class _Seen(threading.local):
    """The attention module that this thread is in, and what it was called with."""

    call: tuple[nn.Module, dict[str, Any]] | None = None


_seen = _Seen()
_turning = threading.RLock()


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of attention modules."""
    _seen.call = module, ({"hidden_states": args[0], **kwargs} if args else kwargs)


def _leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Forward hook of attention modules, also after exceptions."""
    _seen.call = None


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


class PressScorer:
    """A kvpress scorer press as a scorer of ours: the press says how important a token is.

    How many are kept, `sinks` and `recent` are up to the cache's config and not the press: with
    `evict_ratio=press.compression_ratio, sinks=0, recent=0` the tokens kept are those that the
    press would keep (but one, where kvpress rounds down). Every forward pass over at least
    `residual_length` and `recent` tokens is scored, not the first one only.

    Args:
        press: anything with kvpress's `score(module, hidden_states, keys, values, attentions,
            kwargs)`. Its `post_init_from_model` is called here.
        model: the causal LM whose caches will use it. Its attention modules get hooks that remember
            their arguments while they run, as long as this scorer exists.

    Raises:
        ConfigError: no press that scores.
        UnsupportedError: a model without attention modules to watch.

    Example:
        With `press = kvpress.SnapKVPress()` instead of a class of our own:

        >>> from nexusquant import NexusCache, register_scorer
        >>> from nexusquant.kvpress import PressScorer
        >>> class Press:
        ...     def score(self, module, hidden_states, keys, values, attentions, kwargs):
        ...         return -keys.norm(dim=-1)
        >>> press = Press()
        >>> register_scorer("press", PressScorer(press, model))
        >>> cache = NexusCache(model, "balanced", scorer="press")
        >>> output = model.generate(input_ids, cache=cache, max_new_tokens=8)
    """

    def __init__(self, press: Any, model: nn.Module) -> None:
        if isinstance(press, type) or not callable(getattr(press, "score", None)):
            raise ConfigError(
                f"a press must be an object with a method score (a kvpress ScorerPress), got"
                f" {press!r}. Presses that only prune work with PressedCache."
            )
        model = checked_model(model)
        modules = [module for _, module in attention_modules(model)]
        if not modules:
            raise UnsupportedError(
                f"{type(model).__name__} has no attention modules that know their layer, which"
                " presses ask for."
            )
        getattr(press, "post_init_from_model", lambda model: None)(model)
        self.press = press
        self._modules = weakref.WeakSet(modules)
        named = dict(model.named_modules())
        name = next((x for x in named if x.rpartition(".")[2] == "rotary_emb"), None)
        self._rotary = weakref.ref(named[name]) if name is not None else lambda: None
        hooks = [
            hook
            for module in modules
            for hook in (
                module.register_forward_pre_hook(_enter, with_kwargs=True),
                module.register_forward_hook(_leave, with_kwargs=True, always_call=True),
            )
        ]
        weakref.finalize(self, _remove, hooks).atexit = False

    @torch.no_grad()
    def score(self, inputs: ScoreInputs) -> Tensor:
        """`(batch, kv_heads, tokens)`, the press's.

        Raises:
            UnsupportedError: padding; a press that refuses the forward pass, as one that is shorter
                than its window, or that needs attention weights (they never exist here); scores
                asked for outside of the model's attention, as in assisted decoding, or by a cache
                of another model.
        """
        name = type(self.press).__name__
        if _seen.call is None or _seen.call[0] not in self._modules:
            raise UnsupportedError(
                f"{name} can only score while an attention module of its model runs: not in"
                " assisted decoding, on bare tensors or for another model's cache."
            )
        if inputs.valid is not None:
            raise UnsupportedError(
                f"{name} knows no padding: use rows of the same length, without padding, or a"
                " scorer of nexusquant."
            )
        module, kwargs = _seen.call
        tokens = min(kwargs["hidden_states"].shape[1], inputs.keys.shape[2])
        last = {**kwargs, "hidden_states": kwargs["hidden_states"][:, -tokens:]}
        rows = kwargs.get("position_embeddings")
        if rows is not None:
            last["position_embeddings"] = tuple(x[:, -tokens:] for x in rows)
        try:
            with self._turned(module, kwargs.get("position_ids"), tokens):
                scores: Tensor = self.press.score(
                    module, last["hidden_states"], inputs.keys, inputs.values, None, last
                )
        # How presses refuse: they assert that a pass is longer than their window, and those that
        # need what never exists here are not implemented. The cause stays attached.
        except (AssertionError, NotImplementedError) as error:
            raise UnsupportedError(
                f"{name} cannot score {inputs.keys.shape[2]} tokens, {tokens} of them new: {error}."
                " Shorter forward passes are not scored if `recent` and residual_length say so."
            ) from error
        return scores

    @contextmanager
    def _turned(self, module: nn.Module, positions: Any, tokens: int) -> Iterator[None]:
        """`module.rotary_emb` as kvpress's own hooks provide it, but from where the pass begins.

        Presses count positions from 0, as they score first passes only.
        """
        rotary = self._rotary()
        if rotary is None:
            yield
            return
        known = isinstance(positions, Tensor) and positions.numel()
        first = int(positions.max()) + 1 - tokens if known else 0

        def ahead(x: Tensor, at: Tensor, *args: Any, **kwargs: Any) -> Any:
            return rotary(x, at + first, *args, **kwargs)

        mine = vars(module)  # before the submodules, and gone without a trace
        with _turning:
            mine["rotary_emb"] = ahead
            try:
                yield
            finally:
                del mine["rotary_emb"]
