"""Products and attention of a few rows on a CPU, as decoding needs them, by kernels in C++ (``native/few.cpp``).

They are bound by reading: weights, or keys and values. torch's own products of a row or two read large weights at a
third of what the memory gives, and its attention is slow in bfloat16.
"""

import ctypes

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from moe.model import native

MOST_ROWS = 4
"""beyond so many, torch's products are the faster"""


def product(x: Float[Tensor, "T n"], weight: Float[Tensor, "m n"]) -> Float[Tensor, "T m"]:
    """x Wᵀ, without a gradient."""
    if len(x) > MOST_ROWS or x.dtype != weight.dtype or not native.computes(x, weight):
        return F.linear(x, weight)
    out = x.new_empty(len(x), len(weight))
    native.call(f"product_{native.DTYPES[x.dtype]}", x.contiguous(), weight.contiguous(), out, *x.shape, len(weight))
    return out


def attend_to_cache(
    queries: Float[Tensor, "B H 1 d"],
    keys: Float[Tensor, "B H_kv L d"],
    values: Float[Tensor, "B H_kv L d"],
    visible: Bool[Tensor, "#B 1 1 L"] | None,
) -> Float[Tensor, "B H 1 d"]:
    """softmax(q Kᵀ / √d) V over the ``visible`` keys (None: all), without a gradient."""
    same = torch.bfloat16 == queries.dtype == keys.dtype == values.dtype and queries.shape[3] == values.shape[3]
    whole = keys.stride(3) == values.stride(3) == queries.stride(3) == 1
    if not (same and whole and native.computes(queries, keys, values)):
        grouped = queries.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, enable_gqa=grouped)
    batch, n_heads, _, width = queries.shape
    n_key_heads, length = keys.shape[1:3]
    output = queries.new_empty(batch, n_heads, 1, width)
    native.call(
        f"attend_to_cache_{native.DTYPES[queries.dtype]}",
        *(part for tensor in (queries, keys, values) for part in (tensor, _Strides(*tensor.stride()[:3]))),
        None if visible is None else visible.expand(batch, 1, 1, length).contiguous(),
        output,
        _Sizes(batch, n_key_heads, n_heads // n_key_heads, length, width),
    )
    return output


class _Strides(ctypes.Structure):
    """``CacheStrides`` of few.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "token")]


class _Sizes(ctypes.Structure):
    """``CacheSizes`` of few.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "key_heads", "repeats", "length", "width")]
