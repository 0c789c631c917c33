"""Our arithmetic is not the caller's: no autocast, no autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_arithmetic(device: torch.device) -> Iterator[None]:
    """Run in the precision that the code asks for, recorded by nobody."""
    with torch.no_grad():
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield
