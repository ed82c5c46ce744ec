"""The training loss, composed in one place from parts that are all logged: total = lm + Σ coefficient · auxiliary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import BalanceConfig
from moe.model.balance import load_balancing_loss, z_loss
from moe.model.routing import Routing
from moe.parallel.world import World


@dataclass(frozen=True)
class Objective:
    """The parts of one micro-batch's loss, each a scalar with its gradient."""

    lm: Float[Tensor, ""]
    """mean cross-entropy, in nats per scored token; never contains an auxiliary term"""
    auxiliary: dict[str, Float[Tensor, ""]]
    """each auxiliary loss unweighted, its mean over the mixture layers (1 is perfect balance for load_balance)"""
    total: Float[Tensor, ""]
    """what is minimised: lm + Σ coefficient · (sum of the auxiliary loss over the mixture layers)"""


def compose(
    lm: Float[Tensor, ""], routings: Sequence[Routing], balance: BalanceConfig, step_counts: "StepCounts"
) -> Objective:
    """The loss of one micro-batch whose mean cross-entropy is ``lm`` (:func:`~moe.training.head_loss.head_loss`).

    ``step_counts`` gathers its loads, and gives the global ones where those count.
    """
    if not routings:
        return Objective(lm, {}, lm)
    step_counts.add(routings)
    counts: Sequence[Tensor | None] = [None] * len(routings)
    if balance.scope == "global_batch":
        counts = list(step_counts.over_ranks())
    losses = {
        "load_balance": [load_balancing_loss(routing, count) for routing, count in zip(routings, counts, strict=True)],
        "z_loss": [z_loss(routing) for routing in routings],
    }
    coefficients = {"load_balance": balance.load_balance, "z_loss": balance.z_loss}
    total = lm
    for name, values in losses.items():
        if coefficients[name]:  # 0 times an infinite loss would be NaN
            total = total + coefficients[name] * torch.stack(values).sum()
    return Objective(lm, {name: torch.stack(values).mean() for name, values in losses.items()}, total)


class StepCounts:
    """Assignments per expert of every mixture layer, added up over the micro-batches of one optimizer step."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.counts: Int[Tensor, "L E"] | None = None
        self.dropped: Int[Tensor, " L"] | None = None

    def add(self, routings: Sequence[Routing]) -> None:
        """Count one micro-batch, once: a recomputation in the backward pass does not come here."""
        with torch.no_grad():
            counts = torch.stack([routing.counts() for routing in routings])
            dropped = torch.stack([routing.dropped_count() for routing in routings])
            self.counts = counts if self.counts is None else self.counts + counts
            self.dropped = dropped if self.dropped is None else self.dropped + dropped

    def over_ranks(self) -> Int[Tensor, "L E"]:
        """The counts so far, summed over all ranks.

        With one micro-batch a step that is the global batch. With several, micro-batch m sees micro-batches 1 to m: the
        running buffer of Qiu et al. 2025, which costs no second forward pass.
        """
        assert self.counts is not None
        return self.world.sum(self.counts)
