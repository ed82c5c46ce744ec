"""The training loss, composed in one place from parts that are all logged: total = lm + Σ coefficient · auxiliary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import BalanceConfig, BalancedChoices, RouterConfig
from moe.model.balance import (
    common_scale,
    device_loss,
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    noisy_load_loss,
    orthogonality_loss,
    sparsity_loss,
    z_loss,
)
from moe.model.routing import Routing
from moe.parallel.world import World
from moe.training.evaluate import mlps_computed


@dataclass(frozen=True)
class Objective:
    """The parts of one micro-batch's loss, each a scalar; ``lm`` and ``total`` with their gradient."""

    lm: Float[Tensor, ""]
    """mean cross-entropy, in nats per scored token; never contains an auxiliary term"""
    auxiliary: dict[str, Float[Tensor, ""]]
    """each auxiliary loss unweighted, on its own scale, its mean over the mixture layers; and beside ``<name>`` as
    ``<name>/common`` the same on the scale where 1 is perfect balance (:func:`~moe.model.balance.common_scale`)"""
    total: Float[Tensor, ""]
    """what is minimised: lm + Σ coefficient · (sum of the auxiliary loss over the mixture layers)"""


def compose(
    lm: Float[Tensor, ""],
    routings: Sequence[Routing],
    balance: BalanceConfig,
    step_counts: "StepCounts",
    *,
    router: RouterConfig | None = None,
    router_weights: Sequence[Float[Tensor, "E D"] | None] = (),
    sparsity_coefficient: float | None = None,
) -> Objective:
    """The loss of one micro-batch whose mean cross-entropy is ``lm`` (:func:`~moe.training.head_loss.head_loss`).

    ``step_counts`` gathers its loads, and gives the global ones where those count. ``router`` is how ``routings`` were
    made (None: by the defaults), ``router_weights`` the matrix of each router, for `orthogonality`, and
    ``sparsity_coefficient`` what `sparsity` has become by now (None: what the configuration says).

    Losses with a coefficient are computed, and load_balance and z_loss as measures also without; z_loss only where the
    router has logits.
    """
    if not routings:
        return Objective(lm, {}, lm)
    router = RouterConfig() if router is None else router
    step_counts.add(routings)
    losses = _losses(routings, balance, step_counts, router, router_weights)
    coefficients = {name: float(getattr(balance, name)) for name in losses}
    if "sparsity" in losses and sparsity_coefficient is not None:
        coefficients["sparsity"] = sparsity_coefficient
    total = lm
    auxiliary = {}
    for name, values in losses.items():
        stacked = torch.stack(values)
        if coefficients[name]:  # 0 times an infinite loss would be NaN
            total = total + coefficients[name] * stacked.sum()
        auxiliary[name] = stacked.mean()
        with torch.no_grad():
            common = [
                common_scale(name, value, routing, balance.special_weight)
                for value, routing in zip(values, routings, strict=True)
            ]
            auxiliary[f"{name}/common"] = torch.stack(common).mean()
    return Objective(lm, auxiliary, total)


def measured_losses(balance: BalanceConfig, router: RouterConfig) -> list[str]:
    """The names of the auxiliary losses that :func:`compose` computes of a mixture, in its order."""
    others = ("importance", "noisy_load", "device", "sparsity", "entropy", "orthogonality")
    always = ["load_balance", "z_loss"] if router.has_logits else ["load_balance"]
    return [*always, *(name for name in others if getattr(balance, name))]


def _losses(
    routings: Sequence[Routing],
    balance: BalanceConfig,
    step_counts: "StepCounts",
    router: RouterConfig,
    router_weights: Sequence[Float[Tensor, "E D"] | None],
) -> dict[str, list[Float[Tensor, ""]]]:
    """The loss of each layer, by name, of all that are active or measured."""
    per_sequence, over_all = balance.scope == "sequence", balance.scope == "global_batch"
    local: Sequence[Tensor | None] = [None] * len(routings)
    loads = step_counts.balanced_over_ranks() if over_all else local
    losses = {
        "load_balance": [
            load_balancing_loss(
                routing,
                load,
                per_sequence=per_sequence,
                choices=balance.choices,
                special_weight=balance.special_weight,
            )
            for routing, load in zip(routings, loads, strict=True)
        ]
    }
    if router.has_logits:
        losses["z_loss"] = [z_loss(routing) for routing in routings]
    if balance.importance:
        losses["importance"] = [importance_loss(routing) for routing in routings]
    if balance.noisy_load:
        losses["noisy_load"] = [noisy_load_loss(routing) for routing in routings]
    if balance.device:
        assert balance.n_devices is not None
        losses["device"] = [
            device_loss(routing, balance.n_devices, load, per_sequence=per_sequence)
            for routing, load in zip(routings, step_counts.over_ranks() if over_all else local, strict=True)
        ]
    if balance.sparsity:
        losses["sparsity"] = [sparsity_loss(routing, router.top_k) for routing in routings]
    if balance.entropy:
        losses["entropy"] = [entropy_loss(routing) for routing in routings]
    if balance.orthogonality:
        losses["orthogonality"] = []
        for weight, _ in zip(router_weights, routings, strict=True):
            assert weight is not None
            losses["orthogonality"].append(orthogonality_loss(weight))
    return losses


