"""A profile without being asked: a model is calibrated once, on text that the package brings along.

It holds nothing of any user, so it is kept in the user's cache directory, for every process.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from nexusquant.corpus import pieces
from nexusquant.errors import ConfigError, ProfileError
from nexusquant.hf.cache import text_config
from nexusquant.hf.collecting import Collector, show
from nexusquant.hf.context import outside_blocks
from nexusquant.hf.coverage import CODES, DECODED, KEPT, cover
from nexusquant.hf.notices import Notices
from nexusquant.hf.profiles import find_profile, remember_profile
from nexusquant.profile import Profile
from nexusquant.profile_store import save_profile
from nexusquant.statistics import MIN_DISTINCT, MIN_TOKENS

_logger = logging.getLogger(__name__)

SOURCE = "the package's own text"
SAMPLED = "text sampled by the model"
TOKENS = 512
"""Of every piece: kinds of text matter, not length (docs/results/2026-11-29-first-contact.md)."""
_ROWS = 6  # texts that a model without a tokenizer samples, side by side

_lock = threading.RLock()
_tokenizers: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_failed: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
"""Key frames that a model could not be calibrated in: it is not tried again for every cache."""
_notices = Notices()


def remember_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Calibrate `model` with this tokenizer; without, it is looked for beside the weights."""
    _tokenizers[model] = tokenizer
    _failed.pop(model, None)


def automatic_profile(
    model: Any, page: int, report: Callable[[str], None] | None = None
) -> Profile | None:
    """The profile that caches of a model use by default: known, stored, or calibrated now.

    None if it cannot be calibrated, with one warning, or if no layer would use one.

    Args:
        report: called with a line of text as each piece of text starts; default: one line in the
            log.
    """
    with _lock:
        known = find_profile(model, page)
        if known is not None and known.source != SAMPLED and not _outdated(known):
            return known
        if not {CODES, DECODED, KEPT} & {layer.treatment for layer in cover(model.config).layers}:
            return known  # all latents, or kept exact
        tokenizer = _tokenizer(model)
        if tokenizer is None and known is not None and not _outdated(known):
            return known
        if page in _failed.get(model, ()):
            return known
        try:
            return _calibrated(model, page, tokenizer, report)
        # A forward pass of somebody else's model runs here, remote code included: what it raises is
        # no closed list. Nothing is lost: its prompts build their profiles, as one reads here.
        except Exception as error:
            _failed.setdefault(model, set()).add(page)
            _notices.warn(
                f"{type(model).__name__} could not be calibrated ({error}): long prompts build"
                " their own profiles. nexusquant.calibrate(model, tokenizer, texts) does better."
            )
            return known


def _outdated(profile: Profile) -> bool:
    """Made by this package by itself, before it measured what it does now."""
    ranked = any(layer.rank_costs is not None for layer in profile.layers.values())
    return profile.source in (SOURCE, SAMPLED) and not ranked


def _calibrated(
    model: Any, page: int, tokenizer: Any, report: Callable[[str], None] | None
) -> Profile:
    began = time.perf_counter()
    if report is None:
        _logger.warning(
            "calibrating %s for compressed caches, once; `nexusquant calibrate` does it ahead",
            type(model).__name__,
        )
    chosen = _sampled(model) if tokenizer is None else _read(model, tokenizer)
    collector = Collector(model, page)
    said = (lambda step: None) if report is None else (lambda step: report(f"calibrating, {step}"))
    tokens = show(model, chosen, collector, said)
    profile = collector.profile_of(model, SAMPLED if tokenizer is None else SOURCE, tokens)
    remember_profile(model, profile)
    try:
        save_profile(profile)
    except ProfileError as error:
        _notices.warn(f"the profile cannot be kept, so every process calibrates anew: {error}")
    _logger.info("calibrated in %.1f s", time.perf_counter() - began)
    return profile


def _length(model: Any) -> int:
    """Tokens per piece.

    Raises:
        ConfigError: the model takes too few.
    """
    limit = getattr(text_config(model), "max_position_embeddings", None) or TOKENS
    if limit < MIN_TOKENS:
        raise ConfigError(f"it takes {limit} tokens at most, a profile needs {MIN_TOKENS}")
    return min(TOKENS, limit)


def _read(model: Any, tokenizer: Any) -> list[Tensor]:
    """The package's text, the first tokens of every kind."""
    length, found = _length(model), []
    for piece in pieces():
        text = piece.text
        if piece.messages and getattr(tokenizer, "chat_template", None):
            turns = [{"role": role, "content": said} for role, said in piece.messages]
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :length]
        if ids.shape[1] >= MIN_TOKENS:
            found.append(ids.long())
    if not found or len(torch.cat(found, 1).unique()) < MIN_DISTINCT:
        raise ConfigError("its tokenizer makes too few tokens of the package's text")
    return found


@torch.no_grad()
def _sampled(model: Any) -> list[Tensor]:
    """Text that the model writes itself behind random tokens: there is no tokenizer."""
    length, config = _length(model), text_config(model)
    devices = [model.device] if model.device.type == "cuda" else []
    with outside_blocks(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        start = torch.randint(config.vocab_size, (_ROWS, 1), device=model.device)
        out = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, temperature=1.0,
            min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=0,
        )  # fmt: skip
    return list(out.split(1))


def _tokenizer(model: Any) -> Any:
    """The one beside the weights or in the local hub cache; never the network."""
    if model in _tokenizers:
        return _tokenizers[model]
    name = getattr(model.config, "name_or_path", "") or ""
    if not name:
        return None
    try:
        found = AutoTokenizer.from_pretrained(name, local_files_only=True)
    # Readers of tokenizer files and remote code raise what they like (OSError, KeyError, ...), no
    # closed list. Nothing hangs on it: the model samples text instead, and the log says why.
    except Exception as error:
        _logger.info("no tokenizer for %s: %s", name, error)
        return None
    _tokenizers[model] = found
    return found
