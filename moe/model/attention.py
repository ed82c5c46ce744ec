"""Causal self-attention with rotary positions and grouped heads."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model import short_attention
from moe.model.cache import Cache

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""the signature of :func:`attend`"""


class Attention(nn.Module):
    """Multi-, grouped- or multi-query attention (Ainslie et al. 2023): each key head serves H / H_kv query heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        attention = config.attention
        self.layer = layer
        self.head_dim = attention.head_dim
        query_width, key_width = attention.n_heads * self.head_dim, attention.kv_heads * self.head_dim
        self.query = nn.Linear(config.d_model, query_width, bias=attention.bias)
        self.key = nn.Linear(config.d_model, key_width, bias=attention.bias)
        self.value = nn.Linear(config.d_model, key_width, bias=attention.bias)
        self.output = nn.Linear(query_width, config.d_model, bias=attention.bias)
        self.attend: Attend = attend
        self.qk_norm = attention.qk_norm
        if attention.qk_norm != "none":
            per_head = attention.qk_norm == "head"
            self.query_norm = nn.RMSNorm(self.head_dim if per_head else query_width, eps=config.norm_eps)
            self.key_norm = nn.RMSNorm(self.head_dim if per_head else key_width, eps=config.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rotation: tuple[Tensor, Tensor],
        visible: Bool[Tensor, "#B 1 S L"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Attend to the tokens before; ``visible`` says which of L keys a query may see, None: plainly causal."""
        queries, keys, values = self.query(x), self.key(x), self.value(x)
        if self.qk_norm == "full":
            queries, keys = _normalise(self.query_norm, queries), _normalise(self.key_norm, keys)
        queries, keys, values = (rearrange(t, "b s (h d) -> b h s d", d=self.head_dim) for t in (queries, keys, values))
        if self.qk_norm == "head":
            queries, keys = _normalise(self.query_norm, queries), _normalise(self.key_norm, keys)
        queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if cache is not None:
            keys, values = cache.store(self.layer, keys, values)
            keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        heads = self.attend(queries, keys, values, visible)
        output: Tensor = self.output(rearrange(heads, "b h s d -> b s (h d)"))
        return output


def attend(
    queries: Float[Tensor, "B H S d"],
    keys: Float[Tensor, "B H_kv L d"],
    values: Float[Tensor, "B H_kv L d"],
    visible: Bool[Tensor, "#B 1 S L"] | None,
) -> Float[Tensor, "B H S d"]:
    """softmax(Q Kᵀ / √d) V over the ``visible`` keys (None: up to the query), each key head for H / H_kv heads."""
    if short_attention.pays(queries, keys, causal=visible is None):
        return short_attention.short_attention(queries, keys, values)
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=visible,
        is_causal=visible is None,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


def _normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm in at least float32, whatever autocast made of ``x``."""
    normed: Tensor = norm(x.to(torch.promote_types(x.dtype, torch.float32)))
    return normed.to(x.dtype)


def rotation_of(positions: Int[Tensor, "#B S"], head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [B, 1, S, head_dim / 2], of position · theta^(-2i / head_dim) (Su et al. 2021)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "*B S d"], rotation: tuple[Tensor, Tensor]) -> Float[Tensor, "*B S d"]:
    """Turn the pairs (x_i, x_{i + d/2}) by their angle: the half-split layout of GPT-NeoX, Llama and Mixtral."""
    if x.is_cuda:
        return rotate_rows(x, rotation)
    rotated: Tensor = _Rotate.apply(x, *rotation)  # type: ignore[no-untyped-call]
    return rotated


def rotate_rows(x: Float[Tensor, "B H S d"], rotation: tuple[Tensor, Tensor]) -> Float[Tensor, "B H S d"]:
    """:func:`rotate`, with a token's heads side by side in memory, as the projections leave them and want them back.

    A GPU's attention answers in the layout that it is asked in, so neither it nor its gradient need be copied.
    """
    rows: Tensor = _Rotate.apply(  # type: ignore[no-untyped-call]
        x.transpose(1, 2), *(part.transpose(1, 2) for part in rotation)
    )
    return rows.transpose(1, 2)


class _Rotate(torch.autograd.Function):
    """A rotation, whose transpose, and so its backward, is the opposite rotation: half the work of autograd's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In at least float32, returned in the dtype of ``x``."""
    first, second = x.chunk(2, dim=-1)
    turned = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
    return torch.cat(turned, dim=-1).to(x.dtype)


def visible_keys(real: Bool[Tensor, "B L"], n_queries: int) -> Bool[Tensor, "B 1 S L"]:
    """Which of L keys the last S = ``n_queries`` tokens may attend to: real ones, not after the query.

    A query always sees itself, padding too: a row that saw nothing would be NaN.
    """
    length = real.shape[1]
    query = torch.arange(length - n_queries, length, device=real.device)[:, None]
    key = torch.arange(length, device=real.device)[None, :]
    return ((key <= query) & real[:, None, None, :]) | (key == query)
