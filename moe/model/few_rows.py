"""Products and attention of a few rows on a CPU, as decoding needs them, by kernels in C++ (``native/few.cpp``).

They are bound by reading: weights, or keys and values. torch's own products of a row or two read large weights at a
third of what the memory gives, and its attention is slow in bfloat16.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from moe.model import native

MOST_ROWS = 4
"""with eight, torch's products were about as fast, and with sixteen faster"""


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
    if not (same and native.computes(queries, keys, values)):
        grouped = queries.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, enable_gqa=grouped)
    output = queries.new_empty(queries.shape)
    native.call(
        f"attend_to_cache_{native.DTYPES[queries.dtype]}",
        *native.heads(queries, keys, values),
        None if visible is None else visible.expand(len(queries), 1, 1, keys.shape[2]).contiguous(),
        output,
        native.Sizes.of(queries, keys),
    )
    return output
