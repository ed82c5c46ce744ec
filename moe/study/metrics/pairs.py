"""Which experts go together: within a layer, and from one layer to the next.

Two traps that published analysis code fell into. Of a token's K experts all K(K - 1)/2 pairs count, not those of
neighbouring ranks alone (K - 1 of them). And between layers all K·K pairs count, not those of equal rank alone; here
metrics between layers are of first choices, for which there is one pair, unless they say ``choice="any"``.

An assignment counts where the router sent it, dropped or not.
"""

import numpy as np

from moe.study.measurement import Array, Axis, Measurement
from moe.study.metrics.information import entropy, mutual_information, permutation_null
from moe.study.metrics.load import (
    Choice,
    chunks,
    divide,
    expert_axis,
    expert_counts,
    first_choice,
    layer_axis,
    most_experts,
)
from moe.study.record import EMPTY, Ints, Layer, Record

FIT_STEPS = 500
LARGEST_CODE = 1 << 40
"""numbers of paths are renumbered before they grow beyond it"""

# ------------------------------------------------------------------------------------------------------ within a layer


def co_activation(record: Record) -> Measurement:
    """N_ij / N_i: of the tokens of expert i, the share that expert j was chosen for too: [layer, expert, other].

    Over all pairs of a token's K experts. Not symmetric; a row sums to K - 1 where all tokens hold K; the diagonal, and
    experts without tokens, are NaN. Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060, section 5.2).

    Chance is (K - 1)/(E - 1); where tokens hold different numbers k, Σ k(k - 1) / (Σ k · (E - 1)). It takes the experts
    to be used alike: an expert that is used often goes with all others often. So the null is what the margins alone
    would give, quasi-independence (Goodman 1968, JASA 63): N_ij = w_i w_j for i ≠ j, with the sums over j as observed.
    """
    n_experts = most_experts(record)
    values, null = np.full((2, len(record.layers), n_experts, n_experts), np.nan)
    chance = []
    for shares, expected, layer in zip(values, null, record.layers, strict=True):
        pairs, counts = pair_counts(layer), expert_counts(layer)[0]
        here = slice(layer.n_experts)
        shares[here, here] = _off_diagonal(divide(pairs, counts[:, None]))
        expected[here, here] = _off_diagonal(divide(_quasi_independent(pairs), counts[:, None]))
        chance.append(divide(pairs.sum(), counts.sum() * (layer.n_experts - 1)))
    return Measurement(
        "co_activation",
        "Experts chosen together",
        "Of the tokens of one expert (row), the share that also goes to another (column): above chance the "
        "two go together, but a column above it as a whole is only an expert that is used often, as the null shows.",
        values,
        (layer_axis(record), expert_axis(record), expert_axis(record, "other")),
        "share",
        chance=np.reshape(np.array(chance), (-1, 1, 1)),
        null=null,
    )


def pair_counts(layer: Layer) -> Array:
    """N_ij, the tokens that hold both experts: int64 [E, E], symmetric, 0 on the diagonal."""
    counts = np.zeros(layer.n_experts**2, np.int64)
    for rows in chunks(len(layer.selected)):
        for one in range(layer.top_k):
            for other in range(one):
                counts += _joint(layer.selected[rows, one], layer.selected[rows, other], layer.n_experts, counts.size)
    pairs: Array = counts.reshape(layer.n_experts, layer.n_experts)
    return pairs + pairs.T


# -------------------------------------------------------------------------------------------------- from layer to layer


def cross_layer_transitions(record: Record, from_layer: int, to_layer: int, choice: Choice = "first") -> Measurement:
    """Share of tokens that go to expert i in block ``from_layer`` and to j in block ``to_layer``: [from, to], sum 1.

    Of first choices, or for choice="any" of all K·K pairs of a place in one layer and a place in the other. Tokens
    without an expert in one of them are left out. Chance is the product of the margins, over the same tokens: the two
    loads, as if one knew nothing of the other. Raises ValueError for a block without experts.
    """
    one, other = layer_of_block(record, from_layer), layer_of_block(record, to_layer)
    counts = _transition_counts(one, other, choice)
    shares = divide(counts, counts.sum())
    return Measurement(
        "cross_layer_transitions",
        f"From the experts of layer {from_layer} to those of layer {to_layer}",
        f"The share of tokens that go to one expert in layer {from_layer} (row) and to another in layer {to_layer} "
        "(column): above chance, tokens that were together stay together.",
        shares,
        (
            Axis("from", tuple(str(number) for number in range(one.n_experts))),
            Axis("to", tuple(str(number) for number in range(other.n_experts))),
        ),
        "share",
        chance=shares.sum(axis=1, keepdims=True) * shares.sum(axis=0, keepdims=True),
    )


