"""How evenly experts are used, how surely they are chosen, what is dropped, and how use changes along a text.

An assignment is a place of a token that holds an expert; it counts where the router sent it, dropped or not. Shares of
load are shares of assignments, as in Jiang et al. 2024 (Mixtral, arXiv 2401.04088, figure 7): they sum to 1 over
experts. (Muennighoff et al. 2024, OLMoE, divide by tokens: K times as much.)

Chance is routing at random: each token chooses as many different experts as it has in the record, all equally likely,
and independently of other tokens. A token that holds k of E experts then holds a given one with probability q = k/E, so
that a count has mean Σ q and variance Σ q (1 - q) over tokens. In real text tokens resemble their neighbours, so that
imbalance over few sequences is larger than for as many independent tokens.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from moe.study.measurement import Array, Axis, Measurement
from moe.study.metrics.information import entropy, mutual_information, per_assignment, permutation_null
from moe.study.record import EMPTY, Ints, Layer, Record

Over = Literal["all", "batch", "sequence"]
DropsBy = Literal["layer", "rank", "position", "domain"]
Choice = Literal["first", "any"]

DEAD = 0.1
"""An expert with less than this of its fair share is dead; as in the reports of training."""

CHUNK = 1 << 20
"""tokens that are worked on at once: memory does not grow with the record beyond its own columns"""

# ----------------------------------------------------------------------------------------------------------- balance


def load(record: Record) -> Measurement:
    """f_e, the share of a layer's assignments that went to expert e: [layer, expert], each row sums to 1.

    NaN for experts that a layer does not have. Chance is 1/E.
    """
    values = np.full((len(record.layers), most_experts(record)), np.nan)
    for row, layer in zip(values, record.layers, strict=True):
        counts = expert_counts(layer)[0]
        row[: layer.n_experts] = divide(counts, counts.sum())
    return Measurement(
        "load",
        "Load of each expert",
        "The share of all assignments that each expert got: equal bars at the chance line mean perfect balance, and an "
        "empty one an expert that is never used.",
        values,
        (layer_axis(record), expert_axis(record)),
        "share",
        chance=np.array([[1 / layer.n_experts] for layer in record.layers]),
    )


def coefficient_of_variation(record: Record) -> Measurement:
    """std(f) / mean(f) over the experts of a layer: [layer] (Shazeer et al. 2017, arXiv 1701.06538, eq. 7).

    The deviation is that of the population (over E). Chance is s · sqrt(2/(E - 1)) · Γ(E/2)/Γ((E - 1)/2), where s is
    the deviation of one count over its mean, sqrt((E - K)/(N K)) for N tokens of K experts: counts are close to normal
    and their sum is fixed, so that (E - 1) CV²/s² is χ² with E - 1 degrees of freedom. Within 1 % of simulated routing
    from 1 assignment an expert on.
    """
    values = []
    for layer in record.layers:
        counts = expert_counts(layer)[0]
        values.append(counts.std() / counts.mean() if counts.any() else np.nan)
    return Measurement(
        "coefficient_of_variation",
        "Coefficient of variation of the load",
        "The spread of the experts' loads over their mean: 0 is perfect balance, 1 means that loads typically differ "
        "from their mean by as much as it, and the square root of E - 1 that one expert gets all.",
        np.array(values),
        (layer_axis(record),),
        chance=np.array([_chance_variation(layer) for layer in record.layers]),
    )


def max_violation(record: Record, over: Over = "all", batch_sequences: int = 16) -> Measurement:
    """MaxVio = max_e f_e · E - 1: [layer] (Wang et al. 2024, arXiv 2408.15664, eq. 4).

    over: all assignments of the record (MaxVio_global), or the mean over batches of ``batch_sequences`` sequences in
    the order of the record (MaxVio_batch), or over sequences. In a record of held-out text a batch is mostly of one
    domain, unlike in training. Batches without assignments are left out.

    Chance is the expected maximum of E normal variables with a fixed sum, m_E · sqrt(E/(E - 1)), in units of the
    deviation of a count over its mean; the skewness of a count is the first correction (Cornish and Fisher). It is
    within 3 % of simulated routing from 4 assignments an expert on, and 8 % from 1 on. The rule sqrt(2 ln E / n) for n
    assignments an expert is a bound that is approached slowly, and leaves out that no expert comes twice: for 16
    experts and 2 choices it is 38 % too large.

    Raises ValueError for another ``over``, or fewer than 1 sequence in a batch.
    """
    if over not in ("all", "batch", "sequence"):
        raise ValueError(f"over is {over}: it must be all, batch or sequence")
    if batch_sequences < 1:
        raise ValueError(f"batches of {batch_sequences} sequences: they need at least 1")
    group = np.zeros(record.n_tokens, np.int64)
    if over != "all":
        group = _order_of_sequence(record) // (batch_sequences if over == "batch" else 1)
    n_groups = int(group.max(initial=0)) + 1
    values, chance = [], []
    for layer in record.layers:
        counts = expert_counts(layer, group, n_groups)
        totals = counts.sum(axis=1)
        some = totals > 0
        violations = counts[some].max(axis=1) / totals[some] * layer.n_experts - 1
        values.append(violations.mean() if some.any() else np.nan)
        expected = chance_max_violation(random_counts(layer, group, n_groups), layer.n_experts)[some]
        chance.append(expected.mean() if some.any() else np.nan)
    pure = "; where the record goes domain by domain so do its batches, unlike those of training"
    where = {
        "all": "over all tokens",
        "batch": f"in batches of {batch_sequences} sequences, on average",
        "sequence": "within a sequence, on average",
    }[over]
    return Measurement(
        "max_violation",
        f"Imbalance (MaxVio) {where}",
        f"How far the busiest expert is above its fair share {where}: 0 is perfect balance and 1 is twice its share, "
        "and routing at random gives the chance value, since few tokens never balance"
        f"{pure if over == 'batch' else ''}.",
        np.array(values),
        (layer_axis(record),),
        chance=np.array(chance),
    )


def load_entropy(record: Record) -> Measurement:
    """-Σ_e f_e ln f_e / ln E: [layer], 1 for perfect balance and 0 for collapse.

    The entropy of the load of all tokens, not of one token's scores (:func:`router_entropy`): a router can be balanced
    and sure of every token. Chance is 1 - s²/(2 ln E), s the deviation of a count over its mean: the first order in s²,
    0.001 off at 8 assignments an expert. 1 where there is only one expert, as in the reports of training.
    """
    values, chance = [], []
    for layer in record.layers:
        largest = math.log(layer.n_experts)
        values.append(entropy(expert_counts(layer)[0]) / largest if largest else 1.0)
        spread = float(random_counts(layer).deviation[0])
        chance.append(1 - spread**2 / (2 * largest) if largest else 1.0)
    return Measurement(
        "load_entropy",
        "Entropy of the load",
        "How evenly all tokens together use the experts: 1 is perfect balance, 0 is one expert for everything; it says "
        "nothing of how sure the router is of a single token.",
        np.array(values),
        (layer_axis(record),),
        "share",
        chance=np.array(chance),
    )


def dead_experts(record: Record, threshold: float = DEAD) -> Measurement:
    """Number of experts whose load is below ``threshold`` times the fair share 1/E: [layer], int64.

    Chance is E times the probability that a binomial count of N tokens and mean n/E, for n assignments, is so low.
    """
    values, chance = [], []
    for layer in record.layers:
        counts = expert_counts(layer)[0]
        total = int(counts.sum())
        values.append(int(_is_dead(counts, total, layer.n_experts, threshold).sum()))
        chance.append(layer.n_experts * _chance_of_death(layer, total, threshold))
    return Measurement(
        "dead_experts",
        "Dead experts",
        f"The number of experts that get less than {threshold:g} times their fair share of the assignments: none is "
        "well, and each that is dead is memory without use.",
        np.array(values, dtype=np.int64),
        (layer_axis(record),),
        "experts",
        chance=np.array(chance),
    )


# -------------------------------------------------------------------------------------------------------- each token


def router_entropy(record: Record) -> Measurement:
    """Mean over tokens of -Σ_e p_e ln p_e / ln E, p the scores of a token over their sum: [layer].

    How sure the router is of one token: 0 when all score is on one expert, 1 when it has no preference, which is the
    chance value given. The scores are those of all experts before selection; independent ones (sigmoid, ReLU) are
    divided by their sum, and tokens without any score are left out. Selection biases are not in it. NaN for layers
    whose scores were not recorded, and 1 where there is only one expert.
    """
    values = [_mean_score_entropy(layer) for layer in record.layers]
    known = any(layer.scores is not None for layer in record.layers)
    return Measurement(
        "router_entropy",
        "Entropy of a token's scores",
        "How undecided the router is about a single token: 0 is all score on one expert, 1 is the same score for all; "
        "it says nothing of whether the tokens together use all experts."
        if known
        else "The scores of all experts were not recorded, so how undecided the router is cannot be told here.",
        np.array(values),
        (layer_axis(record),),
        "share",
        chance=np.ones(()),
    )


def experts_per_token(record: Record) -> Measurement:
    """Mean number of experts that a token was assigned: [layer]; dropped assignments count too.

    There is no chance value: how many experts a token gets is asked of a router, or learnt, not a matter of chance.
    """
    held = [_held(layer) for layer in record.layers]
    return Measurement(
        "experts_per_token",
        "Experts of a token",
        "How many experts a token gets on average: the number asked for, or less or more where the router decides, or "
        "where experts choose their tokens.",
        np.array([divide(counts @ np.arange(counts.size), counts.sum()) for counts in held]),
        (layer_axis(record),),
        "experts",
    )


def experts_per_token_distribution(record: Record) -> Measurement:
    """Share of tokens that were assigned 0, 1, ..., K experts: [layer, number].

    Chance is binomial with the layer's mean: every expert takes a token or not, on its own and with the same
    probability. A router that always gives K is far from it, all at K; experts that choose tokens need not be.
    """
    most = max((layer.top_k for layer in record.layers), default=0)
    values, chance = np.full((2, len(record.layers), most + 1), np.nan)
    for row, expected, layer in zip(values, chance, record.layers, strict=True):
        counts = _held(layer)
        row[: counts.size] = divide(counts, counts.sum())
        probability = float(row[: counts.size] @ np.arange(counts.size)) / layer.n_experts
        expected[: counts.size] = [_binomial(layer.n_experts, number, probability) for number in range(counts.size)]
    return Measurement(
        "experts_per_token_distribution",
        "How many experts tokens get",
        "The share of tokens that get each number of experts: all at one number where the router gives as many to "
        "each, and close to chance where every expert takes tokens on its own; tokens at 0 pass the layer by.",
        values,
        (layer_axis(record), Axis("number", tuple(str(number) for number in range(most + 1)))),
        "share",
        chance=chance,
    )


# ------------------------------------------------------------------------------------------------------------- drops


def drop_rate(record: Record, by: DropsBy = "layer", bins: int = 16) -> Measurement:
    """Share of assignments that were dropped for lack of room: [layer], or [layer, rank | position | domain].

    rank: of a token's choices, 0 its first. position: in ``bins`` bins of equal width of the place in the sequence,
    labelled by their first position; dropping the last to come makes it grow (Xue et al. 2024, OpenMoE, arXiv
    2402.01739, figure 12). NaN where there were no assignments.

    Chance, but for by="layer", is the layer's rate: drops that hit all alike. The rate itself has none, because a
    record does not know the capacity. Raises ValueError for another ``by``.
    """
    if by not in ("layer", "rank", "position", "domain"):
        raise ValueError(f"by is {by}: it must be layer, rank, position or domain")
    # [L, groups, kept or dropped]
    if by == "rank":
        axis = Axis(
            "rank", tuple(str(rank) for rank in range(max((layer.top_k for layer in record.layers), default=0)))
        )
        counts = np.zeros((len(record.layers), len(axis.labels), 2), np.int64)
        for of_layer, layer in zip(counts, record.layers, strict=True):
            for rank in range(layer.top_k):
                of_layer[rank] = _fates(layer.selected[:, rank : rank + 1], layer.dropped[:, rank : rank + 1])[0]
    else:
        group: Array | None = None
        axis = Axis("layer", ("",))
        if by == "position":
            group, axis = _position_bins(record, bins)
        elif by == "domain":
            group, axis = record.domain, Axis("domain", record.domains)
        n_groups = len(axis.labels)
        fates = [_fates(layer.selected, layer.dropped, group, n_groups) for layer in record.layers]
        counts = np.stack(fates) if fates else np.zeros((0, n_groups, 2), np.int64)
    rates = divide(counts[..., 1], counts.sum(axis=-1))
    whole = divide(counts[..., 1].sum(axis=1), counts.sum(axis=(1, 2)))
    if by == "layer":
        return Measurement(
            "drop_rate",
            "Dropped assignments",
            "The share of assignments that found their expert full, so that it did not compute them: 0 is what a model "
            "that drops nothing has.",
            whole,
            (layer_axis(record),),
            "share",
        )
    return Measurement(
        "drop_rate",
        f"Dropped assignments by {by}",
        {
            "rank": "The share of first, second and later choices that found their expert full, against that of all.",
            "position": "The share of assignments that found their expert full, along the sequence, against that of "
            "all: a curve that rises means that late tokens pay for early ones.",
            "domain": "The share of a domain's assignments that found their expert full, against that of all: a domain "
            "far above it is one that experts are too few for.",
        }[by],
        rates,
        (layer_axis(record), axis),
        "share",
        chance=whole[:, None],
    )


# --------------------------------------------------------------------------------------------------- along a sequence


def consecutive_repetition(
    record: Record, choice: Choice = "first", permutations: int = 20, seed: int = 0
) -> Measurement:
    """Share of neighbouring tokens whose first choice is the same, or that share any expert: [layer].

    Jiang et al. 2024 (Mixtral, arXiv 2401.04088, table 5). Neighbours are of one sequence and of consecutive
    positions, and both have an expert. Chance for the first choice is Σ_e f_e², f the load of first choices (1/E where
    it is balanced: 12.5 % for 8 experts); for any, the mean of 1 - C(E-a, b)/C(E, b) over neighbours that hold a and b
    experts, at random and balanced (46 % for 2 of 8, 24.2 % for 2 of 16).

    The null shuffles tokens within their sequences: it holds uneven load, and what all tokens of a text have in common,
    so that what is above it is between neighbours. Raises ValueError for another ``choice``.
    """
    if choice not in ("first", "any"):
        raise ValueError(f"choice is {choice}: it must be first or any")
    neighbours = (np.diff(record.sequence) == 0) & (np.diff(record.position) == 1)
    pairs = np.nonzero(neighbours)[0]
    columns = [_members(layer, choice) for layer in record.layers]

    def share(row: Array) -> Array:
        one, other = row[pairs], row[pairs + 1]
        return np.array([_share_that_meet(members, one, other) for members in columns])

    chance = _chance_of_same_first if choice == "first" else _chance_of_overlap
    null = permutation_null(
        share,
        np.arange(record.n_tokens, dtype=np.int32),
        within=record.sequence,
        permutations=permutations,
        seed=seed,
    )
    what = "go first to the same expert" if choice == "first" else "share at least one expert"
    return Measurement(
        "consecutive_repetition",
        "Neighbours with the same first expert" if choice == "first" else "Neighbours that share an expert",
        f"The share of neighbouring tokens that {what}: above chance, routing runs in stretches, and above the null, "
        "which shuffles each sequence, it is neighbours that resemble each other and not the text as a whole.",
        share(np.arange(record.n_tokens)),
        (layer_axis(record),),
        "share",
        chance=np.array([chance(layer, pairs) for layer in record.layers]),
        null=null.mean,
        null_std=null.std,
    )


def position_dependence(record: Record, bins: int = 16, permutations: int = 20, seed: int = 0) -> Measurement:
    """I(position bin; expert) / H(expert): [layer], what the place in the sequence tells of the expert.

    Over assignments, in ``bins`` bins of equal width. Chance is the plug-in bias (bins - 1)(E - 1)/(2n), smaller by
    (E - K)/(E - 1) because no expert comes twice, over H(expert): what independent tokens would give. The null moves
    bins whole, among sequences and places: tokens of one bin of one sequence resemble each other, and look like
    positions that matter where sequences are few. NaN for a layer that uses one expert.
    """
    position, axis = _position_bins(record, bins)
    n_bins = len(axis.labels)
    stretch = record.sequence.astype(np.int64) * n_bins + position

    def dependence(label: Array) -> Array:
        return np.array([_told(expert_counts(layer, label, n_bins)) for layer in record.layers])

    null = permutation_null(dependence, position, blocks=stretch, permutations=permutations, seed=seed)
    return Measurement(
        "position_dependence",
        "What the position tells of the expert",
        "The share of what there is to know of a token's expert that its place in the sequence tells: 0 is nothing, 1 "
        "is all, and what is not above the null is chance.",
        dependence(position),
        (layer_axis(record),),
        "share",
        chance=np.array([_chance_told(layer, n_bins) for layer in record.layers]),
        null=null.mean,
        null_std=null.std,
    )


# ------------------------------------------------------------------------------------------------- shared by metrics


def expert_counts(layer: Layer, group: Array | None = None, n_groups: int = 1) -> Array:
    """Assignments to each expert, of the tokens of each group: int64 [n_groups, E]; ``group`` is [N]."""
    counts = np.zeros(n_groups * layer.n_experts, np.int64)
    for rows in chunks(len(layer.selected)):
        if group is None:
            (code,) = per_assignment(layer.selected[rows])
        else:
            expert, row = per_assignment(layer.selected[rows], group[rows])
            code = row.astype(np.int64) * layer.n_experts + expert
        counts += np.bincount(code, minlength=counts.size)
    return counts.reshape(n_groups, layer.n_experts)


def first_choice(layer: Layer) -> Ints:
    """[N] the expert of each token's first place that is not empty; EMPTY for a token without any."""
    first = layer.selected[:, 0] if layer.top_k else np.full(len(layer.selected), EMPTY, np.int32)
    for rank in range(1, layer.top_k):
        missing = first == EMPTY
        if not missing.any():
            break
        first = np.where(missing, layer.selected[:, rank], first)
    return first


