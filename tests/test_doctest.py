"""Every docstring example runs, with a tiny model where one is needed. None is skipped."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import nexusquant
from tests.tiny_checkpoint import tiny_model, tiny_tokenizer

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def installed(package: str) -> bool:
    """Whether there is such a package, not just a folder of tests with its name."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def examples() -> list[doctest.DocTest]:
    """All docstrings with examples, of all modules."""
    finder = doctest.DocTestFinder()
    found = []
    wanted = {
        "nexusquant.kernels.cpu.": "numba",
        "nexusquant.kernels.gpu.": "triton",
        "nexusquant.vllm.connector": "vllm",
        "nexusquant.vllm.metrics": "vllm",
        "nexusquant.vllm.support": "vllm",
    }
    absent = tuple(prefix for prefix, needs in wanted.items() if not installed(needs))
    for info in pkgutil.walk_packages(nexusquant.__path__, "nexusquant."):
        if not info.name.endswith("__main__") and not info.name.startswith(absent):
            found += finder.find(importlib.import_module(info.name), info.name)
    return [test for test in found if test.examples]


TESTS = examples()


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What examples may use without defining it."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer))
    ids = torch.randint(2, len(tokenizer), (1, 400), generator=torch.Generator().manual_seed(0))
    text = tokenizer.decode(torch.randint(2, len(tokenizer), (2000,)))
    return {"model": model, "tokenizer": tokenizer, "input_ids": ids, "text": text}


@pytest.mark.usefixtures("own_scorers")
@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_example(test: doctest.DocTest, names: dict[str, Any]) -> None:
    skipped = [e.lineno for e in test.examples if e.options.get(doctest.SKIP)]
    assert not skipped, f"examples have to run, lines {skipped} of {test.name} are skipped"
    test.globs = {**test.globs, **names}
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)


def test_the_public_api_has_examples() -> None:
    have = [test.name for test in TESTS]
    for name in nexusquant.__all__:
        thing = getattr(nexusquant, name)
        if name == "evaluate":
            assert any(test.startswith("nexusquant.evaluate") for test in have)
        elif callable(thing) and not (
            isinstance(thing, type) and issubclass(thing, nexusquant.NexusQuantError)
        ):
            assert any(test.endswith(f".{name}") for test in have), f"{name} has no example"
