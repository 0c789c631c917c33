"""`NexusQuantSimple`: bare tensors in, small storage, near tensors out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexusquant import NexusQuantSimple
from nexusquant.accounting import storage_bytes
from nexusquant.codec import PackedKV
from nexusquant.config import PRESETS, CompressionConfig
from nexusquant.errors import NonFiniteError
from nexusquant.math.e8 import HEADROOM

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# Mean squared error per dimension of unit Gaussians, token gain and fp16 centre included: of levels
# made for Gaussians, and of those with the headroom that real caches want.
OPTIMAL_MSE = {2: 0.101, 3: 0.0285, 4: 0.0078}
LARGEST_MSE = {2: 0.117, 3: 0.0400, 4: 0.0127}


def random_kv(
    batch: int = 2, heads: int = 3, tokens: int = 200, dim: int = 64, value_dim: int | None = None
) -> tuple[Tensor, Tensor]:
    shape = batch, heads, tokens
    return torch.randn(*shape, dim), torch.randn(*shape, value_dim or dim)


def test_the_poison_works() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, 2)).isnan().all()
    assert torch.zeros(1).new_empty(4, dtype=torch.uint8).tolist() == [255] * 4


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize(("heads", "tokens"), [(1, 1), (1, 33), (4, 100)])
@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (64, 64), (80, 40), (128, 256)])
def test_shapes(batch: int, heads: int, tokens: int, dim: int, value_dim: int) -> None:
    keys, values = random_kv(batch, heads, tokens, dim, value_dim)
    for quality in ("lossless", "max"):
        codec = NexusQuantSimple(quality)
        packed = codec.encode(keys, values)
        back = codec.decode(packed)
        assert back[0].shape == keys.shape
        assert back[1].shape == values.shape
        assert packed.shape == (batch, heads, tokens)
        assert codec.kept(packed).shape == packed.shape
        assert all(torch.isfinite(x).all() for x in back)


@pytest.mark.parametrize("headroom", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_decoded_error_is_bounded(bits: int, dtype: torch.dtype, headroom: bool) -> None:
    keys, values = (x.to(dtype) for x in random_kv())
    overload, largest = (1.0, LARGEST_MSE) if headroom else (1 / HEADROOM[bits], OPTIMAL_MSE)
    codec = NexusQuantSimple(
        "lossless", key_bits=bits, value_bits=bits, tiers=(), overload=overload
    )
    for back, source in zip(codec.decode(codec.encode(keys, values)), (keys, values), strict=True):
        assert back.dtype == dtype
        error = (back.float() - source.float()).square()
        assert float(error.mean()) < largest[bits]
        assert float(error[:, :, :4].max()) < 1e-5, "sinks are stored uncoded"


def test_keys_and_values_have_rates_of_their_own() -> None:
    keys, values = random_kv()
    codec = NexusQuantSimple("lossless", key_bits=4, value_bits=2, tiers=())
    back = codec.decode(codec.encode(keys, values))
    assert float((back[0] - keys).square().mean()) < LARGEST_MSE[4]
    assert 0.1 < float((back[1] - values).square().mean()) < LARGEST_MSE[2]


def test_important_tokens_are_coded_better() -> None:
    keys, values = random_kv(tokens=1000)
    codec = NexusQuantSimple("lossless", scorer="key_norm", key_bits=2, value_bits=2)
    back = codec.decode(codec.encode(keys, values))
    rank = keys.norm(dim=-1)[:, :, 4:].argsort(-1).argsort(-1)  # the shortest keys matter most
    for mine, source in zip(back, (keys, values), strict=True):
        error = (mine - source).square().mean(-1)[:, :, 4:]
        best, second, last = (
            float(error[(rank >= a * 996) & (rank < b * 996)].mean())
            for a, b in ((0, 0.11), (0.13, 0.45), (0.47, 1))
        )
        assert best < 0.6 * second
        assert second < 0.6 * last


def test_exact_codec_returns_what_it_was_given() -> None:
    keys, values = random_kv(dim=12)
    codec = NexusQuantSimple("lossless", codec="exact")
    back = codec.decode(codec.encode(keys, values))
    assert torch.equal(back[0], keys)
    assert torch.equal(back[1], values)


def walk(packed: PackedKV) -> int:
    """Bytes of all storages of a packed pair, reached by attribute instead of by field."""
    found = {}
    todo: list[Any] = [packed]
    while todo:
        thing = todo.pop()
        if isinstance(thing, Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, tuple | list):
            todo += thing
        elif hasattr(thing, "__dict__"):
            todo += vars(thing).values()
    return sum(found.values())


@pytest.mark.parametrize("quality", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nbytes_is_what_is_allocated(quality: str, dtype: torch.dtype) -> None:
    keys, values = (x.to(dtype) for x in random_kv(tokens=500))
    packed = NexusQuantSimple(quality).encode(keys, values)
    assert packed.nbytes == walk(packed) == storage_bytes(packed)
    elements = keys.numel() + values.numel()
    assert packed.compression_ratio == pytest.approx(2 * elements / packed.nbytes)
    assert packed.bits_per_element == pytest.approx(16 / packed.compression_ratio)
    config = PRESETS[quality]
    per_token = (config.key_bits + config.value_bits) / 2 + 4 / 64  # codes and gains
    expected = (1 - config.evict_ratio) * per_token
    # On top: 4 sinks, a mean and a scale per head at 16 bits, and a bit per slot, head and tier.
    assert expected < packed.bits_per_element < expected + 0.25


def test_presets_are_ordered_and_known_by_both_names() -> None:
    keys, values = random_kv(tokens=500)
    ratio = [
        NexusQuantSimple(name).encode(keys, values).compression_ratio
        for name in ("lossless", "high", "balanced", "max")
    ]
    assert ratio == sorted(set(ratio))
    assert ratio[0] > 6
    assert ratio[-1] > 23
    for name, alias in (("high", "conservative"), ("max", "aggressive")):
        assert NexusQuantSimple(name).config == NexusQuantSimple(alias).config
    config = CompressionConfig(evict_ratio=0.1)
    assert NexusQuantSimple(config, recent=3).config == config.replace(recent=3)


@pytest.mark.parametrize("quality", ["lossless", "balanced"])
@pytest.mark.parametrize("scorer", ["expected_attention", "snapkv", "key_key", "key_norm"])
def test_every_batch_row_is_as_if_alone(quality: str, scorer: str) -> None:
    keys, values = random_kv(batch=4)
    keys *= torch.tensor([0.01, 1.0, 50.0, 1.0]).view(4, 1, 1, 1)
    codec = NexusQuantSimple(quality, scorer=scorer)
    packed = codec.encode(keys, values)
    back, kept = codec.decode(packed), codec.kept(packed)
    for row in range(4):
        single = codec.encode(keys[row : row + 1], values[row : row + 1])
        assert torch.equal(codec.kept(single)[0], kept[row])
        for mine, alone in zip(back, codec.decode(single), strict=True):
            torch.testing.assert_close(mine[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("codec_name", ["e8", "exact"])
def test_evicted_tokens_are_zero_and_reported(per_head: bool, codec_name: str) -> None:
    keys, values = random_kv()
    codec = NexusQuantSimple(
        "balanced", per_head=per_head, codec=codec_name, key_bits=1.5, value_bits=1.5,
        evict_ratio=0.3,
    )  # fmt: skip
    packed = codec.encode(keys, values)
    kept = codec.kept(packed)
    assert kept.dtype == torch.bool
    assert (kept.sum(-1) == round((1 - codec.config.evict_ratio) * 200)).all()
    assert kept[..., :4].all()
    assert kept[..., -32:].all()
    assert bool((kept == kept[:, :1]).all()) != per_head
    for back, source in zip(codec.decode(packed), (keys, values), strict=True):
        assert not back[~kept].any()
        assert float((back[kept] - source[kept]).square().mean()) < 0.47


@pytest.mark.parametrize("token", [20, 77, 150])
def test_given_queries_decide_what_stays(token: int) -> None:
    keys, values = random_kv(batch=1, heads=4)
    looking = 4 * keys[:, :, token : token + 1].repeat_interleave(3, 1)
    codec = NexusQuantSimple(evict_ratio=0.9, scorer="snapkv", recent=5)
    packed = codec.encode(keys, values, looking.expand(1, 12, 5, 64))
    assert codec.kept(packed)[0, :, token].all()


def test_encoding_does_not_touch_or_keep_the_source() -> None:
    keys, values = random_kv()
    before = keys.clone(), values.clone()
    keys.requires_grad_()
    codec = NexusQuantSimple("lossless", codec="exact")
    packed = codec.encode(keys, values)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])
    parts = list(packed.stored.parts())
    assert all(not part.keys.requires_grad for part in parts)
    with torch.no_grad():
        keys.zero_()
    assert torch.equal(codec.decode(packed)[0], before[0])


def test_sources_that_want_gradients_and_inference_mode() -> None:
    keys, values = random_kv(dim=88)  # a size whose transform no other test has cached
    codec = NexusQuantSimple("balanced")
    with torch.inference_mode():
        inside = codec.decode(codec.encode(keys, values))
    outside = codec.decode(codec.encode(keys.requires_grad_(), values))
    assert not outside[0].requires_grad
    assert torch.equal(inside[0], outside[0])


def test_views_and_odd_strides() -> None:
    keys, values = random_kv(tokens=40)
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
    codec = NexusQuantSimple("balanced")
    expected = codec.decode(codec.encode(keys, values))
    assert torch.equal(codec.decode(codec.encode(strided, values))[0], expected[0])


@pytest.mark.parametrize("size", [1e-4, 1e6, 1e15])
def test_codes_are_relative_to_the_sequence(size: float) -> None:
    """What counts is not how large vectors are, but how large next to each other."""
    keys, values = random_kv(tokens=100)
    codec = NexusQuantSimple(tiers=(), key_bits=2)
    back = codec.decode(codec.encode(size * keys, values))[0]
    assert float((back / size - keys).square().mean()) < LARGEST_MSE[2]


def test_one_vector_far_beyond_the_others_does_not_spoil_them() -> None:
    """It is refused, with a way out; one less far out is coded, and the others keep theirs."""
    keys, values = random_kv(tokens=100)
    keys[1, 2, 50] *= 1e6
    codec = NexusQuantSimple(codec="exact")
    assert torch.equal(codec.decode(codec.encode(keys, values))[0], keys)
    codec = NexusQuantSimple(tiers=(), key_bits=2)
    with pytest.raises(NonFiniteError, match="codec='exact'"):
        codec.encode(keys, values)
    keys[1, 2, 50] *= 50e-6  # 50 times the others: within the range of the gains
    back = codec.decode(codec.encode(keys, values))[0]
    others = torch.arange(100) != 50
    assert float((back - keys)[1, 2, others].square().mean()) < 0.2
