"""The output projection is found by name and turned the right way round, in whatever model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from nexusquant import CompressionConfig, NexusCache
from nexusquant.hf import attention as hf_attention
from nexusquant.hf.output_side import output_side
from nexusquant.residual import OutputSide
from tests.hf.models import KINDS, left_padded, prompt, tiny


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=96, n_positions=600, n_embd=64, n_layer=2, n_head=4, bos_token_id=1,
        eos_token_id=None, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


class Holder(nn.Module):
    """An attention module with one child."""

    def __init__(self, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def assert_projects(weight: Tensor | None, layer: nn.Module, width: int) -> None:
    """`weight @ x` is what the layer makes of x, but for its bias."""
    assert weight is not None
    x = torch.randn(5, width)
    with torch.no_grad():
        want = layer(x) - layer(torch.zeros(1, width))
    torch.testing.assert_close(x @ weight.mT, want, rtol=1e-5, atol=1e-5)
    assert not weight.requires_grad


@pytest.mark.parametrize("name", ["o_proj", "out_proj", "dense", "c_proj", "wo"])
@pytest.mark.parametrize(("width", "hidden"), [(64, 64), (64, 48), (32, 96)])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_linear_and_conv1d_of_any_shape(name: str, width: int, hidden: int, kind: Any) -> None:
    layer = nn.Linear(width, hidden) if kind is nn.Linear else Conv1D(hidden, width)
    nn.init.normal_(layer.bias)
    side = output_side(Holder(**{name: layer}), width, None, None)
    assert_projects(side.projection, layer, width)


def test_what_cannot_be_read_is_left_out() -> None:
    linear = nn.Linear(64, 48)
    assert output_side(Holder(), 64, None, None).projection is None
    assert output_side(Holder(project=linear), 64, None, None).projection is None, "unknown name"
    assert output_side(Holder(o_proj=linear), 40, None, None).projection is None, "another width"
    packed = nn.Linear(64, 48, bias=False)
    packed.weight = nn.Parameter(torch.zeros(64, 24, dtype=torch.uint8), requires_grad=False)
    assert output_side(Holder(o_proj=packed), 64, None, None).projection is None, "quantized"
    with torch.device("meta"):
        absent = nn.Linear(64, 48)
    assert output_side(Holder(o_proj=absent), 64, None, None).projection is None, "offloaded"


class RMSNorm(nn.Module):
    """As Gemma's: the weight counts from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(48))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight)


def blocks() -> list[tuple[str, nn.Module]]:
    norm, before_mlp = RMSNorm(), nn.Identity()
    return [
        ("gemma, olmo 2", Holder(post_attention_layernorm=norm, post_feedforward_layernorm=norm)),
        ("glm 4", Holder(post_self_attn_layernorm=norm, post_attention_layernorm=before_mlp)),
    ]


@pytest.mark.parametrize(("name", "block"), blocks())
def test_a_norm_behind_the_projection(name: str, block: Any) -> None:
    linear, stream = nn.Linear(64, 48, bias=False), torch.randn(1, 7, 48)
    side = output_side(Holder(o_proj=linear), 64, block, stream)
    norm = getattr(block, "post_self_attn_layernorm", block.post_attention_layernorm)
    assert side.projection is not None
    assert side.complete
    assert side.behind is not None
    with torch.no_grad():
        x = torch.randn(5, 64)
        size = linear(x).square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(x @ side.projection.mT / size * side.behind, norm(linear(x)))
    projection, added = side.as_read(None)
    assert projection is not None
    torch.testing.assert_close(projection, side.projection * side.behind[:, None])
    assert added == pytest.approx(float((1 + norm.weight.detach()).square().sum()))
    assert side.readers is None


def test_norms_that_read_the_stream() -> None:
    linear, stream = nn.Linear(64, 48), torch.randn(1, 7, 48)
    first, second, other = RMSNorm(), RMSNorm(), RMSNorm()
    plain = nn.LayerNorm(48)
    nn.init.normal_(plain.weight)
    for block, readers in [
        (Holder(input_layernorm=first, post_attention_layernorm=second), [first, second]),
        (Holder(ln_1=plain, ln_2=first), [plain, first]),
        (Holder(input_layernorm=nn.Identity(), post_attention_layernorm=nn.LayerNorm(40)), []),
        (Holder(input_layernorm=nn.LayerNorm(48, elementwise_affine=False)), []),
        (
            Holder(  # Gemma 2 and 3
                input_layernorm=first, post_attention_layernorm=other,
                pre_feedforward_layernorm=second, post_feedforward_layernorm=other,
            ),
            [first, second],
        ),
        (
            Holder(  # GLM 4
                input_layernorm=first, post_self_attn_layernorm=other,
                post_attention_layernorm=second, post_mlp_layernorm=other,
            ),
            [first, second],
        ),
    ]:  # fmt: skip
        side = output_side(Holder(o_proj=linear), 64, block, stream)
        gains = [norm.weight.detach() + (norm is not plain) for norm in readers]
        if gains:
            assert side.readers is not None
            torch.testing.assert_close(side.readers, torch.stack(gains))
        else:
            assert side.readers is None


def test_other_norms() -> None:
    linear, stream = nn.Linear(64, 48), torch.randn(1, 7, 48)
    before_mlp = Holder(post_attention_layernorm=RMSNorm())
    assert output_side(Holder(o_proj=linear), 64, before_mlp, stream).behind is None
    unread = Holder(post_self_attn_layernorm=nn.LayerNorm(48, elementwise_affine=False))
    side = output_side(Holder(o_proj=linear), 64, unread, stream)
    assert not side.complete, "errors are relative to what goes into it"


class Seen:
    """The output sides that a forward pass came across, per layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sides: list[tuple[nn.Module, OutputSide]] = []

        def note(module: nn.Module, *rest: Any) -> OutputSide:
            self.sides.append((module, output_side(module, *rest)))
            return self.sides[-1][1]

        monkeypatch.setattr(hf_attention, "output_side", note)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("mistral", "gemma3")])
@torch.no_grad()
def test_real_models(kind: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny(kind, attention), Seen(monkeypatch)
    ids, mask = left_padded([520, 530])
    output = model(
        ids, attention_mask=mask, cache=NexusCache(model), output_hidden_states=True,
    )  # fmt: skip
    assert len(seen.sides) == 3
    for (module, side), stream in zip(seen.sides, output.hidden_states[:-1], strict=True):
        layer = module.dense if kind == "gpt_neox" else module.o_proj
        assert_projects(side.projection, layer, 64)
        torch.testing.assert_close(side.residual, stream, rtol=0, atol=0)


@torch.no_grad()
def test_gpt2_keeps_its_square_weight_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = gpt2(), Seen(monkeypatch)
    output = model(prompt(530), cache=NexusCache(model), output_hidden_states=True)
    assert len(seen.sides) == 2
    for (module, side), stream in zip(seen.sides, output.hidden_states[:-1], strict=True):
        assert_projects(side.projection, module.c_proj, 64)
        torch.testing.assert_close(side.residual, stream, rtol=0, atol=0)


@torch.no_grad()
def test_nobody_asks_when_no_profile_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny(), Seen(monkeypatch)
    built = NexusCache(model)
    for settings in ({"codec": "exact"}, {"transform": "hadamard"}):
        model(prompt(530), cache=NexusCache(model, CompressionConfig(**settings)))
    model(prompt(400), cache=NexusCache(model))
    assert not seen.sides
    model(prompt(530), cache=built)
    model(prompt(530), cache=NexusCache(model, profile=built.profile))
    model(prompt(530), cache=built)
    assert len(seen.sides) == 3, "once per layer"
