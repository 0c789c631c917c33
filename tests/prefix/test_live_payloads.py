"""The codecs of tensors' bytes."""

from __future__ import annotations

import numpy as np
import pytest

from nexusquant import FormatError
from nexusquant.prefix import payloads
from nexusquant.prefix.payloads import PAYLOADS, payload_of, pieces


@pytest.mark.parametrize("size", [0, 1, 7, 64, 1000, 4096])
@pytest.mark.parametrize("runs", [0, 1, 4])
@pytest.mark.parametrize("name", PAYLOADS)
def test_there_and_back(name: str, runs: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "PIECE", 300)
    data = np.random.default_rng(0).integers(0, 3, max(runs, 1) * size, np.uint8)
    payload = payload_of(name)
    chunks = payload.encode(data, size if runs else 0)
    assert len(chunks) == pieces(len(data))
    views = [memoryview(x) for x in chunks]
    assert payload.decode(views, len(data), size if runs else 0) == data.tobytes()


def test_differences_compress_what_changes_slowly() -> None:
    walk = np.cumsum(np.random.default_rng(0).integers(-1, 2, (4, 5000)), 1).astype(np.uint8)
    plain, delta = (
        sum(map(len, payload_of(name).encode(walk.reshape(-1), 5000))) for name in PAYLOADS[1:]
    )
    assert delta < 0.7 * plain


def test_what_does_not_shrink_or_shrinks_too_well_stays() -> None:
    payload = payload_of("zstd")
    noise = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    for data in (noise, np.zeros(1 << 20, np.uint8)):
        assert payload.encode(data, 0) == [data.tobytes()]


@pytest.mark.parametrize("name", PAYLOADS)
def test_other_sizes_are_refused(name: str) -> None:
    payload = payload_of(name)
    chunks = [memoryview(x) for x in payload.encode(np.arange(100, dtype=np.uint8).repeat(9), 0)]
    for size in (1, 899, 901, 1 << 40):
        with pytest.raises(FormatError):
            payload.decode(chunks, size, 0)
