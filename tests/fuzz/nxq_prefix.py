"""`python -m tests.fuzz.nxq_prefix FOLDER`: fuzzing of stored prefixes; see README.md."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["nexusquant"]):
    from tests.fuzz import nxq_harness, prefix_decoders


def run(data: bytes) -> None:
    nxq_harness.check(data)


def mutate(data: bytes, size: int, seed: int) -> bytes:
    return nxq_harness.mutate(data, size, seed, atheris.Mutate)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of layers that stay exact
    nxq_harness.DECODERS.append(prefix_decoders.decode)
    prefix_decoders.write_seeds(Path(sys.argv[1]))
    atheris.Setup(sys.argv, run, custom_mutator=mutate)
    atheris.Fuzz()
