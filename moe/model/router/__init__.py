"""Which experts a token goes to, and with what weight.

A published router is a choice on a few axes (Megatron's vocabulary): logits -> scores -> selected experts -> weights.
:meth:`Router.forward` reads in that order, and each axis has a file of its own: :mod:`.logits`, :mod:`.selection` with
:mod:`.assignment` for rules that compare tokens, :mod:`.weights`, :mod:`.capacity`; :mod:`.selection_bias` is what
training does between two steps.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.config import RouterConfig, Score
from moe.model.router import fused
from moe.model.router.capacity import beyond_capacity, kept_second_choices
from moe.model.router.logits import Product, cosine_logits, linear_logits, logit_norm, noise_std, score_function
from moe.model.router.selection import Choice, choose
from moe.model.router.weights import combine_weights, equal_scores
from moe.model.routing import LearnedNoise, Routing

__all__ = ["Router"]


class Router(nn.Module):
    """The router of one mixture layer: T tokens to K of E experts, as ``config`` says on each axis.

    Logits, scores and weights are float32 (float64 for float64 input) whatever autocast says: in bfloat16 about one
    token in two hundred would be sent to other experts, and casting after the product would not bring them back.

    ``n_experts`` counts the special experts, the last ``n_special`` of them, of which the first ``n_zero`` are zero
    experts. ``layer`` tells hashed choices of different layers apart; ``first`` is whether no mixture comes before.
    """

    def __init__(
        self,
        config: RouterConfig,
        d_model: int,
        n_experts: int,
        *,
        n_special: int = 0,
        n_zero: int = 0,
        layer: int = 0,
        first: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.n_experts, self.n_special, self.n_zero, self.layer = n_experts, n_special, n_zero, layer
        width = config.inner_width(n_experts)

        def matrix(wanted: bool, rows: int, columns: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(rows, columns)) if wanted and config.has_logits else None

        self.weight = matrix(True, n_experts, width or d_model)
        self.inner_weight = matrix(width is not None, width or 0, d_model)
        self.noise_weight = matrix(config.noise == "shazeer", n_experts, d_model)
        self.residual_weight = matrix(config.residual and not first, n_experts, n_experts)
        self.bias = nn.Parameter(torch.empty(n_experts)) if config.bias else None
        self.temperature = (
            nn.Parameter(torch.tensor(config.initial_temperature)) if config.projection == "cosine" else None
        )
        self.product: Product = linear_logits
        self.score: Callable[[Tensor, Score], Tensor] = score_function
        self.selection_bias: Tensor | None
        self.register_buffer("selection_bias", None if config.selection_bias == "none" else torch.zeros(n_experts))

    def forward(
        self,
        x: Float[Tensor, "T D"],
        mask: Bool[Tensor, " T"] | None = None,
        *,
        token_ids: Int[Tensor, " T"] | None = None,
        positions: Int[Tensor, " T"] | None = None,
        previous_logits: Float[Tensor, "T E"] | None = None,
        n_sequences: int = 1,
    ) -> Routing:
        """Route T tokens, which are ``n_sequences`` sequences one after the other.

        ``mask`` is False for padding, which gets weight 0 and is computed by no expert. ``token_ids`` are needed by
        the selections hash and random, ``positions`` by random, ``previous_logits`` (of the mixture layer before) by
        a residual router: without them ValueError is raised. Raises FloatingPointError for non-finite logits while
        ``torch.autograd.detect_anomaly`` is on: ``topk`` over NaN returns expert ids without a word.
        """
        logits, noise = self._logits(x, previous_logits)
        if not torch.compiler.is_compiling() and torch.is_anomaly_enabled() and not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the router's logits are not finite")
        if fused.usable(self.config, logits, self.training):
            return self.within_capacity(self._fused(logits, noise, mask, n_sequences))
        scores = self.score(logits, self.config.score)
        choice = choose(
            self.config,
            logits,
            scores,
            self.selection_bias,
            mask,
            training=self.training,
            layer=self.layer,
            token_ids=token_ids,
            positions=positions,
        )
        if not self.config.has_logits:
            scores = equal_scores(choice.selected, self.n_experts, logits.dtype)
        weights, assigned = self.weigh(scores, choice)
        if mask is not None:
            weights = weights.masked_fill(~mask[:, None], 0.0)
        routing = Routing(
            logits=logits,
            scores=scores,
            selected=choice.selected,
            weights=weights,
            mask=mask,
            assigned=assigned,
            n_special=self.n_special,
            n_sequences=n_sequences,
            scores_are_probabilities=self.config.score == "softmax" or not self.config.has_logits,
            noise=noise,
        )
        return self.within_capacity(routing)

    def _fused(
        self,
        logits: Float[Tensor, "T E"],
        noise: LearnedNoise | None,
        mask: Bool[Tensor, " T"] | None,
        n_sequences: int,
    ) -> Routing:
        """What :meth:`forward` computes from the logits, but for the capacity, in one kernel."""
        first_zero = self.n_experts - self.n_special
        routed = fused.route(self.config, logits, self.selection_bias, mask, first_zero=first_zero, n_zero=self.n_zero)
        return Routing(
            logits=logits,
            scores=routed.scores,
            selected=routed.selected,
            weights=routed.weights,
            mask=mask,
            n_special=self.n_special,
            n_sequences=n_sequences,
            scores_are_probabilities=self.config.score == "softmax",
            noise=noise,
            tally=routed.tally,
        )

    def _logits(
        self, x: Float[Tensor, "T D"], previous_logits: Float[Tensor, "T E"] | None
    ) -> tuple[Float[Tensor, "T E"], LearnedNoise | None]:
        """The logits, noise included, and what is known of that noise."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.weight is None:
            return torch.zeros(x.shape[0], self.n_experts, dtype=dtype, device=x.device), None
        with torch.autocast(x.device.type, enabled=False):
            if self.training and self.config.jitter:
                x = x.to(dtype)
                x = x * torch.empty_like(x).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
            if self.inner_weight is None:
                logits = self.product(x, self.weight)
            elif self.temperature is not None:
                logits = cosine_logits(self.product(x, self.inner_weight), self.weight, self.temperature, self.product)
            else:
                logits = self.product(self.product(x, self.inner_weight).tanh(), self.weight)
            if self.bias is not None:
                logits = logits + self.bias.to(dtype)
            if self.residual_weight is not None:
                if previous_logits is None:
                    raise ValueError("a residual router needs the logits of the mixture layer before: previous_logits")
                logits = logits + self.product(previous_logits, self.residual_weight)
            if self.config.logit_norm is not None:
                logits = logit_norm(logits, self.config.logit_norm)
            if self.noise_weight is None or not self.training:
                return logits, None
            std = noise_std(self.product(x, self.noise_weight))
            return logits + torch.randn_like(logits) * std, LearnedNoise(logits, std)

    def weigh(
        self, scores: Float[Tensor, "T E"], choice: Choice
    ) -> tuple[Float[Tensor, "T K"], Bool[Tensor, "T K"] | None]:
        """The weight of each place, and which places hold an assignment once second choices are thinned out.

        By the rule of ``config``, from the ``scores`` of all experts; a place that holds none has weight 0. None in
        place of which: all do. Padding is not looked at here.
        """
        weighted, assigned = choice.assigned, choice.assigned
        if self.n_zero:
            # A zero expert takes no share of the sum (MoE++): what it would have taken goes to the others.
            first_zero = self.n_experts - self.n_special
            useful = (choice.selected < first_zero) | (choice.selected >= first_zero + self.n_zero)
            weighted = useful if weighted is None else weighted & useful
        raw = scores.gather(-1, choice.selected) if choice.weights is None else choice.weights
        if self.config.weights == "equal":
            raw = torch.ones_like(raw)
        weights = combine_weights(raw, self.config.normalise, self.config.scale, weighted)
        if self.config.second_choice is not None and self.training:
            # Decided by the weight before its scale, and not renormalised after (GShard, algorithm 1).
            kept = kept_second_choices(weights / self.config.scale, self.config.second_choice)
            weights = weights.masked_fill(~kept, 0.0)
            assigned = kept if assigned is None else assigned & kept
        return weights, assigned

    def within_capacity(self, routing: Routing) -> Routing:
        """``routing`` with assignments beyond capacity dropped: their weight is exactly 0."""
        capacity = self.config.capacity
        if capacity.factor is None or not (self.training or capacity.in_evaluation):
            return routing
        return routing.dropping(beyond_capacity(routing, self.config.top_k, capacity))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Move the router; the selection bias changes its device but never its dtype.

        In bfloat16 0.5 + 0.001 is 0.5, and the bias would stop. Memory fresh from the meta device is zeroed: a bias,
        unlike a parameter, has an initial value of its own.
        """
        before = self.selection_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.selection_bias is not None:
            device = self.selection_bias.device
            fresh = before.is_meta and device.type != "meta"
            self.selection_bias = torch.zeros(self.n_experts, device=device) if fresh else before.to(device)
        return self

    def extra_repr(self) -> str:
        """What ``print(model)`` says of a router."""
        axes: dict[str, Any] = {"experts": self.n_experts, "top_k": self.config.top_k, "score": self.config.score}
        return ", ".join(f"{name}={value}" for name, value in (axes | {"selection": self.config.selection}).items())
