"""What `generate` and `forward` can be asked for: right with exact codes, consistent with real."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer, cache_utils, pipeline, set_seed

from nexusquant import CompressionConfig, NexusCache, nexusquant_evict
from nexusquant.hf.notices import NexusQuantWarning
from tests.hf.models import assert_same_run, feed, generate, left_padded, prompt, step_logits, tiny
from tests.hf.situation_cases import CODES, EXACT, FULL_AND_SLIDING, HALF, SETTINGS
from tests.tiny_checkpoint import tiny_model, tiny_tokenizer


@torch.no_grad()
def by_hand(model: Any, cache: Any, ids: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """Greedy decoding in a loop of one's own: (sequences, logits of every step)."""
    logits, steps = feed(model, cache, ids, ids.shape[1])[:, -1], []
    for step in range(new):
        steps.append(logits)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        if step < new - 1:
            logits = feed(model, cache, ids[:, -1:], 1)[:, -1]
    return ids, torch.stack(steps, 1)


@SETTINGS
@FULL_AND_SLIDING
def test_a_loop_of_ones_own_equals_generate(kind: str, settings: CompressionConfig) -> None:
    model = tiny(kind)
    cache = NexusCache(model, settings)
    out = generate(model, prompt(40), 20, cache=NexusCache(model, settings))
    sequences, logits = by_hand(model, cache, prompt(40), 20)
    assert torch.equal(sequences, out.sequences)
    torch.testing.assert_close(logits, step_logits(out), rtol=0, atol=1e-4)
    with torch.no_grad(), nexusquant_evict(model, settings):
        past, ids = None, prompt(40)
        for token in [ids, *sequences[:, 40:-1].split(1, 1)]:
            output = model(token, cache=past)
            past = output.cache
    torch.testing.assert_close(output.logits[:, -1], logits[:, -1], rtol=0, atol=1e-4)


@CODES
def test_sampled_sequences_with_codes_equal_the_repeated_prompt(
    settings: CompressionConfig,
) -> None:
    model = tiny()
    ids, mask = left_padded([33, 20])
    with nexusquant_evict(model, settings):
        set_seed(5)
        ours = generate(model, ids, 20, do_sample=True, num_return_sequences=3, attention_mask=mask)
        set_seed(5)
        again = generate(
            model,
            ids.repeat_interleave(3, 0),
            20,
            do_sample=True,
            attention_mask=mask.repeat_interleave(3, 0),
        )
    assert_same_run(ours, again)


@CODES
@FULL_AND_SLIDING
def test_beams_with_codes_score_as_each_sequence_fed_alone(
    kind: str, settings: CompressionConfig
) -> None:
    model = tiny(kind)
    with nexusquant_evict(model, settings):
        out = generate(
            model, prompt(30), 20, num_beams=4, num_return_sequences=4, output_scores=True
        )
    for row, score in zip(out.sequences, out.sequences_scores, strict=True):
        cache = NexusCache(model, settings)
        logits = [feed(model, cache, row[None, :30], 30)[:, -1:]]
        logits.append(feed(model, cache, row[None, 30:-1], 1))
        chosen = torch.cat(logits, 1)[0].log_softmax(-1).gather(-1, row[30:, None])
        torch.testing.assert_close(chosen.sum() / 20, score, rtol=0, atol=1e-4)


