"""Streams of a live cache: a JSON description and the tensors that it implies, in order.

Shapes are not written: they follow from the description, so a tensor of another size is refused by
its number of bytes, before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from nexusquant.errors import FormatError, NonFiniteError, UnsupportedError
from nexusquant.nxq import Reader, canonical
from nexusquant.prefix.fields import Fields
from nexusquant.prefix.payloads import Payload, pieces

DTYPES = {
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
FLOATS = ("float16", "bfloat16", "float32", "float64")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_ABOUT = 1 << 20
"""Bytes of a description."""


def name_of(x: Tensor | torch.dtype) -> str:
    """The name of a dtype in files.

    Raises:
        UnsupportedError: it has none.
    """
    dtype = x.dtype if isinstance(x, Tensor) else x
    if dtype not in _NAMES:
        raise UnsupportedError(f"{dtype} cannot be saved; known are {', '.join(DTYPES)}.")
    return _NAMES[dtype]


class ArrayWriter:
    """Collects the tensors of a stream."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._chunks: list[bytes] = []

    def put(
        self,
        x: Tensor,
        *shape: int,
        along_tokens: bool = False,
        check: Callable[[Tensor], bool] | None = None,
    ) -> str:
        """Add a tensor of this shape; returns its dtype's name.

        Args:
            along_tokens: its last axis are tokens, one byte each.
            check: as `ArrayReader.take` will.

        Raises:
            NonFiniteError: values that a reader will not take.
            UnsupportedError: it has another shape.
        """
        if tuple(x.shape) != shape:
            raise UnsupportedError(
                f"a tensor of shape {tuple(x.shape)} where {shape} was expected: such a cache"
                " cannot be saved."
            )
        name = name_of(x)
        if check is not None and not check(x):
            raise NonFiniteError("NaN or infinity in the cache: it cannot be saved.")
        data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._chunks += self._payload.encode(data, shape[-1] if along_tokens else 0)
        return name

    def chunks(self, about: dict[str, Any]) -> list[bytes]:
        """The stream: a description and the tensors."""
        raw = canonical.encode(about)
        if len(raw) > MAX_ABOUT:
            raise UnsupportedError(f"a description of {len(raw)} bytes, at most {MAX_ABOUT}.")
        return [raw, *self._chunks]


class ArrayReader:
    """Reads a stream that `ArrayWriter` made.

    Attributes:
        about: its description.
        device: where its tensors go.
    """

    def __init__(self, reader: Reader, stream: str, payload: Payload, device: torch.device) -> None:
        self._stream, self._payload, self.device = stream, payload, device
        if not reader.streams.get(stream):
            raise FormatError(f"{stream}: missing.")
        # In one read, which matters where each is a request.
        raw, *self._chunks = reader.read_range(stream, 0, reader.streams[stream])
        self._next = 0
        if len(raw) > MAX_ABOUT:
            raise FormatError(f"{stream}: a description of {len(raw)} bytes.")
        try:
            value = canonical.decode(bytes(raw))
        except ValueError as error:
            raise FormatError(f"{stream}: its description is not as written ({error}).") from error
        self.about = Fields(value, stream)

    def take(
        self,
        what: str,
        dtype: str,
        *shape: int,
        along_tokens: bool = False,
        check: Callable[[Tensor], bool] | None = None,
    ) -> Tensor:
        """The next tensor, on the device.

        Args:
            what: what messages call it.
            check: whether its values, on the CPU, are possible.

        Raises:
            FormatError: it is not there, has another size or impossible values.
        """
        size = prod(shape) * DTYPES[dtype].itemsize
        stop = self._next + pieces(size)
        if stop > len(self._chunks):
            raise FormatError(f"{self._stream}: {what} of {size} bytes is missing.")
        chunks, self._next = self._chunks[self._next : stop], stop
        run = shape[-1] if along_tokens else 0
        try:
            data = self._payload.decode(chunks, size, run)
        except FormatError as error:
            raise FormatError(f"{self._stream}: {what}: {error}") from error
        if size:
            x = torch.frombuffer(data, dtype=DTYPES[dtype]).view(shape)
        else:
            x = torch.empty(shape, dtype=DTYPES[dtype])
        if check is not None and not check(x):
            raise FormatError(f"{self._stream}: {what} has impossible values.")
        return x.to(self.device)

    def close(self) -> None:
        """Everything was read."""
        self.about.close()
        if left := len(self._chunks) - self._next:
            raise FormatError(f"{self._stream}: {left} chunks more than its description implies.")


def finite(x: Tensor) -> bool:
    """Neither NaN nor infinity."""
    return bool(torch.isfinite(x).all())
