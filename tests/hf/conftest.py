"""A model that every test must leave exactly as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from tests.hf.models import ATTENTIONS, tiny
from tests.hf.state import State


@pytest.fixture(params=ATTENTIONS)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A model that every test must leave as it was."""
    gc.collect()  # caches of other tests that only a cycle keeps alive
    model = tiny("llama", request.param)
    state = State(model)
    yield model
    state.assert_restored()
