"""The same products and the same attention on a GPU, in Triton: one tiling for all sizes, no split of any sum.

A program computes a tile of the result alone, from the first term of its sums to the last, so nothing but the row and
the weight decides a row's bits. No tuning by time: that would let the machine, or the size, choose.
"""

# mypy: ignore-errors
# ruff: noqa: N803 (compile-time arguments are upper case, as everywhere in Triton)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

ROWS = 32
COLUMNS = 128
INNER = 32
KEYS = 64


def rows_by_weights(
    rows: Float[Tensor, "R n"], weights: Float[Tensor, "E m n"], spans: Sequence[tuple[int, int]]
) -> Float[Tensor, "R m"]:
    """Row by row the product with the weight in whose span the row lies; spans are whole tiles of 32 rows."""
    rows, weights = rows.contiguous(), weights.contiguous()
    n_tiles, (n_weights, width, inner) = rows.shape[0] // ROWS, weights.shape
    y = rows.new_empty(rows.shape[0], width)
    if n_tiles == 0:
        return y
    of_tile = None
    if n_weights > 1:
        tiles = torch.tensor([(end - start) // ROWS for start, end in spans], device=rows.device)
        of_tile = torch.repeat_interleave(torch.arange(n_weights, device=rows.device), tiles, output_size=n_tiles)
    with torch.cuda.device_of(rows):
        _rows_by_weights[(n_tiles, triton.cdiv(width, COLUMNS))](
            rows, weights, y, of_tile, width, inner, of_tile is not None, ROWS, COLUMNS, INNER, num_warps=4
        )
    return y


@triton.jit
def _rows_by_weights(
    rows_at, weights_at, y_at, weight_of_tile_at, width, inner,
    SEVERAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    tile, column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    out = column * COLUMNS + tl.arange(0, COLUMNS)
    weight = tl.load(weight_of_tile_at + tile) if SEVERAL else 0
    term = tl.arange(0, INNER)
    left_at = rows_at + row[:, None] * inner + term[None, :]
    right_at = weights_at + weight * width * inner + out[None, :].to(tl.int64) * inner + term[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inner, INNER):
        there = start + term < inner
        left = tl.load(left_at + start, mask=there[None, :], other=0.0)
        right = tl.load(right_at + start, mask=there[:, None] & (out < width)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(y_at + row[:, None] * width + out[None, :], total.to(y_at.dtype.element_ty), mask=(out < width)[None, :])


def attend_backwards(
    queries: Float[Tensor, "B H S d"],
    keys: Float[Tensor, "B H_kv L d"],
    values: Float[Tensor, "B H_kv L v"],
    visible: Bool[Tensor, "#B 1 S L"] | None,
    scale: float,
    sinks: Float[Tensor, " H"] | None,
    window: int | None,
) -> Float[Tensor, "B H S v"]:
    """Attention of each query through blocks of keys from its own backwards: it knows its end, not where it begins.

    The heads that share a key head are the rows of a tile.
    """
    n_sequences, n_heads, n_queries, width = queries.shape
    n_key_heads, n_keys, value_width = keys.shape[1], keys.shape[2], values.shape[3]
    queries, keys, values = (tensor.contiguous() for tensor in (queries, keys, values))
    # Always with a mask: without one another program would be compiled, which may round otherwise.
    seen = torch.ones(n_keys, dtype=torch.int8, device=queries.device)
    strides = (0, 0)
    if visible is not None:
        seen = visible[:, 0].expand(n_sequences, -1, -1).to(torch.int8).contiguous()
        strides = (n_queries * n_keys, n_keys)
    group = n_heads // n_key_heads
    heads = min(64, max(16, triton.next_power_of_2(group)))
    wide = max(16, triton.next_power_of_2(width))
    result = queries.new_empty(n_sequences, n_heads, n_queries, value_width)
    with torch.cuda.device_of(queries):
        _attend[(n_queries, n_sequences * n_key_heads, triton.cdiv(group, heads))](
            queries, keys, values, seen, *strides, None if sinks is None else sinks.float(), result, scale,
            n_key_heads, group, n_queries, n_keys, window or n_keys, width, value_width,
            sinks is not None, heads, KEYS if wide <= 128 else KEYS // 2, wide,
            max(16, triton.next_power_of_2(value_width)), num_warps=4, num_stages=2,
        )  # fmt: skip
    return result


# For the same reason no number is specialised on: by default a 1, or a multiple of 16, makes a program of its own.
@triton.jit(do_not_specialize=["sequence_stride", "query_stride", "n_queries", "n_keys", "reach"])
def _attend(
    queries_at, keys_at, values_at, visible_at, sequence_stride, query_stride, sinks_at, result_at, scale,
    n_key_heads, group, n_queries, n_keys, reach, width, value_width,
    SINKS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    query, key_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    there = head < group
    part, value_part, block = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH), tl.arange(0, KEYS)
    row = (key_head * group + head) * n_queries + query
    q = tl.load(
        queries_at + row[:, None] * width + part[None, :], mask=there[:, None] & (part < width)[None, :], other=0.0
    )
    if SINKS:
        highest = tl.load(sinks_at + (key_head % n_key_heads) * group + head, mask=there, other=0.0)
        total = tl.zeros((HEADS,), tl.float32) + 1.0
    else:
        highest = tl.zeros((HEADS,), tl.float32) - float("inf")
        total = tl.zeros((HEADS,), tl.float32)
    mixed = tl.zeros((HEADS, VALUE_WIDTH), tl.float32)
    own = n_keys - n_queries + query
    visible_row_at = visible_at + key_head // n_key_heads * sequence_stride + query.to(tl.int64) * query_stride
    # A block in which nothing is visible changes nothing, so padding may add as many as it likes.
    for back in range(0, tl.minimum(own + 1, reach), KEYS):
        key = own - back - block
        seen = (key >= 0) & (back + block < reach)
        seen = seen & (tl.load(visible_row_at + key, mask=seen, other=0) != 0)
        key_row = key_head * n_keys + key
        k = tl.load(
            keys_at + key_row[None, :] * width + part[:, None], mask=seen[None, :] & (part < width)[:, None], other=0.0
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        at = tl.where(new == float("-inf"), 0.0, new)
        shares = tl.exp(scores - at[:, None])
        shrink = tl.exp(highest - at)
        v = tl.load(
            values_at + key_row[:, None] * value_width + value_part[None, :],
            mask=seen[:, None] & (value_part < value_width)[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(shares, 1)
        mixed = tl.dot(shares.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        highest = new
    mixed = mixed / total[:, None]
    tl.store(
        result_at + row[:, None] * value_width + value_part[None, :],
        mixed.to(result_at.dtype.element_ty),
        mask=there[:, None] & (value_part < value_width)[None, :],
    )
