"""The command line, run in process on a tiny random model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import nexusquant
from nexusquant import PRESETS, CompressionConfig, NexusCache, load_profile, loading
from nexusquant.cli import app
from nexusquant.cli.common import parse_settings
from nexusquant.errors import ConfigError
from nexusquant.kernels import use_operator
from nexusquant.statistics import MIN_TOKENS
from tests.kernel_cases import FAST

EXACT = ("--set", "codec=exact", "--set", "evict_ratio=0")
needs_numba = pytest.mark.skipif("numba" not in FAST, reason="needs Numba, an optional extra")
STORY = "the lazy dog packs my box with five dozen liquor jugs. " * 8


@pytest.fixture
def story(tmp_path: Path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    return file


def run(*args: str | Path | int, stdin: str | None = None) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; anything but a deliberate exit is a failure."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def plain_answer(folder: Path, text: str, count: int) -> str:
    model, tokenizer = loading.load_model(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=1)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_version() -> None:
    assert run("--version") == (0, f"nexusquant {nexusquant.__version__}\n", "")


def test_help_and_version_do_not_load_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from nexusquant.cli import app\n"
        "names = 'generate', 'pack', 'inspect', 'verify'\n"
        "for args in (['--version'], ['--help'], *([x, '--help'] for x in names)):\n"
        "    assert CliRunner().invoke(app, args).exit_code == 0, args\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_numba
def test_warmup_compiles_once_what_a_model_needs(folder: Path) -> None:
    from nexusquant.kernels.cpu.kept import folder as kept_in

    assert run("warmup", folder)[0] == 0
    status, out, _ = run("warmup", folder)
    assert status == 0
    assert out == f"all 6 kernels are there\nkept in {kept_in()}\n"
    status, out, _ = run("info")
    assert status == 0
    assert re.search(r"compiled kernels: \d+ of 15, in", out)
    assert str(kept_in()) in out


def test_warmup_of_a_model_that_is_not_there(tmp_path: Path) -> None:
    status, out, err = run("warmup", tmp_path / "nowhere")
    assert status == 2
    assert out == ""
    assert "nowhere" in err


def test_warmup_without_numba() -> None:
    before = use_operator("reference")
    try:
        assert "nothing to compile" in run("warmup")[1]
        assert "compiled kernels" not in run("info")[1]
    finally:
        use_operator(before)


def test_the_line_about_compiling(
    folder: Path, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stderr, where the statistics are."""
    line = "compiling kernels took 2.0 s, once on this machine"
    monkeypatch.setattr("nexusquant.progress.compile_kernels", lambda *_, **__: line)
    status, out, err = run("generate", folder, "--prompt-file", story, "--max-new-tokens", 2)
    assert status == 0
    assert line in err
    assert line not in out


def test_module_runs_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nexusquant", "--version"], check=True, capture_output=True
    )
    assert done.stdout.decode() == f"nexusquant {nexusquant.__version__}\n"


def test_presets_shows_every_preset_and_field() -> None:
    code, out, _ = run("presets")
    assert code == 0
    for name in PRESETS:
        assert name in out
    row = next(line for line in out.splitlines() if "key_bits" in line)
    distinct = dict.fromkeys(PRESETS.values())
    assert [cell.strip() for cell in row.split("│")[2:-1]] == [
        str(config.key_bits) for config in distinct
    ]
    for field in nexusquant.CompressionConfig.__dataclass_fields__:
        assert field in out


