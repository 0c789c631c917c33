"""A reader of entropy-coded layers that is written from docs/FORMAT.md and shares no code with the
package: what the text says is enough, and true. Slow, and careless with damaged files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from math import ceil
from typing import Any

import constriction
import numpy as np
import zstandard

Array = np.ndarray[Any, Any]
Symbols = Callable[[int, Any], Any]
_DTYPES = {"F16": "<f2", "F32": "<f4", "I16": "<i2", "BF16": "<u2"}


def read_safetensors(data: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors (bf16 as its bits) and metadata."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, x in header.items():
        first, last = x["data_offsets"]
        tensors[name] = np.frombuffer(body[first:last], _DTYPES[x["dtype"]]).reshape(x["shape"])
    return tensors, metadata


class Layer:
    """One layer of a file.

    Attributes:
        sinks: keys as rotated, and values; by `dtype` as in the file.
        coded: keys without RoPE, and values.
        e: of the coded tokens.
        pages: of how many of their numbers each thing is true.
    """

    def __init__(self, meta: dict[str, Any], profile: bytes, index: int, chunks: list[bytes]):
        self.tensors, metadata = read_safetensors(profile)
        self.heads, *self.dims = json.loads(metadata["nexusquant-store"])["shapes"][str(index)]
        self.step, start = meta["step"], meta["starts"][index]
        skip = min(max(4 - start, 0), meta["tokens"] - start)
        self.pages: list[Counter[str]] = []
        self._sides(index)
        self._first(chunks[0], skip)
        count = meta["tokens"] - start - skip
        assert len(self.e) == count
        pages = [self._page(x, self.e[256 * i :][:256]) for i, x in enumerate(chunks[1:])]
        self.coded = [np.concatenate(x, 1) for x in zip(*pages, strict=True)]

    def _sides(self, index: int) -> None:
        self.side = []
        for name in ("key", "value"):
            fields = "forward", "scale", "mean", "decay", "level", "group"
            side = {x: self.tensors[f"{index}.{name}.{x}"] for x in fields}
            loud = [i for i, x in enumerate(side["group"].max(0)) if x >= self.step - 24]
            self.side.append((side, max(loud, default=-1) + 1))

    def _first(self, data: bytes, skip: int) -> None:
        self.dtype, size, at = data[0], (2, 2, 4)[data[0]], 1
        self.sinks = []
        for dim in self.dims:
            part = data[at : at + size * self.heads * skip * dim]
            at += len(part)
            if data[0] == 1:
                x = (np.frombuffer(part, "<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                x = np.frombuffer(part, ("<f2", "", "<f4")[data[0]]).astype(np.float32)
            self.sinks.append(x.reshape(self.heads, skip, dim))
        self.e = list(zstandard.ZstdDecompressor().decompress(data[at:]))

    def _page(self, data: bytes, e: list[int]) -> list[Array]:
        seen = Counter[str]()
        self.pages.append(seen)
        decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, "<u4"))
        groups = [(s, g) for s, (_, count) in enumerate(self.side) for g in range(count)]
        places = [(t, i) for t in range(len(e)) for i in range(len(groups))]

        def of_class(level: int, t: int) -> tuple[int, int]:
            """Dropped bits and class."""
            k = min(max((level - self.step - 6 * (e[t] - 4) + 38) // 4, 0), 69)
            d = max(ceil((k - 15) / 3), 0)
            return d, k - 3 * d

        def coded(symbols: list[tuple[Any, ...]], model: Callable[..., Any]) -> dict[Any, int]:
            """Symbols (key, place) in the order of keys, then as they come."""
            return {
                place: int(decoder.decode(model(*key)))
                for key, place in sorted(symbols, key=lambda one: one[0])
            }

        def categorical(counts: Array) -> Any:
            share = (counts.astype(np.float64) / counts.astype(np.float64).sum()).astype(np.float32)
            return constriction.stream.model.Categorical(share, perfect=False)

        cosets = self.tensors["tables.cosets"].view(np.uint16)
        values = self.tensors["tables.values"].view(np.uint16)

        def key_of_coset(t: int, i: int) -> tuple[int, int]:
            s, g = groups[i]
            return s, of_class(int(self.side[s][0]["group"][min(t, 1), g]), t)[1]

        c = coded(
            [(key_of_coset(*at), at) for at in places], lambda s, k: categorical(cosets[s, k])
        )
        n: dict[tuple[int, int, int], int] = {}

        def numbers(js: range, parity: Callable[[int, int], int] | None) -> None:
            keys = []
            for t, i in places:
                s, g = groups[i]
                for j in js:
                    d, k = of_class(int(self.side[s][0]["level"][min(t, 1), 8 * g + j]), t)
                    q = 2 if parity is None or d else parity(t, i)
                    keys.append(((d, s, k, c[t, i], q), (t, i, j)))
            keys.sort(key=lambda one: one[0])

            def model(d: int, s: int, k: int, coset: int, q: int) -> Any:
                counts = values[s, k, coset]
                return categorical(counts if q == 2 else np.append(counts[q:80:2], counts[80]))

            found = coded(keys, model)
            escaped = []
            for (d, _, _, _, q), at in keys:
                x = found[at]
                if x == (80 if q == 2 else 40):
                    escaped.append(at)
                n[at] = (x - 40 if q == 2 else 2 * x + q - 40) << d
            twelve = constriction.stream.model.Uniform(4096)
            low = [int(decoder.decode(twelve)) for _ in escaped]
            high = [int(decoder.decode(twelve)) for _ in escaped]
            drop = {at: key[0] for key, at in keys}
            for at, x, y in zip(escaped, low, high, strict=True):
                folded = x + (y << 12)
                seen["far" if y else "escaped"] += 1
                n[at] = (folded // 2 if folded % 2 == 0 else -(folded + 1) // 2) << drop[at]
            for (d, *_, q), at in keys:  # they ascend by d
                seen[f"drop {d}, parity {q}"] += 1
                told = 0 if parity is None else 1
                if d > told:
                    uniform = constriction.stream.model.Uniform(1 << (d - told))
                    n[at] += int(decoder.decode(uniform)) << told
                if d and parity is not None:
                    n[at] += parity(*at[:2])

        numbers(range(1, 8), None)
        numbers(range(1), lambda t, i: sum(n[t, i, j] for j in range(1, 8)) % 2)
        return [self._vectors(s, groups, n, c, e) for s in (0, 1)]

    def _vectors(self, s: int, groups: list[Any], n: Any, c: Any, e: list[int]) -> Array:
        side, count = self.side[s]
        forward = side["forward"].astype(np.float64) * float(side["scale"])
        y = np.zeros((len(e), len(forward)))
        mine = [i for i, (other, _) in enumerate(groups) if other == s]
        for t in range(len(e)):
            size = 2 ** (self.step / 12 + (e[t] - 4) / 2)
            point = [n[t, i, j] + c[t, i] / 2 for i in mine for j in range(8)]
            y[t, : 8 * count] = np.array(point) * size
            if t:
                y[t] += side["decay"].astype(np.float64) * y[t - 1]
        x = y @ np.linalg.inv(forward).T + side["mean"]
        return x.reshape(len(e), self.heads, self.dims[s]).transpose(1, 0, 2)
