"""Attention whose sums over the keys have one order, whatever the batch, the padding and the queries beside."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe.model import attention
from moe.model.router import fused as router_fused

ROWS = 32
"""queries of a tile: those of all heads that share a key head, one after the other"""
KEYS = 64
"""keys of a block"""


def attend(
    queries: Float[Tensor, "B H S d"],
    keys: Float[Tensor, "B H_kv L d"],
    values: Float[Tensor, "B H_kv L v"],
    visible: Bool[Tensor, "#B 1 S L"] | None,
    sinks: Float[Tensor, " H"] | None = None,
    *,
    window: int | None = None,
) -> Float[Tensor, "B H S v"]:
    """:func:`moe.model.attention.attend` with sums in an order of their own; ``window`` is that of the layer.

    Scores and sums are at least float32. The gradient is that of plain attention, computed again from the inputs.
    """
    attended: Tensor = _Attend.apply(queries, keys, values, visible, sinks, window)  # type: ignore[no-untyped-call]
    return attended


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None,
        sinks: Tensor | None,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(queries, keys, values, visible, sinks)
        scale = 1 / math.sqrt(queries.shape[-1])
        if queries.is_cuda and router_fused.HAS_TRITON and queries.dtype != torch.float64:
            from moe.model.invariant.kernels import attend_backwards

            return attend_backwards(queries, keys, values, visible, scale, sinks, window)
        wide = torch.promote_types(queries.dtype, torch.float32)
        with torch.autocast(queries.device.type, enabled=False):
            inputs = (queries.to(wide), keys.to(wide), values.to(wide))
            logits = None if sinks is None else sinks.to(wide)
            if window is None:
                return in_blocks(*inputs, visible, scale, logits).to(queries.dtype)
            return in_windows(*inputs, visible, scale, logits, window).to(queries.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *leaves, visible, sinks = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in leaves]
        sinks = None if sinks is None else sinks.detach().requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            queries, keys, values = inputs
            attended = attention.attend(queries, keys, values, visible, sinks)
        wanted = inputs if sinks is None else [*inputs, sinks]
        gradients = torch.autograd.grad(attended, wanted, grad)
        return (*gradients[:3], None, gradients[3] if sinks is not None else None, None)


def in_blocks(
    queries: Float[Tensor, "B H S d"],
    keys: Float[Tensor, "B H_kv L d"],
    values: Float[Tensor, "B H_kv L v"],
    visible: Bool[Tensor, "#B 1 S L"] | None,
    scale: float,
    sinks: Float[Tensor, " H"] | None,
) -> Float[Tensor, "B H S v"]:
    """Where a query sees all tokens before: the keys in blocks from the first token on (Milakov & Gimelshein 2018).

    A block that a query sees nothing of leaves its sums as they are, to the bit. A sequence's tokens are moved together
    first, so that padding shifts no block; the last query sees them all.
    """
    n_sequences, n_heads, n_queries, _ = queries.shape
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
        return rearrange(F.pad(rows, padding), "b h (t r) ... -> (b h t) r ...", r=ROWS)

    rows = in_tiles(rearrange(queries, "b (h g) s d -> b h (g s) d", g=group)) * scale
    seen = in_tiles(repeat(n_seen, "b s -> b h (g s)", h=n_key_heads, g=group))[..., None]
    total = torch.zeros_like(seen, dtype=rows.dtype)
    highest = torch.full_like(total, float("-inf"))
    if sinks is not None:
        sink = repeat(sinks, "(h g) -> b h (g s)", b=n_sequences, g=group, s=n_queries)
        highest, total = in_tiles(sink)[..., None], torch.ones_like(total)
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


def in_windows(
    queries: Float[Tensor, "B H S d"],
    keys: Float[Tensor, "B H_kv L d"],
    values: Float[Tensor, "B H_kv L v"],
    visible: Bool[Tensor, "#B 1 S L"] | None,
    scale: float,
    sinks: Float[Tensor, " H"] | None,
    window: int,
) -> Float[Tensor, "B H S v"]:
    """Where a query sees the last ``window`` tokens: all of them at once, from its own backwards.

    A cache may have forgotten what lies before the window, so that nobody knows how far from the first token it begins.
    """
    n_sequences, n_heads, n_queries, _ = queries.shape
    n_key_heads, n_keys = keys.shape[1:3]
    group = n_heads // n_key_heads
    sink = None if sinks is None else repeat(sinks, "(h g) -> (b h) 1 g 1", b=n_sequences, g=group)
    parts = []
    for start in range(0, n_queries, ROWS):
        own = torch.arange(n_keys - n_queries + start, n_keys - n_queries + min(start + ROWS, n_queries))
        column = (own[:, None] - torch.arange(window)).to(queries.device)
        there = column >= 0
        column = column.clamp(min=0)
        seen = there.expand(n_sequences, -1, -1)
        if visible is not None:
            chosen = visible[:, 0, start : start + ROWS].expand(n_sequences, -1, -1)
            seen = seen & chosen.gather(2, column.expand(n_sequences, -1, -1))
        block_keys, block_values = (
            rearrange(t[:, :, column.flatten()], "b h (s w) d -> (b h s) w d", w=window) for t in (keys, values)
        )
        rows = rearrange(queries[:, :, start : start + ROWS], "b (h g) s d -> (b h s) g d", g=group) * scale
        scores = torch.bmm(rows, block_keys.transpose(1, 2))
        scores = scores.masked_fill(~repeat(seen, "b s w -> (b h s) 1 w", h=n_key_heads), float("-inf"))
        highest = scores.amax(dim=-1, keepdim=True)
        if sink is not None:
            highest = torch.maximum(highest, sink.expand(-1, column.shape[0], -1, -1).flatten(0, 1))
        shares = (scores - highest).exp()
        total = shares.sum(dim=-1, keepdim=True)
        if sink is not None:
            total = total + (sink.expand(-1, column.shape[0], -1, -1).flatten(0, 1) - highest).exp()
        mixed = torch.bmm(shares, block_values) / total
        parts.append(rearrange(mixed, "(b h s) g v -> b (h g) s v", b=n_sequences, h=n_key_heads))
    return torch.cat(parts, dim=2)
