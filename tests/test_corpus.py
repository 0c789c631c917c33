"""The texts a model is calibrated on: long enough, clean, distinct, and with far repetitions."""

from __future__ import annotations

import re
import unicodedata
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import pytest

from nexusquant.corpus import FILES, Piece, pieces

NAMES = [piece.name for piece in pieces()]
each_piece = pytest.mark.parametrize("piece", pieces(), ids=NAMES)

# Rare, in the first third and again in the last one.
REPEATED = {
    "story": ["Ottoline Brask", "Ivo Tamsett", "Pellagrove", "brass astrolabe", "six oak legs"],
    "contract": ["SN-88-ORRIN-2216", "CHT/LN/0473-B", "9 Lantern Steps", "Jorunn Fairweather-Ames"],
    "code": ["0x5EA110C5", "heron-", "sealed_log.py", "SEGMENT_LIMIT", "BrokenSeal"],
    "dialogue": ["QX7-LUMEN-20931", "8812-BELL-4", "Three Sieves", "lupin flour", "31 kg"],
    "report": ["Osmund gravel", "Varnholt and Iddo, 11", "Dray Cross", "10.2 °C", "2,600 m³"],
    "tables": ["BW-7719-K", "KS40-00397", "OTM-5512-C", "18,204"],
    "meeting": ["Saturday the 5th of July", "2,914 and sixty pence", "3,275"],
    "languages": ["K-4417", "Orsavell", "Aubeline Corsaz"],
    "essay": [r"\eqref{eq:verdict}", "silenced weight", "quiet door", "discord", r"\varepsilon"],
    "news": ["Skerrow Point", "A Matter of an Hour", "Onstruther", "Old Hythe"],
}
# Han and kana are written without spaces.
UNSPACED = re.compile(r"[\u3041-\u30ff\u4e00-\u9fff]")


def words(text: str) -> float:
    """English words, or what amounts to as much.

    Parts between spaces that hold a letter or digit, a Han or kana character being half a word; or
    a sixth of all characters but spaces, where that is more (tables and code: long parts).
    """
    spaced = UNSPACED.sub(" ", text).split()
    parts = sum(any(map(str.isalnum, part)) for part in spaced) + len(UNSPACED.findall(text)) / 2
    return max(parts, len("".join(spaced)) / 6)


@each_piece
def test_fills_a_piece_of_512_tokens_and_is_no_burden(piece: Piece) -> None:
    assert 450 <= words(piece.text) <= 1100


def test_all_of_it_is_of_bounded_length() -> None:
    assert 5000 <= sum(words(piece.text) for piece in pieces()) <= 7000


@each_piece
def test_is_clean_text(piece: Piece) -> None:
    assert unicodedata.is_normalized("NFC", piece.text)
    assert piece.text == piece.text.strip() + "\n"
    assert not re.search(r"[^\S\n ]|[ ]\n", piece.text)
    others = {unicodedata.category(c) for c in piece.text} & {"Cc", "Cf", "Cn", "Co", "Cs"}
    assert others <= {"Cc"}  # the line feed
    assert "\ufffd" not in piece.text


@each_piece
def test_comes_back_to_rare_phrases_of_its_beginning(piece: Piece) -> None:
    third = len(piece.text) // 3
    for phrase in REPEATED[piece.name]:
        assert phrase in piece.text[:third]
        assert phrase in piece.text[-third:]


def test_no_paragraph_is_repeated() -> None:
    paragraphs = [part for piece in pieces() for part in re.split(r"\n{2,}", piece.text)]
    long = [part for part in paragraphs if len(part) > 80]
    assert len(set(long)) == len(long)


def test_pieces_share_no_long_run_of_words() -> None:
    runs = {}
    for piece in pieces():
        parts = piece.text.split()
        runs[piece.name] = {tuple(parts[i : i + 8]) for i in range(len(parts) - 7)}
    for one, other in combinations(NAMES, 2):
        assert not runs[one] & runs[other], (one, other)


def test_order_is_stable() -> None:
    assert list(REPEATED) == NAMES == [file.rpartition(".")[0] for file in FILES]
    assert pieces() == pieces()


def test_dialogue_is_of_turns_and_nothing_else_is() -> None:
    (dialogue,) = (piece for piece in pieces() if piece.messages)
    roles = [role for role, _ in dialogue.messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert all(said in dialogue.text for _, said in dialogue.messages)


def test_the_package_holds_exactly_these_files_and_the_wheel_takes_them() -> None:
    there = {entry.name for entry in files("nexusquant.corpus").iterdir() if entry.is_file()}
    assert there == {*FILES, "__init__.py"}
    for file in FILES:
        files("nexusquant.corpus").joinpath(file).read_bytes().decode("utf-8")
    root = Path(__file__).parents[1]
    wheel = (root / "pyproject.toml").read_text(encoding="utf-8").split("[tool.hatch.build.targets")
    assert 'wheel]\npackages = ["src/nexusquant"]\n\n' in wheel[1]  # nothing excluded
    ignored = (root / ".gitignore").read_text(encoding="utf-8").split()  # hatch leaves these out
    assert not {"*.txt", "*.json", "corpus/"} & set(ignored)