def chunks(n_rows: int, size: int = CHUNK) -> Iterator[slice]:
    """Slices of at most ``size`` rows that cover all, and one empty slice where there are none."""
    for start in range(0, max(n_rows, 1), size):
        yield slice(start, min(start + size, n_rows))


def layer_axis(record: Record) -> Axis:
    """The mixture layers, labelled by block."""
    return Axis("layer", record.blocks)


def expert_axis(record: Record, name: str = "expert") -> Axis:
    """As many experts as the layer with most of them has."""
    return Axis(name, tuple(str(number) for number in range(most_experts(record))))


def most_experts(record: Record) -> int:
    """E of the layer with most experts."""
    return max((layer.n_experts for layer in record.layers), default=0)


def divide(part: Array, whole: Array) -> Array:
    """``part`` over ``whole``, NaN where there is nothing to divide by."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole)
    shape = np.broadcast_shapes(part.shape, whole.shape)
    ratio: Array = np.divide(part, whole, out=np.full(shape, np.nan), where=whole > 0)
    return ratio


# ------------------------------------------------------------------------------------------------------------ chance


class RandomCounts(NamedTuple):
    """Of an expert's count under routing at random, for each of G groups of tokens."""

    mean: Array
    """[G] assignments an expert"""
    deviation: Array
    """[G] over the mean; NaN where that is 0"""
    skewness: Array
    """[G] third central moment over deviation³; 0 where the count is certain"""


