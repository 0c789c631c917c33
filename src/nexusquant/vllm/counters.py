"""What the connector counts, in the scheduler and in every worker."""

from __future__ import annotations

import threading
from collections.abc import Mapping

COUNTERS: Mapping[str, str] = {
    "lookups": "Requests whose blocks were looked up in the store.",
    "looked_up_blocks": "Blocks that were looked up in the store.",
    "found_blocks": "Blocks of these that the store had, counted from the first.",
    "saved_blocks": "Blocks stored, one rank's part each.",
    "saved_bytes": "Bytes stored.",
    "saved_raw_bytes": "Bytes that the stored blocks take in the KV cache.",
    "save_seconds": "Seconds spent encoding and storing blocks, all threads together.",
    "unsaved_blocks": "Blocks that could not be stored.",
    "loaded_blocks": "Blocks loaded, one rank's part each.",
    "loaded_bytes": "Bytes loaded from the store.",
    "load_seconds": "Seconds spent fetching and decoding blocks, all threads together.",
    "failed_blocks": "Blocks that were to be loaded and could not: vLLM computes them again.",
    "damaged_blocks": "Blocks of these whose bytes were not what was stored.",
    "store_errors": "Calls of the store that failed.",
}


class Counters:
    """Sums since they were last taken. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = {}

    def add(self, **counts: float) -> None:
        """Add to some of COUNTERS."""
        with self._lock:
            for name, count in counts.items():
                self._sums[name] = self._sums.get(name, 0) + count

    def take(self) -> dict[str, float]:
        """The sums, which begin anew."""
        with self._lock:
            sums, self._sums = self._sums, {}
        return sums
