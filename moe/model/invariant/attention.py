"""Attention whose sums over the keys have one order, whatever the batch, the padding and the queries beside."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe.model.router import fused as router_fused

ROWS = 32
"""queries of a tile: those of all heads that share a key head, one after the other"""
KEYS = 64
"""keys of a block"""


def attend(
    queries: Float[Tensor, "B H S d"],
    keys: Float[Tensor, "B H_kv L d"],
    values: Float[Tensor, "B H_kv L d"],
    visible: Bool[Tensor, "#B 1 S L"] | None,
) -> Float[Tensor, "B H S d"]:
    """:func:`moe.model.attention.attend` with sums in an order of their own.

    Scores and sums are at least float32. The gradient is that of plain attention, computed again from the inputs.
    """
    attended: Tensor = _Attend.apply(queries, keys, values, visible)  # type: ignore[no-untyped-call]
    return attended


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
        ctx.save_for_backward(queries, keys, values, visible)
        if queries.is_cuda and router_fused.HAS_TRITON and queries.dtype != torch.float64:
            from moe.model.invariant.kernels import attend_backwards

            return attend_backwards(queries, keys, values, visible)
        wide = torch.promote_types(queries.dtype, torch.float32)
        with torch.autocast(queries.device.type, enabled=False):
            return in_blocks(queries.to(wide), keys.to(wide), values.to(wide), visible).to(queries.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *leaves, visible = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in leaves]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            attended = F.scaled_dot_product_attention(
                inputs[0], inputs[1], inputs[2], attn_mask=visible, is_causal=visible is None, enable_gqa=True
            )
        return (*torch.autograd.grad(attended, inputs, grad), None)


def in_blocks(
    queries: Float[Tensor, "B H S d"],
    keys: Float[Tensor, "B H_kv L d"],
    values: Float[Tensor, "B H_kv L d"],
    visible: Bool[Tensor, "#B 1 S L"] | None,
) -> Float[Tensor, "B H S d"]:
    """The keys in blocks from the first token on (Milakov & Gimelshein 2018).

    A block that a query sees nothing of leaves its sums as they are, to the bit. A sequence's tokens are moved together
    first, so that padding shifts no block; the last query sees them all.
    """
    n_sequences, n_heads, n_queries, width = queries.shape
    n_key_heads, n_keys = keys.shape[1:3]
    if visible is None:
        n_seen = torch.arange(n_keys - n_queries + 1, n_keys + 1, device=queries.device).expand(n_sequences, -1)
    else:
        visible = visible[:, 0].expand(n_sequences, -1, -1)
        order = (~visible[:, -1]).to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None]
        keys, values = (t.gather(2, order.expand(-1, n_key_heads, -1, t.shape[3])) for t in (keys, values))
        n_seen = visible.sum(dim=2)
    group = n_heads // n_key_heads

    def in_tiles(rows: Tensor) -> Tensor:
        """[B, H_kv, G·S, ...] -> [tiles, 32, ...]: the last tile of each key head is filled up with zeros."""
        padding = [0, 0] * (rows.ndim - 3) + [0, -rows.shape[2] % ROWS]
        return F.pad(rows, padding).reshape(-1, ROWS, *rows.shape[3:])

    rows = in_tiles(rearrange(queries, "b (h g) s d -> b h (g s) d", g=group)) / math.sqrt(width)
    seen = in_tiles(repeat(n_seen, "b s -> b h (g s)", h=n_key_heads, g=group))[..., None]
    total = torch.zeros_like(seen, dtype=rows.dtype)
    highest = torch.full_like(total, float("-inf"))
    mixed = rows.new_zeros(*rows.shape[:2], values.shape[3])
    tiles = rows.shape[0] // (n_sequences * n_key_heads)
    for start in range(0, n_keys, KEYS):
        block_keys, block_values = (
            repeat(F.pad(t[:, :, start : start + KEYS], (0, 0, 0, max(0, start + KEYS - n_keys))),
                   "b h k d -> (b h t) k d", t=tiles)
            for t in (keys, values)
        )  # fmt: skip
        scores = torch.bmm(rows, block_keys.transpose(1, 2))
        hidden = torch.arange(start, start + KEYS, device=rows.device) >= seen
        scores = scores.masked_fill(hidden, float("-inf"))
        new = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        reference = new.masked_fill(new == float("-inf"), 0.0)
        shares, shrink = (scores - reference).exp(), (highest - reference).exp()
        total = total * shrink + shares.sum(dim=-1, keepdim=True)
        mixed = mixed * shrink + torch.bmm(shares, block_values)
        highest = new
    mixed = (mixed / total).view(n_sequences, n_key_heads, tiles * ROWS, -1)[:, :, : group * n_queries]
    return rearrange(mixed, "b h (g s) v -> b (h g) s v", g=group)
