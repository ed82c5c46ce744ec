"""Causal self-attention with rotary positions and grouped heads."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model import short_attention
from moe.model.cache import Cache
from moe.model.rope_scaling import softmax_factor
from moe.model.rotation import rotate
from moe.model.sinks import with_sinks

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
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
        self.output = nn.Linear(query_width, config.d_model, bias=attention.has_output_bias)
        self.attend: Attend = attend
        self.qk_norm = attention.qk_norm
        if attention.qk_norm != "none":
            per_head = attention.qk_norm == "head"
            self.query_norm = nn.RMSNorm(self.head_dim if per_head else query_width, eps=config.norm_eps)
            self.key_norm = nn.RMSNorm(self.head_dim if per_head else key_width, eps=config.norm_eps)
        self.clip = attention.clip
        self.sinks = nn.Parameter(torch.empty(attention.n_heads)) if attention.sinks else None
        self.softmax_factor = softmax_factor(attention.rope)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rotation: tuple[Tensor, Tensor] | None,
        visible: Bool[Tensor, "#B 1 S L"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Attend to the tokens before; ``visible`` says which of L keys a query may see, None: plainly causal.

        Without a ``rotation`` nothing turns: positions are known otherwise, or not at all.
        """
        queries, keys, values = self.query(x), self.key(x), self.value(x)
        if self.qk_norm == "full":
            queries, keys = normalise_wide(self.query_norm, queries), normalise_wide(self.key_norm, keys)
        if self.clip is not None:
            queries, keys, values = (t.clamp(-self.clip, self.clip) for t in (queries, keys, values))
        queries, keys, values = (rearrange(t, "b s (h d) -> b h s d", d=self.head_dim) for t in (queries, keys, values))
        if self.qk_norm == "head":
            queries, keys = normalise_wide(self.query_norm, queries), normalise_wide(self.key_norm, keys)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if cache is not None:
            keys, values = cache.store(self.layer, keys, values)
            if visible is not None:  # a cache may return no more columns than the window sees
                visible = visible[..., -keys.shape[2] :]
            keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        if self.softmax_factor != 1:
            queries = queries * self.softmax_factor
        heads = self.attend(queries, keys, values, visible, self.sinks)
        output: Tensor = self.output(rearrange(heads, "b h s d -> b s (h d)"))
        return output


def attend(
    queries: Float[Tensor, "B H S d"],
    keys: Float[Tensor, "B H_kv L d"],
    values: Float[Tensor, "B H_kv L d_v"],
    visible: Bool[Tensor, "#B 1 S L"] | None,
    sinks: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H S d_v"]:
    """softmax(Q Kᵀ / √d) V over the ``visible`` keys (None: up to the query), each key head for H / H_kv heads."""
    if sinks is not None:
        return with_sinks(attend, queries, keys, values, visible, sinks)
    if short_attention.pays(queries, keys, values, causal=visible is None):
        return short_attention.short_attention(queries, keys, values)
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=visible,
        is_causal=visible is None,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


def normalise_wide(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm in at least float32, whatever autocast made of ``x``."""
    normed: Tensor = norm(x.to(torch.promote_types(x.dtype, torch.float32)))
    return normed.to(x.dtype)


def visible_keys(real: Bool[Tensor, "B L"], n_queries: int, window: int | None = None) -> Bool[Tensor, "B 1 S L"]:
    """Which of L keys the last S = ``n_queries`` tokens may attend to: real ones, not after the query.

    With a ``window`` they are the last so many real tokens, the query's own included. A query always sees itself,
    padding too: a row that saw nothing would be NaN.
    """
    length = real.shape[1]
    query = torch.arange(length - n_queries, length, device=real.device)[:, None]
    key = torch.arange(length, device=real.device)[None, :]
    seen = (key <= query) & real[:, None, None, :]
    if window is not None:
        position = real.cumsum(dim=1)
        seen &= (position[:, -n_queries:, None] - position[:, None, :] < window)[:, None]
    return seen | (key == query)
