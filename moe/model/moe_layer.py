"""The mixture-of-experts layer: router -> experts -> combine, and the shared experts beside them."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.experts import Experts
from moe.model.feed_forward import FeedForward
from moe.model.router import Router
from moe.model.routing import Routing


class MoELayer(nn.Module):
    """y = Σ_k weight_k · expert_k(x) + shared(x) for each token on its own (Shazeer et al. 2017, eq. 1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config.router, config.d_model, config.experts.n_experts)
        self.experts = Experts(config.experts, config.feed_forward, config.d_model)
        self.shared = SharedExperts(config) if config.shared.n_experts else None

    def forward(
        self, x: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"] | None = None
    ) -> tuple[Float[Tensor, "B S D"], Routing]:
        """Return the layer's output and the routing of its B·S tokens; padding (``mask`` False) is not routed."""
        tokens = rearrange(x, "b s d -> (b s) d")
        routing = self.router(tokens, None if mask is None else rearrange(mask, "b s -> (b s)"))
        y = self.experts(tokens, routing)
        if self.shared is not None:
            y = y + self.shared(tokens)
        return rearrange(y, "(b s) d -> b s d", b=x.shape[0]), routing


class SharedExperts(nn.Module):
    """Experts that every token uses (DeepSeekMoE, Dai et al. 2024, eq. 9), computed as one wide MLP.

    With ``gated``, their output is weighed by sigmoid(w_g · x) (Qwen2-MoE).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mlp = FeedForward(config.feed_forward, config.d_model, config.shared_width)
        self.gate = nn.Linear(config.d_model, 1, bias=False) if config.shared.gated else None

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """Map each token on its own."""
        y: Tensor = self.mlp(x)
        return y if self.gate is None else torch.sigmoid(self.gate(x)) * y
