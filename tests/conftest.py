"""Fixtures for every test: a fixed seed, no files of the user, poisoned memory on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.calibrated import Profiles
from benchmarks.competitors import Prompt
from nexusquant import scorers
from nexusquant.kernels import _made, operators, use_operator
from nexusquant.kernels.base import Operator
from tests.bench_cases import profiles_of, prompt_of
from tests.kernel_cases import FAST
from tests.tiny_checkpoint import save_folder, tiny_model


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session", autouse=True)
def no_user_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache directory is out of reach, also for fixtures of wider scope."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("session")))
        yield


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test finds the profiles that another one stored."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache" / "nexusquant"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tiny random model and its tokenizer."""
    return save_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A tiny random model of 320 words."""
    return tiny_model(320)


@pytest.fixture(scope="module")
def input_ids() -> Tensor:
    """(1, 200) words of that model."""
    return torch.randint(2, 320, (1, 200), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def prompt(model: LlamaForCausalLM) -> Prompt:
    """A prompt of that model, for the tests of benchmarks/."""
    return prompt_of(model)


@pytest.fixture(scope="module")
def profiles(model: LlamaForCausalLM) -> Profiles:
    """Its profiles, likewise."""
    return profiles_of(model)


@pytest.fixture
def own_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scorers registered by this test are gone after it."""
    monkeypatch.setattr(scorers, "SCORERS", dict(scorers.SCORERS))


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, bytes 0xFF: whoever reads before writing is found out."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.is_floating_point():
                return out.detach().fill_(torch.nan).requires_grad_(out.requires_grad)
            return out.fill_(255) if out.dtype == torch.uint8 else out

        return fill

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(params=[name for name, reason in operators("cpu").items() if not reason])
def each_operator(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with every operator that this machine's CPU has."""
    before = use_operator(request.param)
    yield request.param
    use_operator(before)


@pytest.fixture(params=FAST)
def fast(request: pytest.FixtureRequest) -> Operator:
    """Every operator but the reference."""
    return _made(request.param)
