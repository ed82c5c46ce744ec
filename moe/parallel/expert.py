"""A layer's experts over several ranks: rows travel to where their expert is, and their outputs travel back.

Every rank sorts its assignments by expert, and so by the rank that has it. The ranks tell each other how many rows they
will send to which expert; then the rows go, as many as there are and no more: nothing is padded, nothing dropped. What
arrives is computed by the same back-ends as ever, as tokens with one choice of weight 1, and goes back the same way;
weights and sum are applied at home, in float32.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, autograd, nn
from torch.distributed import _functional_collectives as collectives

from moe.model.experts import Experts, ExpertWeights
from moe.model.experts.weights import compute_dtype
from moe.model.moe_layer import SharedExperts
from moe.model.routing import Routing
from moe.parallel.communication import sum_gradients


class PartOfExperts(Experts):
    """What one rank has of a layer's experts, with the signature of all of them: ``(x, routing) -> y``.

    It has the experts of its place in ``expert_group`` (None: all), and of each the part of the hidden units of its
    place in ``tensor_group`` (None: all); then its output is a part of a sum over that group. The ranks of
    ``tensor_group`` are given the same tokens, those of ``expert_group`` each their own.
    """

    def __init__(
        self,
        experts: Experts,
        *,
        expert_group: dist.ProcessGroup | None,
        tensor_group: dist.ProcessGroup | None,
        beside: "SharedBeside | None" = None,
        balanced: bool = False,
    ) -> None:
        """``experts`` whose parameters are cut already; they become this module's own, under the same names.

        ``beside`` is computed while the rows travel, and added. With ``balanced`` the ranks do not ask how many rows
        they get, but take it that every expert gets as many: for tensors that hold no numbers.
        """
        nn.Module.__init__(self)
        self.__dict__.update(experts.__dict__)
        self.expert_group, self.tensor_group, self.balanced = expert_group, tensor_group, balanced
        self._n_joined: int | None = None
        self._beside = [] if beside is None else [beside]  # in a list, for it is the layer's module and not this one's

    @property
    def weights(self) -> ExpertWeights:
        """The parameters as a back-end is given them; the output's bias is added by every rank of the sum in part."""
        weights = super().weights
        if self._n_joined is not None:
            w_in, w_out, b_in, b_out = (
                None if tall is None else tall.view(self._n_joined, -1, *tall.shape[1:]) for tall in weights[:4]
            )
            assert w_in is not None and w_out is not None
            weights = ExpertWeights(w_in, w_out, b_in, b_out, weights.activation)
        if self.tensor_group is None or weights.b_out is None:
            return weights
        return weights._replace(b_out=weights.b_out / self.tensor_group.size())

    def join_rows(self) -> None:
        """Keep each stack of matrices as one tall matrix: its rows can be cut over any number of ranks."""
        self._n_joined = self.w_in.shape[0]
        for name, parameter in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(parameter.detach().flatten(0, 1), parameter.requires_grad))

    @property
    def has_joined_rows(self) -> bool:
        """Whether :meth:`join_rows` was called."""
        return self._n_joined is not None

    # Nor could torch.compile trace what the host reads: it compiles around this.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Send each token through its selected experts, wherever they are, and sum their weighted outputs."""
        weights = routing.weights
        if self.tensor_group is not None:
            weights = sum_gradients(weights, self.tensor_group)
        if self.expert_group is None:
            y: Tensor = super().forward(x, replace(routing, weights=weights))
            return y
        order, counts = _sorted_by_expert(routing)
        sent, received, arriving = self._exchange(counts, routing.selected.numel())
        travel = _Travel(order[: sum(sent)], routing.n_tokens, routing.top_k)
        rows = _depart(x.to(compute_dtype(x)), travel)
        arrived = collectives.all_to_all_single_autograd(rows, received, sent, self.expert_group)
        beside = [shared.now(x) for shared in self._beside]  # while the rows travel: nobody has looked at them yet
        computed = super().forward(arrived, _one_choice_each(arrived, arriving, sum(received)))
        returned = collectives.all_to_all_single_autograd(computed, sent, received, self.expert_group)
        total = _combine(returned, weights, travel).to(x.dtype)
        for output in beside:
            total = total + output
        return total

    def _exchange(
        self, counts: Int[Tensor, " E"], n_assignments: int
    ) -> tuple[list[int], list[int], Int[Tensor, "R E_here"]]:
        """Rows to each rank, rows from each rank, and of the latter how many are for each expert that is here."""
        assert self.expert_group is not None
        ranks = self.expert_group.size()
        per_rank = counts.view(ranks, -1)
        if self.balanced:
            even = [n_assignments // ranks + (rank < n_assignments % ranks) for rank in range(ranks)]
            return even, [even[self.expert_group.rank()]] * ranks, per_rank
        arriving = torch.empty_like(per_rank)
        dist.all_to_all_single(arriving, per_rank, group=self.expert_group)
        sent, received = torch.stack([per_rank.sum(dim=1), arriving.sum(dim=1)]).tolist()
        return sent, received, arriving


class SharedBeside(SharedExperts):
    """Shared experts whose output is part of what :class:`PartOfExperts` returns, which computes it at a better time.

    To whom the layer adds them, they are 0.
    """

    def __init__(self, shared: SharedExperts) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(shared.__dict__)

    def forward(self, x: Float[Tensor, "*T D"]) -> Tensor:
        """0, as their sum is elsewhere."""
        return x.new_zeros(())

    def now(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """What they make of each token."""
        return super().forward(x)


def _sorted_by_expert(routing: Routing) -> tuple[Int[Tensor, " N"], Int[Tensor, " E"]]:
    """The assignments t·K + k in order of their expert, those that no expert computes last; and how many each has."""
    expert = routing.selected.flatten()
    if (executed := routing.executed) is not None:
        expert = expert.where(executed.flatten(), routing.n_mlps)
    order = expert.argsort(stable=True)
    counts = torch.zeros(routing.n_mlps + 1, dtype=torch.int64, device=expert.device)
    return order, counts.scatter_add_(0, expert, torch.ones_like(expert))[:-1]


def _one_choice_each(rows: Float[Tensor, "R D"], arriving: Int[Tensor, "ranks E"], n_rows: int) -> Routing:
    """The routing of rows that came rank by rank, and of each rank expert by expert."""
    ranks, n_experts = arriving.shape
    experts = torch.arange(n_experts, device=rows.device).repeat(ranks)
    selected = experts.repeat_interleave(arriving.flatten(), output_size=n_rows)[:, None]
    dtype = torch.promote_types(rows.dtype, torch.float32)
    nothing = torch.zeros(1, n_experts, dtype=dtype, device=rows.device).expand(n_rows, n_experts)
    ones = torch.ones(n_rows, 1, dtype=dtype, device=rows.device)
    return Routing(logits=nothing, scores=nothing, selected=selected, weights=ones)


class _Travel:
    """Which row carries which assignment: the ``order`` of those that are sent, of T tokens with K places each."""

    def __init__(self, order: Int[Tensor, " n"], n_tokens: int, top_k: int) -> None:
        n_rows = order.shape[0]
        self.token_of_row = order // top_k
        row_of_place = order.new_full(
            (n_tokens * top_k,), n_rows
        )  # beyond the last: a row of zeros, for who is not sent
        row_of_place[order] = torch.arange(n_rows, device=order.device)
        self.row_of_place = row_of_place.view(n_tokens, top_k)


def _depart(x: Float[Tensor, "T D"], travel: _Travel) -> Float[Tensor, "n D"]:
    rows: Tensor = _Depart.apply(x, travel)  # type: ignore[no-untyped-call]
    return rows


def _combine(rows: Float[Tensor, "n D"], weights: Float[Tensor, "T K"], travel: _Travel) -> Float[Tensor, "T D"]:
    """Σ_k weight_tk · row_tk in the dtype of the weights."""
    total: Tensor = _Combine.apply(rows, weights, travel)  # type: ignore[no-untyped-call]
    return total


class _Depart(autograd.Function):
    """A copy of the token for each of its rows; backward: their sum, choice by choice, which is always the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, travel: _Travel) -> Tensor:
        ctx.travel = travel
        return x.index_select(0, travel.token_of_row)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        return _sum_of_places(grad_rows, ctx.travel, None).to(grad_rows.dtype), None


class _Combine(autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, travel: _Travel) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.travel = travel
        return _sum_of_places(rows, travel, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        travel: _Travel = ctx.travel
        padded = F.pad(rows, (0, 0, 0, 1))
        dots, grad_rows = [], rows.new_empty(rows.shape[0] + 1, rows.shape[1])
        for row, weight in zip(travel.row_of_place.unbind(dim=1), weights.unbind(dim=1), strict=True):
            dots.append((padded.index_select(0, row).to(grad.dtype) * grad).sum(dim=1))
            grad_rows[row] = (grad * weight[:, None]).to(rows.dtype)
        return grad_rows[:-1], torch.stack(dots, dim=1), None


def _sum_of_places(rows: Tensor, travel: _Travel, weights: Tensor | None) -> Tensor:
    padded = F.pad(rows, (0, 0, 0, 1))
    total = None
    for choice, row in enumerate(travel.row_of_place.unbind(dim=1)):
        term = padded.index_select(0, row).to(torch.promote_types(rows.dtype, torch.float32))
        if weights is not None:
            term = term * weights[:, choice, None]
        total = term if total is None else total + term
    assert total is not None
    return total
