"""Stored tokens, uncoded and coded: picked, appended, dropped and mapped without loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nexusquant.accounting import storage_bytes
from nexusquant.layout import RowLayout
from nexusquant.math.gains import encode_gain
from nexusquant.quantizer import Centre, Orthonormal, Quantizer
from nexusquant.slots import Slots
from nexusquant.tokens import CodedTokens, ExactTokens, gather_tokens

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def test_gather_tokens_per_head_and_shared() -> None:
    x = torch.randn(2, 3, 7, 4)
    per_head = torch.randint(0, 7, (2, 3, 5))
    per_head[0, 1, 3:] = -1
    got = gather_tokens(x, per_head)
    shared = gather_tokens(x, per_head[:, :1])
    for b in range(2):
        for h in range(3):
            for n in range(5):
                at = int(per_head[b, h, n].clamp(min=0))
                assert torch.equal(got[b, h, n], x[b, h, at])
                assert torch.equal(shared[b, h, n], x[b, h, int(per_head[b, 0, n].clamp(min=0))])


def exact(first: int, count: int, heads: int = 2) -> ExactTokens:
    keys, values = torch.randn(2, heads, count, 8), torch.randn(2, heads, count, 16)
    index = torch.arange(count).view(1, 1, -1).expand(2, 1, -1)
    return ExactTokens.select(keys, values, index, first, torch.float32)


def test_select_copies_tokens_and_zeroes_empty_entries() -> None:
    keys, values = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 16)
    keys[1, :, 0] = values[1, :, 0] = torch.nan  # padding: what an empty entry would read
    index = torch.tensor([[[1, 3, 5]], [[2, -1, -1]]])
    part = ExactTokens.select(keys, values, index, 100, torch.float16)
    assert part.kv_heads == 2
    assert part.keys.dtype == part.values.dtype == torch.float16
    assert torch.equal(part.keys[0], keys[0, :, [1, 3, 5]].half())
    assert torch.equal(part.values[1, :, 0], values[1, :, 2].half())
    assert not part.keys[1, :, 1:].any()
    assert not part.values[1, :, 1:].any()
    assert part.slots.positions(CPU).tolist() == [[[101, 103, 105]], [[102, -1, -1]]]
    assert storage_bytes(part.keys) == part.keys.numel() * 2


def test_what_overflows_the_dtype_keeps_its_own() -> None:
    keys = torch.full((1, 1, 2, 8), 1e5)
    index = torch.arange(2).view(1, 1, 2)
    part = ExactTokens.select(keys, keys / 10, index, 0, torch.float16)
    assert (part.keys.dtype, part.values.dtype) == (torch.float32, torch.float16)
    assert torch.equal(part.keys, keys)


def test_exact_tokens_append_drop_and_map() -> None:
    a, b = exact(0, 3), exact(10, 2)
    both = a.append(b)
    assert torch.equal(both.keys, torch.cat([a.keys, b.keys], 2))
    assert torch.equal(both.values, torch.cat([a.values, b.values], 2))
    assert both.slots.positions(CPU)[0, 0].tolist() == [0, 1, 2, 10, 11]
    rest = both.drop(4)
    assert torch.equal(rest.values, b.values[:, :, 1:])
    assert rest.slots.positions(CPU).flatten().unique().tolist() == [11]
    assert storage_bytes(rest) < storage_bytes(both) / 2, "dropped tokens are really gone"
    turned = both.map(lambda t: t.flip(0))
    assert torch.equal(turned.keys, both.keys.flip(0))


KEY = Quantizer(RowLayout(((3, 0), (2, 5))), Orthonormal("hadamard", 16))
VALUE = Quantizer(RowLayout(((1, 2, 0), (0, 0, 4))), Orthonormal("identity", 24))


def centres(batch: int) -> tuple[Centre, Centre]:
    key = Centre(torch.randn(batch, 2, 1, 16).half(), 1 + torch.rand(batch, 2, 1, 16).half())
    return key, Centre(torch.randn(batch, 2, 1, 24).half())


def vectors(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys much smaller than values, so that swapped gains would be found out."""
    keys, values = torch.randn(batch, 2, tokens, 16), torch.randn(batch, 2, tokens, 24)
    return keys * 0.3 * torch.rand(batch, 2, tokens, 1), values * 20 * torch.rand(tokens, 1)


def coded(
    vectors: tuple[Tensor, Tensor], first: int, centres: tuple[Centre, Centre]
) -> CodedTokens:
    batch, _, tokens, _ = vectors[0].shape
    slots = Slots.of(first + torch.arange(tokens).view(1, 1, -1).expand(batch, 1, -1))
    return CodedTokens.encode(*vectors, slots, centres, (KEY, VALUE))


def test_coded_tokens_are_what_the_quantizers_make_of_them() -> None:
    x, c = vectors(2, 40), centres(2)
    whole = coded(x, 5, c)
    assert (whole.batch_size, whole.kv_heads, whole.device) == (2, 2, CPU)
    assert whole.key_rows.shape == (2, KEY.layout.row_bytes, 40)
    assert whole.value_rows.shape == (2, VALUE.layout.row_bytes, 40)
    key_rows, key_gains = KEY.encode(x[0], c[0])
    value_rows, value_gains = VALUE.encode(x[1], c[1])
    assert torch.equal(whole.key_rows, key_rows)
    assert torch.equal(whole.value_rows, value_rows)
    assert whole.gains.dtype == torch.uint8
    assert torch.equal(whole.gains.long(), key_gains.long() + 16 * value_gains.long())
    assert torch.equal(whole.keys(), KEY.decode(key_rows, key_gains, c[0]))
    assert torch.equal(whole.values(), VALUE.decode(value_rows, value_gains, c[1]))
    coordinates = VALUE.coordinates(value_rows, value_gains)
    assert torch.equal(whole.value_coordinates(), coordinates)


