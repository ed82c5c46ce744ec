"""What experts specialise in: domains of text, and tokens of the vocabulary.

Two traps. Domains differ in vocabulary, so an expert for a token is an expert for a domain too: beside the information
between domain and expert stands what is left of it once the token is known. And a token that occurs once goes to one
expert always: shares are those of frequent tokens, weighted by how often they occur.

An assignment counts where the router sent it, whether or not it was dropped for lack of room.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moe.study.measurement import Array, Axis, Measurement
from moe.study.metrics.information import (
    Counts,
    conditional_mutual_information,
    entropy,
    mutual_information,
    per_assignment,
    permutation_null,
)
from moe.study.metrics.load import (
    chance_max_violation,
    divide,
    expert_axis,
    first_choice,
    layer_axis,
    most_experts,
    random_counts,
)
from moe.study.metrics.pairs import layer_of_block
from moe.study.record import Ints, Layer, Record

By = Literal["input", "predicted", "target"]

# ------------------------------------------------------------------------------------------------------------- domains


def domain_specialisation(record: Record, permutations: int = 20, seed: int = 0) -> Measurement:
    """N_eD / N_D: of the tokens of domain D, the share that expert e was chosen for, in any of its K places.

    [layer, domain, expert]. Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060, section 5.3) divide by tokens as here, so
    a row sums to K and chance is K/E; Jiang et al. 2024 (Mixtral, arXiv 2401.04088, figure 7) divide by assignments,
    where it is 1/E. The null gives whole sequences the domains of others: its mean is the expert's share of all tokens.
    """
    n_experts = most_experts(record)
    by_layer = [_assignments(layer) for layer in record.layers]

    def shares(domain: Array) -> Array:
        tokens = np.bincount(domain, minlength=len(record.domains))
        counts = np.stack([_table(domain[token], expert, tokens.size, n_experts) for expert, token in by_layer])
        return divide(counts, tokens[None, :, None])

    null = permutation_null(shares, record.domain, blocks=_sequences(record), permutations=permutations, seed=seed)
    missing = _missing(record)[:, None, :]
    return Measurement(
        "domain_specialisation",
        "Domain specialisation",
        "Of a domain's tokens, the share that each expert was chosen for; a row sums to the experts of a token, and an "
        "expert that knows nothing of domains has the same share in all of them.",
        np.where(missing, np.nan, shares(record.domain)),
        (layer_axis(record), Axis("domain", record.domains), expert_axis(record)),
        "share",
        chance=_places_over_experts(record)[:, None, None],
        null=np.where(missing, np.nan, null.mean),
        null_std=np.where(missing, np.nan, null.std),
    )


def domain_information(record: Record, permutations: int = 20, seed: int = 0) -> Measurement:
    """I(domain; expert) and I(domain; expert | token id), both over H(domain): [layer, measure].

    H(domain) is ln of the number of domains where these have equally many tokens; divided by it, both are shares of
    what there is to know of the domain, and can be compared with each other (the chain rule: the first plus what the
    token id adds, or what the token id tells plus the second). The expert is that of a random place of a token's K.
    With fewer experts than domains the first cannot reach 1, nor the second where the token id tells the domain.

    The nulls: whole sequences get the domains of others, because tokens of one sequence resemble each other (shuffled
    one by one, they make a difference out of any two samples of one domain). For the second this is done for the tokens
    of each id apart, so that id and domain stay as they are. Few sequences leave
    little to shuffle: with one a domain, the null of the first is its value. NaN for a record of one domain.
    """
    by_layer = [_assignments(layer) for layer in record.layers]

    def nmi(domain: Array) -> Array:
        return np.array([_over_entropy(Counts.of(domain[token], expert)) for expert, token in by_layer])

    def conditional(domain: Array) -> Array:
        counts = (Counts.of(domain[token], expert, record.token_id[token]) for expert, token in by_layer)
        return np.array([_over_entropy(joint) for joint in counts])

    sequences = _sequences(record)
    nulls = [
        permutation_null(
            statistic, record.domain, within=within, blocks=sequences, permutations=permutations, seed=seed
        )
        for statistic, within in ((nmi, None), (conditional, record.token_id))
    ]
    return Measurement(
        "domain_information",
        "What the expert tells of the domain",
        "0: the expert tells nothing of the domain, 1: it tells all; conditional is what is left of that once the "
        "token is known, which a mere difference in vocabulary does not raise; compare each with its null, which "
        "shuffled domains reach.",
        np.stack([nmi(record.domain), conditional(record.domain)], axis=1),
        (layer_axis(record), Axis("measure", ("nmi", "conditional"))),
        "share",
        chance=np.zeros(()),
        null=np.stack([null.mean for null in nulls], axis=1),
        null_std=np.stack([null.std for null in nulls], axis=1),
    )


def domain_max_violation(record: Record, permutations: int = 20, seed: int = 0) -> Measurement:
    """max_e load_e · E - 1 over the tokens of one domain: [layer, domain]; MaxVio (Wang et al. 2024, eq. 4) of each.

    Balance over all text and imbalance within each domain is what specialisation looks like. Chance is the mean for
    routing to K experts at random (:func:`~moe.study.metrics.load.max_violation`), which is above 0 and falls with the
    number of tokens; the null, where whole
    sequences get the domains of others, holds the imbalance over all text as well.
    """
    by_layer = [_assignments(layer) for layer in record.layers]
    n_domains = len(record.domains)

    def violation(domain: Array) -> Array:
        return np.stack(
            [
                _violation_of(_table(domain[token], expert, n_domains, layer.n_experts))
                for layer, (expert, token) in zip(record.layers, by_layer, strict=True)
            ]
        )

    null = permutation_null(violation, record.domain, blocks=_sequences(record), permutations=permutations, seed=seed)
    chance = [
        chance_max_violation(random_counts(layer, record.domain, n_domains), layer.n_experts) for layer in record.layers
    ]
    return Measurement(
        "domain_max_violation",
        "Imbalance within each domain (MaxVio)",
        "How far the busiest expert of a domain is above its fair share of that domain: 0 is balanced, 1 is twice its "
        "share, and routing at random gives the chance value.",
        violation(record.domain),
        (layer_axis(record), Axis("domain", record.domains)),
        chance=np.array(chance).reshape(-1, n_domains),
        null=null.mean,
        null_std=null.std,
    )


# ---------------------------------------------------------------------------------------------------------- vocabulary


def vocabulary_specialisation(
    record: Record, by: By = "input", minimum_count: int = 30, permutations: int = 20, seed: int = 0
) -> Measurement:
    """Σ_x max_e N_xe / Σ_x N_x over ids x that occur at least ``minimum_count`` times: [layer].

    N_x counts the tokens whose input, predicted or target id (``by``) is x, N_xe those of them for which expert e is
    among the K: the share of tokens that go to the favourite expert of their id. Muennighoff et al. 2024 (OLMoE,
    section 5.4) average N_xe / N_x over ids; here each id weighs as much as it has tokens, because ids that occur once
    have a share of 1 whatever the router does. Chance is K/E, for many tokens and balanced experts; the null shuffles
    the ids, and holds what few tokens and uneven load give: a maximum over experts is biased upwards.

    NaN where no id is frequent enough. Raises ValueError for another ``by``.
    """
    ids = _ids(record, by)
    counts = np.bincount(ids, minlength=1)
    frequent = np.nonzero(counts >= max(minimum_count, 1))[0]
    row_of_id = np.full(counts.size, -1)
    row_of_id[frequent] = np.arange(frequent.size)
    covered = int(counts[frequent].sum())
    by_layer = [_assignments(layer) for layer in record.layers]

    def favourites(rows: Array) -> Array:
        if not covered:
            return np.full(len(record.layers), np.nan)
        shares = []
        for layer, (expert, token) in zip(record.layers, by_layer, strict=True):
            row = rows[token]
            table = _table(row[row >= 0], expert[row >= 0], frequent.size, layer.n_experts)
            shares.append(table.max(axis=1).sum() / covered)
        return np.array(shares)

    rows = row_of_id[ids]
    null = permutation_null(favourites, rows, permutations=permutations, seed=seed)
    share = covered / max(record.n_tokens, 1)
    return Measurement(
        "vocabulary_specialisation",
        f"Vocabulary specialisation by {by} token",
        f"The share of tokens that go to the favourite expert of their {by} token, over the {frequent.size} that occur "
        f"at least {minimum_count} times ({share:.0%} of the text); 1: the token decides; shuffled tokens give the "
        "null.",
        favourites(rows),
        (layer_axis(record),),
        "share",
        chance=_places_over_experts(record),
        null=null.mean,
        null_std=null.std,
    )


@dataclass(frozen=True)
class TypicalToken:
    """A token that goes to an expert more often than others do."""

    token_id: int
    text: str
    count: int
    """tokens of this id for which the expert was chosen"""
    share: float
    """``count`` over all tokens of this id"""


def typical_tokens(
    record: Record, layer: int, top: int = 10, by: By = "input", minimum_count: int = 30
) -> tuple[tuple[TypicalToken, ...], ...]:
    """For each expert of block ``layer``, up to ``top`` ids with the largest share N_xe / N_x, the largest first.

    Of those that occur at least ``minimum_count`` times, and only where the share is above the expert's share of all
    tokens; equal shares by count. Raises ValueError for a block without experts, or another ``by``.
    """
    chosen = layer_of_block(record, layer)
    ids = _ids(record, by)
    counts = np.bincount(ids, minlength=1)
    frequent = np.nonzero(counts >= max(minimum_count, 1))[0]
    expert, token = _assignments(chosen)
    table = _table(ids[token], expert, counts.size, chosen.n_experts)
    share_of_all = table.sum(axis=0) / max(record.n_tokens, 1)
    table = table[frequent]
    shares = table / counts[frequent, None]

    def of(number: int) -> tuple[TypicalToken, ...]:
        order = np.lexsort((-table[:, number], -shares[:, number]))
        return tuple(
            TypicalToken(
                int(frequent[row]),
                record.text_of(int(frequent[row])),
                int(table[row, number]),
                float(shares[row, number]),
            )
            for row in order[:top]
            if shares[row, number] > share_of_all[number]
        )

    return tuple(of(number) for number in range(chosen.n_experts))


def token_dependence(record: Record, permutations: int = 20, seed: int = 0) -> Measurement:
    """U = I(token id; expert) / H(expert), Theil's uncertainty coefficient: [layer, choice].

    choice first: the expert is the token's first choice, and 1 means that the id decides it. choice any: it is that of
    a random place of the K, which even a known set leaves open; where the id decides the set, U is 1 - ln K / H(expert)
    (0.75 for 16 experts, K = 2). The null shuffles the ids over the tokens, and is well above 0 with many rare ids:
    about (ids - 1)(experts - 1)/2n over H(expert). NaN for a layer that uses one expert.
    """
    first = [_assignments(layer, first_choice(layer)[:, None]) for layer in record.layers]
    any_place = [_assignments(layer) for layer in record.layers]

    def dependence(ids: Array) -> Array:
        return np.array(
            [
                [_over_entropy(Counts.of(expert, ids[token])) for expert, token in choices]
                for choices in zip(first, any_place, strict=True)
            ]
        )

    null = permutation_null(dependence, record.token_id, permutations=permutations, seed=seed)
    return Measurement(
        "token_dependence",
        "What the token tells of its expert",
        "The share of what there is to know of a token's expert that its id tells; 1 for the first choice means that "
        "the id decides, and what is below the null comes from rare tokens alone.",
        dependence(record.token_id),
        (layer_axis(record), Axis("choice", ("first", "any"))),
        "share",
        chance=np.zeros(()),
        null=null.mean,
        null_std=null.std,
    )


# ---------------------------------------------------------------------------------------------------------------- parts


def _assignments(layer: Layer, selected: Ints | None = None) -> tuple[Array, Array]:
    """The expert and the row of the token of each assignment, of the layer or of ``selected`` [N, K], no empty places.

    Ids and domains are looked up by that row, so that a permutation shuffles N of them and not N·K.
    """
    selected = layer.selected if selected is None else selected
    expert, token = per_assignment(selected, np.arange(len(selected), dtype=np.int32))
    return expert, token


def _table(row: Array, column: Array, n_rows: int, n_columns: int) -> Array:
    """How often each pair occurred, int64 [n_rows, n_columns]."""
    code = row.astype(np.int64) * n_columns + column
    return np.bincount(code, minlength=n_rows * n_columns).reshape(n_rows, n_columns)


def _violation_of(table: Array) -> Array:
    """max_e load_e · E - 1 for each row of counts [D, E]."""
    violation: Array = divide(table.max(axis=1), table.sum(axis=1)) * table.shape[1] - 1
    return violation


def _over_entropy(joint: Counts) -> float:
    """What the other labels tell of the first, over the first's entropy; a third label is taken as known."""
    known = entropy(joint.margin(0))
    if not known > 0:
        return float("nan")
    return (mutual_information(joint) if len(joint.labels) == 2 else conditional_mutual_information(joint)) / known


def _sequences(record: Record) -> Array:
    """[N] what was drawn together: the sequence, or the part of a sequence that is of one domain."""
    return record.sequence.astype(np.int64) * max(len(record.domains), 1) + record.domain


def _places_over_experts(record: Record) -> Array:
    """Chance [L]: the experts that a token has on average, over those that there are (K/E)."""
    return np.array([layer.assigned.sum() / max(len(layer.selected), 1) / layer.n_experts for layer in record.layers])


def _missing(record: Record) -> Array:
    """[L, E] True for experts that a layer with fewer of them does not have."""
    return np.arange(most_experts(record)) >= np.array([[layer.n_experts] for layer in record.layers])


def _ids(record: Record, by: By) -> Ints:
    columns = {"input": record.token_id, "predicted": record.predicted_id, "target": record.target_id}
    if by not in columns:
        raise ValueError(f"by is {by}: it must be one of {', '.join(columns)}")
    return columns[by]