def random_counts(layer: Layer, group: Array | None = None, n_groups: int = 1) -> RandomCounts:
    """A sum of independent yes or no with q = k/E for each token that holds k of E experts, by group [N]."""
    sums = np.zeros((3, n_groups))
    for rows in chunks(len(layer.selected)):
        q = layer.assigned[rows].sum(axis=1) / layer.n_experts
        where = np.zeros(len(q), np.int64) if group is None else group[rows]
        for total, term in zip(sums, (q, q * (1 - q), q * (1 - q) * (1 - 2 * q)), strict=True):
            total += np.bincount(where, term, n_groups)
    mean, variance, third = sums
    skewness = np.divide(third, variance**1.5, out=np.zeros(n_groups), where=variance > 0)
    return RandomCounts(mean, divide(np.sqrt(variance), mean), skewness)


def _chance_variation(layer: Layer) -> float:
    n_experts = layer.n_experts
    if n_experts == 1:
        return 0.0
    spread = float(random_counts(layer).deviation[0])
    return (
        spread
        * math.sqrt(2 / (n_experts - 1))
        * math.exp(math.lgamma(n_experts / 2) - math.lgamma((n_experts - 1) / 2))
    )


def chance_max_violation(counts: RandomCounts, n_experts: int) -> Array:
    """[G] expected max_e f_e · E - 1 of routing at random (:func:`max_violation`); NaN for groups without counts."""
    if n_experts == 1:
        return np.zeros(counts.mean.shape)
    first, second = _largest_of_normals(n_experts)
    # The sum is fixed: counts less their mean vary by (E - 1)/E of what free ones would.
    grow = n_experts / (n_experts - 1)
    largest: Array = counts.deviation * (first * math.sqrt(grow) + counts.skewness / 6 * (second * grow - 1))
    return largest


