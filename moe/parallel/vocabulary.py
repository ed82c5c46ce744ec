"""Embedding, head and cross-entropy where every rank has a part of the vocabulary, and of the sequence between blocks.

No rank ever holds all logits of a token: the softmax needs their maximum and the sum of their exponentials, which are a
number a token each (Shoeybi et al. 2019, section 3).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, autograd, nn

from moe.model.experts.weights import compute_dtype
from moe.parallel.communication import SEQUENCE, all_gather, all_reduce, gather_sequence, sum_to_sequence

BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}
"""largest block of logits of one rank, counted as float32"""


class PartOfEmbedding(nn.Module):
    """Looks up the tokens that are in this rank's part, and leaves it with its part of the sequence."""

    def __init__(self, weight: nn.Parameter, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.group = weight, group

    def forward(self, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B s D"]:
        """Each token's vector, of this rank's part of the sequence."""
        here, elsewhere = _in_part(tokens, self.weight, self.group)
        vectors = F.embedding(here, self.weight).masked_fill(elsewhere[..., None], 0.0)
        return sum_to_sequence(vectors, self.group)


class PartOfHead(nn.Module):
    """The head; its logits are whole again, and carry no gradient: training takes :func:`divided_head_loss`."""

    def __init__(self, weight: nn.Parameter, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.group = weight, group

    def forward(self, hidden: Float[Tensor, "B s D"]) -> Float[Tensor, "B S V"]:
        """All logits of the whole sequence."""
        with torch.no_grad():
            return all_gather(F.linear(all_gather(hidden, SEQUENCE, self.group), self.weight), 2, self.group)


def divided_head_loss(
    hidden: Float[Tensor, "B s D"],
    weight: Float[Tensor, "v D"],
    targets: Int[Tensor, "B S"],
    group: dist.ProcessGroup,
    scored: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the targets (the ``scored`` ones) under the logits of hidden Wᵀ, on every rank.

    Each has its part of the sequence and of the vocabulary; all have all targets.
    """
    counted = torch.ones_like(targets, dtype=torch.bool) if scored is None else scored
    share = counted.to(torch.promote_types(hidden.dtype, torch.float32)) / counted.sum().clamp(min=1)
    whole = gather_sequence(hidden, group).flatten(0, 1)
    loss: Tensor = _DividedHeadLoss.apply(  # type: ignore[no-untyped-call]
        whole, weight, targets.flatten(), share.flatten(), compute_dtype(hidden), group
    )
    return loss


@torch.no_grad()
def divided_token_losses(
    hidden: Float[Tensor, "B s D"], weight: Float[Tensor, "v D"], targets: Int[Tensor, "B S"], group: dist.ProcessGroup
) -> Float[Tensor, "B S"]:
    """Cross-entropy of each target in nats, without a gradient."""
    dtype = compute_dtype(hidden)
    rows, matrix = all_gather(hidden, SEQUENCE, group).flatten(0, 1).to(dtype), weight.to(dtype)
    wanted = targets.flatten()
    losses = [
        _losses(rows[start:end] @ matrix.t(), wanted[start:end], weight, group)[0]
        for start, end in _blocks(rows, weight)
    ]
    return torch.cat(losses).view_as(targets)


class _DividedHeadLoss(autograd.Function):
    """Σ_t share_t · loss_t; its gradients, of the rows a part of a sum over the ranks, are ready when it is."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        share: Tensor,
        dtype: torch.dtype,
        group: dist.ProcessGroup,
    ) -> Tensor:
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype)
        share = share.to(sum_dtype)
        for start, end in _blocks(rows, weight):
            losses, gradient = _losses(rows[start:end] @ matrix.t(), targets[start:end], weight, group)
            total += (losses * share[start:end]).sum()
            gradient = (gradient * share[start:end, None]).to(dtype)
            grad_rows[start:end] = gradient @ matrix
            grad_weight += gradient.t() @ rows[start:end]
        ctx.save_for_backward(grad_rows.to(hidden.dtype), grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_weight = ctx.saved_tensors
        scaled = (grad_rows * grad_total.to(grad_rows.dtype), grad_weight * grad_total.to(grad_weight.dtype))
        return (*scaled, None, None, None, None)


def _losses(
    logits: Float[Tensor, "T v"], targets: Int[Tensor, " T"], weight: Tensor, group: dist.ProcessGroup
) -> tuple[Float[Tensor, " T"], Float[Tensor, "T v"]]:
    """The loss of each row, and its gradient with respect to this rank's logits: softmax less the target's one."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    here, elsewhere = _in_part(targets, weight, group)
    logits = logits - all_reduce(logits.amax(dim=1), dist.ReduceOp.MAX, group)[:, None]
    wanted = logits.gather(1, here[:, None]).squeeze(1).masked_fill(elsewhere, 0.0)
    exponentials = logits.exp()
    total, wanted = all_reduce(torch.stack([exponentials.sum(dim=1), wanted]), dist.ReduceOp.SUM, group)
    gradient = exponentials / total[:, None]
    gradient.scatter_add_(1, here[:, None], (elsewhere.to(gradient.dtype) - 1)[:, None])
    return total.log() - wanted, gradient


def _in_part(
    ids: Int[Tensor, "*n"], weight: Float[Tensor, "v D"], group: dist.ProcessGroup
) -> tuple[Int[Tensor, "*n"], Bool[Tensor, "*n"]]:
    """Each id as a row of this rank's part, and which are elsewhere (their row is 0)."""
    size = weight.shape[0]
    row = ids - group.rank() * size
    elsewhere = (row < 0) | (row >= size)
    return row.masked_fill(elsewhere, 0), elsewhere


def _blocks(rows: Float[Tensor, "T D"], weight: Float[Tensor, "v D"]) -> list[tuple[int, int]]:
    n_rows = max(1, BLOCK_BYTES.get(rows.device.type, 64 << 20) // (4 * weight.shape[0]))
    return [(start, min(start + n_rows, len(rows))) for start in range(0, len(rows), n_rows)]
