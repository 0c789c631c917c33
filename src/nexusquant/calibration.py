"""Building a profile from text: what the first long prompt does by itself, over more of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nexusquant.config import CompressionConfig
from nexusquant.entropy.profile import StoreProfile
from nexusquant.errors import ConfigError
from nexusquant.hf.automatic import automatic_profile, remember_tokenizer
from nexusquant.hf.cache import checked_model, text_config
from nexusquant.hf.collecting import Collector, show
from nexusquant.hf.context import outside_blocks
from nexusquant.hf.fingerprint import forget
from nexusquant.hf.profiles import remember_profile
from nexusquant.hf.store_profiles import (
    StoreCollector,
    find_store_profile,
    remember_store_profile,
    save_store_profile,
)
from nexusquant.profile import Profile
from nexusquant.statistics import MIN_DISTINCT, MIN_TOKENS


@torch.no_grad()
def calibrate(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    tokens: int = 2048,
    pieces: int = 8,
    rope_page: int = CompressionConfig.rope_page,
    source: str = "text",
    report: Callable[[str], None] = lambda step: None,
) -> Profile:
    """The profile of a model from texts, in force for its caches from now on.

    Each text is cut into pieces of `tokens` tokens, and pieces are taken in turn from all texts
    until there are `pieces` of them; each counts the same. `save_profile` keeps the result.

    Args:
        rope_page: key frame, as in `CompressionConfig`.
        source: a word on where the texts come from, kept in the profile.
        report: called with a line of text as each piece starts.

    Raises:
        ConfigError: no text has `MIN_TOKENS` tokens, all have fewer than `MIN_DISTINCT` different
            ones, or an argument is out of range.
        UnsupportedError: a model that cannot have a compressed cache.

    Example:
        >>> from nexusquant import calibrate
        >>> profile = calibrate(model, tokenizer, [text], pieces=2)  # some thousand words
        >>> len(profile.layers) == model.config.num_hidden_layers
        True
    """
    model = checked_model(model)
    collector = Collector(model, rope_page)
    total = _collect(model, tokenizer, texts, collector, tokens, pieces, report)
    profile = collector.profile_of(model, source, total)
    remember_profile(model, profile)
    return profile


@torch.no_grad()
def calibrate_store(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    tokens: int = 2048,
    pieces: int = 8,
    source: str = "text",
    report: Callable[[str], None] = lambda step: None,
) -> StoreProfile:
    """The storage profile of a model from texts, in force for `save` and `load` from now on.

    Arguments and errors are those of `calibrate`. `save_store_profile` keeps the result.

    Example:
        >>> from nexusquant import calibrate_store
        >>> profile = calibrate_store(model, tokenizer, [text], pieces=1)
        >>> len(profile.layers) == model.config.num_hidden_layers
        True
    """
    model = checked_model(model)
    collector = StoreCollector(model, pieces)
    total = _collect(model, tokenizer, texts, collector, tokens, pieces, report)
    profile = collector.store_profile_of(model, source, total, report)
    remember_store_profile(model, profile)
    return profile


def _collect(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    collector: Collector,
    tokens: int,
    pieces: int,
    report: Callable[[str], None],
) -> int:
    """Show pieces of the texts to the collector; returns their tokens."""
    forget(model)
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ConfigError(f"texts must be a list of texts, got {type(texts).__name__}.")
    _need("pieces", pieces, 1)
    _need("tokens", tokens, MIN_TOKENS)
    limit = getattr(text_config(model), "max_position_embeddings", None) or tokens
    length = min(tokens, limit)
    if length < MIN_TOKENS:
        raise ConfigError(
            f"this model takes {limit} tokens at most, but a profile needs {MIN_TOKENS} at a time."
        )
    chosen = _pieces(tokenizer, texts, length, pieces)
    distinct = len(torch.cat(chosen, 1).unique())
    if distinct < MIN_DISTINCT:
        raise ConfigError(
            f"the texts have {distinct} different tokens, too few to tell directions apart; give"
            f" text with {MIN_DISTINCT} at least."
        )
    return show(model, chosen, collector, report)


def _need(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r}: must be an integer of at least {least}.")


def ensure_profile(
    model: Any,
    tokenizer: Any,
    *,
    rope_page: int = CompressionConfig.rope_page,
    report: Callable[[str], None] = lambda step: None,
) -> Profile | None:
    """The profile that caches of `model` use by default, before anything is timed or measured.

    None if the model cannot be calibrated, with a warning.
    """
    model = checked_model(model)
    remember_tokenizer(model, tokenizer)
    return automatic_profile(model, rope_page, report)


def ensure_store_profile(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    report: Callable[[str], None] = lambda step: None,
) -> StoreProfile:
    """The storage profile of `model`, built from `text` and kept if there is none yet.

    Raises:
        ConfigError, ProfileError: as `calibrate_store` and `save_store_profile` do.
    """
    known = find_store_profile(model)
    if known is None:
        report("building a storage profile, once (nexusquant calibrate --store)")
        source = "Python language reference"
        known = calibrate_store(model, tokenizer, [text], source=source, report=report)
        save_store_profile(known)
    return known


def _pieces(tokenizer: Any, texts: Iterable[str], tokens: int, count: int) -> list[Tensor]:
    """Up to `count` pieces (1, n), one of each text in turn."""
    queues = [
        [
            piece
            for piece in _ids(tokenizer, text).split(tokens, dim=1)
            if piece.shape[1] >= MIN_TOKENS
        ]
        for text in texts
    ]
    chosen: list[Tensor] = []
    for rank in range(max(map(len, queues), default=0)):
        chosen += [queue[rank] for queue in queues if rank < len(queue)]
    if not chosen:
        raise ConfigError(
            f"none of the {len(queues)} texts has {MIN_TOKENS} tokens, which a profile needs."
        )
    return chosen[:count]


def _ids(tokenizer: Any, text: str) -> Tensor:
    if not isinstance(text, str):
        raise ConfigError(f"texts must be strings, got {type(text).__name__}.")
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    return ids


@torch.no_grad()
def own_text(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int = 2048,
    pieces: int = 4,
    seed: int = 0,
    report: Callable[[str], None] = lambda step: None,
) -> list[str]:
    """Text that the model samples by itself, for calibration without any data.

    Reproducible: sampling runs under its own seed and leaves the global generator as it was.

    Raises:
        ConfigError: an argument out of range, or a tokenizer without a token to start from.
    """
    _need("pieces", pieces, 1)
    _need("tokens", tokens, 1)
    limit = getattr(text_config(model), "max_position_embeddings", None) or tokens + 1
    tokens = min(tokens, limit - 1)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise ConfigError("this tokenizer has no begin or end token to start from: give --text.")
    texts = []
    devices = [model.device] if model.device.type == "cuda" else []
    with outside_blocks(model), torch.random.fork_rng(devices=devices):
        for index in range(pieces):
            report(f"sampling text {index + 1} of {pieces}")
            torch.manual_seed(seed + index)
            start = torch.full((1, 1), begin, device=model.device)
            out = model.generate(
                start, attention_mask=torch.ones_like(start), do_sample=True, top_k=50,
                temperature=1.0, min_new_tokens=tokens, max_new_tokens=tokens,
                pad_token_id=begin,
            )  # fmt: skip
            texts.append(str(tokenizer.decode(out[0], skip_special_tokens=True)))
    return texts
