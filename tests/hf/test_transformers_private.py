"""What we need of transformers is there; what is missing or renamed is said by name and version."""

from __future__ import annotations

import ast
import copy
import gc
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

import nexusquant
from nexusquant import NexusCache, UnsupportedError, nexusquant_evict
from nexusquant.hf import transformers_private as private
from nexusquant.hf.notices import NexusQuantWarning
from nexusquant.versions import TRANSFORMERS
from tests.hf.models import prompt, tiny

PACKAGE = Path(nexusquant.__file__).parent
ROOT = Path(__file__).parents[2]
NEWER = "99.1.0"


@pytest.fixture(autouse=True)
def unchecked() -> Any:
    """Whatever a test hides, the next one looks anew."""
    yield
    private.check_transformers.cache_clear()


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", NEWER)
    private.check_transformers.cache_clear()


# -- what is there


@pytest.mark.parametrize("need", private.NEEDS, ids=lambda need: need.name.split()[0])
def test_everything_needed_is_there(need: private.Need) -> None:
    assert need.there()


@pytest.mark.parametrize("name", private.__all__)
def test_every_name_exists(name: str) -> None:
    assert getattr(private, name) is not None or name.startswith("STOCK_")


def test_the_implementation_of_one_config_changes_alone() -> None:
    config = transformers.Gemma3Config()
    config._attn_implementation = "sdpa"
    private.set_implementation(config, "mine")
    assert private.implementation(config) == "mine"
    assert private.implementation(config.text_config) == "sdpa"


def test_attention_is_looked_up_in_these_tables() -> None:
    found = private.attention_tables()
    assert any("sdpa" in table for table in found)
    before = found[-1]["sdpa"]
    found[-1]["sdpa"] = test_attention_is_looked_up_in_these_tables
    try:
        given = private.ALL_ATTENTION_FUNCTIONS["sdpa"]
        assert given is test_attention_is_looked_up_in_these_tables or "sdpa" in found[0]
    finally:
        found[-1]["sdpa"] = before


def test_only_one_module_knows_what_may_move() -> None:
    """Names of transformers' modules and underscored attributes of its objects."""
    hidden = {private.IMPLEMENTATION, private._IMPLEMENTATION_HELD}
    hidden |= {private.PREPARE_CACHE, private.VALIDATE}
    hidden |= {"_local_mapping", "_global_mapping", "_supports_default_dynamic_cache"}
    for path in PACKAGE.rglob("*.py"):
        if path == Path(private.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
                assert node.module == "transformers.utils", f"{path}:{node.lineno}"
                assert [x.name for x in node.names] == ["logging"], f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in hidden, f"{path}:{node.lineno}"
            if isinstance(node, ast.Constant):
                assert node.value not in hidden, f"{path}:{node.lineno}"


# -- one range of versions


def test_the_tested_range_is_said_alike_everywhere() -> None:
    oldest, newest = TRANSFORMERS
    assert f"transformers>={oldest.removesuffix('.0')}" in (ROOT / "pyproject.toml").read_text()
    assert f"transformers=={newest}" in (ROOT / "requirements" / "dev.txt").read_text()
    assert f"transformers {oldest} to {newest}" in (ROOT / "README.md").read_text("utf-8")
    assert f"{oldest} to {newest}" in private.TESTED


# -- models that were copied while a cache or a block lived


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_works_like_the_model(copied: Any) -> None:
    model, ids = tiny(eos_token_id=95), prompt(400)
    with nexusquant_evict(model, "high"):
        cache = NexusCache(model)
        again = copied(model)
    del cache
    with nexusquant_evict(model, "high"):
        expected = model(ids, labels=ids)
    with nexusquant_evict(again, "high") as run:
        found = again(ids, labels=ids)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)
        again.generate(ids, max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert run.stats.compressed_layers == 3
    del run, found
    gc.collect()
    assert not {private.VALIDATE, private.PREPARE_CACHE} & set(vars(again))
    for module in again.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_a_method_of_the_users_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    own = type(model)._prepare_cache_for_generation.__get__(model)
    monkeypatch.setattr(model, private.PREPARE_CACHE, lambda *args, **kwargs: own(*args, **kwargs))
    mine = vars(model)[private.PREPARE_CACHE]
    cache = NexusCache(model)
    assert vars(model)[private.PREPARE_CACHE] is mine
    assert private.VALIDATE not in vars(model)
    del cache
    assert vars(model)[private.PREPARE_CACHE] is mine


# -- what a newer transformers may do to us


def test_a_newer_version_with_everything_works_without_a_word(newer: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert NexusCache(tiny()) is not None


def test_a_missing_convenience_is_one_warning(newer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.GenerationMixin, private.PREPARE_CACHE)
    model, ids = tiny(), prompt(60)
    with pytest.warns(NexusQuantWarning, match=f"{NEWER} has no GenerationMixin") as said:
        private.check_transformers()
    cache = NexusCache(model, quality="high")
    assert len(said) == 1
    assert "drafts" in str(said[0].message)
    model(ids, cache=cache)
    assert cache.stats().compressed_layers == 3


def test_something_essential_missing_is_an_error(
    newer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    monkeypatch.delattr(transformers.AttentionInterface, "_global_mapping")
    private.check_transformers.cache_clear()
    with pytest.raises(UnsupportedError, match=rf"{NEWER} has no AttentionInterface\._global"):
        NexusCache(model)


def test_a_new_duty_of_cache_layers_is_an_error(
    newer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    duties = private.CacheLayerMixin.__abstractmethods__ | {"get_block_table"}
    monkeypatch.setattr(private.CacheLayerMixin, "__abstractmethods__", duties)
    with pytest.raises(UnsupportedError, match="has no CacheLayerMixin with nothing to be defined"):
        NexusCache(tiny())


def test_a_private_name_that_moved_is_said_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a program would meet it: the import ends in our error, with the name and the version."""
    source = Path(private.__file__).read_text("utf-8")
    monkeypatch.setattr(transformers, "__version__", NEWER)
    monkeypatch.delattr(transformers.cache_utils, "CacheLayerMixin")
    with pytest.raises(UnsupportedError, match=rf"{NEWER} has moved .*CacheLayerMixin.* is tested"):
        exec(compile(source, "transformers_private.py", "exec"), {"__name__": "moved"})


def test_configs_have_what_eager_models_need() -> None:
    assert hasattr(PreTrainedConfig(), private._IMPLEMENTATION_HELD)
