"""Hidden codes: what the prompts hold, what counts as kept, and that questions do not mix."""

from __future__ import annotations

import math

import pytest
import torch

from nexusquant import ConfigError, NexusCache, evaluate
from nexusquant.evaluate.haystacks import PLACES, encode, needle_prompt
from nexusquant.hf.cache import plain_cache
from tests.tiny_checkpoint import tiny_model, tiny_tokenizer

TEXT = "the lazy dog packs my box with five dozen liquor jugs. " * 30
DEPTHS = (0.25, 0.75)
GRID = {"lengths": [300], "depths": DEPTHS, "rounds": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_model(len(tokenizer))


def test_a_prefix_is_text_with_a_needle_at_every_depth(tokenizer):
    ids = encode(tokenizer, TEXT, special=True)
    prompt = needle_prompt(tokenizer, ids, 300, DEPTHS)
    assert prompt.prefix.shape == (1, 300)
    whole = tokenizer.decode(prompt.prefix[0])
    facts = [
        f"\nRemember this: the secret code of the {place} is {PLACES[place]}.\n"
        for place in ("harbour", "library")
    ]
    assert all(whole.count(fact) == 1 for fact in facts)
    before, _, rest = whole.partition(facts[0])
    between, _, behind = rest.partition(facts[1])
    assert TEXT.startswith(before + between + behind)
    parts = [len(encode(tokenizer, part)) for part in (before, between, behind)]
    assert parts[0] / sum(parts) == pytest.approx(0.25, abs=0.02)
    assert parts[2] / sum(parts) == pytest.approx(0.25, abs=0.02)
    question, answer = prompt.questions[1]
    assert tokenizer.decode(question[0]) == (
        "\nQuestion: what is the secret code of the library?"
        "\nAnswer: the secret code of the library is 20586"
    )
    assert tokenizer.decode(question[0, -answer:]) == " 20586"


def test_questions_follow_the_order_in_which_depths_are_given(tokenizer):
    ids = encode(tokenizer, TEXT)
    prompt = needle_prompt(tokenizer, ids, 300, (0.9, 0.0, 1.0))
    whole = tokenizer.decode(prompt.prefix[0])
    at = [whole.index(PLACES[place]) for place in ("harbour", "library", "station")]
    assert at[1] < at[0] < at[2]
    assert whole.endswith(f"{PLACES['station']}.\n")


def test_rounds_take_other_parts_of_the_text_and_other_places(tokenizer):
    ids = torch.arange(1000) % 300
    ids[0] = tokenizer.bos_token_id
    prompt = needle_prompt(tokenizer, ids, 300, DEPTHS, share=0.5, turn=1)
    assert prompt.prefix[0, 0] == tokenizer.bos_token_id
    whole = tokenizer.decode(prompt.prefix[0])
    assert [place for place in PLACES if f"of the {place} is" in whole] == ["station", "garden"]
    room = 300 - sum(
        len(encode(tokenizer, f"\nRemember this: the secret code of the {p} is {PLACES[p]}.\n"))
        for p in ("station", "garden")
    )
    start = (1000 - room) // 2
    assert prompt.prefix[0, 1:20].tolist() == ids[start + 1 : start + 20].tolist()


def oracle(model, spoil):
    """Make `model` predict every next token, but for those that `spoil(ids, cache)` names."""

    def answer(module, args, kwargs, output):
        ids = args[0][0]
        right = torch.cat([ids[1:], ids[:1]])
        for back in spoil(ids, kwargs["cache"]):
            right[-1 - back] += 1
        one_hot = torch.nn.functional.one_hot(right, output.logits.shape[-1]).float()
        output.logits = one_hot[None, -output.logits.shape[1] :]

    return model.register_forward_hook(answer, with_kwargs=True)


def test_kept_counts_only_what_the_full_model_knows(model, tokenizer):
    """The full model never knows the last digit; the compressed one loses two of the library's."""
    library = encode(tokenizer, PLACES["library"]).tolist()

    def spoil(ids, cache):
        if not isinstance(cache, NexusCache):
            return [1]
        return [1, 2, 3] if ids.tolist()[-len(library) :] == library else []

    oracle(model, spoil)
    digits = len(encode(tokenizer, " 20586"))
    (grid,) = evaluate.needles(model, tokenizer, [TEXT], ["high"], **GRID)
    shallow, deep = grid.cells
    assert (shallow.length, shallow.depth, deep.depth) == (300, *DEPTHS)
    # Round 1 has harbour and library, round 2 station and garden.
    assert (shallow.asked, shallow.known, shallow.kept) == (2 * digits, *[2 * digits - 2] * 2)
    assert (deep.asked, deep.known, deep.kept) == (2 * digits, 2 * digits - 2, 2 * digits - 4)
    assert shallow.share == 1
    assert deep.share == (2 * digits - 4) / (2 * digits - 2)
    assert grid.share == (4 * digits - 6) / (4 * digits - 4)


def test_every_question_is_asked_of_an_untouched_cache(model, tokenizer):
    ids = encode(tokenizer, TEXT, special=True)
    prompt = needle_prompt(tokenizer, ids, 300, DEPTHS)
    heard = []
    handle = model.register_forward_hook(lambda module, args, output: heard.append(output.logits))
    grid = {"lengths": [300], "depths": DEPTHS, "rounds": 1}
    evaluate.needles(model, tokenizer, [TEXT], ["max"], **grid)
    handle.remove()
    asked = [logits for logits in heard if logits.shape[1] > 1]
    makes = [lambda: plain_cache(model), lambda: NexusCache(model, "max")]
    pairs = [(make, question) for make in makes for question, _ in prompt.questions]
    assert len(asked) == len(pairs)
    for (make, question), logits in zip(pairs, asked, strict=True):
        cache = make()
        with torch.no_grad():
            model(prompt.prefix, cache=cache)
            expected = model(question, cache=cache).logits
        torch.testing.assert_close(logits, expected[:, -logits.shape[1] :])


def test_grids_of_several_qualities_lengths_and_texts(model, tokenizer):
    oracle(model, lambda ids, cache: [])
    lines: list[str] = []
    config = evaluate.DEFAULT_PRESETS[0], NexusCache(model, "max").config
    grids = evaluate.needles(
        model, tokenizer, [TEXT, TEXT[11:]], config,
        lengths=[300, 200], depths=[0.5], rounds=1, report=lines.append,
    )  # fmt: skip
    assert [grid.quality for grid in grids] == list(config)
    assert [(cell.length, cell.share) for cell in grids[1].cells] == [(300, 1), (200, 1)]
    assert list(grids[0].ratios) == [300, 200]
    assert grids[0].ratios[300] < grids[1].ratios[300]
    assert lines[2:5] == [
        "300 tokens, lossless, prefix 1 of 2",
        "300 tokens, lossless, prefix 2 of 2",
        "300 tokens, compressed, prefix 1 of 2",
    ]


def test_nothing_known_has_no_share(model, tokenizer):
    oracle(model, lambda ids, cache: range(1, 12))
    (grid,) = evaluate.needles(model, tokenizer, [TEXT], ["high"], **GRID)
    assert sum(cell.known for cell in grid.cells) == 0
    assert math.isnan(grid.share)
    assert all(math.isnan(cell.share) for cell in grid.cells)


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ([], {}, "no text to hide needles in"),
        ([TEXT], {"lengths": []}, r"lengths=\[\]: must be different numbers"),
        ([TEXT], {"lengths": [300, 300]}, r"lengths=\[300, 300\]: must be different"),
        ([TEXT], {"depths": []}, "must be 1 to 12 different numbers from 0 to 1"),
        ([TEXT], {"depths": [0.5, 1.1]}, r"depths=\[0.5, 1.1\]: must be"),
        ([TEXT], {"depths": [i / 12 for i in range(13)]}, "must be 1 to 12"),
        ([TEXT], {"rounds": 0}, "rounds=0: must be at least 1"),
        ([TEXT], {"lengths": [60]}, "length 60: 2 needles take .* more than half"),
        (["a dog"], {}, "length 300 needs a text of at least"),
    ],
)
def test_bad_grids_are_refused(model, tokenizer, texts, changes, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.needles(model, tokenizer, texts, **(GRID | changes))
