"""Whatever befalls the bytes of a file, reading tells the truth or raises FormatError."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from nexusquant import nxq
from nexusquant.errors import FormatError
from tests.nxq.cases import MAGIC, SMALL, Content, contents, header_of, large, reseal, seal

DATA = nxq.pack(*SMALL)


def refused(data: bytes, match: str | None = None) -> None:
    with pytest.raises(FormatError, match=match):
        nxq.Reader.open(data, "p.nxq").verify()


def test_every_truncation_and_any_addition() -> None:
    for length in range(len(DATA)):
        with pytest.raises(FormatError):
            nxq.Reader.open(DATA[:length])
    for extra in (b"\0", b"x", DATA):
        with pytest.raises(FormatError, match="its table makes it"):
            nxq.Reader.open(DATA + extra)


def test_every_change_of_one_byte() -> None:
    content: Content = ({"codec": "x"}, {"a": [b"ab", b"c"], "b": [b"d"]}, {})
    data = nxq.pack(*content)
    for at in range(len(data)):
        changed = bytearray(data)
        readable = 0
        for value in set(range(256)) - {data[at]}:
            changed[at] = value
            try:
                reader = nxq.Reader.open(changed)
                found = contents(reader)
            except FormatError:
                continue
            assert found == content
            readable += 1
            with pytest.raises(FormatError, match="should be zero"):
                reader.verify()
        assert readable in (0, 255)  # 255: padding, which only `verify` reads


def test_random_damage_of_a_larger_file() -> None:
    content = large()
    data, source = nxq.pack(*content), random.Random(0)
    for _ in range(10_000):
        changed = bytearray(data)
        for _ in range(source.choice((1, 1, 2, 8))):
            start = source.randrange(len(data))
            length = source.choice((1, 1, 4, 64))
            changed[start : start + length] = source.randbytes(length)
        if source.random() < 0.1:
            del changed[source.randrange(len(changed)) :]
        try:
            reader = nxq.Reader.open(bytes(changed))
            reader.verify()
        except FormatError:
            continue
        assert contents(reader) == content


def test_resealed_random_damage_is_what_the_writer_writes_or_refused() -> None:
    source = random.Random(1)
    accepted = 0
    for _ in range(10_000):
        changed = bytearray(DATA)
        for _ in range(source.choice((1, 1, 2, 4))):
            changed[source.randrange(len(DATA))] = source.choice(b'\0\1\xff "{}[]:,0123456789eE.-')
        changed = bytearray(reseal(bytes(changed)))
        try:
            reader = nxq.Reader.open(bytes(changed))
            reader.verify()
        except FormatError:
            continue
        accepted += 1
        assert nxq.pack(*contents(reader)) == changed
    assert accepted > 100


def test_chunks_that_change_places() -> None:
    one, other = b"a" * 10, b"b" * 10
    data = nxq.pack({}, {"s": [one, other]})
    refused(data.replace(one + other, other + one), r"p\.nxq: chunk 0 of stream 's' is damaged")


def test_messages_say_what_is_wrong() -> None:
    refused(b"", "empty")
    refused(b"PK\3\4 something else", r"p\.nxq: not an \.nxq file")
    refused(DATA.replace(b"\r\n", b"\n"), "line ends were changed")
    refused(DATA[:11], "within the preamble")
    refused(DATA[:30], "within the preamble")
    refused(DATA[:40], "cut short, 40 bytes where header and table alone are")
    refused(DATA[:-1], rf"{len(DATA) - 1} bytes, but its table makes it {len(DATA)}")
    refused(DATA[:-1] + b"y", "chunk 0 of stream 'tail' is damaged")
    refused(DATA[:50] + b"\0" + DATA[51:], "header or table is damaged")
    refused(seal(HEADERS["long integer"]), "an integer of more than 53 bits")
    refused(DATA[:8] + b"\2" + DATA[9:], r"version 2 .* reads 1\. Upgrade")
    refused(DATA[:10] + b"\1" + DATA[11:], "flags 0x0001.*Upgrade")


S = {"s": 1}
GOOD = header_of({}, S)
LYING: dict[str, Callable[[], bytes]] = {
    "header of 4 GiB": lambda: seal(GOOD, [[b"x"]], header_length=2**32 - 1),
    "header of 1 MiB": lambda: seal(GOOD, [[b"x"]], header_length=2**20),
    "header into table": lambda: seal(GOOD, [[b"x"]], header_length=len(GOOD) + 1),
    "no header": lambda: seal(b"", [[b"x"]]),
    "2**32 chunks": lambda: seal(GOOD, [[b"x"]], count=2**32 - 1),
    "2**22 chunks": lambda: seal(GOOD, [[b"x"]], count=2**22),
    "chunk more in table": lambda: seal(GOOD, [[b"x"], [b""]]),
    "chunk less in table": lambda: seal(header_of({}, {"s": 2}), [[b"x"]]),
    "chunk of 4 GiB": lambda: seal(GOOD, [[b"x"]], lengths={0: 2**32 - 1}),
    "chunk too long": lambda: seal(GOOD, [[b"x"]], lengths={0: 2}),
    "chunk too short": lambda: seal(GOOD, [[b"xy"]], lengths={0: 1}),
    "shifted boundary": lambda: seal(
        header_of({}, {"s": 2}), [[b"xy", b"z"]], lengths={0: 1, 1: 2}
    ),
    "padding": lambda: seal(GOOD, [[b"x"]], padding=b"\1"),
    "tail": lambda: seal(GOOD, [[b"x"]], tail=b"\0"),
    "version 0": lambda: seal(GOOD, [[b"x"]], version=0),
    "flag": lambda: seal(GOOD, [[b"x"]], flags=0x8000),
}
HEADERS: dict[str, bytes] = {
    "not UTF-8": b'{"meta":{"a":"\xff"},"streams":[{"chunks":1,"name":"s"}]}',
    "not JSON": b"{",
    "two values": GOOD + b"{}",
    "BOM": b"\xef\xbb\xbf" + GOOD,
    "space": GOOD.replace(b",", b", "),
    "line end": GOOD + b"\n",
    "unsorted": b'{"streams":[{"chunks":1,"name":"s"}],"meta":{}}',
    "key twice": b'{"meta":{},"meta":{},"streams":[{"chunks":1,"name":"s"}]}',
    "nested key twice": b'{"meta":{"a":1,"a":1},"streams":[{"chunks":1,"name":"s"}]}',
    "half a surrogate": b'{"meta":{"a":"\\ud800"},"streams":[{"chunks":1,"name":"s"}]}',
    "needless escape": b'{"meta":{"a":"\\u0041"},"streams":[{"chunks":1,"name":"s"}]}',
    "deep": b'{"meta":{"a":' + b"[" * 40 + b"]" * 40 + b'},"streams":[{"chunks":1,"name":"s"}]}',
    "very deep": b"[" * 500_000,
    "very deep objects": b'{"a":' * 200_000,
    "long integer": b'{"meta":{"a":' + b"9" * 1_000_000 + b'},"streams":[]}',
    "stream twice": b'{"meta":{},"streams":[{"chunks":1,"name":"s"},{"chunks":0,"name":"s"}]}',
    "stream again": b'{"meta":{},"streams":[{"chunks":0,"name":"s"},{"chunks":1,"name":"s"}]}',
    "list": b"[]",
    "no streams": b'{"meta":{}}',
    "no meta": b'{"streams":[{"chunks":1,"name":"s"}]}',
    "something else": b'{"else":1,"meta":{},"streams":[{"chunks":1,"name":"s"}]}',
    "meta is a list": b'{"meta":[],"streams":[{"chunks":1,"name":"s"}]}',
    "streams is an object": b'{"meta":{},"streams":{"chunks":1,"name":"s"}}',
    "streams is null": b'{"meta":{},"streams":null}',
}
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-0", "01", "1.50", "9007199254740992", "1e5"]
HEADERS |= {
    number: b'{"meta":{"a":' + number.encode() + b'},"streams":[{"chunks":1,"name":"s"}]}'
    for number in NUMBERS
}
ENTRIES: list[Any] = [
    {"name": "s"}, {"chunks": 1}, {"chunks": 1, "name": "s", "x": 1}, [], 3, None, "s",
    {"chunks": -1, "name": "s"}, {"chunks": 1.0, "name": "s"}, {"chunks": True, "name": "s"},
    {"chunks": "1", "name": "s"}, {"chunks": None, "name": "s"}, {"chunks": 2**50, "name": "s"},
    {"chunks": 1, "name": ""}, {"chunks": 1, "name": 1}, {"chunks": 1, "name": "a b"},
    {"chunks": 1, "name": "s\n"}, {"chunks": 1, "name": "../s"}, {"chunks": 1, "name": "x" * 65},
    {"chunks": 1, "name": "é"}, {"chunks": 1, "name": ["s"]}, {"chunks": 1, "name": {"s": 1}},
    {"chunks": 1, "name": "s", "meta": {}}, {"chunks": 1, "name": "s", "meta": []},
    {"chunks": 1, "name": "s", "meta": None},
]  # fmt: skip
HEADERS |= {
    f"entry {entry!r:.60}": json.dumps(
        {"meta": {}, "streams": [entry]}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()
    for entry in ENTRIES
}
LYING |= {name: lambda raw=raw: seal(raw, [[b"x"]]) for name, raw in HEADERS.items()}


def test_limits_of_header_and_table() -> None:
    def padded(length: int) -> bytes:
        return header_of({"a": "x" * (length - len(header_of({"a": ""}, {})))}, {})

    assert nxq.Reader.open(seal(padded(2**20))).streams == {}
    refused(seal(padded(2**20 + 1)), "promises a header of 1048577 bytes")
    refused(seal(GOOD, [[b"x"]], count=2**22 + 1), "and 4194305 chunks")
    refused(seal(GOOD, [[b"x"]], count=2**22), "cut short")


def test_the_unharmed_file_is_read() -> None:
    reader = nxq.Reader.open(seal(GOOD, [[b"x"]]))
    reader.verify()
    assert reader.read("s", 0) == b"x"


@pytest.mark.parametrize("make", LYING.values(), ids=LYING.keys())
def test_files_that_lie_with_right_digests(make: Callable[[], bytes]) -> None:
    data = make()
    assert data.startswith(MAGIC)
    tracemalloc.start()
    try:
        refused(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (1 << 18) + 32 * len(data)
