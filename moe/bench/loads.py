"""Which experts the tokens of a timed layer go to: exactly evenly, or by Zipf's law."""

from typing import Literal

import torch
from torch import Tensor

from moe.bench.shapes import LayerShape

Skew = Literal["balanced", "zipf"]


def assign(shape: LayerShape, skew: Skew, seed: int) -> tuple[Tensor, Tensor]:
    """Selected experts [T, K], int64, none twice for a token, and their weights [T, K], float32, which sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    selected = _balanced(shape, generator) if skew == "balanced" else _zipf(shape, generator)
    weights = torch.randn(shape.tokens, shape.top_k, generator=generator).softmax(dim=-1)
    return selected, weights


def _balanced(shape: LayerShape, generator: torch.Generator) -> Tensor:
    """Every expert gets as many tokens as any other, in random order.

    Each E / K tokens share out one shuffle of the experts, so that K must divide E and E / K the tokens.
    """
    group = shape.n_experts // shape.top_k
    shuffles = torch.rand(shape.tokens // group, shape.n_experts, generator=generator).argsort(dim=-1)
    return shuffles.view(shape.tokens, shape.top_k)


def _zipf(shape: LayerShape, generator: torch.Generator) -> Tensor:
    """Each token draws K different experts, the r-th most popular with odds 1/r (Zipf's law, exponent 1).

    Draws without replacement are the K largest of log odds plus Gumbel noise (Kool et al. 2019, section 3). Who is
    popular is random, so that neighbours do not differ by rank.
    """
    ranks = torch.randperm(shape.n_experts, generator=generator) + 1
    uniform = torch.rand(shape.tokens, shape.n_experts, generator=generator).clamp(min=1e-20)
    keys = -ranks.float().log() - (-uniform.log()).log()
    return keys.topk(shape.top_k, dim=-1).indices
