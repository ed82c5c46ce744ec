"""A routing decision is a value: what the router decided for every token, and what can be derived from it."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The decision of one router for T tokens, E experts and K choices a token.

    An assignment is a pair (token, choice). It is carried out unless its token is padding or it was dropped; the
    expert back-ends ask :attr:`executed`, which is None where every assignment is carried out.
    """

    logits: Float[Tensor, "T E"]
    """router output, at least float32"""
    scores: Float[Tensor, "T E"]
    """after the score function, over all experts"""
    selected: Int[Tensor, "T K"]
    """chosen experts, no expert twice for one token, best first"""
    weights: Float[Tensor, "T K"]
    """what multiplies each chosen expert's output; exactly 0 for padding and dropped assignments"""
    mask: Bool[Tensor, " T"] | None = None
    """True for real tokens, False for padding; None: all are real"""
    dropped: Bool[Tensor, "T K"] | None = None
    """True for assignments beyond an expert's capacity; None: dropless"""

    @property
    def n_tokens(self) -> int:
        """T, padding included."""
        return self.logits.shape[0]

    @property
    def n_experts(self) -> int:
        """E."""
        return self.logits.shape[1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.selected.shape[1]

    @property
    def executed(self) -> Bool[Tensor, "T K"] | None:
        """Which assignments an expert computes; None where all are."""
        kept = None if self.dropped is None else ~self.dropped
        if self.mask is None:
            return kept
        real = self.mask[:, None].expand_as(self.selected)
        return real if kept is None else real & kept

    def real_tokens(self) -> Int[Tensor, ""]:
        """Number of tokens that are not padding, as a tensor (no host synchronisation)."""
        if self.mask is None:
            return torch.full((), self.n_tokens, dtype=torch.int64, device=self.logits.device)
        return self.mask.sum()

    def counts(self) -> Int[Tensor, " E"]:
        """Assignments of real tokens to each expert, before any were dropped; they sum to K times the real tokens.

        int64: a bfloat16 counter stops at 256, and ``histc`` is neither deterministic on CUDA nor exact.
        """
        real = torch.ones_like(self.selected) if self.mask is None else self.mask[:, None].expand_as(self.selected)
        chosen = self.selected.flatten()
        zeros = torch.zeros(self.n_experts, dtype=chosen.dtype, device=chosen.device)
        return zeros.scatter_add_(0, chosen, real.flatten().to(chosen.dtype))

    def dropped_count(self) -> Int[Tensor, ""]:
        """Number of assignments of real tokens that were dropped."""
        if self.dropped is None:
            return torch.zeros((), dtype=torch.int64, device=self.logits.device)
        return (self.dropped if self.mask is None else self.dropped & self.mask[:, None]).sum()


@dataclass(frozen=True)
class LoadSummary:
    """How evenly one layer's experts were used; in brackets the value at perfect balance."""

    max_over_fair: float
    """largest load over the fair share 1/E [1]; MaxVio (Wang et al. 2024, eq. 4) is this minus 1"""
    min_over_fair: float
    """smallest load over the fair share [1]"""
    dead: int
    """experts with less than a tenth of their fair share [0]"""
    entropy: float
    """entropy of the load over log E [1]"""
    dropped: float
    """share of assignments that were dropped [0]"""


def summarise_load(counts: Int[Tensor, " E"], dropped: int = 0) -> LoadSummary:
    """The :class:`LoadSummary` of one layer, from its assignments per expert (any number of batches added up)."""
    total = int(counts.sum())
    n_experts = counts.numel()
    if total == 0:
        return LoadSummary(0.0, 0.0, n_experts, 0.0, 0.0)
    over_fair = counts.double() * n_experts / total
    load = counts.double() / total
    entropy = -(torch.special.xlogy(load, load)).sum() / math.log(n_experts) if n_experts > 1 else 1.0
    return LoadSummary(
        max_over_fair=float(over_fair.max()),
        min_over_fair=float(over_fair.min()),
        dead=int((over_fair < 0.1).sum()),
        entropy=float(entropy),
        dropped=dropped / total,
    )


def summarise_layers(counts: Int[Tensor, "L E"] | None, dropped: list[int]) -> list[LoadSummary]:
    """The :class:`LoadSummary` of each mixture layer; an empty list for a model without one (``counts`` None)."""
    if counts is None:
        return []
    return [summarise_load(layer, lost) for layer, lost in zip(counts, dropped, strict=True)]
