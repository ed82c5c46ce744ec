"""Entropy and mutual information of counts, how far such estimates are off, and what shuffled data would give.

All in nats, and all plug-in estimates: the formula with shares of counts in place of probabilities. Those are biased by
about the number of cells over twice the number of draws, upwards for mutual information: with 50,000 token ids and 64
experts, a router that knows nothing seems to know much. So each has its bias beside it, and :func:`permutation_null`.

The K experts of one token are not K independent draws (no expert comes twice): the formulas of the bias are too large
for them, by (E - 1)/(E - K) where experts are used alike. The permutation null moves tokens whole: it is not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe.study.measurement import Array
from moe.study.record import EMPTY, Ints

DENSE_CELLS = 1 << 22
"""Up to so many cells, or twice the number of draws, counting into a dense table is faster than sorting."""

# ------------------------------------------------------------------------------------------------------------- counts


@dataclass(frozen=True)
class Counts:
    """How often each combination of A labels occurred; of a table of any size, the M cells that are not empty."""

    labels: tuple[Array, ...]
    """A columns [M]"""
    counts: Array
    """[M] positive whole numbers, int64"""

    @classmethod
    def of(cls, *columns: Array) -> "Counts":
        """Count the rows of A columns [n] of labels, whole numbers from 0. Raises ValueError for a negative label."""
        return _count(tuple(columns), None)

    @classmethod
    def of_table(cls, table: Array) -> "Counts":
        """The counts of a dense table, each of its dimensions a label."""
        cells = np.nonzero(table)
        return cls(tuple(cells), np.asarray(table[cells], dtype=np.int64))

    @property
    def total(self) -> int:
        """Number of draws."""
        return int(self.counts.sum())

    def margin(self, *axes: int) -> "Counts":
        """The counts of these labels alone, whatever the others are."""
        return _count(tuple(self.labels[axis] for axis in axes), self.counts)


def per_assignment(selected: Ints, *labels: Array) -> tuple[Array, ...]:
    """The expert of every assignment, then the labels of its token: A + 1 columns [n], empty places left out.

    ``selected`` is [N, K], with EMPTY for a place without an assignment; each of the A ``labels`` is [N].
    """
    held = selected != EMPTY
    if held.all():
        return selected.ravel(), *(np.repeat(column, selected.shape[1]) for column in labels)
    token = np.nonzero(held)[0]
    return selected[held], *(column[token] for column in labels)


def _count(columns: tuple[Array, ...], weights: Array | None) -> Counts:
    n = len(columns[0])
    if n == 0:
        return Counts(tuple(np.zeros(0, dtype=np.int64) for _ in columns), np.zeros(0, dtype=np.int64))
    shape = tuple(int(column.max()) + 1 for column in columns)
    if any(int(column.min()) < 0 for column in columns):
        raise ValueError("a label is negative: leave empty places out")
    code = np.ravel_multi_index(columns, shape)
    if math.prod(shape) <= max(DENSE_CELLS, 2 * n):
        dense = np.bincount(code, weights)
        cells = np.nonzero(dense)[0]
        counts = dense[cells]
    elif weights is None:
        cells, counts = np.unique(code, return_counts=True)
    else:
        cells, cell_of_row = np.unique(code, return_inverse=True)
        counts = np.bincount(cell_of_row, weights)
    return Counts(tuple(np.unravel_index(cells, shape)), counts.astype(np.int64))


# ---------------------------------------------------------------------------------------------------------- estimates


def entropy(counts: Array | Counts) -> float:
    """H = -Σ p ln p, with p = n / Σ n, over counts of any shape; NaN where nothing was counted."""
    n = _flat(counts)
    total = n.sum()
    return max(0.0, float(np.log(total) - (n * np.log(n)).sum() / total)) if total > 0 else math.nan


def entropy_bias(counts: Array | Counts) -> float:
    """Expected estimate minus truth, -(m - 1)/(2n) for m cells seen in n draws (Miller 1955). Negative.

    The first term of a series in 1/n: right where each cell that can be drawn has been drawn several times.
    """
    n = _flat(counts)
    return -(len(n) - 1) / (2 * float(n.sum())) if len(n) else math.nan


def mutual_information(table: Array | Counts) -> float:
    """I(X; Y) = H(X) + H(Y) - H(X, Y), from counts [X, Y]; 0 where X and Y are independent in the sample."""
    joint = _of_labels(table, 2)
    return _at_least_0(entropy(joint.margin(0)) + entropy(joint.margin(1)) - entropy(joint))


def mutual_information_bias(table: Array | Counts) -> float:
    """Expected estimate minus truth: (m_xy - m_x - m_y + 1)/(2n), m the cells seen (Roulston 1999, Physica D 125).

    That is (R - 1)(C - 1)/(2n) where all R x C cells were seen. Too small where many that can be drawn were not: the
    permutation null is for those.
    """
    joint = _of_labels(table, 2)
    return entropy_bias(joint.margin(0)) + entropy_bias(joint.margin(1)) - entropy_bias(joint)


def conditional_mutual_information(table: Array | Counts) -> float:
    """I(X; Y | Z) = H(X, Z) + H(Y, Z) - H(Z) - H(X, Y, Z), from counts [X, Y, Z]: what Y tells of X once Z is known."""
    joint = _of_labels(table, 3)
    known = entropy(joint.margin(2)) + entropy(joint)
    return _at_least_0(entropy(joint.margin(0, 2)) + entropy(joint.margin(1, 2)) - known)


def conditional_mutual_information_bias(table: Array | Counts) -> float:
    """Expected estimate minus truth: (m_xyz - m_xz - m_yz + m_z)/(2n), m the cells seen."""
    joint = _of_labels(table, 3)
    known = entropy_bias(joint.margin(2)) + entropy_bias(joint)
    return entropy_bias(joint.margin(0, 2)) + entropy_bias(joint.margin(1, 2)) - known


def _flat(counts: Array | Counts) -> Array:
    """The counts that are not 0, as float64 [m]."""
    n = np.asarray(counts.counts if isinstance(counts, Counts) else counts, dtype=np.float64).ravel()
    return n[n > 0]


def _of_labels(table: Array | Counts, wanted: int) -> Counts:
    joint = table if isinstance(table, Counts) else Counts.of_table(table)
    if len(joint.labels) != wanted:
        raise ValueError(f"counts of {len(joint.labels)} labels, where {wanted} are needed")
    return joint


def _at_least_0(information: float) -> float:
    """Rounding alone takes a plug-in information below 0; NaN stays."""
    return information if math.isnan(information) else max(0.0, information)


# --------------------------------------------------------------------------------------------------- permutation null


class Null(NamedTuple):
    """What a statistic gave on shuffled labels, each of the statistic's own shape."""

    mean: Array
    std: Array
    """over permutations, with n - 1"""


