"""Arithmetic of a token: a multiplication and an addition are two FLOPs.

Only matrix products count, those of attention scores apart, since publications differ about them: not at all (6 N D,
Kaplan et al. 2020), over the whole square of queries and keys (Narayanan et al. 2021; Chowdhery et al. 2022), or over
what a causal model looks at, half of it (Megatron-LM today).
"""

from dataclasses import dataclass, replace
from typing import Literal

from moe.config import Checkpointing, FeedForwardConfig, ModelConfig
from moe.config.parameters import attention_parameters, mlp_parameters

Counting = Literal["6nd", "products", "causal", "full_square"]
"""6nd: 2 FLOPs forward for each active parameter, embedding and all; products: the matrices alone; causal and
full_square: the scores of attention as well"""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one token, forward, by part; ``sequence`` tokens are what attention looks over."""

    sequence: int
    attention: float
    """projections"""
    experts: float
    """routed experts"""
    dense: float
    """dense layers and shared experts"""
    router: float
    head: float
    scores_causal: float
    """Q Kᵀ and the product with V, as far as a query sees"""
    scores_full: float
    """the same as if every query saw every key"""
    active_parameters: int

    def forward(self, counting: Counting = "causal") -> float:
        """FLOPs of one token, forward."""
        if counting == "6nd":
            return 2.0 * self.active_parameters
        products = self.attention + self.experts + self.dense + self.router + self.head
        return products + {"products": 0.0, "causal": self.scores_causal, "full_square": self.scores_full}[counting]

    def training(self, counting: Counting = "causal") -> float:
        """FLOPs of one token, forward and backward: three times :meth:`forward`, without what is computed again."""
        return 3 * self.forward(counting)

    def recomputed(self, policy: Checkpointing) -> float:
        """FLOPs of one token that the backward pass computes again under a checkpointing policy; scores causally."""
        attention = self.attention + self.scores_causal
        mlps = self.experts + self.dense
        return {"none": 0.0, "attention": attention, "experts": mlps, "block": attention + mlps + self.router}[policy]


def count_flops(model: ModelConfig, sequence: int | None = None) -> Flops:
    """The arithmetic of a token in a sequence of ``sequence`` tokens (None: ``max_seq``)."""
    sequence = model.max_seq if sequence is None else sequence
    d_model, attention = model.d_model, model.attention
    moe_layers = frozenset(model.moe_layers)
    mixtures = len(moe_layers)
    latent = attention.latent
    plain = replace(attention, bias=False, output_bias=None, qk_norm="none", sinks=False)
    projections = attention_parameters(plain, d_model)
    if latent.rank is not None:
        projections -= latent.rank + (latent.query_rank or 0)  # their norms are no products
    mlp = FeedForwardConfig(activation=model.feed_forward.activation)
    routed = model.mlps_per_token * mlp_parameters(mlp, d_model, model.experts.d_ff)
    shared = mlp_parameters(mlp, d_model, model.shared_width) + model.shared.gated * d_model
    dense = sum(
        mlp_parameters(mlp, d_model, model.dense_width(layer))
        for layer in range(model.n_layers)
        if layer not in moe_layers
    )
    parts = model.parameters()
    router = parts.router - mixtures * (model.router.bias * model.routed_experts)
    per_key = 2.0 * attention.n_heads * (attention.query_dim + attention.value_dim)
    windows = [attention.window_of(layer) for layer in range(model.n_layers)]
    return Flops(
        sequence=sequence,
        attention=2.0 * model.n_layers * projections,
        experts=2.0 * mixtures * routed,
        dense=2.0 * (mixtures * shared * bool(model.shared.n_experts) + dense),
        router=2.0 * (router + parts.special),
        head=2.0 * d_model * (model.vocab_size or 0),
        scores_causal=per_key * sum(keys_seen(sequence, window) for window in windows),
        scores_full=per_key * sum(min(sequence, window or sequence) for window in windows),
        active_parameters=parts.active(),
    )


def keys_seen(sequence: int, window: int | None) -> float:
    """Keys that a query sees in the mean over a sequence: S / 2, or w (1 - w / 2S) where it sees no more than w."""
    seen = sequence if window is None else min(window, sequence)
    return seen * (1 - seen / (2 * sequence))
