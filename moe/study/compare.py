"""Two models side by side, expert by expert, and several seeds of one configuration with their interval.

The numbers of experts mean nothing: two seeds learn the same experts in another order. So experts are matched by
co-routing first: expert i of one model answers to the expert of the other that gets the same tokens, one to one, such
that as many assignments as possible agree (the Hungarian method on the co-assignment matrix of each layer). A matching
always finds something, so the agreement after it has its own chance value: what matching routers that know nothing
finds, and, as the null, what it finds once the tokens of one model are shuffled.

Matching and intervals need scipy, which comes with the extra ``study``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from moe.errors import UserError
from moe.study.measurement import Array, Axis, Measurement
from moe.study.record import EMPTY, Ints, Layer, Record

if TYPE_CHECKING:
    import pandas as pd

UNMATCHED = -1
"""partner of an expert for which the other model has none left"""
CONFIDENCE = 0.95
DRAWS = 20
"""of routing that knows nothing, matched anew each time"""

NUMBERED_AXES = ("expert", "from", "to", "other", "path")
"""axes along which models differ by a renumbering of their experts, so that their values cannot be averaged"""

# ------------------------------------------------------------------------------------------------------------- matching


@dataclass(frozen=True)
class Matching:
    """Which expert of another model answers to each expert of one, in the mixture blocks that both have."""

    blocks: tuple[int, ...]
    partners: tuple[Ints, ...]
    """for each block [E], the other model's expert for each of one's; UNMATCHED where it has fewer"""

    def of(self, block: int) -> Ints:
        """The partners in ``block``; raises KeyError for a block that is not a mixture in both."""
        if block not in self.blocks:
            raise KeyError(block)
        return self.partners[self.blocks.index(block)]


def require_same_tokens(records: Sequence[Record], names: Sequence[str] | None = None) -> None:
    """Raise UserError unless all ``records`` are of the same tokens in the same order, in sequences of the same cut."""
    names = names or [record.source or f"record {number}" for number, record in enumerate(records, 1)]
    first = records[0]
    for name, record in zip(names[1:], records[1:], strict=True):
        different = [
            column
            for column in ("token_id", "target_id", "position", "sequence")
            if not np.array_equal(getattr(first, column), getattr(record, column))
        ]
        if different or _domain_names(first) != _domain_names(record):
            raise UserError(
                f"{names[0]} and {name}: their records are of different tokens ({first.n_tokens:,} and "
                f"{record.n_tokens:,}): only runs of one corpus, tokenizer and data.sequence_length can be compared, "
                "recorded with the same --tokens"
            )


def _domain_names(record: Record) -> tuple[str, ...]:
    """The names of the domains from their first token on; where all tokens are the same, so are the bounds."""
    order = np.sort(np.unique(record.domain, return_index=True)[1])
    return tuple(record.domains[index] for index in record.domain[order])


def co_routing(one: Layer, other: Layer) -> Array:
    """Tokens for which ``one`` chose expert i and ``other`` expert j, in any of their places: int64 [E, E']."""
    return _joint(_membership(one), _membership(other))


def match_experts(one: Record, other: Record) -> Matching:
    """Pair the experts of two records of the same tokens so that as many of their assignments as possible agree.

    One to one in each block that is a mixture in both, by the Hungarian method (Kuhn 1955) on :func:`co_routing`. Where
    one model has more experts, those of its experts stay alone that cost least. Raises UserError for records of
    different tokens or without a common mixture block, and where scipy is missing.
    """
    pairs = _layer_pairs(one, other)
    return Matching(
        tuple(layer.block for layer, _ in pairs),
        tuple(_partners(co_routing(layer, its_other)) for layer, its_other in pairs),
    )


def renumber(other: Record, matching: Matching) -> Record:
    """``other`` with its experts numbered as those that they answer to, so that every metric lines up.

    With as many experts in both, an expert gets its partner's number; those without a partner come last, and where
    there are fewer experts than partners they keep the partners' order. Blocks outside the matching stay as they are.
    """
    return replace(
        other,
        layers=tuple(
            _renumbered(layer, matching.of(layer.block)) if layer.block in matching.blocks else layer
            for layer in other.layers
        ),
    )


def agreement(one: Record, other: Record, *, draws: int = DRAWS, seed: int = 0) -> Measurement:
    """Share of the assignments of two records of the same tokens that agree: [layer, experts], as numbered and matched.

    2 Σ_t |A_t ∩ B_t| / Σ_t (|A_t| + |B_t|) for the experts A_t and B_t of token t: |A ∩ B|/K where all tokens have K.
    Chance is what routers have that know nothing and use experts alike, K/E as numbered, and a little more once
    matched (a mean over ``draws``). The null keeps each expert's load but shuffles the tokens of ``other``, and matches
    anew each time: experts that take half of all tokens agree much, whatever they take. Raises as
    :func:`match_experts` does.
    """
    pairs = _layer_pairs(one, other)
    generator = np.random.default_rng(seed)
    values, chance, nulls = [], [], []
    for layer, its_other in pairs:
        members, other_members = _membership(layer), _membership(its_other)
        total = (members.sum(dtype=np.int64) + other_members.sum(dtype=np.int64)) / 2
        values.append(_agreements(_joint(members, other_members), total))
        chance.append(_chance_agreements(layer, its_other, draws, generator))
        nulls.append(
            [
                _agreements(_joint(members, other_members[generator.permutation(len(members))]), total)
                for _ in range(draws)
            ]
        )
    null = np.array(nulls)
    return Measurement(
        "agreement",
        "Do both send a token to the same expert?",
        "The share of assignments on which the two agree, with experts as they are numbered and once each is matched "
        "to the one that gets the same tokens; what is above the null is more than matching finds in shuffled tokens.",
        np.array(values),
        (
            Axis("layer", tuple(str(layer.block) for layer, _ in pairs)),
            Axis("experts", ("as numbered", "matched")),
        ),
        "share",
        chance=np.array(chance),
        null=null.mean(axis=1),
        null_std=null.std(axis=1, ddof=1),
    )


def partner_overlap(one: Record, other: Record, matching: Matching) -> Measurement:
    """For each expert of ``one``, how much of its tokens it shares with its partner: [layer, expert].

    |tokens of both| / |tokens of either| (Jaccard), so a partner that takes everything does not score. Chance is that
    of partners that matching finds where routers know nothing and use experts alike (:func:`agreement`): with a share a
    of assignments that agree, a/(2 - a) where both have as many experts. NaN without a partner or tokens.
    """
    pairs = _layer_pairs(one, other)
    generator = np.random.default_rng(0)
    most = max(layer.n_experts for layer, _ in pairs)
    values = np.full((len(pairs), most), np.nan)
    chance = []
    for row, (layer, its_other) in enumerate(pairs):
        joint = co_routing(layer, its_other)
        tokens, others = _tokens_of_experts(layer), _tokens_of_experts(its_other)
        for expert, partner in enumerate(matching.of(layer.block)):
            if partner != UNMATCHED and (either := tokens[expert] + others[partner] - joint[expert, partner]):
                values[row, expert] = joint[expert, partner] / either
        chance.append(_chance_overlap(layer, its_other, generator))
    return Measurement(
        "partner_overlap",
        "How alike are matched experts?",
        "Of the tokens that go to an expert or to its partner in the other model, the share that go to both; 1 means "
        "that they are the same expert.",
        values,
        (
            Axis("layer", tuple(str(layer.block) for layer, _ in pairs)),
            Axis("expert", tuple(str(expert) for expert in range(most))),
        ),
        "share",
        chance=np.array(chance)[:, None],
    )


def _layer_pairs(one: Record, other: Record) -> list[tuple[Layer, Layer]]:
    """The layers of both for each block that is a mixture in both."""
    require_same_tokens((one, other))
    others = {layer.block: layer for layer in other.layers}
    pairs = [(layer, others[layer.block]) for layer in one.layers if layer.block in others]
    if not pairs:
        raise UserError(
            f"no block is a mixture in both: those of one are {', '.join(one.blocks)}, "
            f"those of the other {', '.join(other.blocks)}"
        )
    return pairs


def _membership(layer: Layer) -> Array:
    """[N, E] 1 where the token has the expert, else 0; float32, in which whole numbers are exact up to 2^24."""
    members = np.zeros((len(layer.selected), layer.n_experts), np.float32)
    token, place = np.nonzero(layer.selected != EMPTY)
    members[token, layer.selected[token, place]] = 1
    return members


def _joint(members: Array, others: Array) -> Array:
    """Aᵀ B in whole numbers, int64, a block of tokens at a time so that float32 counts stay exact."""
    at_once = 1 << 20
    joint: Array = np.zeros((members.shape[1], others.shape[1]), np.int64)
    for start in range(0, len(members), at_once):
        part = slice(start, start + at_once)
        joint += np.rint(members[part].T @ others[part]).astype(np.int64)
    return joint


def _partners(joint: Array) -> Ints:
    partners = np.full(len(joint), UNMATCHED, np.int32)
    rows, columns = _scipy("optimize").linear_sum_assignment(joint, maximize=True)
    partners[rows] = columns
    return partners


def _agreements(joint: Array, total: float) -> tuple[float, float]:
    """Share of the assignments on the diagonal, and on the best matching."""
    rows, columns = _scipy("optimize").linear_sum_assignment(joint, maximize=True)
    if not total:
        return math.nan, math.nan
    return float(np.trace(joint) / total), float(joint[rows, columns].sum() / total)


def _chance_agreements(one: Layer, other: Layer, draws: int, generator: np.random.Generator) -> tuple[float, float]:
    """What routers have that choose at random and use experts alike: as numbered, and on the best matching.

    Co-assignments of N tokens are then nearly normal, with mean N p p' and variance N p (1 - p) p' (1 - p'), p = K/E.
    What is common to a row or a column moves no matching, and rows and columns have fixed sums: noise is centred both
    ways, and scaled so that its variance stays. Of what simulated matching finds above K/E this is 5 % too little at
    N p p' = 10 tokens for a pair of experts, and 15 % at 1.
    """
    n, share, other_share = len(one.selected), _share(one), _share(other)
    rows, columns = one.n_experts, other.n_experts
    total = n * (share * rows + other_share * columns) / 2
    if not total:
        return math.nan, math.nan
    mean = n * share * other_share
    numbered = min(rows, columns) * mean / total
    if min(rows, columns) == 1:
        return numbered, numbered
    deviation = math.sqrt(mean * (1 - share) * (1 - other_share) * rows / (rows - 1) * columns / (columns - 1))
    found = []
    for _ in range(draws):
        noise = generator.standard_normal((rows, columns))
        noise = noise - noise.mean(axis=0) - noise.mean(axis=1, keepdims=True) + noise.mean()
        best = _scipy("optimize").linear_sum_assignment(noise, maximize=True)
        found.append(noise[best].sum())
    return numbered, numbered + float(np.mean(found)) * deviation / total


def _chance_overlap(one: Layer, other: Layer, generator: np.random.Generator) -> float:
    """Tokens of both over tokens of either, for the pairs of experts that agree by chance once matched."""
    _, matched = _chance_agreements(one, other, DRAWS, generator)
    tokens, others = one.assigned.sum() / one.n_experts, other.assigned.sum() / other.n_experts
    total = (one.assigned.sum() + other.assigned.sum()) / 2
    both = matched * total / min(one.n_experts, other.n_experts)
    return float(both / (tokens + others - both)) if total else math.nan


def _share(layer: Layer) -> float:
    """p = K/E, with K the places that a token fills on average."""
    return float(layer.assigned.sum()) / max(len(layer.selected), 1) / layer.n_experts


def _tokens_of_experts(layer: Layer) -> Array:
    return np.bincount(layer.selected[layer.assigned], minlength=layer.n_experts)


def _renumbered(layer: Layer, partners: Ints) -> Layer:
    number_of = np.full(layer.n_experts, len(partners), np.int64)
    matched = partners != UNMATCHED
    number_of[partners[matched]] = np.nonzero(matched)[0]
    # Stable: experts without a partner come last, in their own order.
    order = np.argsort(number_of, kind="stable")
    new = np.empty(layer.n_experts + 1, np.int32)
    new[order] = np.arange(layer.n_experts)
    new[EMPTY] = EMPTY
    return replace(
        layer,
        selected=new[layer.selected],
        scores=None if layer.scores is None else layer.scores[:, order],
    )


# --------------------------------------------------------------------------------------------------------- side by side


@dataclass(frozen=True)
class Comparison:
    """Two records of the same tokens."""

    names: tuple[str, str]
    one: Record
    other: Record
    """its experts numbered as they are"""
    matching: Matching
    renumbered: Record
    """``other`` with its experts numbered as those of ``one`` that they answer to"""

    def agreement(self) -> Measurement:
        """:func:`agreement`."""
        return agreement(self.one, self.other)

    def partner_overlap(self) -> Measurement:
        """:func:`partner_overlap`."""
        return partner_overlap(self.one, self.other, self.matching)

    def loss_difference(self) -> "Spread":
        """:func:`loss_difference`."""
        return loss_difference(self.one, self.other)

    def measure(self, metric: Callable[[Record], Measurement]) -> tuple[Measurement, Measurement]:
        """A metric of both, with matched experts under the same number."""
        return metric(self.one), metric(self.renumbered)

    def side_by_side(self, metric: Callable[[Record], Measurement]) -> Measurement:
        """A metric of both as one measurement, with the axis ``run`` in front; raises as :func:`side_by_side` does."""
        return side_by_side(self.measure(metric), self.names)


def compare(one: Record, other: Record, names: tuple[str, str] | None = None) -> Comparison:
    """Match the experts of two records of the same tokens; raises as :func:`match_experts` does."""
    names = names or (one.source or "one", other.source or "other")
    require_same_tokens((one, other), names)
    matching = match_experts(one, other)
    return Comparison(names, one, other, matching, renumber(other, matching))


def side_by_side(measurements: Sequence[Measurement], names: Sequence[str]) -> Measurement:
    """The same metric of several models as one measurement, the axis ``run`` in front.

    Raises ValueError where their axes differ: models with another number of experts go into a :func:`table`.
    """
    first = measurements[0]
    for measurement in measurements:
        if measurement.name != first.name or measurement.axes != first.axes:
            raise ValueError(f"{measurement.name} has other axes than {first.name} of {names[0]}")
    shape = first.values.shape

    def stacked(part: str) -> Array | None:
        parts = [getattr(measurement, part) for measurement in measurements]
        present = [value for value in parts if value is not None]
        return np.stack([np.broadcast_to(value, shape) for value in present]) if len(present) == len(parts) else None

    return replace(
        first,
        values=np.stack([measurement.values for measurement in measurements]),
        axes=(Axis("run", tuple(names)), *first.axes),
        chance=stacked("chance"),
        null=stacked("null"),
        null_std=stacked("null_std"),
    )


def table(one: Measurement, other: Measurement, names: tuple[str, str]) -> "pd.DataFrame":
    """A metric of two models: one row a value, with a column for each axis, both values and their difference.

    Values that only one of them has are NaN for the other, where it has fewer experts, or other layers.
    """
    import pandas as pd

    keys = [axis.name for axis in one.axes]
    kept = [column for column in ("chance", "null") if getattr(one, column) is not None]
    left = one.frame()[[*keys, "value", *kept]].rename(columns={"value": names[0]})
    right = other.frame()[[*keys, "value"]].rename(columns={"value": names[1]})
    both = pd.merge(left, right, on=keys, how="outer", sort=False) if keys else left.join(right)
    both["difference"] = both[names[1]] - both[names[0]]
    both.insert(0, "metric", one.name)
    return both[["metric", *keys, *names, "difference", *kept]]


# ---------------------------------------------------------------------------------------------------------------- seeds


@dataclass(frozen=True)
class Spread:
    """A mean over n draws and how far the truth may be from it."""

    mean: Measurement
    half_width: Array
    """of the 95 % t-interval, of the shape of the mean's values; NaN where there are fewer than 2 draws"""
    n: int
    """draws: seeds, pairs of seeds, or sequences"""

    @property
    def low(self) -> Array:
        """Lower end of the interval."""
        return self.mean.values - self.half_width

    @property
    def high(self) -> Array:
        """Upper end of the interval."""
        return self.mean.values + self.half_width

    @property
    def differs(self) -> Array:
        """Where the interval leaves out 0; for differences."""
        return (self.low > 0) | (self.high < 0)

    def frame(self) -> "pd.DataFrame":
        """One row a value: a column for each axis, then mean, low, high, n and chance."""
        frame = self.mean.frame().rename(columns={"value": "mean"})
        place = list(frame.columns).index("mean") + 1
        for offset, (name, values) in enumerate((("low", self.low), ("high", self.high))):
            frame.insert(place + offset, name, values.ravel())
        frame.insert(place + 2, "n", self.n)
        return frame


def over_seeds(runs: Sequence[Sequence[Measurement]]) -> tuple[Spread, ...]:
    """Mean and 95 % t-interval of every metric over n runs, each given by its measurements.

    Mean ± t(n - 1) s/√n, s with n - 1 (Student 1908). Metrics with an axis of experts are left out, because the numbers
    of experts mean nothing across seeds; so are those that not every run has with the same axes. Chance and null are
    means too. Raises ValueError for fewer than 2 runs.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run: an interval needs at least 2")
    return tuple(_spread(same, "") for same in _common(runs))


def paired_differences(
    ones: Sequence[Sequence[Measurement]], others: Sequence[Sequence[Measurement]]
) -> tuple[Spread, ...]:
    """Mean and 95 % t-interval of other - one of every metric, over n pairs of runs that share all but one setting.

    What the runs of a pair have in common (the seed, the order of the data) cancels, so few pairs tell what many single
    runs do not. The records of a pair must be of the same tokens (:func:`require_same_tokens`). Metrics are left out as
    in :func:`over_seeds`. Raises ValueError for fewer than 2 pairs, or sides of different lengths.
    """
    if len(ones) != len(others) or len(ones) < 2:
        raise ValueError(f"{len(ones)} and {len(others)} runs: an interval needs at least 2 pairs")
    differences = []
    for one, other in zip(ones, others, strict=True):
        pairs = _common([one, other])
        differences.append([replace(pair[1], values=pair[1].values - pair[0].values) for pair in pairs])
    return tuple(_spread(same, " (difference)") for same in _common(differences))


def loss_difference(one: Record, other: Record) -> Spread:
    """Mean over tokens of the loss of ``other`` less that of ``one``, on all text and by domain: [domain], in nats.

    The interval is over sequences, whose tokens are not independent: that of a ratio of sums (Cochran 1977, "Sampling
    Techniques", eq. 2.46) over S sequences, with t(S - 1). It says whether these two models differ on such text, not
    whether two configurations do: for that, there are seeds. NaN for a domain with fewer than 2 sequences. Raises
    UserError for records of different tokens.
    """
    require_same_tokens((one, other))
    difference = other.loss.astype(np.float64) - one.loss
    rows = [np.ones(one.n_tokens, np.bool_), *(one.domain == index for index in range(len(one.domains)))]
    found = np.array([_mean_over_sequences(difference[row], one.sequence[row]) for row in rows])
    mean = Measurement(
        "loss_difference",
        "Difference of the loss",
        "Nats a token by which the second model's loss is above the first's; an interval over sequences that holds 0 "
        "shows no difference.",
        found[:, 0],
        (Axis("domain", ("all text", *one.domains)),),
        "nats per token",
        chance=np.zeros(()),
    )
    return Spread(mean, found[:, 1], len(np.unique(one.sequence)))


def _mean_over_sequences(values: Array, sequence: Array) -> tuple[float, float]:
    """Mean over tokens, and half the width of its 95 % interval over sequences."""
    if not len(values):
        return math.nan, math.nan
    mean = float(values.mean())
    number = np.unique(sequence, return_inverse=True)[1]
    residual = np.bincount(number, values - mean)
    n = len(residual)
    if n < 2:
        return mean, math.nan
    error = math.sqrt(n / (n - 1) * float((residual**2).sum())) / len(values)
    return mean, _t_quantile(n - 1) * error


def _common(runs: Sequence[Sequence[Measurement]]) -> list[list[Measurement]]:
    """The measurements that can be averaged: in every run, with the same axes, none of them of experts."""
    kept = []
    by_key = [{(measurement.name, measurement.title): measurement for measurement in run} for run in runs]
    for key, first in by_key[0].items():
        same = [run[key] for run in by_key if key in run and run[key].axes == first.axes]
        if len(same) == len(runs) and not any(axis.name in NUMBERED_AXES for axis in first.axes):
            kept.append(same)
    return kept


def _spread(same: Sequence[Measurement], suffix: str) -> Spread:
    first, n = same[0], len(same)
    values = np.stack([measurement.values for measurement in same]).astype(np.float64)
    half_width = _t_quantile(n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)

    def mean_of(part: str) -> Array | None:
        parts = [getattr(measurement, part) for measurement in same]
        if suffix:  # of a difference, chance is no difference
            return np.zeros(()) if part == "chance" else None
        if any(value is None for value in parts):
            return None
        mean: Array = np.mean([np.broadcast_to(value, first.values.shape) for value in parts], axis=0)
        return mean

    mean = replace(
        first,
        title=first.title + suffix,
        values=values.mean(axis=0),
        chance=mean_of("chance"),
        null=mean_of("null"),
        null_std=None,
    )
    return Spread(mean, np.asarray(half_width), n)


def _t_quantile(degrees: int) -> float:
    return float(_scipy("stats").t.ppf((1 + CONFIDENCE) / 2, degrees))


def require_scipy() -> None:
    """Raise UserError where scipy is missing, before work is done that needs it."""
    _scipy("optimize")


def _scipy(room: str) -> Any:
    try:
        return import_module(f"scipy.{room}")
    except ModuleNotFoundError as error:
        raise UserError("comparing models needs scipy: pip install 'moe-lab[study]'") from error
