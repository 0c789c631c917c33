"""pack, inspect, verify, generate --prefix and calibrate --store on a tiny random model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nexusquant
from nexusquant import NexusCache, load_store_profile, loading, nxq
from nexusquant.hf.fingerprint import fingerprint
from nexusquant.hf.store_profiles import default_store_path
from nexusquant.prefix.saving import DEFAULT_BITS
from nexusquant.stores import open_store
from tests.cli_prefix.cases import ASKED, continued, refused
from tests.nxq.cases import contents
from tests.stores.servers import running
from tests.test_cli import STORY, run


@pytest.mark.filterwarnings("ignore:this model has no profile for live caches")
def test_generate_goes_on_as_load_does(folder: Path, packed: Path) -> None:
    expected = continued(folder, lambda model, ids: nexusquant.load(packed, model))
    code, out, err = run("generate", folder, "--prefix", packed, *ASKED)
    assert (code, out) == (0, expected)
    assert "Stored cache: loading" in err
    live = continued(folder, lambda model, ids: nexusquant.load(packed, model, quality="high"))
    assert run("generate", folder, "--prefix", packed, "--quality", "high", *ASKED)[1] == live


def test_generate_beside_a_plain_cache(folder: Path, packed: Path) -> None:
    code, out, err = run("generate", folder, "--prefix", packed, "--compare", *ASKED)
    assert code == 0
    assert "quality as stored" in err
    assert "plain cache answers" in err
    assert out == continued(folder, lambda model, ids: nexusquant.load(packed, model))


@pytest.mark.parametrize("codec", ["auto", "zstd+delta"])
def test_a_live_cache_goes_on_exactly(
    folder: Path, story: Path, tmp_path: Path, codec: str
) -> None:
    path = tmp_path / "live.nxq"
    args = ("--prompt-file", story, "-o", path, "--quality", "high", "--codec", codec)
    assert run("pack", folder, *args)[0] == 0

    def live(model: Any, ids: Any) -> Any:
        cache = NexusCache(model, "high")
        with torch.inference_mode():
            model(ids, cache=cache)
        return cache

    assert run("generate", folder, "--prefix", path, *ASKED)[1] == continued(folder, live)
    assert "leave them out" in refused(
        "generate", folder, "--prefix", path, "--quality", "high", *ASKED
    )


def test_two_processes(folder: Path, packed: Path, tmp_path: Path) -> None:
    """What one process packed, another goes on behind: with the profile that the first kept."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "nexusquant", "generate", str(folder)]
    command += ["--prefix", str(packed), *map(str, ASKED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = continued(folder, lambda model, ids: nexusquant.load(packed, model))
    assert done.stdout.splitlines() == expected.splitlines()  # "\r" is a newline in text mode


def test_inspect_says_what_there_is(folder: Path, packed: Path) -> None:
    code, out, _ = run("inspect", packed)
    assert code == 0
    model, tokenizer = loading.load_model(folder)
    count = len(tokenizer(STORY).input_ids)
    cells = dict(re.findall(r"│ (\S.*?)\s*│\s*(.*?) │", out))
    assert cells["codec"] == "entropy"
    assert cells["fingerprint"] == fingerprint(model)
    assert cells["tokens"] in (str(count), f"{4 * count:,} B")
    with nxq.Reader.open(packed) as reader:
        assert cells["layer.0"] == f"{reader.size('layer.0'):,} B"
        elements = reader.meta["elements"]
    size = packed.stat().st_size
    assert cells["the file"] == f"{size:,} B"
    assert cells["ratio to fp16"] == f"{2 * elements / size:.2f}x"


def test_inspect_prints_nothing_that_a_file_should_not(packed: Path, tmp_path: Path) -> None:
    meta, streams, _ = contents(nxq.Reader.open(packed))
    evil = {"[/red]": "[bold]x[/bold]", "\x1b[2J": "\x1b]0;title\x07", "long": "x" * 5000,
            "wide": "\u202e" + "模" * 200, "n" * 999: 1e300, "no": None, "is": True}  # fmt: skip
    path = tmp_path / "evil.nxq"
    path.write_bytes(nxq.pack({**meta, **evil}, streams))
    code, out, _ = run("inspect", path)
    assert code == 0
    assert "[bold]x[/bold]" in out.replace("\n", "")
    assert all(x.isprintable() for x in out.replace("\n", ""))
    assert len(out) < 20_000


def test_verify(folder: Path, packed: Path) -> None:
    assert run("verify", packed)[:2] == (0, f"{packed}: all checksums are right\n")
    code, out, _ = run("verify", packed, "--model", folder)
    assert (code, out) == (0, f"{packed}: all checksums are right, it decodes\n")


@pytest.mark.parametrize("kind", ["directory", "redis"])
def test_stores(kind: str, folder: Path, known: Path, story: Path, tmp_path: Path) -> None:
    if kind == "directory":
        check_store(str(tmp_path / "store"), folder, story)
        return
    with running() as server:
        check_store(server.url, folder, story)
    assert "Check that the server runs" in refused("inspect", "mine", "--store", server.url)


def check_store(store: str, folder: Path, story: Path) -> None:
    def loaded(model: Any, ids: Any) -> Any:
        with open_store(store) as opened:
            return nexusquant.load(opened, model, key=key)

    args, at = ("--prompt-file", story, "--store", store), ("--store", store)
    code, out, err = run("pack", folder, *args)
    assert code == 0, err
    key = out.split()[-1]
    assert run("pack", folder, *args, "--key", "mine")[1].split()[-1] == "mine"
    expected = continued(folder, loaded)
    for name in (key, "mine"):
        assert run("generate", folder, "--prefix", name, *at, *ASKED)[:2] == (0, expected)
    assert "entropy" in run("inspect", key, *at)[1]
    assert run("verify", key, *at, "--model", folder)[0] == 0
    assert "has no other" in refused("inspect", "other", *at)
    assert "is not a key" in refused("verify", "../x", *at)


def test_a_missing_profile_is_built_once_and_kept(
    folder: Path, story: Path, tmp_path: Path
) -> None:
    args = ("pack", folder, "--prompt-file", story, "-o")
    _, _, first = run(*args, tmp_path / "a")
    _, _, second = run(*args, tmp_path / "b")
    assert "building a storage profile, once" in first
    assert "building" not in second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    kept = load_store_profile(default_store_path(fingerprint(loading.load_model(folder)[0])))
    assert kept.source == "Python language reference"
    with nxq.Reader.open(tmp_path / "a") as reader:
        assert reader.meta["profile"] == kept.digest


def test_options_of_pack(folder: Path, known: Path, story: Path, tmp_path: Path) -> None:
    sizes = []
    for bits in (0.5, DEFAULT_BITS, 8):
        run("pack", folder, "--prompt-file", story, "-o", tmp_path / "p", "--bits", bits)
        sizes.append((tmp_path / "p").stat().st_size)
    assert sizes == sorted(set(sizes))
    run("pack", folder, "--prompt-file", story, "-o", tmp_path / "p", "--embed-profile")
    known.unlink()
    assert run("generate", folder, "--prefix", tmp_path / "p", *ASKED)[0] == 0
    run("pack", folder, "--prompt-file", "-", "-o", tmp_path / "q", stdin=STORY)
    with nxq.Reader.open(tmp_path / "q") as reader:
        assert reader.streams["tokens"] == 1


def test_calibrate_store(folder: Path, story: Path, tmp_path: Path) -> None:
    assert "--rope-page" in refused("calibrate", folder, "--store", "--rope-page", 1)
    text = tmp_path / "text"
    text.write_text("ABCDEFGHIJKLMNOP " + STORY * 4)
    code, out, err = run("calibrate", folder, "--store", "--text", text, "--tokens", 448)
    assert code == 0, err
    model, _ = loading.load_model(folder)
    assert out.splitlines()[1] == str(default_store_path(fingerprint(model)))
    assert load_store_profile(out.splitlines()[1]).source == "text"
    assert "448 tokens" in refused("calibrate", folder, "--store", "--text", story)
