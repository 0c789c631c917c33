"""Prefixes with codes hidden in them, and the questions that ask for the codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexusquant.errors import ConfigError

PLACES = {
    "harbour": "73914", "library": "20586", "station": "91437", "garden": "46203",
    "bridge": "85921", "museum": "17360", "market": "60748", "lighthouse": "39152",
    "theatre": "54879", "mill": "28065", "chapel": "92631", "tower": "71498",
}  # fmt: skip
"""Place to the code that is hidden for it."""


@dataclass(frozen=True)
class NeedlePrompt:
    """One prefix with a needle at every depth.

    Attributes:
        prefix: (1, length) int64.
        questions: per depth, question and answer (1, tokens) int64 and how many tokens at its end
            are the answer.
    """

    prefix: Tensor
    questions: tuple[tuple[Tensor, int], ...]


def needle_prompts(
    tokenizer: Any,
    texts: Iterable[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    rounds: int,
) -> dict[int, list[NeedlePrompt]]:
    """Per length, `rounds` prefixes of every text: other parts of it, other places at each depth.

    Raises:
        ConfigError: no texts or one too short, or lengths, depths or rounds out of range.
    """
    contents = [encode(tokenizer, text, special=True) for text in texts]
    _check(contents, lengths, depths, rounds)
    return {
        length: [
            needle_prompt(tokenizer, ids, length, depths, share=turn / rounds, turn=turn)
            for ids in contents
            for turn in range(rounds)
        ]
        for length in lengths
    }


def needle_prompt(
    tokenizer: Any,
    ids: Tensor,
    length: int,
    depths: Sequence[float],
    *,
    share: float = 0.0,
    turn: int = 0,
) -> NeedlePrompt:
    """A prefix of exactly `length` tokens with a needle at every depth, and the questions.

    Args:
        ids: (tokens,) int64, the text that the needles are hidden in.
        share: where the part of the text that is used starts, as a share of where it can.
        turn: shifts which places are at which depth.

    Raises:
        ConfigError: the needles would be more than half of the prefix, or the text is too short.
    """
    names = list(PLACES)
    places = [names[(turn * len(depths) + i) % len(names)] for i in range(len(depths))]
    facts = [encode(tokenizer, _fact(place)) for place in places]
    room = length - sum(map(len, facts))
    if 2 * room < length:
        raise ConfigError(
            f"length {length}: {len(depths)} needles take {length - room} tokens, more than half;"
            " use longer prefixes or fewer depths."
        )
    if len(ids) < room:
        raise ConfigError(
            f"length {length} needs a text of at least {room} tokens, got {len(ids)}."
        )
    start = int(share * (len(ids) - room))
    text = ids[start : start + room].clone()
    if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        text[0] = ids[0]  # models that are used to a first token need it in every prefix
    pieces, done = [], 0
    for depth, fact in sorted(zip(depths, facts, strict=True), key=lambda pair: pair[0]):
        at = 1 + round(depth * (room - 1))  # behind the first token, which may be a special one
        pieces += [text[done:at], fact]
        done = at
    questions = []
    for place in places:
        answer = encode(tokenizer, f" {PLACES[place]}")
        questions.append((torch.cat([encode(tokenizer, _ask(place)), answer])[None], len(answer)))
    return NeedlePrompt(torch.cat([*pieces, text[done:]])[None], tuple(questions))


def _fact(place: str) -> str:
    return f"\nRemember this: the secret code of the {place} is {PLACES[place]}.\n"


def _ask(place: str) -> str:
    subject = f"the secret code of the {place}"
    return f"\nQuestion: what is {subject}?\nAnswer: {subject} is"


def encode(tokenizer: Any, text: str, *, special: bool = False) -> Tensor:
    """Token ids (tokens,), with the tokenizer's special ones if `special`."""
    out = tokenizer(text, add_special_tokens=special, return_tensors="pt", verbose=False)
    ids: Tensor = out.input_ids[0]
    return ids


def _check(
    contents: list[Tensor], lengths: Sequence[int], depths: Sequence[float], rounds: int
) -> None:
    if not contents:
        raise ConfigError("no text to hide needles in.")
    if not lengths or len(set(lengths)) < len(lengths) or min(lengths) < 1:
        raise ConfigError(f"lengths={list(lengths)}: must be different numbers of tokens.")
    inside = all(0 <= depth <= 1 for depth in depths)
    if not depths or not inside or len(set(depths)) < len(depths) or len(depths) > len(PLACES):
        raise ConfigError(
            f"depths={list(depths)}: must be 1 to {len(PLACES)} different numbers from 0 to 1."
        )
    if rounds < 1:
        raise ConfigError(f"rounds={rounds}: must be at least 1.")
