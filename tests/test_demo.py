"""The measuring behind `nexusquant demo` and `generate --compare`, on a tiny random model."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache

from nexusquant import CompressionConfig, ConfigError
from nexusquant.demo import (
    Run,
    comparison_table,
    context_limit,
    demo_text,
    encode_prompt,
    first_tokens,
    timed_run,
    warm_up,
)
from nexusquant.hf.cache import cache_stats
from nexusquant.statistics import MIN_TOKENS
from tests.tiny_checkpoint import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat=True)
MODEL = tiny_model(len(TOKENIZER))
ELEMENTS_PER_TOKEN = 2 * 2 * 2 * 16  # K and V, layers, KV heads, head_dim
PROMPT = "the lazy dog packs my box with five dozen liquor jugs. " * 12


def test_demo_text_is_long_and_holds_the_answer() -> None:
    text = demo_text()
    assert len(text) > 60_000
    assert 'The module "pdb" defines an interactive source code debugger' in text


def test_first_tokens_cuts_and_counts() -> None:
    whole = TOKENIZER(PROMPT).input_ids
    cut, total = first_tokens(TOKENIZER, PROMPT, 20)
    assert total == len(whole)
    assert PROMPT.startswith(cut)
    assert TOKENIZER(cut).input_ids == whole[:20]
    assert first_tokens(TOKENIZER, PROMPT, 10_000) == (PROMPT, total)


def test_encode_prompt_uses_the_chat_template_if_asked() -> None:
    chat = encode_prompt(TOKENIZER, "a dog")
    assert TOKENIZER.decode(chat[0]) == "<|start|>user: a dog<|end|><|start|>assistant: "
    raw = encode_prompt(TOKENIZER, "a dog", chat=False)
    assert TOKENIZER.decode(raw[0]) == "a dog"
    with pytest.raises(ConfigError, match="the prompt is empty"):
        encode_prompt(TOKENIZER, "", chat=False)


def test_context_limit() -> None:
    assert context_limit(MODEL) == 512


def test_stats_of_a_plain_cache_equal_the_formula() -> None:
    cache = DynamicCache(config=MODEL.config)
    with torch.no_grad():
        MODEL(torch.arange(2, 39)[None], cache=cache)
    stats = cache_stats(cache)
    assert stats.nbytes == 37 * ELEMENTS_PER_TOKEN * 4
    assert stats.compression_ratio == 0.5
    assert stats.bits_per_element == 32
    assert stats.tokens == stats.kept_tokens == 37


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return encode_prompt(TOKENIZER, PROMPT)


def test_plain_run_is_generate(ids: torch.Tensor) -> None:
    counts: list[int] = []
    run = timed_run(MODEL, TOKENIZER, ids, None, 9, counts.append)
    expected = MODEL.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=1)
    new = expected[0, ids.shape[1] :]
    assert run.answer == TOKENIZER.decode(new, skip_special_tokens=True).strip()
    assert counts == list(range(1, len(new) + 1))
    assert run.new_tokens == len(new)
    assert run.first_token_seconds > 0
    assert run.seconds_per_token is not None
    # The last token generated is never fed back, so the cache lacks it.
    assert run.stats.tokens == ids.shape[1] + len(new) - 1


def test_exact_compression_without_eviction_answers_the_same(ids: torch.Tensor) -> None:
    exact = CompressionConfig(codec="exact", evict_ratio=0.0)
    plain = timed_run(MODEL, TOKENIZER, ids, None, 9)
    assert timed_run(MODEL, TOKENIZER, ids, exact, 9).answer == plain.answer


def test_warming_up_uses_either_cache_and_builds_no_profile(
    ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that neither column has first times in it."""
    config = CompressionConfig()
    made: list[tuple[object, int, int]] = []

    def spy(*args: object) -> Run:
        run = timed_run(*args)
        made.append((args[3], run.stats.tokens, run.new_tokens))
        return run

    monkeypatch.setattr("nexusquant.demo.timed_run", spy)
    warm_up(MODEL, TOKENIZER, ids, config)
    assert [(each, tokens >= 64) for each, tokens, _ in made] == [(config, True), (None, True)]
    assert all(new > 1 and tokens < MIN_TOKENS for _, tokens, new in made)


def test_table_shows_what_was_measured(ids: torch.Tensor) -> None:
    plain = timed_run(MODEL, TOKENIZER, ids, None, 1)
    small = timed_run(MODEL, TOKENIZER, ids, CompressionConfig(evict_ratio=0.5), 1)
    assert small.stats.nbytes < plain.stats.nbytes / 4
    assert plain.seconds_per_token is None
    page = io.StringIO()
    Console(width=100, file=page).print(comparison_table(plain, small, "title"))
    rows = dict(re.findall(r"│ (\S[^│]*?) +│ +(\S[^│]*│ +\S[^│]*?) +│", page.getvalue()))
    sizes = re.findall(r"[\d.]+", rows["bytes, measured"])
    assert sizes == [f"{run.stats.nbytes / 2**20:.2f}" for run in (plain, small)]
    bits = re.findall(r"[\d.]+", rows["bits per element"])
    assert bits == ["32.00", f"{small.stats.bits_per_element:.2f}"]
    ratios = re.findall(r"[\d.]+", rows["ratio, fp16 bytes / measured"])
    assert ratios == ["0.50", f"{small.stats.compression_ratio:.2f}"]
    assert rows["time per further token"].split("│")[0].strip() == "-"
    tokens = ids.shape[1]
    assert f"{small.stats.kept_tokens:,.0f} of {tokens:,}" in rows["tokens kept per head"]
