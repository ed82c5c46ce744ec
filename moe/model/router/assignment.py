"""Selection rules that compare tokens with each other: expert choice, Sinkhorn, BASE.

They are balanced by construction and not causal: which expert a token gets depends on later tokens and on the other
sequences. None has a gradient. Those that iterate until the data say stop are run as they are by torch.compile.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

SINKHORN_TOLERANCE = 1e-4
"""largest relative change of a column factor at which Sinkhorn's iteration stops"""
SINKHORN_ITERATIONS = 200
"""at most so many Sinkhorn iterations"""
SINKHORN_CHECK_EVERY = 8
"""iterations between two looks at the change: on a GPU each look makes the host wait"""

AUCTION_PRECISION = 0.01
"""default epsilon of an assignment, and step of its first auction, as parts of the widest spread within a token"""
AUCTION_SHRINK = 10.0
"""factor between the step of one auction and that of the next, finer one"""
AUCTION_ROUNDS = 1000
"""at most so many rounds of bids in one assignment"""


def expert_choice(
    scores: Float[Tensor, "T E"], top_k: int, mask: Bool[Tensor, " T"] | None = None
) -> Bool[Tensor, "T E"]:
    """Which tokens each expert takes: the c = ceil(k T / E) real ones that score highest for it.

    T counts real tokens; padding is never taken (k is at most E), and equal scores go to the earlier token. A token may
    be taken by any number of experts, none included. Zhou et al. 2022 (arXiv 2202.09368), with capacity factor k; there
    are no fractions of a place, so c is rounded up. Scores must be finite. No host synchronisation.
    """
    n_tokens, n_experts = scores.shape
    # Sorting rows is several times as fast as sorting columns.
    by_expert = scores.detach().T.contiguous()
    n_real: int | Tensor = n_tokens
    if mask is not None:
        n_real = mask.sum()
        by_expert = by_expert.masked_fill(~mask, -torch.inf)
    capacity = (top_k * n_real + n_experts - 1) // n_experts
    order = by_expert.argsort(dim=1, descending=True, stable=True)
    within = torch.arange(n_tokens, device=scores.device) < capacity
    taken = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, within.expand_as(order))
    return taken.T


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sinkhorn_plan(logits: Float[Tensor, "T E"], mask: Bool[Tensor, " T"] | None = None) -> Float[Tensor, "T E"]:
    """The transport plan nearest to exp(logits): d0_t exp(z_te) d1_e with row sums 1/T and column sums 1/E.

    T counts real tokens; the rows of padding are 0. At least float32. A token's experts are the largest entries of its
    row. Clark et al. 2022 (arXiv 2202.01169, S-BASE), with the alternation and the tolerance of Megatron-LM's
    ``sinkhorn``.

    Each iteration scales the rows, as a softmax of z + log d1, then the columns. Adding a constant to a token's logits
    changes nothing but d0, so no exponential overflows. Column sums are exact; the iteration stops once no column
    factor moves by more than :data:`SINKHORN_TOLERANCE` relatively, which bounds the relative error of every row sum.
    Megatron asks that of the mean absolute change; the factors are about 1 unless an expert is starved, whose factor
    is huge and might never settle absolutely. The more peaked the logits, the slower: of 4096 tokens and 16 experts,
    with logits of standard deviation 1, 10 and 30, it takes about 8, 40 and 110 iterations. After
    :data:`SINKHORN_ITERATIONS` the plan is returned as it is: its columns balance, its rows nearly. The host waits for
    a GPU once in :data:`SINKHORN_CHECK_EVERY` iterations.
    """
    n_tokens, n_experts = logits.shape
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    n_real: int | Tensor = n_tokens if mask is None else mask.sum().clamp(min=1)
    smallest = torch.finfo(logits.dtype).tiny
    log_factor = logits.new_zeros(n_experts)
    for iteration in range(1, SINKHORN_ITERATIONS + 1):
        rows = (logits + log_factor).softmax(dim=-1)
        if mask is not None:
            rows = rows.masked_fill(~mask[:, None], 0.0)
        # A column may underflow to 0: its factor then grows by the largest finite step, and again in the next turn.
        over_fair = (rows.sum(dim=0) * n_experts / n_real).clamp(min=smallest)
        change = over_fair.log()
        log_factor = log_factor - change
        if iteration % SINKHORN_CHECK_EVERY == 0 and bool(change.abs().amax() < SINKHORN_TOLERANCE):
            break
    return rows / over_fair / n_real


