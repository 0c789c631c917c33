"""Both ways between us and kvpress (NVIDIA): our codes under its presses, its scores for our cache.

kvpress is never imported: a press is whatever has the methods of one. The hooks of kvpress 0.5
read a `cache_position` that transformers hands on up to 5.3, and kvpress asks for versions below
5.3; `PressedCache` needs these hooks, `PressScorer` works with later versions, too.
"""

from nexusquant.kvpress.cache import PressedCache
from nexusquant.kvpress.scorer import PressScorer

__all__ = ["PressScorer", "PressedCache"]