@lru_cache
def _largest_of_normals(number: int) -> tuple[float, float]:
    """Mean and mean square of the largest of ``number`` independent standard normal variables, to 5 digits."""
    x = np.linspace(-9, 9, 36001)
    density = np.exp(-(x**2) / 2)
    cumulative = np.cumsum(density)
    probability = np.diff((cumulative / cumulative[-1]) ** number)
    middle = (x[1:] + x[:-1]) / 2
    return float(probability @ middle), float(probability @ middle**2)


def _is_dead(counts: Array, total: int, n_experts: int, threshold: float) -> Array:
    dead: Array = counts * n_experts < threshold * total if total else np.ones(counts.shape, np.bool_)
    return dead


def _chance_of_death(layer: Layer, total: int, threshold: float) -> float:
    tokens = len(layer.selected)
    q = total / max(tokens, 1) / layer.n_experts
    if total == 0:
        return 1.0
    if q >= 1:
        return float(threshold > 1)
    low = np.arange(min(tokens, math.ceil(threshold * total / layer.n_experts)) + 1)
    low = low[_is_dead(low, total, layer.n_experts, threshold)]
    if not low.size:
        return 0.0
    # ln P(c + 1) = ln P(c) + ln((N - c)/(c + 1)) + ln(q/(1 - q))
    steps = np.log((tokens - low[:-1]) / (low[:-1] + 1)) + math.log(q / (1 - q))
    return float(np.exp(tokens * math.log1p(-q) + np.append(0.0, np.cumsum(steps))).sum())


