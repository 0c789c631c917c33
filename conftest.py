"""Settings that are read on import: to be made before anything imports Triton or Numba."""

from __future__ import annotations

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Most tests are about what a prompt shows by itself; those of automatic profiles ask for them.
os.environ.setdefault("NEXUSQUANT_PROFILE", "first-prompt")

# Tests have a user's cache directory of their own, each of them; kernels are compiled once.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache" / "kernels"))
