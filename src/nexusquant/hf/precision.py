"""Our arithmetic is not the caller's: no autocast, and no autograd but where it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nexusquant.errors import UnsupportedError


@contextmanager
def own_arithmetic(device: torch.device) -> Iterator[None]:
    """Run in the precision that the code asks for, recorded by nobody."""
    with torch.no_grad():
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield


def refuse_gradient(_: torch.Tensor) -> torch.Tensor:
    """In place of a gradient."""
    raise UnsupportedError(
        "no gradient flows into the past of a compressed cache; run the whole text in one forward"
        " pass, or without a cache (use_cache=False)."
    )
