"""`python -m tests.prefix.bombs`: small files that claim much, read with little memory to spare."""

from __future__ import annotations

import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from nexusquant import NexusQuantError, nxq
from nexusquant.prefix.coded import MOST_HIDDEN
from nexusquant.prefix.decoded import decode_layers
from nexusquant.prefix.loading import load, prefix_tokens
from nexusquant.prefix.rotary import cached_layers
from tests.prefix.stored_cases import case, model_of
from tests.prefix.stored_lies import parts, small

SPARE = 400 << 20
"""Bytes that reading may map on top of what is there."""
Change = Callable[[dict[str, Any], dict[str, list[bytes]]], None]


def _far(meta: dict[str, Any], tokens: int) -> None:
    meta["tokens"], meta["starts"] = tokens, [tokens - 47] * len(meta["starts"])


def _frame(size: int, blocks: bytes = b"", window: int | None = None) -> bytes:
    """A zstandard frame that says so: with 8 bytes of content size, one segment or a window."""
    descriptor = 0xC0 | (0x20 if window is None else 0)
    kept = b"" if window is None else bytes([(window - 10) << 3])
    return zstandard.FRAME_HEADER + bytes([descriptor]) + kept + struct.pack("<Q", size) + blocks


def _run(length: int, last: bool) -> bytes:
    """A block of one byte, again and again."""
    return struct.pack("<I", length << 3 | 1 << 1 | last)[:3] + b"\4"


def _steps(frame: bytes) -> Change:
    def change(meta: dict[str, Any], streams: dict[str, list[bytes]]) -> None:
        for name in streams:
            if name.startswith("layer"):
                first = streams[name][0]
                streams[name][0] = first[: first.index(zstandard.FRAME_HEADER)] + frame

    return change


def _pages(meta: dict[str, Any], streams: dict[str, list[bytes]]) -> None:
    tokens = 256 * 100_000
    meta.update(tokens=tokens, starts=[0] * len(meta["starts"]))
    for name in streams:
        if name.startswith("layer"):
            streams[name] = [streams[name][0], *[b""] * 100_000]


def _profile(data: bytes) -> Change:
    def change(meta: dict[str, Any], streams: dict[str, list[bytes]]) -> None:
        streams["profile"] = [data]

    return change


BOMBS: dict[str, Change] = {
    "as it is": lambda meta, streams: None,
    "as many positions as are allowed": lambda meta, streams: _far(meta, MOST_HIDDEN + 47),
    "more positions": lambda meta, streams: _far(meta, MOST_HIDDEN + 48),
    "2^31 positions": lambda meta, streams: _far(meta, 1 << 31),
    "all positions": lambda meta, streams: _far(meta, (1 << 53) - 1),
    "tokens only": lambda meta, streams: meta.update(tokens=1 << 52),
    "a frame of 2^60 bytes": _steps(_frame(1 << 60)),
    "a window of 2^31 bytes": _steps(_frame(47, _run(47, True), window=31)),
    "a window of 2^27 bytes": _steps(_frame(47, _run(47, True), window=27)),
    "blocks of more than the frame": _steps(_frame(47, _run(1 << 17, False) * 10_000)),
    "empty pages": _pages,
    "many starts": lambda meta, streams: meta.update(starts=[0] * 200_000),
    "a profile's header of 2^62 bytes": _profile(struct.pack("<Q", 1 << 62) + b"{}"),
    "a profile of many layers": _profile(
        struct.pack("<Q", 300_000) + b'{"__metadata__":' + b"[" * 299_984
    ),
}


def main() -> None:
    """Two lines of text per bomb, then by how much the peak of memory rose."""
    model, profile = case("mistral")
    layers, data = cached_layers(model), small("mistral", 300)
    load(data, model, store_profile=profile)  # everything is imported and warm
    load(data, model, store_profile=profile, quality="high")
    stranger = model_of("mistral")  # knows no profile
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = _peak()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + SPARE, mapped + SPARE))
    for name, change in BOMBS.items():
        meta, streams = parts(data)
        streams.pop("tokens")
        change(meta, streams)
        bomb = nxq.pack(meta, streams)
        for how in ("decode", "live"):
            start = time.perf_counter()
            try:
                with nxq.Reader.open(bomb) as reader:
                    prefix_tokens(reader)
                    if how == "decode" and "profile" not in streams:
                        decode_layers(reader, layers, profile, lambda step: None)
                if how == "live":
                    if "profile" in streams:
                        load(bomb, stranger, quality="high")
                    else:
                        load(bomb, model, store_profile=profile, quality="high")
                outcome = "read"
            except NexusQuantError as error:
                outcome = type(error).__name__
            seconds = time.perf_counter() - start
            sys.stdout.write(f"{name}|{how}|{outcome}|{seconds}\n")
    sys.stdout.write(f"MiB|||{_peak() - before}\n")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
