"""Kernels ahead of their first use: what is needed, how it is kept, and who says what about it."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import nexusquant
from nexusquant.errors import NexusQuantWarning
from nexusquant.kernels.warmup import state, warm_up
from tests.kernel_cases import FAST

pytestmark = pytest.mark.skipif("numba" not in FAST, reason="needs Numba, an optional extra")
SOURCE = Path(nexusquant.__file__).parent


def printed(code: str, **environment: str) -> list[str]:
    """What a fresh interpreter prints, line by line."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def add_one(address: Any, task: Any) -> None:
    """A kernel that compiles in no time."""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Kernels that are kept in `tmp_path`, each as a new process would make it."""
    import numba

    from nexusquant.kernels.cpu import compiled, kept

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "_told", [])
    kept._once.cache_clear()
    return lambda: compiled.Task(add_one, "one")


def compilations(kernel: Any) -> int:
    """How often it was compiled rather than read."""
    return sum(kernel.dispatcher.stats.cache_misses.values())


def test_a_kernel_is_compiled_once_for_all_processes(make: Any) -> None:
    first, second = make(), make()
    assert not first.there
    assert first.address
    assert compilations(first) == 1
    assert second.there
    assert second.address
    assert compilations(second) == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "another's"])
def test_a_damaged_file_is_compiled_again(make: Any, damage: str) -> None:
    from nexusquant.kernels.cpu.kept import Kept

    first = make()
    assert first.address
    path = first.kept.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    foreign = b"not a pickle"
    path.write_bytes(
        {
            "cut": bytes(data[:-100]),
            "flipped": bytes(data),
            "empty": b"",
            "foreign": first.kept._digest(foreign) + foreign,
            "another's": Kept("another")._digest(bytes(data[32:])) + bytes(data[32:]),
        }[damage]
    )
    second = make()
    assert second.address
    assert compilations(second) == 1
    assert make().kept.read() is not None
    third = make()
    assert third.address
    assert compilations(third) == 0


def test_nowhere_to_write_is_said_once(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numba

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file"))
    first, second = make(), make()
    with pytest.warns(NexusQuantWarning, match="cannot be kept.*XDG_CACHE_HOME"):
        assert first.address
    assert second.address  # warnings are errors here
    assert compilations(second) == 1


def test_a_user_without_a_home(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    from nexusquant.kernels.cpu.kept import folder

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert folder() is None
    with pytest.warns(NexusQuantWarning, match="no home directory"):
        assert make().address


def test_kept_in_the_users_cache_directory(
    monkeypatch: pytest.MonkeyPatch, user_cache: Path
) -> None:
    import numba

    from nexusquant.kernels.cpu.kept import folder

    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    where = folder()
    assert where is not None
    assert where.parent == user_cache / "kernels"
    assert numba.__version__ in where.name
    assert nexusquant.__version__ in where.name


def test_many_threads_compile_it_once(make: Any) -> None:
    kernel = make()
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: kernel.address, range(16)))) == 1
    assert compilations(kernel) == 1


def test_first_use_is_said_in_the_log_once(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    from nexusquant.kernels.cpu import compiled

    with caplog.at_level(logging.WARNING, "nexusquant"):
        assert make().address
        assert compiled.Task(add_one, "other").address
    (record,) = caplog.records
    assert "compiling kernels for this CPU, once" in record.message
    assert "`nexusquant warmup`" in record.message
    caplog.clear()
    compiled._told.clear()
    assert make().address
    assert not caplog.records


def test_other_environments_find_them_and_other_sources_do_not(tmp_path: Path) -> None:
    """As a second virtual environment would, under another path."""
    warm_up([2])
    code = "from nexusquant.kernels.warmup import state; print(len(state([2]).compiled))"
    copy = tmp_path / "elsewhere" / "nexusquant"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert printed(code, PYTHONPATH=str(copy.parent)) == ["0"]
    with (copy / "kernels" / "cpu" / "code.py").open("a") as file:
        file.write("# a change\n")
    assert printed(code, PYTHONPATH=str(copy.parent)) == ["6"]


def test_nothing_is_compiled_or_read_in_a_generation_after_it() -> None:
    """In a process of its own, which has nothing but what it warmed up."""
    warm_up([2])
    code = """
import torch
from numba.core import event
from nexusquant import NexusCache
from nexusquant.hf.kernels import query_groups
from nexusquant.kernels.cpu import warmup as kernels
from nexusquant.kernels.warmup import warm_up
from tests.tiny_checkpoint import tiny_model

class Count(event.Listener):
    started = 0
    def on_start(self, event): self.started += 1
    def on_end(self, event): pass

model, count = tiny_model(320), Count()
warm_up(query_groups(model.config))
loaded = lambda: sum(len(one.dispatcher.overloads) for one in kernels.needed(None, True))
before = loaded()
event.register("numba:compile", count)
ids = torch.randint(2, 320, (1, 300))
for quality in ("high", "max"):
    model.generate(ids, cache=NexusCache(model, quality=quality), max_new_tokens=40,
                   pad_token_id=1)
print(query_groups(model.config), before, loaded() - before, count.started)
"""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, str(SOURCE.parent)])
    assert printed(code, PYTHONPATH=path)[-1] == "[2] 6 0 0"


def test_progress_is_of_what_is_compiled(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nexusquant.kernels.cpu import compiled
    from nexusquant.kernels.cpu import warmup as kernels

    made = [compiled.Task(add_one, name) for name in ("a", "b", "c")]
    assert made[1].address
    monkeypatch.setattr(kernels, "needed", lambda groups, storage: made)
    assert state().compiled == ("a", "c")
    steps: list[tuple[int, int, str]] = []
    done = warm_up(progress=lambda *step: steps.append(step))
    assert steps == [(0, 2, "a"), (1, 2, "c")]
    assert done.compiled == ("a", "c")
    assert done.kernels == 3
    assert done.seconds > 0
    assert warm_up(progress=lambda *step: steps.append(step)).compiled == ()
    assert len(steps) == 2


def test_a_cpu_without_half_precision_is_left_to_the_reference() -> None:
    """LLVM would end the process."""
    code = "from nexusquant.kernels import operators; print(operators('cpu')['numba'])"
    said = printed(code, NUMBA_CPU_NAME="generic")
    assert platform.machine() not in ("x86_64", "AMD64") or "(F16C)" in said[0]
