"""Fixtures for every test: a fixed seed, and fresh memory full of poison on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, bytes 0xFF: whoever reads before writing is found out."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.is_floating_point():
                return out.detach().fill_(torch.nan).requires_grad_(out.requires_grad)
            return out.fill_(255) if out.dtype == torch.uint8 else out

        return fill

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
