"""Work of other threads on the model's device, beside the model's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_own = threading.local()


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A point in the work of the current stream; None where there are no streams."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


@contextmanager
def beside(device: torch.device, after: torch.cuda.Event | None) -> Iterator[None]:
    """This thread's own stream, behind what was marked; on leaving, its work is done.

    Caches of vLLM are inference tensors, so they may be written in inference mode only.
    """
    with torch.inference_mode():
        if device.type != "cuda" or after is None:
            yield
            return
        streams: dict[torch.device, torch.cuda.Stream] = vars(_own).setdefault("streams", {})
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
        stream = streams[device]
        stream.wait_event(after)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()