def _binomial(trials: int, successes: int, probability: float) -> float:
    return math.comb(trials, successes) * probability**successes * (1 - probability) ** (trials - successes)


def _chance_of_same_first(layer: Layer, pairs: Array) -> float:
    first = first_choice(layer)
    counts = np.bincount(first[first != EMPTY], minlength=layer.n_experts)
    return float((divide(counts, counts.sum()) ** 2).sum())


def _chance_of_overlap(layer: Layer, pairs: Array) -> float:
    """Mean of 1 - C(E-a, b)/C(E, b) over the neighbours that hold a and b experts, those with none left out."""
    places = layer.top_k + 1
    held = layer.assigned.sum(axis=1)
    counts = np.bincount(held[pairs] * places + held[pairs + 1], minlength=places**2).reshape(places, places)[1:, 1:]
    sizes = range(1, places)
    disjoint = np.array(
        [[math.comb(layer.n_experts - a, b) / math.comb(layer.n_experts, b) for b in sizes] for a in sizes]
    )
    return float(divide((counts * (1 - disjoint)).sum(), counts.sum()))


def _chance_told(layer: Layer, n_bins: int) -> float:
    counts = expert_counts(layer)[0]
    held, known = counts.sum() / max(len(layer.selected), 1), entropy(counts)
    if not known > 0:
        return math.nan
    distinct = (layer.n_experts - held) / (layer.n_experts - 1)
    return float((n_bins - 1) * (np.count_nonzero(counts) - 1) * distinct / (2 * counts.sum()) / known)


