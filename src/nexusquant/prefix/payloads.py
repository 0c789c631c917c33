"""How the tensors of a live cache become chunks: as they are, or compressed without loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nexusquant.errors import ConfigError, FormatError
from nexusquant.extras import need

PIECE = 1 << 24
"""Bytes of a tensor in one chunk, but for the last one."""
MOST = 512
"""Bytes that one byte of a compressed chunk may stand for."""
LEVEL = 9
"""Of zstandard, by default."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Payload:
    """A codec of the bytes of tensors.

    Attributes:
        name: in the file.
        level: of zstandard; None leaves the bytes as they are.
        delta: what lies along tokens is replaced by its differences, modulo 256.
    """

    name: str
    level: int | None = None
    delta: bool = False

    def encode(self, data: Bytes, run: int) -> list[bytes]:
        """The chunks of a tensor.

        Args:
            data: (bytes,).
            run: neighbouring bytes that belong to successive tokens, 0 for none.
        """
        if self.delta and run and data.size:
            rows = data.reshape(-1, run)
            data = np.diff(rows, axis=1, prepend=np.uint8(0)).reshape(-1)
        return [self._pack(data[i : i + PIECE].tobytes()) for i in range(0, len(data), PIECE)]

    def decode(self, chunks: Sequence[memoryview], size: int, run: int) -> bytearray:
        """Inverse of `encode`; `chunks` are as many as `pieces(size)`.

        Raises:
            FormatError: they do not stand for `size` bytes.
        """
        out = bytearray()
        for chunk in chunks:
            out += self._unpack(chunk, min(PIECE, size - len(out)))
        if self.delta and run and size:
            rows = np.frombuffer(out, np.uint8).reshape(-1, run)
            np.add.accumulate(rows, axis=1, out=rows)
        return out

    def _pack(self, piece: bytes) -> bytes:
        if self.level is None:
            return piece
        zstandard = need("zstandard")
        frame: bytes = zstandard.ZstdCompressor(level=self.level).compress(piece)
        return frame if len(piece) <= MOST * len(frame) and len(frame) < len(piece) else piece

    def _unpack(self, chunk: memoryview, size: int) -> bytes | memoryview:
        """`size` bytes; a chunk of as many is those bytes."""
        if len(chunk) == size:
            return chunk
        if self.level is None or len(chunk) > size or size > MOST * len(chunk):
            raise FormatError(f"a chunk of {len(chunk)} bytes cannot stand for {size}.")
        zstandard = need("zstandard")
        try:
            if zstandard.get_frame_parameters(chunk).content_size != size:
                raise FormatError(f"a compressed chunk does not stand for {size} bytes.")
            data: bytes = zstandard.ZstdDecompressor().decompress(chunk, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise FormatError(f"a compressed chunk is damaged ({error}).") from error
        if len(data) != size:
            raise FormatError(f"a compressed chunk holds {len(data)} bytes instead of {size}.")
        return data


def pieces(size: int) -> int:
    """Chunks of a tensor of `size` bytes."""
    return -(-size // PIECE)


PAYLOADS = ("raw", "zstd", "zstd+delta")


def payload_of(name: str, level: int = LEVEL) -> Payload:
    """A codec by its name.

    Raises:
        ConfigError: there is none, or no such level.
    """
    if name not in PAYLOADS:
        raise ConfigError(f"codec={name!r}: must be one of {', '.join(PAYLOADS)}.")
    if type(level) is not int or not 1 <= level <= 22:
        raise ConfigError(f"level={level!r}: must be an integer from 1 to 22.")
    return Payload(name, None if name == "raw" else level, name == "zstd+delta")
