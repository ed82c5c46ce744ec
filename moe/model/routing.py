"""A routing decision is a value: what the router decided for every token, and what can be derived from it."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The decision of one router for T tokens, E experts and K choices a token.

    An assignment is a pair (token, choice). Every token has K places for one; where the number of experts varies from
    token to token, some places are empty (:attr:`assigned`). Of the E experts the last ``n_special`` have no MLP.
    The expert back-ends compute what :attr:`executed` says: assignments to an MLP, unless dropped or of padding.
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
    assigned: Bool[Tensor, "T K"] | None = None
    """True where the place holds an assignment; None: everywhere. An empty place has weight 0"""
    n_special: int = 0
    """zero, copy and constant experts, the last of the E"""
    n_sequences: int = 1
    """B: the T tokens are so many sequences of equal length, one after the other"""
    scores_are_probabilities: bool = True
    """whether each token's scores sum to 1"""
    noise: "LearnedNoise | None" = None
    """what Shazeer's load loss needs to know of the noise in the logits; None: there was none"""
    tally: "Tally | None" = None
    """sums over the tokens, where the router had them at hand; read it as :attr:`own_tally`"""

    @property
    def n_tokens(self) -> int:
        """T, padding included."""
        return self.selected.shape[0]

    @property
    def n_experts(self) -> int:
        """E."""
        return self.logits.shape[1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.selected.shape[1]

    @property
    def n_mlps(self) -> int:
        """Experts with an MLP: the first of the E."""
        return self.n_experts - self.n_special

    @property
    def present(self) -> Bool[Tensor, "T K"] | None:
        """Which places hold an assignment of a real token, dropped or not; None where all do."""
        if self.mask is None:
            return self.assigned
        real = self.mask[:, None].expand_as(self.selected)
        return real if self.assigned is None else real & self.assigned

    @property
    def carried_out(self) -> Bool[Tensor, "T K"] | None:
        """Which places hold an assignment that counts in the output; None where all do."""
        present = self.present
        if self.dropped is None:
            return present
        return ~self.dropped if present is None else present & ~self.dropped

    @property
    def executed(self) -> Bool[Tensor, "T K"] | None:
        """Which assignments an expert's MLP computes; None where all are."""
        carried_out = self.carried_out
        if not self.n_special:
            return carried_out
        to_mlp = self.selected < self.n_mlps
        return to_mlp if carried_out is None else carried_out & to_mlp

    @property
    def own_tally(self) -> "Tally | None":
        """The tally if it is of this routing: ``replace`` leaves that of the routing it started from."""
        tally = self.tally
        if tally is None or self.assigned is not None:
            return None
        same = tally.scores is self.scores and tally.selected is self.selected and tally.mask is self.mask
        return tally if same else None

    def dropping(self, dropped: Bool[Tensor, "T K"]) -> "Routing":
        """This routing with those assignments dropped: they are still counted as load, and their weight is 0."""
        return replace(self, dropped=dropped, weights=self.weights.masked_fill(dropped, 0.0))

    def first_choices(self) -> "Routing":
        """This routing with the first place of each token alone."""
        return replace(
            self,
            selected=self.selected[:, :1],
            weights=self.weights[:, :1],
            dropped=None if self.dropped is None else self.dropped[:, :1],
            assigned=None if self.assigned is None else self.assigned[:, :1],
        )

    def one_row_a_place(self) -> "Routing":
        """The T·K places as single choices of as many tokens, of weight 1 where carried out, else 0."""
        carried_out = self.carried_out
        kept = None if carried_out is None else carried_out.reshape(-1, 1)
        ones = self.weights.new_ones(self.weights.numel(), 1)
        return Routing(
            logits=self.logits.repeat_interleave(self.top_k, dim=0),
            scores=self.scores.repeat_interleave(self.top_k, dim=0),
            selected=self.selected.reshape(-1, 1),
            weights=ones if kept is None else ones * kept,
            assigned=kept,
            n_special=self.n_special,
        )

    def real_tokens(self) -> Int[Tensor, ""]:
        """Number of tokens that are not padding, as a tensor (no host synchronisation)."""
        if self.mask is None:
            return torch.full((), self.n_tokens, dtype=torch.int64, device=self.logits.device)
        return self.mask.sum()

    def counts(self) -> Int[Tensor, " E"]:
        """Assignments of real tokens to each expert, before any were dropped.

        They sum to K times the real tokens, if every place holds one. int64: a bfloat16 counter stops at 256, and
        ``histc`` is neither deterministic on CUDA nor exact.
        """
        if (tally := self.own_tally) is not None:
            return tally.counts
        return _count(self.selected, self.present, self.n_experts)

    def sequence_counts(self) -> Int[Tensor, "B E"]:
        """:meth:`counts` of each sequence."""
        per_sequence = self.n_tokens // self.n_sequences
        first = torch.arange(self.n_sequences, device=self.selected.device) * self.n_experts
        slot = self.selected + first.repeat_interleave(per_sequence)[:, None]
        return _count(slot, self.present, self.n_sequences * self.n_experts).view(self.n_sequences, self.n_experts)

    def dropped_count(self) -> Int[Tensor, ""]:
        """Number of assignments of real tokens that were dropped."""
        if self.dropped is None:
            return torch.zeros((), dtype=torch.int64, device=self.logits.device)
        present = self.present
        return (self.dropped if present is None else self.dropped & present).sum()


@dataclass(frozen=True)
class Tally:
    """Sums over the real tokens of a routing of which every place holds an assignment."""

    scores: Float[Tensor, "T E"]
    """of that routing, as are ``selected`` and ``mask``"""
    selected: Int[Tensor, "T K"]
    mask: Bool[Tensor, " T"] | None
    counts: Int[Tensor, " E"]
    """:meth:`Routing.counts`"""
    share_sums: Float[Tensor, " E"]
    """sum over the tokens of each expert's share of a token's scores; with its gradient"""
    n_scored: Int[Tensor, ""]
    """number of tokens that have shares: whose scores are probabilities, or not all 0"""


@dataclass(frozen=True)
class LearnedNoise:
    """The two parts of the logits of a noisy router (Shazeer et al. 2017, eq. 4)."""

    clean_logits: Float[Tensor, "T E"]
    """the logits without noise"""
    std: Float[Tensor, "T E"]
    """standard deviation of the noise on each logit, positive"""


def _count(expert: Int[Tensor, "T n"], present: Bool[Tensor, "T n"] | None, n_experts: int) -> Int[Tensor, " E"]:
    chosen = expert.flatten()
    ones = torch.ones_like(chosen) if present is None else present.flatten().to(chosen.dtype)
    return torch.zeros(n_experts, dtype=chosen.dtype, device=chosen.device).scatter_add_(0, chosen, ones)


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