def contrastive(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """Contrastive search in small: repeat the cache, try the best three, select one."""
    cache = kwargs["cache"]
    out = model(input_ids, cache=cache, output_hidden_states=True)
    context, logits = out.hidden_states[-1], out.logits[:, -1]
    for _ in range(14):
        weights, ids = logits.softmax(-1).topk(3)
        cache.batch_repeat_interleave(3)
        out = model(ids.view(-1, 1), cache=cache, output_hidden_states=True)
        new = out.hidden_states[-1].view(len(ids), 3, -1)
        alike = torch.cosine_similarity(new[:, :, None], context[:, None], dim=-1).amax(-1)
        best = (0.4 * weights - 0.6 * alike).argmax(-1)
        rows = best + 3 * torch.arange(len(ids))
        cache.batch_select_indices(rows)
        logits = out.logits[rows, -1]
        context = torch.cat([context, out.hidden_states[-1][rows]], 1)
        input_ids = torch.cat([input_ids, ids.gather(1, best[:, None])], 1)
    return input_ids


@torch.no_grad()
@FULL_AND_SLIDING
def test_contrastive_search_equals_stock_and_rows_alone(kind: str) -> None:
    model = tiny(kind)
    ids = prompt(30, batch=2)
    stock = model.generate(ids, custom_generate=contrastive, max_new_tokens=14)
    with nexusquant_evict(model, EXACT) as run:
        ours = model.generate(ids, custom_generate=contrastive, max_new_tokens=14)
    assert run.stats.compressed_layers == 3
    assert torch.equal(ours, stock)
    both = contrastive(model, ids, cache=NexusCache(model, HALF))
    for row in range(2):
        alone = contrastive(model, ids[row : row + 1], cache=NexusCache(model, HALF))
        assert torch.equal(alone[0], both[row])


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "quantized"},
    ],
    ids=lambda mode: "-".join(map(str, next(reversed(mode.items())))),
)
def test_what_stock_refuses_is_refused_with_the_same_words(
    mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu(*_: Any) -> None:
        raise RuntimeError("no GPU")

    # As on any machine without a GPU and without optimum-quanto.
    monkeypatch.setattr(torch.cuda, "default_stream", no_gpu)
    monkeypatch.setattr(cache_utils, "is_optimum_quanto_available", lambda: False)
    model = tiny()
    with pytest.raises((ValueError, RuntimeError, ImportError)) as stock:
        generate(model, prompt(20), 4, **mode)
    with warnings.catch_warnings(), nexusquant_evict(model, HALF):
        warnings.simplefilter("ignore", NexusQuantWarning)
        with pytest.raises(stock.type) as ours:
            generate(model, prompt(20), 4, **mode)
    assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize("negative", [None, 35], ids=["last_token", "negative_prompt"])
def test_guidance_equals_stock_and_compresses_both_sides(negative: int | None) -> None:
    model = tiny()
    guided: dict[str, Any] = {"guidance_scale": 1.5}
    if negative:
        guided["negative_prompt_ids"] = prompt(negative, seed=9)
    stock = generate(model, prompt(40, seed=2), 20, **guided)
    assert not torch.equal(stock.sequences, generate(model, prompt(40, seed=2), 20).sequences)
    with nexusquant_evict(model, EXACT) as run:
        ours = generate(model, prompt(40, seed=2), 20, **guided)
    assert run.stats.compressed_layers == 3, "the unconditional side's, which ran last"
    assert ours.cache.layers[0].stored.count > 40
    assert_same_run(ours, stock)
    # A cache of one's own is for the prompt; the other side then has a plain one.
    own = generate(model, prompt(40, seed=2), 20, cache=NexusCache(model, EXACT), **guided)
    assert_same_run(own, stock)


@FULL_AND_SLIDING
def test_five_turns_go_on_as_a_copy_does(kind: str) -> None:
    """The returned cache, turn after turn; and it stays smaller."""
    model, ids, past, length = tiny(kind), prompt(30), None, 0
    with nexusquant_evict(model, HALF) as run:
        for turn in range(5):
            twin = copy.deepcopy(past)
            out = generate(model, ids, 10, cache=past)
            if turn:
                assert_same_run(generate(model, ids, 10, cache=twin), out, 0)
            past, length = out.cache, ids.shape[1] + 9
            assert past.get_seq_length() == length
            ids = torch.cat([out.sequences, prompt(9 + turn, seed=turn)], 1)
    assert run.stats.tokens == length
    assert run.stats.compression_ratio > 1.5, "of 100 tokens, 8 uncoded in fp32"


@torch.no_grad()
def test_tuples_are_returned_as_ever() -> None:
    model = tiny()
    stock = model(prompt(40), return_dict=False)
    with nexusquant_evict(model, EXACT):
        first = model(prompt(40)[:, :30], return_dict=False)
        second = model(prompt(40)[:, 30:], cache=first[1], return_dict=False)
        plain = model.generate(prompt(40), max_new_tokens=9, do_sample=False)
    assert isinstance(second, tuple)
    assert len(second) == len(stock) == 2
    torch.testing.assert_close(second[0], stock[0][:, 30:], rtol=0, atol=1e-4)
    assert second[1].get_seq_length() == 40
    assert torch.equal(plain, generate(model, prompt(40), 9).sequences)


@SETTINGS
@FULL_AND_SLIDING
def test_embeddings_as_prompt_equal_ids_as_prompt(kind: str, settings: CompressionConfig) -> None:
    model = tiny(kind)
    ids, mask = left_padded([41, 30])
    embedded = model.get_input_embeddings()(ids).detach()
    with nexusquant_evict(model, settings):
        by_ids = generate(model, ids, 20, attention_mask=mask)
        by_vector = generate(model, None, 20, inputs_embeds=embedded, attention_mask=mask)
    assert torch.equal(by_vector.sequences, by_ids.sequences[:, 41:])
    torch.testing.assert_close(step_logits(by_vector), step_logits(by_ids), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 7])], ids=["one", "three", "some"])
