"""Which experts a token goes to, and with what weight.

A router is read in four lines of :meth:`Router.forward`, one an axis: logits -> scores -> selected experts -> weights.
A published router is a choice on each axis, so a new rule is a new function beside the ones below.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.config import RouterConfig
from moe.model.routing import Routing


class Router(nn.Module):
    """A linear router: softmax over E experts, then the top K (Mixtral, OLMoE, Qwen).

    Logits, scores and weights are float32 (float64 for float64 input) whatever autocast says: in bfloat16 about one
    token in two hundred would be sent to other experts, and casting after the product would not bring them back.
    """

    def __init__(self, config: RouterConfig, d_model: int, n_experts: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    def forward(self, x: Float[Tensor, "T D"], mask: Bool[Tensor, " T"] | None = None) -> Routing:
        """Route T tokens. ``mask`` is False for padding, which gets weight 0 and is computed by no expert.

        Raises FloatingPointError for non-finite logits while ``torch.autograd.detect_anomaly`` is on: ``topk`` over
        NaN returns expert ids without a word.
        """
        logits = router_logits(x, self.weight)
        scores = softmax_scores(logits)
        selected = select_top_k(scores, self.config.top_k)
        weights = combine_weights(scores, selected, self.config.normalise, self.config.scale)
        if mask is not None:
            weights = weights.masked_fill(~mask[:, None], 0.0)
        if not torch.compiler.is_compiling() and torch.is_anomaly_enabled() and not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the router's logits are not finite")
        return Routing(logits=logits, scores=scores, selected=selected, weights=weights, mask=mask)


def router_logits(x: Float[Tensor, "T D"], weight: Float[Tensor, "E D"]) -> Float[Tensor, "T E"]:
    """x Wᵀ in at least float32, outside autocast."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype))


def softmax_scores(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Probabilities over all experts."""
    return logits.softmax(dim=-1)


def select_top_k(scores: Float[Tensor, "T E"], top_k: int) -> Int[Tensor, "T K"]:
    """The K experts of largest score, best first; a choice has no gradient."""
    return scores.detach().topk(top_k, dim=-1).indices


def combine_weights(
    scores: Float[Tensor, "T E"], selected: Int[Tensor, "T K"], normalise: bool, scale: float
) -> Float[Tensor, "T K"]:
    """The selected scores, divided by their sum if ``normalise``, times ``scale`` (applied once, in both cases).

    Softmax over all experts, top-k and normalisation equal a softmax over the k selected logits (Jiang et al. 2024,
    Mixtral, section 2.1).
    """
    weights = scores.gather(-1, selected)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scale
