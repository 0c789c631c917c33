"""`nexusquant_evict`: the one-liner. Every cache a model makes inside the block is compressed.

The model instance gets a forward pre-hook that swaps the layers of the empty `DynamicCache` about
to be used; `generate`, pipelines and plain forward calls keep their own objects. Nothing is patched
on classes, and two threads may run different settings on one model: each sees its own block, and a
thread that has none (a streaming worker started inside) sees the one entered last.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from nexusquant.config import CompressionConfig, resolve_config
from nexusquant.hf.cache import (
    attach,
    checked_model,
    compact_layers,
    compacted,
    plain_cache,
    text_config,
)
from nexusquant.hf.cache_names import cache_argument, given_cache, named_arguments
from nexusquant.hf.install import Installation, drop_copied_hooks
from nexusquant.hf.layer import CompactLayer
from nexusquant.hf.prepare import starters
from nexusquant.hf.profiles import ProfileLike
from nexusquant.hf.run import Run
from nexusquant.hf.scoring import Scoring, join, obstacle, run_chunks, too_short
from nexusquant.hf.uncompiled import uncompiled

_lock = threading.RLock()
_thread = threading.local()


# Runs entered by this thread or task, and all runs of a model for threads that entered none.
# None instead of a run: outside of all of them for a while.
_active: contextvars.ContextVar[tuple[tuple[int, Run | None], ...]] = contextvars.ContextVar(
    "nexusquant_active", default=()
)
_entered: weakref.WeakKeyDictionary[nn.Module, list[Run]] = weakref.WeakKeyDictionary()
_hooks: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()


def _current(model: nn.Module) -> Run | None:
    runs = _entered.get(model, [])
    mine = [run for owner, run in _active.get() if owner == id(model) and run in (None, *runs)]
    return mine[-1] if mine else runs[-1] if runs else None


@contextmanager
def outside_blocks(model: nn.Module) -> Iterator[None]:
    """What this thread runs meanwhile is not of any block: `calibrate` is nobody's generation.

    The model is in eval mode; afterwards, every module is in the mode that it was in.
    """
    token = _active.set((*_active.get(), (id(model), None)))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        _active.reset(token)


@uncompiled
def _before(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: make sure the cache that is about to be used is compact."""
    run = _current(model)
    if run is None:
        return None
    if model.training and torch.is_grad_enabled():
        run.notices.warn("training with gradients is left uncompressed; call model.eval() first.")
        return None
    _forget_scoring(model)  # an interrupted call leaves its state behind
    kwargs = named_arguments(model, args, kwargs)
    if kwargs.get("labels") is not None and (why := obstacle(model, kwargs)):
        run.notices.warn(f"labels are scored in one pass, against exact keys and values: {why}.")
    elif kwargs.get("labels") is not None and not too_short(kwargs, run.config.least_scored):
        scoring, kwargs = run_chunks(model, kwargs, run.config.least_scored)
        _scorings().append((id(model), scoring))
        return (), kwargs
    cache = given_cache(kwargs)
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(text_config(model), "use_cache", True)
    if cache is None and use_cache:
        cache = plain_cache(model)
        kwargs |= cache_argument(model, cache)
    if cache is not None:
        _compact(model, run, cache)
    return (), kwargs


def _compact(model: nn.Module, run: Run, cache: Any) -> None:
    layers = getattr(cache, "layers", ())
    if any(isinstance(layer, CompactLayer) for layer in layers):
        attach(cache, model)
        run.adopt(cache)
    elif cache in compacted:
        run.adopt(cache)
    elif type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        kind = "offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        run.notices.warn(
            f"{kind} is left uncompressed; use the default DynamicCache (no cache_implementation)."
        )
        run.adopt(cache)
    elif cache.get_seq_length() > 0:
        run.notices.warn(
            "a DynamicCache that already holds tokens is left uncompressed; start it inside the"
            " nexusquant_evict block or create a NexusCache."
        )
        run.adopt(cache)
    else:
        compact_layers(cache, model, run.config, run.notices, run.book(model))
        run.adopt(cache)


def _start(model: nn.Module, cache: Any) -> None:
    """`generate` is about to run the model with `cache`."""
    run = _current(model)
    if run is not None:
        _compact(model, run, cache)


starters.append(_start)


def _attach(model: nn.Module) -> list[Any]:
    """Hook a model; returns what has a `remove`."""
    drop_copied_hooks(model, _before, _after)
    return [
        model.register_forward_pre_hook(_before, with_kwargs=True),
        model.register_forward_hook(_after, with_kwargs=True, always_call=True),
    ]


def _scorings() -> list[tuple[int, Scoring]]:
    if not hasattr(_thread, "scorings"):
        _thread.scorings = []
    found: list[tuple[int, Scoring]] = _thread.scorings
    return found


def _forget_scoring(model: nn.Module) -> None:
    _thread.scorings = [entry for entry in _scorings() if entry[0] != id(model)]


@uncompiled
def _after(model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Forward hook, also after exceptions (output None): put the score together."""
    pending = _scorings()
    if pending and pending[-1][0] == id(model):
        _, scoring = pending.pop()
        return None if output is None else join(model, scoring, output)
    return None


@contextmanager
def nexusquant_evict(
    model: nn.Module,
    quality: str | CompressionConfig = "balanced",
    *,
    profile: ProfileLike = None,
    **overrides: Any,
) -> Iterator[Run]:
    """Compress every KV cache that `model` makes inside the block.

    Args:
        model: a transformers causal LM. It is not modified beyond hooks that leave with the block;
            caches made inside keep working afterwards.
        quality: "lossless", "high" (= "conservative"), "balanced", "max" (= "aggressive"), or a
            `CompressionConfig`.
        profile: where the model's profile comes from if it is neither known in this process nor
            stored in the user's cache directory. "auto" (default; `NEXUSQUANT_PROFILE` in the
            environment says otherwise): the model is calibrated now, on text of this package, and
            the profile stored. "first-prompt": a cache's first long prompt builds one while it is
            compressed, for that cache, in whose bytes it counts. "none": coded without. Or a
            profile, or its file.
        **overrides: fields of `CompressionConfig`.

    Yields:
        `Run`, whose `stats` give the measured size of the cache used last, `profile` its profile.

    Raises:
        ConfigError: unknown preset or field.
        ProfileError: a profile that is damaged or another model's.
        UnsupportedError: a model that cannot have a compressed cache.

    Example:
        >>> from nexusquant import nexusquant_evict
        >>> with nexusquant_evict(model, quality="balanced") as run:
        ...     output = model.generate(input_ids, max_new_tokens=8)
        >>> print(run.stats)
        0.0... MiB for ... tokens (... kept per head), ...x smaller than fp16, ... bits/element, ...
    """
    model = checked_model(model)
    config = resolve_config(quality, **overrides)
    run = Run(model, config, profile)
    installation = Installation(model)
    with _lock:
        runs = _entered.setdefault(model, [])
        if not runs:
            _hooks[model] = _attach(model)
        runs.append(run)
    _active.set((*_active.get(), (id(model), run)))
    try:
        yield run
    finally:
        _active.set(tuple(entry for entry in _active.get() if entry[1] is not run))
        with _lock:
            runs.remove(run)
            if not runs:
                for hook in _hooks.pop(model):
                    hook.remove()
                del _entered[model]
        _forget_scoring(model)
        installation.release()
        run.let_go()