def test_logits_to_keep_are_those_of_all(keep: Any) -> None:
    model = tiny()
    chosen = keep if isinstance(keep, Tensor) else slice(-keep, None)
    caches = [NexusCache(model, HALF) for _ in range(2)]
    for ids in (prompt(40), prompt(9)):
        whole, few = (
            model(ids, cache=cache, logits_to_keep=kept).logits
            for cache, kept in zip(caches, (0, keep), strict=True)
        )
        torch.testing.assert_close(few, whole[:, chosen], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_text_generation_pipeline_inside_a_block(batch_size: int) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    write = pipeline("text-generation", model=tiny_model(len(tokenizer)), tokenizer=tokenizer)
    texts = ["pack my box", "the quick brown fox jumps over the lazy dog " * 3]
    settings = {"max_new_tokens": 12, "do_sample": False, "batch_size": batch_size}
    stock = write(texts, **settings)
    with nexusquant_evict(write.model, EXACT) as run:
        assert write(texts, **settings) == stock
    assert run.stats.compressed_layers == 2
    with nexusquant_evict(write.model, HALF) as run:
        assert len(write(texts, **settings)) == 2
    assert run.stats.kept_tokens < run.stats.tokens


def test_a_streamer_shows_what_is_returned_while_it_is_made() -> None:
    model, tokenizer = tiny_model(320), tiny_tokenizer()
    ids = prompt(40) + 10
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    cache, twin = NexusCache(model, HALF), NexusCache(model, HALF)
    whole = model.generate(ids, cache=twin, max_new_tokens=20, do_sample=False)
    arguments = {"cache": cache, "max_new_tokens": 20, "do_sample": False}
    worker = threading.Thread(
        target=model.generate, args=(ids,), kwargs={**arguments, "streamer": streamer}
    )
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert text == tokenizer.decode(whole[0, 40:])
    assert cache.nbytes == twin.nbytes


@pytest.mark.parametrize("new", [1, 12])  # right behind the prompt nothing is left unquantized
def test_a_quantized_cache_of_others_is_left_alone_with_one_warning(new: int) -> None:
    from transformers.cache_utils import Cache, QuantizedLayer

    class Rounded(QuantizedLayer):
        def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
            return tensor.half()

        def _dequantize(self, q_tensor: Tensor) -> Tensor:
            return q_tensor.float()

    model = tiny()
    caches = [Cache(layers=[Rounded(residual_length=8) for _ in range(3)]) for _ in range(2)]
    stock = generate(model, prompt(40), new, cache=caches[0])
    with (
        pytest.warns(NexusQuantWarning, match="Cache is left uncompressed") as caught,
        nexusquant_evict(model) as run,
    ):
        ours = generate(model, prompt(40), new, cache=caches[1])
    assert len(caught) == 1
    assert run.stats.tokens == 40 + new - 1
    assert_same_run(ours, stock, 0)