class StepCounts:
    """Assignments per expert of every mixture layer, added up over the micro-batches of one optimizer step.

    With ``choices`` "first" the first choices are counted beside all of them. With ``keep_logits`` the logits are kept
    too, T · E numbers a layer, for a quantile needs them all at once.
    """

    def __init__(self, world: World, *, choices: BalancedChoices = "all", keep_logits: bool = False) -> None:
        self.world = world
        self.choices = choices
        self.counts: Int[Tensor, "L E"] | None = None
        self.first_counts: Int[Tensor, "L E"] | None = None
        self.dropped: Int[Tensor, " L"] | None = None
        self.computed: Int[Tensor, " L"] | None = None
        """assignments that an MLP computed"""
        self.tokens: Int[Tensor, ""] | None = None
        """real tokens"""
        self.logits: list[list[Float[Tensor, "T E"]]] | None = [] if keep_logits else None
        """of the real tokens, for each layer one tensor a micro-batch"""

    def add(self, routings: Sequence[Routing]) -> None:
        """Count one micro-batch, once: a recomputation in the backward pass does not come here."""
        with torch.no_grad():
            self.counts = _plus(self.counts, torch.stack([routing.counts() for routing in routings]))
            self.dropped = _plus(self.dropped, torch.stack([routing.dropped_count() for routing in routings]))
            self.computed = _plus(self.computed, torch.stack([mlps_computed(routing) for routing in routings]))
            self.tokens = _plus(self.tokens, routings[0].real_tokens())
            if self.choices == "first":
                first = torch.stack([routing.first_choices().counts() for routing in routings])
                self.first_counts = _plus(self.first_counts, first)
            if self.logits is not None:
                self.logits = self.logits or [[] for _ in routings]
                for layer, routing in zip(self.logits, routings, strict=True):
                    real = routing.logits.detach()
                    layer.append(real if routing.mask is None else real[routing.mask])

    @classmethod
    def joined(cls, parts: Sequence["StepCounts"], n_experts: int, device: torch.device) -> "StepCounts":
        """The counts of all layers, from those of consecutive ones; of none, no rows."""
        whole = cls(parts[0].world)
        seen = [part for part in parts if part.counts is not None]
        nothing = torch.zeros(0, n_experts, dtype=torch.int64, device=device)
        whole.counts = torch.cat([part.counts for part in seen if part.counts is not None] or [nothing])
        whole.dropped = torch.cat([part.dropped for part in seen if part.dropped is not None] or [nothing[:, 0]])
        whole.computed = torch.cat([part.computed for part in seen if part.computed is not None] or [nothing[:, 0]])
        whole.tokens = seen[0].tokens if seen else nothing.sum()
        return whole

    def over_ranks(self) -> Int[Tensor, "L E"]:
        """The counts so far, summed over all ranks.

        With one micro-batch a step that is the global batch. With several, micro-batch m sees micro-batches 1 to m: the
        running buffer of Qiu et al. 2025, which costs no second forward pass.
        """
        assert self.counts is not None
        return self.world.sum(self.counts)

    def balanced_over_ranks(self) -> Int[Tensor, "L E"]:
        """:meth:`over_ranks` of the choices that the load-balancing loss counts."""
        if self.choices == "all":
            return self.over_ranks()
        assert self.first_counts is not None
        return self.world.sum(self.first_counts)

    def tokens_over_ranks(self) -> Int[Tensor, ""]:
        """The real tokens so far, on all ranks."""
        assert self.tokens is not None
        return self.world.sum(self.tokens)

    def dropped_over_ranks(self) -> Int[Tensor, " L"]:
        """The dropped assignments so far, on all ranks."""
        assert self.dropped is not None
        return self.world.sum(self.dropped)

    def computed_over_ranks(self) -> Int[Tensor, " L"]:
        """The assignments so far that an MLP computed, on all ranks."""
        assert self.computed is not None
        return self.world.sum(self.computed)

    def logits_over_ranks(self, layer: int) -> Float[Tensor, "T E"]:
        """The logits of all real tokens so far, on all ranks, of one mixture layer (from 0)."""
        assert self.logits is not None
        mine = torch.cat(self.logits[layer])
        if self.world.size == 1:
            return mine
        # A sum in which every rank fills in its own rows, since that is what a world can do: x + 0 is x.
        lengths = torch.zeros(self.world.size, dtype=torch.int64, device=mine.device)
        lengths[self.world.rank] = len(mine)
        lengths = self.world.sum(lengths)
        rows = mine.new_zeros(int(lengths.sum()), mine.shape[1])
        start = int(lengths[: self.world.rank].sum())
        rows[start : start + len(mine)] = mine
        return self.world.sum(rows)


def _plus(so_far: Tensor | None, more: Tensor) -> Tensor:
    return more if so_far is None else so_far + more
