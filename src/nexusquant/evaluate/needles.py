"""What a compressed cache still finds: codes hidden at several depths of prefixes of any length."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch

from nexusquant.evaluate.base import DEFAULT_PRESETS, Quality
from nexusquant.evaluate.haystacks import NeedlePrompt, needle_prompts
from nexusquant.hf.cache import NexusCache, cache_stats, plain_cache
from nexusquant.hf.cache_names import cache_argument


@dataclass(frozen=True)
class NeedleCell:
    """Answers about the needles at one depth of prefixes of one length.

    Attributes:
        length: tokens of the prefix.
        depth: share of the text that stands before the needle.
        asked: answer tokens, over all prompts.
        known: how many of them the uncompressed model predicts right.
        kept: how many of the known ones are still right with the compressed cache.
    """

    length: int
    depth: float
    asked: int
    known: int
    kept: int

    @property
    def share(self) -> float:
        """Known tokens that are kept; nan if none is known."""
        return self.kept / self.known if self.known else float("nan")


@dataclass(frozen=True)
class NeedleGrid:
    """Retrieval at one quality.

    Attributes:
        quality: as it was given.
        cells: one per length and depth, lengths outermost.
        ratios: mean measured compression ratio of the prefixes of each length.
    """

    quality: Quality
    cells: tuple[NeedleCell, ...]
    ratios: dict[int, float]

    @property
    def share(self) -> float:
        """Known tokens of all cells that are kept; nan if none is known."""
        known = sum(cell.known for cell in self.cells)
        return sum(cell.kept for cell in self.cells) / known if known else float("nan")


@torch.no_grad()
def needles(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    qualities: Sequence[Quality] = DEFAULT_PRESETS,
    *,
    lengths: Sequence[int] = (1024, 2048),
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    rounds: int = 2,
    report: Callable[[str], None] = lambda step: None,
) -> list[NeedleGrid]:
    """Which codes hidden in a long prefix are still found behind a compressed cache?

    A prefix holds one needle per depth, for different places with different codes, and each is
    asked for in turn from a copy of the same cache. Answers are teacher-forced: a token is right if
    it is the most likely one behind the right tokens before it.

    Args:
        texts: what the needles are hidden in.
        lengths: tokens of the prefixes, needles included.
        depths: from 0 (start) to 1 (end), at most twelve of them.
        rounds: prefixes per text and length: other parts of the text, other places at each depth.
        report: called with a line of text as each prefix starts.

    Raises:
        ConfigError: no texts or one too short, or lengths, depths or rounds out of range.

    Example:
        >>> from nexusquant import evaluate
        >>> text = "some text of your own " * 40
        >>> grid, = evaluate.needles(
        ...     model, tokenizer, [text], ["high"], lengths=[256], depths=[0.5], rounds=1
        ... )
        >>> [(cell.length, cell.depth) for cell in grid.cells]
        [(256, 0.5)]
    """
    prompts = needle_prompts(tokenizer, texts, lengths, depths, rounds)
    grids: list[list[NeedleCell]] = [[] for _ in qualities]
    ratios: list[dict[int, float]] = [{} for _ in qualities]
    for length, some in prompts.items():
        known = []
        for index, prompt in enumerate(some):
            report(f"{length:,} tokens, uncompressed, prefix {index + 1} of {len(some)}")
            known.append(_hits(model, prompt, plain_cache(model))[0])
        for which, quality in enumerate(qualities):
            ours, measured = [], []
            for index, prompt in enumerate(some):
                name = quality if isinstance(quality, str) else "compressed"
                report(f"{length:,} tokens, {name}, prefix {index + 1} of {len(some)}")
                hits, ratio = _hits(model, prompt, NexusCache(model, quality))
                ours.append(hits)
                measured.append(ratio)
            ratios[which][length] = mean(measured)
            grids[which] += [
                _cell(length, depth, [k[row] for k in known], [o[row] for o in ours])
                for row, depth in enumerate(depths)
            ]
    return [
        NeedleGrid(quality, tuple(cells), ratio)
        for quality, cells, ratio in zip(qualities, grids, ratios, strict=True)
    ]


def _hits(model: Any, prompt: NeedlePrompt, cache: Any) -> tuple[list[list[bool]], float]:
    """Per question, which answer tokens are right; and the prefix's compression ratio."""
    settings = {**cache_argument(model, cache), "use_cache": True}
    model(prompt.prefix.to(model.device), **settings, logits_to_keep=1)
    hits = []
    for question, answer in prompt.questions:
        tokens = question.to(model.device)
        settings |= cache_argument(model, copy.deepcopy(cache))
        out = model(tokens, **settings, logits_to_keep=answer + 1)
        hits.append((out.logits[0, :-1].argmax(-1) == tokens[0, -answer:]).tolist())
    return hits, cache_stats(cache).compression_ratio


def _cell(length: int, depth: float, known: list[list[bool]], ours: list[list[bool]]) -> NeedleCell:
    """Counts over prompts: known and ours are (prompts, answer tokens)."""
    pairs = [
        pair
        for full, here in zip(known, ours, strict=True)
        for pair in zip(full, here, strict=True)
    ]
    return NeedleCell(
        length, depth, len(pairs), sum(full for full, _ in pairs), sum(a and b for a, b in pairs)
    )
