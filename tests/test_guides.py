"""The guides: every Python block runs, every command line parses, every page is in the index."""

from __future__ import annotations

import copy
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from nexusquant import NexusCache
from nexusquant.cli import app
from nexusquant.hf.cache_names import generate_cache_name
from nexusquant.profile_store import save_profile
from tests.hf.models import prompt, tiny
from tests.kvpress_cases import KeyNormPress
from tests.tiny_checkpoint import tiny_tokenizer

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
INDEX = GUIDES / "README.md"
PAGES = sorted(page for page in GUIDES.glob("*.md") if page != INDEX)
BLOCK = re.compile(r"^(<!-- [^\n]* -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str) -> list[tuple[int, str, str]]:
    """(line of its first character, the comment above it, code)."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start(3)), found[1] or "", found[3])
        for found in BLOCK.finditer(text)
        if found[2] == language
    ]


def random_model(kind: str) -> Any:
    return tiny(kind, vocab_size=320, bos_token_id=0, pad_token_id=1, eos_token_id=319)


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the index says that snippets may use."""
    model, tokenizer = random_model("llama"), tiny_tokenizer()
    with torch.no_grad():
        model(prompt(600), **{generate_cache_name(): (built := NexusCache(model))})
    assert built.profile is not None
    save_profile(replace(built.profile, source="a calibration"))  # as by default
    assistant, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for weight in assistant.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data += 0.25 * weight.data.std() * noise
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "input_ids": torch.randint(2, len(tokenizer), (1, 600), generator=generator),
        "assistant": assistant,
        "sliding_model": random_model("gemma3"),
        "folder": folder,
    }


@pytest.fixture
def presses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of kvpress; tests/test_kvpress_package.py has those of the package."""
    module = ModuleType("kvpress")
    vars(module)["KnormPress"] = KeyNormPress
    monkeypatch.setitem(sys.modules, "kvpress", module)


@pytest.mark.usefixtures("own_scorers")
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # early 5.x, offloaded
@EACH
def test_every_python_block_runs(
    page: Path,
    names: dict[str, Any],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(names["folder"].parent)
    found = blocks(page, "python")
    assert found, "a page shows what it says"
    provided = dict(names)
    for line, comment, code in found:
        if "needs kvpress" in comment:
            request.getfixturevalue("presses")
        code = re.sub(r"\bcache=", f"{generate_cache_name()}=", code)  # as the index says
        exec(compile("\n" * line + code, str(page), "exec"), names)
    assert all(names[name] is thing for name, thing in provided.items()), "they are others'"


@EACH
def test_snippets_assert_what_they_show(page: Path) -> None:
    for line, _, code in blocks(page, "python"):
        assert re.search(r"assert |\.assert_close\(|pytest\.(raises|warns)", code), line
        assert "print(" not in code, line
        assert ">>>" not in code, line


@pytest.mark.parametrize("page", [INDEX, *PAGES], ids=lambda page: page.stem)
def test_command_lines_parse(page: Path) -> None:
    commands: Any = get_command(app)
    for _, _, code in blocks(page, "bash"):
        for words in (shlex.split(line, comments=True) for line in code.splitlines()):
            if words[:1] != ["nexusquant"]:
                continue
            command = commands.commands[words[1]]
            context = command.context_class(command, info_name=words[1])
            _, left, _ = command.make_parser(context).parse_args(words[2:])
            assert not left, words


@EACH
def test_outputs_of_the_doctor_are_its_own(
    page: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(names["folder"].parent)
    for _, _, text in blocks(page, "text"):
        result = CliRunner().invoke(app, ["doctor", text.split()[0]])
        shown = [line.rstrip() for line in result.output.splitlines()]
        assert set(text.splitlines()) <= set(shown), result.output


def test_every_page_is_in_the_index_and_links_lead_somewhere() -> None:
    links = {page: re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")) for page in PAGES}
    links[INDEX] = re.findall(r"\]\(([^)#]+)[^)]*\)", INDEX.read_text("utf-8"))
    assert {page.name for page in PAGES} == set(links[INDEX])
    for page, targets in links.items():
        for target in targets:
            assert target.startswith("https://") or (page.parent / target).exists(), target


def test_lines_are_short_enough() -> None:
    for page in [INDEX, *PAGES]:
        assert max(map(len, page.read_text("utf-8").splitlines())) <= 160, page.name


def test_names_of_the_index_are_those_provided(names: dict[str, Any]) -> None:
    table = INDEX.read_text("utf-8").partition("## Names")[2]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(names)
