"""`python -m tests.fuzz.nxq_reader`: coverage-guided fuzzing of .nxq files; see README.md."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["nexusquant"]):
    from tests.fuzz import nxq_harness


def run(data: bytes) -> None:
    nxq_harness.check(data)


def mutate(data: bytes, size: int, seed: int) -> bytes:
    return nxq_harness.mutate(data, size, seed, atheris.Mutate)


if __name__ == "__main__":
    atheris.Setup(sys.argv, run, custom_mutator=mutate)
    atheris.Fuzz()
