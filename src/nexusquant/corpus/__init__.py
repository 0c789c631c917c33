"""Text of many kinds, written for this package, to calibrate a model on.

Every piece repeats, late, rare names and numbers of its beginning, as real documents do: attention
that reaches far back is what compression puts at risk. Nothing here is taken from elsewhere;
persons, places, firms and figures are invented.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

FILES = (
    "story.txt",
    "contract.txt",
    "code.txt",
    "dialogue.json",
    "report.txt",
    "tables.txt",
    "meeting.txt",
    "languages.txt",
    "essay.txt",
    "news.txt",
)
"""One per kind, in the order of `pieces()`: its first few already differ much."""


@dataclass(frozen=True)
class Piece:
    """One text.

    Attributes:
        name: its kind, and the stem of its file.
        text: all of it; of a dialogue, a transcript for models without a chat template.
        messages: (role, text) of every turn, roles "user" and "assistant" in turn; () elsewhere.
    """

    name: str
    text: str
    messages: tuple[tuple[str, str], ...] = ()


@lru_cache(maxsize=1)
def pieces() -> tuple[Piece, ...]:
    """All pieces, always in the same order.

    >>> [piece.name for piece in pieces() if piece.messages]
    ['dialogue']
    """
    return tuple(_piece(file) for file in FILES)


def _piece(file: str) -> Piece:
    name, _, kind = file.rpartition(".")
    content = files(__name__).joinpath(file).read_text(encoding="utf-8")
    if kind == "txt":
        return Piece(name, content)
    messages = tuple((turn["role"], turn["content"]) for turn in json.loads(content))
    text = "\n\n".join(f"{role.capitalize()}: {said}" for role, said in messages) + "\n"
    return Piece(name, text, messages)