def cross_layer_information(record: Record, permutations: int = 20, seed: int = 0) -> Measurement:
    """What the first choice of a layer tells of the next layer's: [layers, measure].

    information: I(e_l; e_l+1) / H(e_l+1). accuracy: the share of tokens whose next first choice is the one that is most
    frequent among tokens of the same choice in this layer, Σ_i max_j N_ij / N.

    Chance is (R - 1)(C - 1)/(2N H(e_l+1)) for R and C used experts, what the plug-in estimate gives where there is
    nothing to tell and N is well above R·C (and 1 at most); for the accuracy it is max_j N_j / N, guessing the busiest.
    The null shuffles the tokens of one layer: the same for both, for any N, bias of the accuracy included. NaN where
    the next layer uses one expert only.
    """
    pairs = list(zip(record.layers, record.layers[1:], strict=False))
    # [4, pairs of layers, measures]
    parts = np.empty((4, len(pairs), 2))
    for number, (one, other) in enumerate(pairs):
        parts[:, number] = _cross_layer(one, other, permutations, seed)
    values, chance, null, null_std = parts
    return Measurement(
        "cross_layer_information",
        "What an expert tells of the next layer's",
        "information is the share of what there is to know of the next layer's expert that this layer's tells, "
        "accuracy how often the likeliest guess is right: both are to be compared with chance and null, not with 0.",
        values,
        (
            Axis("layers", tuple(f"{one.block} → {other.block}" for one, other in pairs)),
            Axis("measure", ("information", "accuracy")),
        ),
        "share",
        chance=chance,
        null=null,
        null_std=null_std,
    )


def expert_paths(record: Record, top: int = 20) -> Measurement:
    """The ``top`` most frequent paths, a token's first choices in all layers, as a share of tokens: [path].

    The most frequent first; labels are experts, "3 → 0 → 5". Tokens without an expert in some layer are left out.
    Chance is the product of the loads of first choices on the path, as if layers knew nothing of each other.
    """
    first, paths, counts = _paths(record)
    order = np.lexsort((paths, -counts))[:top]
    n_tokens = counts.sum()
    experts = first[:, paths[order]]
    loads = [divide(np.bincount(column), n_tokens) for column in first]
    chance = np.prod([load[chosen] for load, chosen in zip(loads, experts, strict=True)], axis=0)
    shares = divide(counts[order], n_tokens)
    return Measurement(
        "expert_paths",
        "The most frequent paths through the layers",
        f"The share of tokens that take each path of first choices through all layers; these {len(order)} of the "
        f"{len(counts)} paths that occur carry {shares.sum():.1%} of the tokens, and by chance {chance.sum():.1%}.",
        shares,
        (Axis("path", tuple(" → ".join(str(number) for number in path) for path in experts.T)),),
        "share",
        chance=np.broadcast_to(chance, shares.shape),
    )


def distinct_paths(record: Record, permutations: int = 5, seed: int = 0) -> Measurement:
    """Number of different paths (:func:`expert_paths`) that occur, one number.

    The null shuffles the tokens of each layer on its own: as many paths as the same loads would give if layers knew
    nothing of each other. There is no closed form of it for long paths. Raises ValueError for fewer than 2
    permutations.
    """
    if permutations < 2:
        raise ValueError(f"{permutations} permutations: a deviation needs at least 2")
    first, _, counts = _paths(record)
    generator = np.random.default_rng(seed)
    drawn = [
        len(_count_paths(np.stack([generator.permutation(column) for column in first]))[1]) for _ in range(permutations)
    ]
    return Measurement(
        "distinct_paths",
        "Different paths through the layers",
        "How many different paths of first choices the tokens take: the further below the null, which shuffles each "
        "layer on its own, the more the layers agree.",
        np.array(len(counts)),
        (),
        "paths",
        null=np.array(np.mean(drawn)),
        null_std=np.array(np.std(drawn, ddof=1)),
    )


# --------------------------------------------------------------------------------------------------------------- parts


