"""What the attention kernel is handed: addresses, sizes, and the columns of its tables."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import types
from numba.extending import intrinsic

from nexusquant.kernels.cpu.simd import read_fields


class Call(NamedTuple):
    """One call. Addresses are of contiguous fp32 tensors unless said; strides count elements.

    Attributes:
        rows: queries per KV head times their number that are real; `query` may have more.
        query: (batch, kv_heads, rows, dim), scaled.
        turns, page_of, rotary: see `nexusquant.pages.Pages`; `held` pages with padding, F
            `columns`. Batch strides are 0 where all rows share one.
        width: coordinates of queries in code space, a multiple of 16.
        splits: parts of the context that are attended to apart.
        sinks: (query_heads,), or 0.
        entries: of all coded parts together.
        codes, gains: the tables of `tables`.
        softcap: the bits of a float32, 0 for none.
    """

    batch: int
    kv_heads: int
    rows: int
    q_len: int
    dim: int
    dim_v: int
    query: int
    pages: int
    held: int
    columns: int
    turns: int
    turns_batch: int
    page_of: int
    page_of_batch: int
    rotary: int
    width: int
    splits: int
    sinks: int
    entries: int
    codes: int
    gains: int
    softcap: int


class Bias(NamedTuple):
    """What is added to logits, by query head, query and column; address 0: nothing."""

    address: int
    batch: int
    kv_head: int
    head: int
    query: int
    columns: int
    first_column: int


class Side(NamedTuple):
    """Code space of keys or values: x = mean + scale * (inverse @ y).

    Attributes:
        inverse: (heads, dim, row); `heads` may be 1.
        scale: (batch, kv_heads, scale_row), one or one per dimension; or 0.
        mean: (batch, kv_heads, mean_row), or 0.
        scale_kind, mean_kind: their dtypes, as below.
    """

    inverse: int
    heads: int
    row: int
    scale: int
    scale_row: int
    scale_kind: int
    mean: int
    mean_row: int
    mean_kind: int


class Work(NamedTuple):
    """Tables of parts, what the kernels keep for each other, and what they write.

    Attributes:
        parts, exacts: (coded, FIELDS) and (uncoded, FIELDS) int64, of coded and uncoded tokens.
        where: (heads, entries) int32, slots of coded tokens (`tokens.positions`); heads are
            batch kv_heads.
        basis, shift: (heads, (2 F + 1) rows width) and (heads, (2 F + 1) rows) fp32, see `queries`.
        tops, sums, sent: (heads, splits + 1, rows), twice, and (heads, splits + 1, rows, dim_v)
            fp32: largest logit, sum of weights and weighted values of every split, and of the
            uncoded tokens last.
        held: rows of `query`, real or not.
        output, lse: (batch, kv_heads, held, dim_v) and (batch, kv_heads, held) fp32.
    """

    parts: int
    coded: int
    exacts: int
    uncoded: int
    where: int
    basis: int
    shift: int
    tops: int
    sums: int
    sent: int
    held: int
    output: int
    lse: int


class Coding(NamedTuple):
    """A call of `encode` or `decode`, heads are those of one row of the batch.

    Attributes:
        codes: the code tables, one of `code.STRIDE` floats per rate.
        gains: the 16 gains and the 15 boundaries between them.
        limit: bits of the largest size with a gain.
        groups: (heads, width, 4) int32: per head how many groups are coded, then for each its
            number, rate, first row, and the mask of the lowest bits of a word. The rows of all
            are in the entry behind the last head's.
        runs: tasks per head, `encode.RUN` tokens each.
        y: (batch, heads, dim, tokens) fp32.
        rows, sizes: (batch, row_bytes, tokens) and (batch, heads, tokens) uint8; may be slices.
        rows_batch, rows_row, sizes_batch, sizes_head: their strides.
        bad: (batch heads runs,) int32, to be filled by `encode`: vectors that are NaN, infinite or
            above the limit.
    """

    codes: int
    gains: int
    limit: int
    groups: int
    width: int
    heads: int
    dim: int
    tokens: int
    runs: int
    y: int
    rows: int
    rows_batch: int
    rows_row: int
    sizes: int
    sizes_batch: int
    sizes_head: int
    bad: int


def _read(kind: Any, before: int = 0) -> Any:
    """A function for kernels: the tuple that an array of int64 holds behind `before` numbers."""
    type_ = types.NamedTuple([types.int64] * len(kind._fields), kind)

    @intrinsic
    def read(_: Any, address: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return context.make_tuple(
                builder, type_, read_fields(builder, args[0], before, len(kind._fields))
            )

        return type_(types.intp), lower

    return read


_BIAS = len(Call._fields)
_KEY = _BIAS + len(Bias._fields)
_VALUE = _KEY + len(Side._fields)
_WORK = _VALUE + len(Side._fields)
read_call, read_bias = _read(Call), _read(Bias, _BIAS)
read_key, read_value = _read(Side, _KEY), _read(Side, _VALUE)
read_work, read_coding = _read(Work, _WORK), _read(Coding)


# Columns of the int64 tables of parts. Of all:
TOKENS, HEAD_MAP, SLOT_KIND, SLOT_DATA, SLOT_START, SLOT_BATCH, SLOT_HEAD, SLOT_BYTES = range(8)
# of coded ones:
KEY_ROWS, VALUE_ROWS, GAINS, KEY_GROUPS, KEY_WIDTH, VALUE_GROUPS, VALUE_WIDTH = range(8, 15)
HEADS, ENTRY, KEY_BYTES, VALUE_BYTES = range(15, 19)
# of uncoded ones:
KEYS, KEY_BATCH, KEY_HEAD, KEY_TOKEN, VALUES, VALUE_BATCH, VALUE_HEAD, VALUE_TOKEN = range(8, 16)
DTYPE = 16
FIELDS = 19

CONTIGUOUS, GAPS_8, GAPS_16, GAPS_32, BITMAP = range(5)
"""Kinds of slots."""
FP32, FP16, BF16 = range(3)
"""Dtypes of uncoded tokens and centres (`memory.get_number`)."""
