"""Transforms: orthonormal for every head size, energy spread evenly, signs pinned."""

from __future__ import annotations

import math

import pytest
import torch

from nexusquant.math.transform import orthonormal

DIMS = [1, 8, 12, 16, 24, 64, 80, 96, 112, 128, 192, 256]


@pytest.mark.parametrize("name", ["hadamard", "identity"])
@pytest.mark.parametrize("dim", DIMS)
def test_orthonormal(name: str, dim: int) -> None:
    matrix = orthonormal(name, dim)
    assert matrix.shape == (dim, dim)
    assert matrix.dtype == torch.float32
    product = matrix.double() @ matrix.double().mT
    torch.testing.assert_close(product, torch.eye(dim).double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_no_entry_holds_much_of_a_vector(dim: int) -> None:
    """A one-hot vector spreads over all coordinates: perfectly for powers of two."""
    largest = float(orthonormal("hadamard", dim).abs().max())
    even = 1 / math.sqrt(dim)
    power = dim & (dim - 1) == 0
    assert largest <= (even if power else math.sqrt(2) * even) * (1 + 1e-6)


def test_identity_does_nothing() -> None:
    x = torch.randn(3, 24)
    assert torch.equal(x @ orthonormal("identity", 24).mT, x)


def test_hadamard_64_is_sylvester_times_signs() -> None:
    """The signs are part of the byte format: stored codes mean nothing under other ones."""
    matrix = orthonormal("hadamard", 64)
    signs = matrix[0].sign()
    bits = "".join("1" if sign > 0 else "0" for sign in signs.tolist())
    assert int(bits, 2) == 0x25A220F1B0585F22
    i, j = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    parity = torch.zeros(64, 64, dtype=torch.long)
    for bit in range(6):
        parity ^= (i >> bit) & (j >> bit) & 1
    torch.testing.assert_close(matrix, (1 - 2 * parity) * signs / 8, rtol=0, atol=1e-7)


def test_the_default_dtype_does_not_matter() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        for name in ("hadamard", "identity"):
            made = orthonormal.__wrapped__(name, 40)
            assert torch.equal(made, orthonormal(name, 40))
            assert made.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