def layer_of_block(record: Record, block: int) -> Layer:
    """The layer of block ``block``; raises ValueError for a block without experts."""
    for layer in record.layers:
        if layer.block == block:
            return layer
    raise ValueError(f"block {block} has no experts: those that have are {', '.join(record.blocks)}")


def _joint(one: Ints, other: Ints, n_columns: int, n_cells: int) -> Array:
    """How often each pair occurred, int64 [n_cells], rows of EMPTY left out."""
    both = (one != EMPTY) & (other != EMPTY)
    code = one.astype(np.int64) * n_columns + other
    return np.bincount(code if both.all() else code[both], minlength=n_cells)


def _transition_counts(one: Layer, other: Layer, choice: Choice) -> Array:
    if choice not in ("first", "any"):
        raise ValueError(f"choice is {choice}: it must be first or any")
    n_cells = one.n_experts * other.n_experts
    counts = np.zeros(n_cells, np.int64)
    starts, ends = [[first_choice(layer)] if choice == "first" else list(layer.selected.T) for layer in (one, other)]
    for start in starts:
        for end in ends:
            for rows in chunks(len(start)):
                counts += _joint(start[rows], end[rows], other.n_experts, n_cells)
    return counts.reshape(one.n_experts, other.n_experts)


def _cross_layer(one: Layer, other: Layer, permutations: int, seed: int) -> tuple[Array, Array, Array, Array]:
    """Values, chance, null and its deviation, each of (information, accuracy)."""
    start, end = first_choice(one), first_choice(other)
    both = (start != EMPTY) & (end != EMPTY)
    start, end = start[both], end[both]
    shape = (one.n_experts, other.n_experts)
    if not start.size:
        nothing = np.full(2, np.nan)
        return nothing, nothing, nothing, nothing

    ends = np.bincount(end, minlength=shape[1])
    known = entropy(ends)

    def told(labels: Array) -> Array:
        table = _joint(start, labels, shape[1], shape[0] * shape[1]).reshape(shape)
        information = mutual_information(table) / known if known > 0 else np.nan
        return np.array([information, table.max(axis=1).sum() / start.size])

    degrees = (np.count_nonzero(np.bincount(start)) - 1) * (np.count_nonzero(ends) - 1)
    bias = min(1.0, degrees / (2 * start.size * known)) if known > 0 else np.nan
    null = permutation_null(told, end, permutations=permutations, seed=seed)
    return told(end), np.array([bias, ends.max() / start.size]), null.mean, null.std


def _paths(record: Record) -> tuple[Array, Array, Array]:
    """First choices [L, n] of the tokens that have one in each layer, and for each path a token of it and its count."""
    first = np.stack([first_choice(layer) for layer in record.layers]) if record.layers else np.zeros((0, 0), np.int32)
    first = first[:, (first != EMPTY).all(axis=0)]
    return first, *_count_paths(first)


def _count_paths(first: Array) -> tuple[Array, Array]:
    code = np.zeros(first.shape[1], np.int64)
    largest = 1
    for column in first:
        n_experts = int(column.max(initial=0)) + 1
        if largest * n_experts > LARGEST_CODE:
            distinct, code = np.unique(code, return_inverse=True)
            largest = len(distinct)
        code = code * n_experts + column
        largest *= n_experts
    _, token, counts = np.unique(code, return_index=True, return_counts=True)
    return token, counts


def _quasi_independent(pairs: Array) -> Array:
    """w_i w_j off the diagonal, with the row sums of ``pairs`` [E, E], by scaling (Deming and Stephan 1940).

    Where one expert is in every pair no such w exists; the steps then approach the table whose only pairs are its own,
    which is right.
    """
    sums = pairs.sum(axis=1).astype(np.float64)
    used = sums > 0
    weight = np.where(used, sums / max(np.sqrt(sums.sum()), 1.0), 0.0)
    for _ in range(FIT_STEPS):
        reached = weight * (weight.sum() - weight)
        # The root halves the step, without which two experts that balance each other swing forever.
        ratio = np.divide(sums, reached, out=np.ones_like(sums), where=used & (reached > 0))
        weight = weight * np.sqrt(ratio)
        if np.abs(ratio - 1).max(initial=0.0) < 1e-9:
            break
    expected: Array = np.outer(weight, weight)
    np.fill_diagonal(expected, 0.0)
    return expected


def _off_diagonal(matrix: Array) -> Array:
    np.fill_diagonal(matrix, np.nan)
    return matrix
