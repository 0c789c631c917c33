"""What is fuzzed for stored prefixes, with random bytes in place of a fuzzer's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nexusquant import nxq
from nexusquant.errors import FormatError
from tests.fuzz import nxq_harness, prefix_decoders

pytestmark = pytest.mark.filterwarnings("ignore::nexusquant.hf.notices.NexusQuantWarning")


def test_seeds_are_taken_and_others_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, outcomes = random.Random(0), []

    def decode(reader: nxq.Reader) -> None:
        outcomes.append(False)
        prefix_decoders.decode(reader)
        outcomes[-1] = True

    def scrambled(data: bytes, size: int) -> bytes:
        changed = bytearray(data)
        for _ in range(source.randrange(1, 4)):
            changed[source.randrange(len(data))] = source.randrange(256)
        return bytes(changed[:size])

    monkeypatch.setattr(nxq_harness, "DECODERS", [decode])
    prefix_decoders.write_seeds(tmp_path)
    seeds = [x.read_bytes() for x in sorted(tmp_path.iterdir())]
    assert all(nxq_harness.check(data) for data in seeds)
    assert outcomes == [True] * len(seeds)
    for seed in range(400):
        nxq_harness.check(nxq_harness.mutate(seeds[seed % len(seeds)], 1 << 16, seed, scrambled))
    assert 0.1 < sum(outcomes) / len(outcomes) < 0.7
    with pytest.raises(FormatError):
        prefix_decoders.decode(nxq.Reader.open(nxq.pack({"codec": "raw"}, {})))
