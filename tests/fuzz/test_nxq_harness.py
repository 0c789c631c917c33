"""The fuzzing harness itself, with random bytes in place of a fuzzer's."""

from __future__ import annotations

import random

import pytest

from nexusquant import nxq
from tests.fuzz import nxq_harness
from tests.nxq.cases import SMALL


def outcomes(files: int) -> list[bool]:
    """Which of so many files were taken."""
    source = random.Random(0)

    def scrambled(data: bytes, size: int) -> bytes:
        changed = bytearray(data)
        for _ in range(source.randrange(1, 4)):
            changed[source.randrange(len(data))] = source.randrange(256)
        return bytes(changed[:size])

    data = nxq.pack(*SMALL)
    return [
        nxq_harness.check(nxq_harness.mutate(data, 4096, seed, scrambled)) for seed in range(files)
    ]


def test_files_are_taken_and_refused() -> None:
    assert 200 < sum(outcomes(1000)) < 800


def test_decoders_meet_chunks_whose_digests_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def decode(reader: nxq.Reader) -> None:
        chunk = bytes(reader.read("tokens", 0))
        seen.add(chunk)
        if len(seen) == 50:
            raise IndexError(chunk)

    monkeypatch.setattr(nxq_harness, "DECODERS", [decode])
    with pytest.raises(IndexError):
        outcomes(1000)
