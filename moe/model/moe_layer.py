"""The mixture-of-experts layer: router -> experts -> combine, and what stands beside the experts."""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import ModelConfig
from moe.model.experts import Experts
from moe.model.feed_forward import FeedForward
from moe.model.invariant import make_invariant
from moe.model.invariant.elementwise import sigmoid
from moe.model.router import Router
from moe.model.router.weights import straight_through_weights
from moe.model.routing import Routing
from moe.model.special_experts import SpecialExperts


class MoELayer(nn.Module):
    """y = Σ_k weight_k · expert_k(x) + shared(x) for each token on its own (Shazeer et al. 2017, eq. 1).

    ``layer`` is the block's number, from 0.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.router = Router(
            config.router,
            config.d_model,
            config.routed_experts,
            n_special=config.special.total,
            n_zero=config.special.zero,
            layer=layer,
            first=layer <= config.moe_layers[0] if config.moe_layers else True,
        )
        self.experts = Experts(config.experts, config.feed_forward, config.d_model)
        self.special = SpecialExperts(config.special, config.d_model) if config.special.total else None
        self.shared = SharedExperts(config) if config.shared.n_experts else None
        if config.deterministic:
            make_invariant(self, config)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        mask: Bool[Tensor, "B S"] | None = None,
        *,
        token_ids: Int[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "#B S"] | None = None,
        previous_logits: Float[Tensor, "T E"] | None = None,
        recompute: bool = False,
    ) -> tuple[Float[Tensor, "B S D"], Routing]:
        """Return the layer's output and the routing of its B·S tokens; padding (``mask`` False) is not routed.

        With ``recompute`` the routed experts keep nothing for the backward pass, which runs them again on the same
        routing. The other arguments are those of :meth:`~moe.model.router.Router.forward`, for the routers that need
        them.
        """
        tokens = x.flatten(0, 1)
        routing = self.router(
            tokens,
            None if mask is None else mask.flatten(),
            token_ids=None if token_ids is None else token_ids.flatten(),
            positions=None if positions is None else positions.expand(x.shape[:2]).flatten(),
            previous_logits=previous_logits,
            n_sequences=x.shape[0],
        )
        compute = self._weigh_then_compute if self._weighs_first else self.experts
        y = checkpoint(compute, tokens, routing, use_reentrant=False) if recompute else compute(tokens, routing)
        if self.training and self.router.config.gradient == "all_experts" and torch.is_grad_enabled():
            y = y + self._gradient_of_unselected(tokens, routing)
        if self.special is not None:
            y = y + self.special(tokens, routing).to(y.dtype)
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view_as(x), routing

    @property
    def _weighs_first(self) -> bool:
        return self.router.config.apply == "before"

    def _weigh_then_compute(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Σ_k expert_k(weight_k · x): Llama-4's order, in which the expert's activation sees the weight."""
        weighted = rearrange(x[:, None] * routing.weights[..., None], "t k d -> (t k) d").to(x.dtype)
        y: Tensor = self.experts(weighted, routing.one_row_a_place())
        return rearrange(y, "(t k) d -> t k d", k=routing.top_k).sum(dim=1)

    def _gradient_of_unselected(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Zeros that give the router a gradient from the experts it did not select (DenseMixer).

        The experts themselves, and x through them, get none: they are computed without one.
        """
        config = self.router.config
        weights = straight_through_weights(routing.scores, routing.selected, config.normalise, config.scale)
        if routing.mask is not None:
            weights = weights.masked_fill(~routing.mask[:, None], 0.0)
        zero = torch.zeros_like(x, dtype=weights.dtype)
        for expert, weight in enumerate(weights.unbind(dim=1)):
            with torch.no_grad():
                output = self.experts.one(expert, x)
            zero = zero + weight[:, None] * output
        return zero.to(x.dtype)


class SharedExperts(nn.Module):
    """Experts that every token uses (DeepSeekMoE, Dai et al. 2024, eq. 9), computed as one wide MLP.

    With ``gated``, their output is weighed by sigmoid(w_g · x) (Qwen2-MoE).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mlp = FeedForward(config.feed_forward, config.d_model, config.shared_width)
        self.gate = nn.Linear(config.d_model, 1, bias=False) if config.shared.gated else None
        self.sigmoid: Callable[[Tensor], Tensor] = sigmoid if config.deterministic else torch.sigmoid

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """Map each token on its own."""
        y: Tensor = self.mlp(x)
        return y if self.gate is None else self.sigmoid(self.gate(x)) * y