def test_one_byte_holds_every_pair_of_gains() -> None:
    layout = RowLayout(((8,),))
    q = Quantizer(layout, Orthonormal("identity", 8))
    size = torch.logspace(-3, 6.9, 60, base=2)
    keys = size.repeat(60)[:, None].expand(-1, 8)
    values = size.repeat_interleave(60)[:, None].expand(-1, 8)
    plain = Centre(torch.zeros(1, 1, 1, 1))
    part = CodedTokens.encode(
        keys[None, None], values[None, None], Slots(0, 3600), (plain, plain), (q, q)
    )
    expected = encode_gain(keys[:, 0]).long() + 16 * encode_gain(values[:, 0]).long()
    assert torch.equal(part.gains[0, 0].long(), expected)
    assert part.gains.unique().numel() == 256
    for back, x in ((part.keys(), keys), (part.values(), values)):
        torch.testing.assert_close(back[0, 0], x, rtol=0.05, atol=0.01)


def test_coded_tokens_append_drop_and_map() -> None:
    (keys, values), c = vectors(2, 40), centres(2)
    whole = coded((keys, values), 5, c)
    first = coded((keys[:, :, :30], values[:, :, :30]), 5, c)
    both = first.append(coded((keys[:, :, 30:], values[:, :, 30:]), 35, c))
    for name in ("key_rows", "value_rows", "gains"):
        assert torch.equal(getattr(both, name), getattr(whole, name))
    assert both.slots == whole.slots == Slots(5, 40)
    rest = both.drop(35)
    assert torch.equal(rest.keys(), whole.keys()[:, :, 35:])
    assert torch.equal(rest.values(), whole.values()[:, :, 35:])
    assert rest.slots == Slots(40, 5)
    bare = [replace(p, key_centre=Centre(), value_centre=Centre()) for p in (rest, both)]
    assert storage_bytes(bare[0]) == storage_bytes(bare[1]) // 8
    turned = whole.map(lambda t: t.flip(0))
    assert torch.equal(turned.keys(), whole.keys().flip(0))
    assert torch.equal(turned.values(), whole.values().flip(0))
    assert torch.equal(first.keys(), whole.keys()[:, :, :30]), "unchanged by what came after"


def test_parts_are_views() -> None:
    whole = coded(vectors(2, 40), 5, centres(2))
    part = whole.part(slice(7, 20))
    assert torch.equal(part.keys(), whole.keys()[:, :, 7:20])
    assert torch.equal(part.value_coordinates(), whole.value_coordinates()[:, :, 7:20])
    assert part.slots is whole.slots
    for name in ("key_rows", "value_rows", "gains"):
        storages = [getattr(p, name).untyped_storage().data_ptr() for p in (part, whole)]
        assert storages[0] == storages[1]


def test_picking_entries_head_by_head() -> None:
    x, at = vectors(2, 30), torch.randint(1, 9, (2, 2, 30)).cumsum(-1)
    at[1, 0, 25:] = -1
    index = torch.rand(2, 2, 30).argsort(-1)[..., :11].sort(-1).values
    coded_part = CodedTokens.encode(*x, Slots.of(at), centres(2), (KEY, VALUE))
    exact_part = ExactTokens(*x, Slots.of(at))
    slots = at.gather(2, index)
    for whole in (coded_part, exact_part):
        part = whole.pick(index)
        assert torch.equal(part.slots.positions(CPU), slots)
        both = [(p.keys, p.values) for p in (part, whole)]
        if isinstance(part, CodedTokens):
            both = [(p.keys(), p.values()) for p in (part, whole)]
        for mine, source in zip(*both, strict=True):
            for b in range(2):
                for head in range(2):
                    assert torch.equal(mine[b, head], source[b, head, index[b, head]])
    assert coded_part.pick(index[..., :0]).slots.count == 0


def test_slots_may_differ_by_head() -> None:
    x, index = vectors(2, 9), torch.randint(1, 300, (2, 2, 9)).cumsum(-1)
    index[1, 0, 6:] = -1
    part = CodedTokens.encode(*x, Slots.of(index), centres(2), (KEY, VALUE))
    grown = part.append(coded(vectors(2, 3), 4000, (part.key_centre, part.value_centre)))
    behind = torch.arange(4000, 4003).expand(2, 2, 3)
    assert torch.equal(grown.slots.positions(CPU), torch.cat([index, behind], -1))
    assert torch.equal(grown.keys()[:, :, :9], part.keys())


def test_no_tokens_at_all() -> None:
    """A tier that nothing fell into."""
    c = centres(2)
    none = coded(vectors(2, 0), 0, c)
    assert none.keys().shape == (2, 2, 0, 16)
    assert none.values().shape == (2, 2, 0, 24)
    some = coded(vectors(2, 4), 7, c)
    assert torch.equal(none.append(some).values(), some.values())
    assert none.append(some).slots == some.append(none).slots == Slots(7, 4)