def test_generate_puts_the_text_on_stdout_and_statistics_on_stderr(
    folder: Path, story: Path
) -> None:
    code, out, err = run("generate", folder, "--prompt-file", story, "--max-new-tokens", "8")
    assert code == 0
    model, tokenizer = loading.load_model(folder)
    ids = tokenizer(STORY, return_tensors="pt").input_ids
    cache = NexusCache(model, "balanced")
    expected = model.generate(ids, cache=cache, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert out == tokenizer.decode(expected[0, ids.shape[1] :]).strip() + "\n"
    assert str(cache.stats()) in err
    assert "first token after" in err


def test_generate_with_exact_storage_equals_plain_generate(folder: Path, story: Path) -> None:
    code, out, _ = run("generate", folder, "--prompt-file", story, "--max-new-tokens", "8", *EXACT)
    assert (code, out) == (0, plain_answer(folder, STORY, 8) + "\n")


def test_generate_appends_the_prompt_to_the_file_and_reads_stdin(folder: Path, story: Path) -> None:
    args = ("--prompt", "why?", "--max-new-tokens", "4", *EXACT)
    expected = plain_answer(folder, f"{STORY}\n\nwhy?", 4) + "\n"
    assert run("generate", folder, "--prompt-file", story, *args)[1] == expected
    assert run("generate", folder, "--prompt-file", "-", *args, stdin=STORY)[1] == expected


def test_compare_prints_both_answers(folder: Path, story: Path) -> None:
    code, out, err = run(
        "generate", folder, "--prompt-file", story, "--max-new-tokens", "8", "--compare", *EXACT
    )
    assert code == 0
    assert "ratio, fp16 bytes / measured" in err
    assert "32.00" in err
    assert "quality balanced, codec=exact, evict_ratio=0" in err
    assert "plain cache answers" in err
    assert out == plain_answer(folder, STORY, 8) + "\n"


def test_more_tokens_than_positions_is_said(folder: Path) -> None:
    _, _, err = run("generate", folder, "--prompt", STORY * 5, "--max-new-tokens", "1")
    assert "more than the 512 this model was made for" in err


def test_demo_measures_both_caches(
    folder: Path, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "demo_model", lambda report: folder)
    args = ("--prompt-tokens", "90", "--max-new-tokens", "5", "--question", "[bold]why?")
    code, out, err = run("demo", "--prompt-file", story, *args)
    assert code == 0, err
    _, tokenizer = loading.load_model(folder)
    total = len(tokenizer(STORY).input_ids)
    assert f"90 of {total} tokens" in out
    assert "[bold]why?" in out
    assert "plain cache answers" in out
    assert "compressed cache answers" in out
    assert "Plain cache: reading" in err
    assert "Compressed cache: reading" in err


def test_demo_refuses_more_text_than_the_model_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "demo_model", lambda report: folder)
    code, _, err = run("demo", "--prompt-tokens", "400")
    assert code == 2
    assert "--prompt-tokens 400: this model has room for 264" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--quality", "hihg"), "unknown quality 'hihg'; known presets: lossless, high"),
        (("--set", "evict_ratio"), "--set evict_ratio: must be KEY=VALUE"),
        (("--set", "evict=0.5"), "unknown setting evict; known: "),
        (("--set", "evict_ratio=1.5"), r"evict_ratio=1.5: must be in [0, 1)"),
        (("--dtype", "int7"), "dtype 'int7': must be one of"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
        (("--prompt", " "), "the prompt is empty"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    folder: Path, args: tuple[str, ...], message: str
) -> None:
    code, out, err = run("generate", folder, "--prompt", "a dog", *args)
    assert (code, out) == (2, "")
    complaint = [line for line in err.splitlines() if not line.startswith("Loading")]
    assert len(complaint) == 1
    assert complaint[0].startswith(f"error: {message}")


def test_missing_model_and_missing_file(folder: Path, tmp_path: Path) -> None:
    code, _, err = run("generate", tmp_path / "gone", "--prompt", "a dog")
    assert code == 2
    assert "no such file or folder" in err
    code, _, err = run("generate", folder, "--prompt-file", tmp_path / "gone.txt")
    assert code == 2
    assert f"{tmp_path / 'gone.txt'}: cannot read it (No such file or directory)" in err


def test_unreadable_prompt_files(folder: Path, tmp_path: Path) -> None:
    binary, empty = tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.write_text("\n")
    for file, message in ((binary, "not UTF-8 text"), (empty, "holds no text")):
        code, _, err = run("generate", folder, "--prompt-file", file)
        assert code == 2
        assert message in err


def test_settings_are_typed() -> None:
    assert parse_settings(
        ["evict_ratio=0.5", "per_head=false", "sinks = 8", "scorer=snapkv", "key_bits=3"]
    ) == {"evict_ratio": 0.5, "per_head": False, "sinks": 8, "scorer": "snapkv", "key_bits": 3}
    with pytest.raises(ConfigError, match="must be KEY=VALUE"):
        parse_settings(["=3"])


def test_evaluate_prints_every_preset_and_refuses_short_texts(folder: Path, story: Path) -> None:
    arguments = ("evaluate", folder, "--text", story, "--continuation", "16")
    status, out, _ = run(*arguments, "--prefix", "64", "--decode", "3")
    assert status == 0
    assert "3 tokens one by one behind 64" in " ".join(out.split())
    out = out.partition("3 tokens one by one")[0]
    assert [line.split()[1] for line in out.splitlines() if "%" not in line and "." in line] == [
        "lossless", "high", "balanced", "max",
    ]  # fmt: skip
    status, _, err = run(*arguments, "--prefix", "100000")
    assert status == 2
    assert "fewer than --prefix 100000" in err


def test_calibrate_keeps_a_profile_that_is_found(
    folder: Path, tmp_path: Path, user_cache: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ABCDEFGH " + STORY * 20)
    arguments = ("calibrate", folder, "--text", text, "--pieces", "1")
    for options, page in (((), CompressionConfig.rope_page), (("--rope-page", "8"), 8)):
        status, out, err = run(*arguments, *options, "--tokens", MIN_TOKENS)
        assert status == 0, err
        assert f"2 layers from {MIN_TOKENS} tokens of text.txt" in out
        (file,) = user_cache.rglob(f"*-page{page}.safetensors")
        assert load_profile(file).rope_page == page
    status, _, err = run(*arguments, "--tokens", MIN_TOKENS - 1)
    assert status == 2
    assert f"--tokens {MIN_TOKENS - 1}: a profile needs at least {MIN_TOKENS}" in err


def test_profile_of_a_command(
    folder: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode or a file, in force for what the command does; anything else is refused at once."""
    monkeypatch.setenv("NEXUSQUANT_PROFILE", "first-prompt")  # put back behind this test
    generate = ("generate", folder, "--prompt-file", story, "--max-new-tokens", 2, "--profile")
    code, _, err = run(*generate, "frist-prompt")
    assert code == 2
    assert "--profile frist-prompt: must be one of auto, first-prompt, none" in err
    file = tmp_path / "profile.safetensors"
    text = tmp_path / "text.txt"
    text.write_text("ABCDEFGH " + STORY * 20)
    arguments = ("calibrate", folder, "--text", text, "--tokens", MIN_TOKENS, "--output", file)
    assert run(*arguments)[0] == 0
    for given in ("none", "auto", file):
        assert run(*generate, given)[0] == 0
    other = tmp_path / "other.safetensors"
    other.write_bytes(file.read_bytes()[:-9])
    code, _, err = run(*generate, other)
    assert code == 2
    assert "other" in err
