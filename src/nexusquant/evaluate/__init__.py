"""Measuring what compression costs: divergence, retrieval, long decoding, loss per domain, memory.

Everything is teacher-forced over a compressed prefix, so the scored tokens really see codes.
"""

from nexusquant.evaluate.base import DEFAULT_PRESETS, Quality
from nexusquant.evaluate.decoding import Decoding, decoding
from nexusquant.evaluate.divergence import Divergence, divergence
from nexusquant.evaluate.domains import PresetLoss, domain_test
from nexusquant.evaluate.drift import Drift, DriftBucket, drift
from nexusquant.evaluate.memory import Memory, memory
from nexusquant.evaluate.needles import NeedleCell, NeedleGrid, needles

__all__ = [
    "DEFAULT_PRESETS",
    "Decoding",
    "Divergence",
    "Drift",
    "DriftBucket",
    "Memory",
    "NeedleCell",
    "NeedleGrid",
    "PresetLoss",
    "Quality",
    "decoding",
    "divergence",
    "domain_test",
    "drift",
    "memory",
    "needles",
]
