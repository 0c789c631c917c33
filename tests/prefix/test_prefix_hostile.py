"""Files that are cut, damaged or lie: one of our errors, or numbers that fit what they say."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from nexusquant import FormatError, ProfileError, UnsupportedError, load, nxq
from tests.prefix.stored_cases import case, model_of, pairs
from tests.prefix.stored_lies import (
    KINDS,
    REFUSED,
    bytewise,
    decoded,
    lie,
    parts,
    same,
    small,
    survives,
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation(kind: str) -> None:
    data = small(kind, 60)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            nxq.Reader.open(data[:length])
    with pytest.raises(FormatError):
        nxq.Reader.open(data + b"\0")


@pytest.mark.parametrize("count", [700, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_single_bytes(kind: str, count: int) -> None:
    data, taken = small(kind, 60), 0
    whole = decoded(data, kind)
    for changed in bytewise(data, count, random.Random(0)):
        try:
            found = decoded(changed, kind)
        except FormatError:
            continue
        assert same(found, whole)  # what changed lies between two streams
        with pytest.raises(FormatError, match="should be zero"):
            nxq.Reader.open(changed).verify()
        taken += 1
    assert taken < count / 5


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_lies(kind: str, count: int) -> None:
    source = random.Random(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = sum(survives(lie(kind, source), kind) for _ in range(count))
    assert count / 20 < taken < count / 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


FIELDS: list[tuple[str, Any, type[Exception], str]] = [
    ("tokens", 0, FormatError, "do not fit"),
    ("tokens", -1, FormatError, "do not fit"),
    ("tokens", True, FormatError, "tokens is True, no int"),
    ("tokens", 300.0, FormatError, "tokens is 300.0, no int"),
    ("tokens", "x" * 9999, FormatError, r"tokens is 'x{70,80}, no int"),
    ("tokens", None, FormatError, "tokens is None"),
    ("tokens", 301, FormatError, "another number of tokens"),
    ("tokens", (1 << 53) - 1, FormatError, "has not the"),
    ("starts", [0, 0], FormatError, "do not fit"),
    ("starts", [0, 0, 0, 0], FormatError, "do not fit"),
    ("starts", [0, 0, 1], FormatError, "do not fit"),
    ("starts", [0, False, 0], FormatError, "do not fit"),
    ("starts", [0, -1, 0], FormatError, "do not fit"),
    ("starts", {}, FormatError, "starts is {}, no list"),
    ("step", -241, FormatError, "out of range"),
    ("step", 49, FormatError, "out of range"),
    ("page", 255, FormatError, "out of range"),
    ("profile", "x", ProfileError, "coded with storage profile 'x'"),
    ("profile", "\x1b" * 999, ProfileError, "coded with storage profile"),
    ("profile", None, FormatError, "profile is None, no str"),
    ("fingerprint", "x", UnsupportedError, "another model"),
]


@pytest.mark.parametrize(("name", "value", "kind", "why"), FIELDS)
def test_fields(name: str, value: Any, kind: type[Exception], why: str) -> None:
    model, profile = case("llama")
    meta, streams = parts(small("llama"))
    meta[name] = value
    if name == "tokens":
        del streams["tokens"]
    with pytest.raises(kind, match=why) as error:
        load(nxq.pack(meta, streams), model, store_profile=profile)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("step", [-240, -239, 0, 47, 48])
def test_steps_that_the_pages_were_not_coded_at(step: int) -> None:
    for kind in KINDS:
        meta, streams = parts(small(kind))
        survives(nxq.pack({**meta, "step": step}, streams), kind)


def test_chunks_of_other_layers() -> None:
    """Their digests are right: they are refused, or give other numbers."""
    meta, streams = parts(small("llama"))
    whole = decoded(small("llama"), "llama")
    for one, other in (("layer.0", "layer.1"), ("layer.1", "layer.2"), ("layer.2", "layer.0")):
        swapped = nxq.pack(meta, {**streams, one: streams[other]})
        assert not survives(swapped, "llama") or not same(decoded(swapped, "llama"), whole)


def test_profiles_that_lie() -> None:
    _, profile = case("llama")
    model = model_of("llama")  # knows no other
    meta, streams = parts(small("llama"))
    data, source, taken = profile.to_bytes(), random.Random(0), 0
    whole = load(small("llama"), model, store_profile=profile)
    head = 8 + int.from_bytes(data[:8], "little")
    for at in range(100):
        changed = bytearray(data)
        area = range(head) if at % 2 else range(head, len(data))
        for _ in range(source.choice((1, 1, 50))):
            changed[source.choice(area)] = source.randrange(256)
        try:
            found = load(nxq.pack(meta, {**streams, "profile": [bytes(changed)]}), model)
        except (FormatError, ProfileError):
            continue
        assert all(torch.equal(*pair) for pair in pairs(found, whole))  # it means the same
        taken += 1
    assert taken < 5
    for length in (0, 7, 8, head - 1, head, len(data) - 1):
        with pytest.raises(ProfileError):
            load(nxq.pack(meta, {**streams, "profile": [data[:length]]}), model)
    for extreme in (1e-30, 1e30):
        meta["profile"], wrong = _scaled(extreme)
        try:
            load(nxq.pack(meta, {**streams, "profile": [wrong]}), model)
        except REFUSED:
            continue


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_bombs() -> None:
    """In a process that can map little more than it has: it would end, or raise MemoryError."""
    command = [sys.executable, "-m", "tests.prefix.bombs"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    seconds = {tuple(row[:2]): float(row[3]) for row in rows}
    outcomes = {tuple(row[:2]): row[2] for row in rows}
    assert seconds.pop(("MiB", "")) < 200
    assert max(seconds.values()) < 5
    harmless = ("as it is", "as many positions as are allowed")
    for (name, how), outcome in outcomes.items():
        if name.startswith("a profile"):
            assert outcome == ("ProfileError" if how == "live" else "read")
        elif name.startswith("a window"):  # of other steps, with which pages may mean something
            assert outcome in ("read", "FormatError")
        elif name != "MiB":
            assert outcome == ("read" if name in harmless else "FormatError"), name
    assert len(outcomes) == 29


def _scaled(factor: float) -> tuple[str, bytes]:
    """The profile with transforms that give far too large or small numbers."""
    _, profile = case("llama")
    sides = {
        i: tuple(replace(side, scale=side.scale * factor) for side in pair)
        for i, pair in profile.layers.items()
    }
    wrong = replace(profile, layers=sides)
    return wrong.digest, wrong.to_bytes()
