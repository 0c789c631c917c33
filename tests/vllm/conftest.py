"""Fixtures of the tests that need vLLM: the small real model, a Redis of their own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexusquant.calibration import calibrate_store
from nexusquant.demo import calibration_text
from nexusquant.hf.store_profiles import save_store_profile
from nexusquant.loading import demo_model, load_model


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M-Instruct, in the user's cache directory as `nexusquant demo` leaves it."""
    return demo_model()


@pytest.fixture(scope="session")
def profile(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage profile of that model, from less text than `nexusquant calibrate --store` takes."""
    network, tokenizer = load_model(model)
    text = calibration_text()
    made = calibrate_store(network, tokenizer, [text], tokens=1024, pieces=3, source="test")
    return save_store_profile(made, tmp_path_factory.mktemp("profile") / "store.safetensors")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """The URL and the process of a server on a free port, gone after the test."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0", server
    finally:
        server.kill()
        server.wait()
