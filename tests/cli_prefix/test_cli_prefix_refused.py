"""Damaged, missing and foreign prefixes: one line, status 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nexusquant
from nexusquant import FormatError, NexusCache, loading, nxq
from nexusquant.cli.prefix import behind
from tests.cli_prefix.cases import ASKED, refused
from tests.nxq.cases import contents
from tests.test_cli import run
from tests.tiny_checkpoint import save_folder, tiny_model, tiny_tokenizer


def test_verify_finds_every_kind_of_damage(folder: Path, packed: Path) -> None:
    data = packed.read_bytes()
    for at in (0, 9, 40, len(data) // 2, len(data) - 1):
        packed.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert str(packed) in refused("verify", packed)
    packed.write_bytes(data[:-1])
    assert "bytes" in refused("verify", packed)
    assert "bytes" in refused("generate", folder, "--prefix", packed, *ASKED)
    meta, streams, _ = contents(nxq.Reader.open(data))
    packed.write_bytes(nxq.pack({**meta, "step": 999}, streams))
    assert run("verify", packed)[0] == 0
    assert "out of range" in refused("verify", packed, "--model", folder)


def test_what_pack_refuses(folder: Path, story: Path, tmp_path: Path) -> None:
    text, out = ("--prompt-file", story), ("-o", tmp_path / "p")
    assert "--output FILE or --store URL" in refused("pack", folder, *text)
    assert "one of them" in refused("pack", folder, *text, *out, "--store", tmp_path)
    assert run("pack", folder, *out)[0] == 2
    assert "--key: give --store" in refused("pack", folder, *text, *out, "--key", "x")
    for codec, more in (("raw", ()), ("zstd", ()), ("entropy", ("--quality", "high"))):
        assert f"--codec {codec}: " in refused("pack", folder, *text, *out, "--codec", codec, *more)
    assert "--codec x: known are" in refused("pack", folder, *text, *out, "--codec", "x")
    assert "cannot read" in refused("pack", folder, "--prompt-file", tmp_path / "none", *out)
    assert "quality" in refused("pack", folder, *text, *out, "--quality", "no such")
    assert run("pack", folder, *text, *out, "--bits", 17)[0] == 2
    assert not (tmp_path / "p").exists()


def test_what_is_not_there(folder: Path, packed: Path, known: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    for command in (
        ("inspect", none),
        ("verify", none),
        ("generate", folder, "--prefix", none, *ASKED),
    ):
        assert "cannot be opened" in refused(*command)
    assert "give --prefix" in refused("generate", folder, "--store", tmp_path, *ASKED)
    assert "the prompt is empty" in refused("generate", folder, "--prefix", packed)
    known.unlink()
    assert "it is not there" in refused("generate", folder, "--prefix", packed, *ASKED)
    given = ("generate", folder, "--prefix", packed, "--store-profile", known, *ASKED)
    assert "cannot read" in refused(*given)
    known.write_bytes(b"no profile")
    assert "it is not there" in refused("generate", folder, "--prefix", packed, *ASKED)
    assert "not a storage profile" in refused(*given)


def test_another_model(packed: Path, tmp_path: Path) -> None:
    other = save_folder(tmp_path / "other")
    tiny_model(len(tiny_tokenizer()), seed=1).save_pretrained(other)
    assert "is of another model" in refused("generate", other, "--prefix", packed, *ASKED)
    assert "is of another model" in refused("verify", packed, "--model", other)


def test_prefixes_without_usable_token_ids(folder: Path, packed: Path) -> None:
    meta, streams, _ = contents(nxq.Reader.open(packed))
    count = meta["tokens"]
    generate = ("generate", folder, "--prefix", packed, "--compare", *ASKED)
    packed.write_bytes(nxq.pack(meta, {**streams, "tokens": [b"\xff" * (4 * count)]}))
    assert "token ids that the model has not" in refused(*generate)
    packed.write_bytes(nxq.pack(meta, {**streams, "tokens": [b"\xff" * count]}))
    assert "bytes of token ids" in refused(*generate)
    del streams["tokens"]
    packed.write_bytes(nxq.pack(meta, streams))
    assert "saved without its token ids" in refused(*generate)


def test_several_sequences(folder: Path, tmp_path: Path) -> None:
    model, _ = loading.load_model(folder)
    cache = NexusCache(model)
    with torch.no_grad():
        model(torch.randint(2, 300, (2, 40)), cache=cache)
    nexusquant.save(cache, tmp_path / "p")
    meta, streams, _ = contents(nxq.Reader.open(tmp_path / "p"))
    (tmp_path / "p").write_bytes(nxq.pack(meta, {"tokens": [bytes(160)], **streams}))
    assert "several sequences" in refused("generate", folder, "--prefix", tmp_path / "p", *ASKED)


def test_a_file_that_is_replaced_meanwhile(folder: Path, packed: Path) -> None:
    network, tokenizer = loading.load_model(folder)
    ids, opened = behind(str(packed), None, network, tokenizer, "x", None, None)
    assert opened().get_seq_length() < ids.shape[1]
    meta, streams, _ = contents(nxq.Reader.open(packed))
    packed.write_bytes(nxq.pack({**meta, "another": "file"}, streams))
    with pytest.raises(FormatError, match="was replaced while it was read"):
        opened()


def test_options_of_something_else(folder: Path, packed: Path, story: Path, tmp_path: Path) -> None:
    pack = ("pack", folder, "--prompt-file", story, "-o", tmp_path / "p", "--quality", "high")
    assert "--bits: a cache with --quality" in refused(*pack, "--bits", 2)
    assert "--store-profile: a cache" in refused(*pack, "--store-profile", story)
    assert "are of --model" in refused("verify", packed, "--device", "cpu")
    assert "--chat" in refused("generate", folder, "--prefix", packed, "--chat", *ASKED)
    assert "give --prefix" in refused("generate", folder, "--store-profile", story, *ASKED)
    pack = ("pack", folder, "--prompt-file", story)
    assert "no file can be made" in refused(*pack, "-o", story / "p")
    assert "no option foo" in refused(*pack, "--store", f"{tmp_path}/s?foo=1")