# ------------------------------------------------------------------------------------------------------------- parts


def _order_of_sequence(record: Record) -> Array:
    """[N] 0 for the rows of the first sequence of the record, 1 for those of the next, ..."""
    starts = np.diff(record.sequence, prepend=record.sequence[:1]) != 0
    order: Array = np.cumsum(starts)
    return order


def _held(layer: Layer) -> Array:
    """Tokens that hold 0, 1, ..., K experts: int64 [K + 1]."""
    counts = np.zeros(layer.top_k + 1, np.int64)
    for rows in chunks(len(layer.selected)):
        counts += np.bincount(layer.assigned[rows].sum(axis=1), minlength=counts.size)
    return counts


def _mean_score_entropy(layer: Layer) -> float:
    if layer.scores is None:
        return math.nan
    total, tokens = 0.0, 0
    for rows in chunks(len(layer.scores), max(1, CHUNK // layer.n_experts)):
        scores = layer.scores[rows].astype(np.float32)
        scores = scores[scores.sum(axis=1) > 0]
        scores /= scores.sum(axis=1, keepdims=True)
        total -= float((scores * np.log(scores, where=scores > 0, out=np.zeros_like(scores))).sum(dtype=np.float64))
        tokens += len(scores)
    if not tokens:
        return math.nan
    return total / tokens / math.log(layer.n_experts) if layer.n_experts > 1 else 1.0


def _fates(selected: Ints, dropped: Array, group: Array | None = None, n_groups: int = 1) -> Array:
    """Assignments that were kept, and those that were dropped, of the tokens of each group: int64 [n_groups, 2]."""
    counts = np.zeros(n_groups * 2, np.int64)
    for rows in chunks(len(selected)):
        held = selected[rows] != EMPTY
        fate = dropped[rows].astype(np.int64)
        if group is not None:
            fate += 2 * group[rows, None].astype(np.int64)
        counts += np.bincount(fate[held], minlength=counts.size)
    return counts.reshape(n_groups, 2)


def _position_bins(record: Record, bins: int) -> tuple[Array, Axis]:
    """[N] the bin of each token, and the axis: bins of equal width, or one for each position if those are fewer."""
    if bins < 1:
        raise ValueError(f"{bins} bins: there must be at least 1")
    length = int(record.position.max(initial=0)) + 1
    n_bins = min(bins, length)
    index: Array = record.position.astype(np.int64) * n_bins // length
    return index, Axis("position", tuple(str(-(-number * length // n_bins)) for number in range(n_bins)))


def _members(layer: Layer, choice: Choice) -> Array:
    """[N, W] a bit for each expert that the token holds (choice first: for its first), in W words of 64."""
    words = -(-layer.n_experts // 64)
    members = np.zeros((len(layer.selected), words), np.uint64)
    for place in [first_choice(layer)] if choice == "first" else layer.selected.T:
        for word in range(words):
            here = (place != EMPTY) & (place >> 6 == word)
            members[:, word] |= np.where(here, np.uint64(1) << (place & 63).astype(np.uint64), np.uint64(0))
    return members


def _share_that_meet(members: Array, one: Array, other: Array) -> float:
    both = meet = 0
    for rows in chunks(len(one)):
        first, second = members[one[rows]], members[other[rows]]
        both += int((first.any(axis=1) & second.any(axis=1)).sum())
        meet += int((first & second).any(axis=1).sum())
    return meet / both if both else math.nan


def _told(table: Array) -> float:
    """What the row tells of the column in counts [R, C], over the entropy of the column."""
    known = entropy(table.sum(axis=0))
    return mutual_information(table) / known if known > 0 else math.nan
