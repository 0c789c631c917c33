"""`model(ids, labels=ids)` inside a block measures the compressed cache, in every calling style."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import CompressionConfig, nexusquant_evict
from nexusquant.hf.notices import NexusQuantWarning
from tests.hf.models import ATTENTIONS, left_padded, prompt, tiny
from tests.hf.situation_cases import EXACT


def stock_and_ours(
    model: Any, *args: Any, settings: CompressionConfig = EXACT, **kwargs: Any
) -> tuple[Any, Any]:
    stock = model(*args, **kwargs)
    with nexusquant_evict(model, settings):
        return stock, model(*args, **kwargs)


def assert_same(ours: Any, stock: Any, valid: Tensor | None = None) -> None:
    torch.testing.assert_close(ours.loss, stock.loss, rtol=0, atol=1e-4)
    valid = torch.ones(stock.logits.shape[:2], dtype=torch.bool) if valid is None else valid
    assert ours.logits.shape == stock.logits.shape
    torch.testing.assert_close(ours.logits[valid], stock.logits[valid], rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt_neox"])
@torch.no_grad()
def test_exact_codec_gives_the_stock_loss_and_logits(kind: str, attention: str) -> None:
    ids = prompt(90, batch=2)
    stock, ours = stock_and_ours(tiny(kind, attention), ids, labels=ids)
    assert_same(ours, stock)


@torch.no_grad()
def test_presets_give_different_losses() -> None:
    model, ids = tiny(), prompt(400)
    losses = {None: float(model(ids, labels=ids).loss)}
    for quality in ("lossless", "high", "balanced", "max"):
        with nexusquant_evict(model, quality) as run:
            losses[quality] = float(model(ids, labels=ids).loss)
        assert run.stats.tokens == 400
    assert len({round(loss, 5) for loss in losses.values()}) == 5
    assert float(model(ids, labels=ids).loss) == losses[None]


@pytest.mark.parametrize("lengths", [[90, 70], [90, 20]])
@torch.no_grad()
def test_with_padding_and_ignored_labels(lengths: list[int]) -> None:
    ids, mask = left_padded(lengths)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, -10:-5] = -100
    stock, ours = stock_and_ours(tiny(), ids, attention_mask=mask, labels=labels)
    assert_same(ours, stock, mask.bool())


@torch.no_grad()
def test_with_right_padding() -> None:
    ids, mask = (t.flip(1) for t in left_padded([90, 40]))
    labels = ids.masked_fill(mask == 0, -100)
    stock, ours = stock_and_ours(tiny(), ids, attention_mask=mask, labels=labels)
    assert_same(ours, stock, mask.bool())


@torch.no_grad()
def test_with_position_ids() -> None:
    ids, mask = left_padded([90, 50])
    # Strides that no default reproduces: RoPE would not notice a mere shift.
    positions = (mask.cumsum(-1) - 1).clamp(min=0) * torch.tensor([[3], [2]])
    stock, ours = stock_and_ours(
        tiny(), ids, attention_mask=mask, position_ids=positions, labels=ids
    )
    assert_same(ours, stock, mask.bool())


@torch.no_grad()
def test_positional_arguments_and_tuples() -> None:
    model, ids = tiny(), prompt(90)
    mask = torch.ones_like(ids)
    stock, ours = stock_and_ours(model, ids, mask, None, None, None, ids)
    assert_same(ours, stock)
    stock, ours = stock_and_ours(model, ids, labels=ids, return_dict=False)
    assert isinstance(ours, tuple)
    for index in range(2):
        torch.testing.assert_close(ours[index], stock[index], rtol=0, atol=1e-4)


def test_without_no_grad_the_numbers_are_the_same_and_carry_no_gradient() -> None:
    ids = prompt(90)
    stock, ours = stock_and_ours(tiny(), ids, labels=ids)
    assert_same(ours, stock)
    assert not ours.loss.requires_grad


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 33])
@torch.no_grad()
def test_short_texts(tokens: int) -> None:
    ids = prompt(tokens, batch=3)
    stock, ours = stock_and_ours(tiny(), ids, labels=ids)
    torch.testing.assert_close(ours.loss, stock.loss, rtol=0, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(ours.logits, stock.logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_nested_calls_of_two_models_do_not_mix() -> None:
    """A model that scores with another one inside its own forward pass."""
    outer, inner, ids = tiny(), tiny("gemma3"), prompt(90)
    expected = [float(m(ids, labels=ids).loss) for m in (outer, inner)]
    seen: list[float] = []
    handle = outer.model.norm.register_forward_pre_hook(
        lambda *_: seen.append(float(inner(ids, labels=ids).loss)) and None
    )
    with nexusquant_evict(outer, EXACT), nexusquant_evict(inner, EXACT):
        loss = float(outer(ids, labels=ids).loss)
    handle.remove()
    assert [loss, *set(seen)] == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_without_labels_nothing_is_split() -> None:
    model, ids = tiny(), prompt(90)
    stock, ours = stock_and_ours(model, ids, settings=CompressionConfig(evict_ratio=0.8))
    torch.testing.assert_close(ours.logits, stock.logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_interrupted_call_leaves_nothing_behind() -> None:
    model, ids = tiny(), prompt(200)
    passes: list[int] = []

    def interrupt(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 4:  # in the last chunk
            raise KeyboardInterrupt

    with nexusquant_evict(model, "max"):
        handle = model.model.norm.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, labels=ids)
        handle.remove()
        output = model(ids[:, :50])
        assert output.loss is None
        assert output.logits.shape[1] == 50
    assert model(ids[:, :50]).loss is None


@torch.no_grad()
def test_loss_arguments_and_masks_of_four_dimensions_are_honoured() -> None:
    ids = prompt(90)
    stock, ours = stock_and_ours(tiny(), ids, labels=ids, num_items_in_batch=10)
    assert_same(ours, stock)
    mask = torch.ones(90, 90, dtype=torch.bool).tril()[None, None]
    stock, ours = stock_and_ours(tiny(), ids, labels=ids, attention_mask=mask)
    assert_same(ours, stock)


@pytest.mark.parametrize(
    "arguments",
    [{"use_cache": False}, {"output_hidden_states": True}, {"logits_to_keep": 90}],
)
@torch.no_grad()
def test_a_call_that_cannot_be_split_says_so(arguments: dict[str, Any]) -> None:
    model, ids = tiny(), prompt(90)
    stock = model(ids, labels=ids, **arguments)
    with (
        nexusquant_evict(model, "max"),
        pytest.warns(NexusQuantWarning, match=f"in one pass.*{next(iter(arguments))}"),
    ):
        ours = model(ids, labels=ids, **arguments)
    assert_same(ours, stock)
