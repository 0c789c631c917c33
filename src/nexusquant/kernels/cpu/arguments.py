"""What the attention kernel is handed: addresses, sizes, and the columns of its tables."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


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
        softcap: 0 for none.
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
    softcap: np.float32


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