def permutation_null(
    statistic: Callable[[Array], Array | float],
    labels: Array,
    *,
    within: Array | None = None,
    blocks: Array | None = None,
    permutations: int = 20,
    seed: int = 0,
) -> Null:
    """Mean and deviation of ``statistic`` over shuffled ``labels`` [N]; a label keeps its count in every shuffle.

    within: [N] labels are shuffled only among rows of the same number here, so that what this tells of them stays.
    blocks: [N] rows of the same number here keep a common label, for rows that were drawn together (the tokens of one
    sequence resemble each other, and shuffled one by one they would promise more than they hold). Labels move from
    block to block, whatever their lengths: counts of rows stay only for blocks of equal length. With ``within``, rows
    are of one block only where they agree in both.

    Raises ValueError for fewer than 2 permutations, or for a block of several labels.
    """
    if permutations < 2:
        raise ValueError(f"{permutations} permutations: a deviation needs at least 2")
    shuffle = _shuffle(labels, within, blocks)
    generator = np.random.default_rng(seed)
    drawn = np.stack([np.asarray(statistic(shuffle(generator)), dtype=np.float64) for _ in range(permutations)])
    return Null(drawn.mean(axis=0), drawn.std(axis=0, ddof=1))


Shuffle = Callable[[np.random.Generator], Array]


def _shuffle(labels: Array, within: Array | None, blocks: Array | None) -> Shuffle:
    """What draws another order of ``labels``."""
    if blocks is None:
        return _shuffle_rows(labels, within)
    number = np.unique(blocks, return_inverse=True)[1]
    if within is not None:
        group = np.unique(within, return_inverse=True)[1]
        number = number * (group.max(initial=0) + 1) + group
    _, first, block = np.unique(number, return_index=True, return_inverse=True)
    if not np.array_equal(labels[first][block], labels):
        raise ValueError("a block has several labels")
    shuffle_blocks = _shuffle_rows(labels[first], None if within is None else within[first])
    return lambda generator: shuffle_blocks(generator)[block]


def _shuffle_rows(labels: Array, within: Array | None) -> Shuffle:
    if within is None:
        return lambda generator: generator.permutation(labels)
    group = np.unique(within, return_inverse=True)[1]
    in_order = np.argsort(group, kind="stable")

    def shuffle(generator: np.random.Generator) -> Array:
        # Sorting by group plus a fraction puts the rows of each group together, in random order; the fraction is below
        # a half so that rounding never lifts a row into the next group.
        drawn = np.argsort(group + generator.random(len(group)) / 2)
        shuffled = np.empty_like(labels)
        shuffled[in_order] = labels[drawn]
        return shuffled

    return shuffle