@torch.compiler.disable  # type: ignore[untyped-decorator]
def balanced_assignment(
    affinity: Float[Tensor, "T E"], mask: Bool[Tensor, " T"] | None = None, epsilon: float | None = None
) -> Int[Tensor, " T"]:
    """One expert a token, none with more than ceil(T / E) tokens, the sum of affinities nearly largest.

    T counts real tokens; padding gets an id that means nothing and takes no place. BASE layers, Lewis et al. 2021
    (arXiv 2103.16716), for any T.

    The sum is within T ``epsilon`` of the largest possible; with integer affinities and epsilon below 1/T it is the
    largest. None: :data:`AUCTION_PRECISION` of the widest spread within one token's affinities (the authors' code
    takes twice that, of the spread over all). Solved by auction: tokens without an expert bid for the one they like
    best at its price, up to their second best and a step beyond; an expert keeps its highest bids, and the lowest kept
    is its price (Bertsekas 1988, "The auction algorithm"; Bertsekas and Castañon 1989 for several equal places). The
    step shrinks to epsilon from one auction to the next, which starts from the prices so far: with small steps from
    the start, experts much alike would outbid each other for long. After :data:`AUCTION_ROUNDS` rounds the last
    auction that ended decides, and its step takes epsilon's place; if none did, tokens without an expert get the
    places that are left, in order.

    Affinities must be finite. In float64: a step must not vanish beside a price. The host waits for a GPU in every
    round, some 20 to 200 times. Raises ValueError for an epsilon that is not positive.
    """
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}, and must be positive")
    real = (affinity.detach() if mask is None else affinity.detach()[mask]).double()
    n_real, n_experts = real.shape
    if n_real == 0 or n_experts == 1:
        return torch.zeros(affinity.shape[0], dtype=torch.int64, device=affinity.device)
    places = -(-n_real // n_experts)
    # Made-up tokens that like all experts alike take the places beyond T. With every place taken in the end, prices may
    # start anywhere; where places could stay empty, those would have to be free of charge.
    everyone = F.pad(real, (0, 0, 0, places * n_experts - n_real))
    coarsest = AUCTION_PRECISION * (float((real.amax(dim=1) - real.amin(dim=1)).max()) or 1.0)
    # An auction is within one step for each token, the made-up ones too.
    finest = (coarsest if epsilon is None else epsilon) * n_real / len(everyone)

    step, rounds_left = max(coarsest, finest), AUCTION_ROUNDS
    expert, prices, rounds_left = _auction(everyone, real.mean(dim=0), places, step, rounds_left)
    while step > finest and rounds_left > 0:
        step = max(step / AUCTION_SHRINK, finest)
        finer, prices, rounds_left = _auction(everyone, prices, places, step, rounds_left)
        if rounds_left > 0:
            expert = finer
    assigned = _fill(expert, n_experts, places)[:n_real]
    if mask is None:
        return assigned
    return torch.zeros_like(mask, dtype=torch.int64).masked_scatter_(mask, assigned)


def _auction(
    affinity: Float[Tensor, "N E"], prices: Float[Tensor, " E"], places: int, step: float, rounds_left: int
) -> tuple[Int[Tensor, " N"], Float[Tensor, " E"], int]:
    """The expert of each token (E: none, where the rounds ran out), the new prices, and the rounds that are left."""
    n_tokens, n_experts = affinity.shape
    everyone = torch.arange(n_tokens, device=affinity.device)
    ids = torch.arange(n_experts, device=affinity.device)
    expert = torch.full_like(everyone, n_experts)
    bids = affinity.new_zeros(n_tokens)
    bidders = everyone
    while bidders.numel() > 0 and rounds_left > 0:
        rounds_left -= 1
        value = affinity[bidders] - prices
        best, wanted = value.max(dim=1)
        second = value.scatter_(1, wanted[:, None], -torch.inf).amax(dim=1)
        expert[bidders] = wanted
        bids[bidders] = prices[wanted] + (best - second) + step

        # By expert, higher bids first, the earlier token first among equals.
        order = bids.argsort(descending=True, stable=True)
        order = order[expert[order].argsort(stable=True)]
        owner = expert[order]
        first = torch.searchsorted(owner, ids)
        full = torch.searchsorted(owner, ids, right=True) - first >= places
        lowest_kept = bids[order[(first + places - 1).clamp(max=n_tokens - 1)]]
        prices = torch.where(full, lowest_kept, prices)
        bidders = order[everyone - first[owner] >= places].sort().values
        expert[bidders] = n_experts
    return expert, prices, rounds_left


def _fill(expert: Int[Tensor, " N"], n_experts: int, places: int) -> Int[Tensor, " N"]:
    """Give tokens without an expert (id E), in order, the places that are left; N = E x ``places``."""
    without = (expert == n_experts).nonzero()[:, 0]
    if without.numel() == 0:
        return expert
    ids = torch.arange(n_experts, device=expert.device)
    left = places - (expert[:, None] == ids).sum(dim=0)
    return expert.index_put((without,), ids.repeat_interleave(left))
