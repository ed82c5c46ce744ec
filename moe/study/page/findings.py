"""What the measurements say in plain words, never without what chance would give.

A finding is one only where the value is more than :data:`SURE` standard deviations above what shuffled data gave
(:data:`SOUGHT` where it is the largest of many), or, where no deviation is known, :data:`CLEAR` times chance; otherwise
the sentence says that it is no more than chance.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from moe.study.measurement import Measurement
from moe.study.metrics.load import DEAD, expert_counts, first_choice, load, max_violation
from moe.study.record import EMPTY, Bools, Record

SURE = 3.0
SOUGHT = 5.0
"""standard deviations for the largest of many cells: of 384 cells without effect, 1.6 exceed 3 and 0.02 exceed 5, where
20 shuffles give the deviation (Student's t)"""
CLEAR = 1.1
"""times chance, where there is no null"""
FEWEST_SEQUENCES = round(SOUGHT**2) + 2
"""from which on domains can be told: of n sequences that are shuffled whole, an expert of one domain alone
is √(n - 1) deviations above the null, and none can be more"""
EARLY = 0.1
"""share of training at which saturation is told"""
NO_PAIR = "No two experts are chosen together more often than their loads alone would have it."
NO_WAY = "No way from layer to layer is taken more often than chance."
MOST_TRIED = 100
"""of what exceeds chance, that is held against the deviation over sequences"""
MOST_EXPERTS = 3
"""named in one sentence"""


@dataclass(frozen=True)
class Value:
    """One number of a measurement and what it is held against."""

    value: float
    reference: float
    """mean of the null where there is one, else chance"""
    std: float
    """of the null; NaN where there is none"""
    is_null: bool

    def above(self, deviations: float = SURE) -> bool:
        """Whether this is more than chance."""
        if math.isfinite(self.std):
            return self.value > self.reference + deviations * self.std
        return self.reference > 0 and self.value > self.reference * CLEAR

    @property
    def ratio(self) -> float:
        """Value over reference; infinite over nothing."""
        return self.value / self.reference if self.reference > 0 else math.inf

    def held_against(self, spell: Callable[[float], str], deviations: float = SURE) -> str:
        """The reference in brackets, and the verdict where it is not above."""
        kind = "null" if self.is_null else "chance"
        verdict = "" if self.above(deviations) else ", which is no more than chance"
        return f"({kind}: {spell(self.reference)})" + verdict


def values_of(measurement: Measurement, **labels: str) -> list[tuple[dict[str, str], Value]]:
    """Every number whose ``labels`` are these, with all its labels; NaN left out, and what has no reference."""
    reference = measurement.null if measurement.null is not None else measurement.chance
    if reference is None:
        return []
    shape = measurement.values.shape
    means = np.broadcast_to(reference, shape)
    stds = np.broadcast_to(np.nan if measurement.null_std is None else measurement.null_std, shape)
    found = []
    for index in np.ndindex(*shape):
        named = {axis.name: axis.labels[place] for axis, place in zip(measurement.axes, index, strict=True)}
        if all(named.get(name) == label for name, label in labels.items()) and math.isfinite(measurement.values[index]):
            value = Value(
                float(measurement.values[index]), float(means[index]), float(stds[index]), measurement.null is not None
            )
            found.append((named, value))
    return found


def findings(
    final: Record,
    measurements: Mapping[str, Measurement],
    flows: Sequence[Measurement] = (),
    delta_loss: Measurement | None = None,
    loss_by_k: Measurement | None = None,
) -> list[str]:
    """Sentences, the balance first; a metric that is missing, or has other axes than expected, has none.

    ``measurements`` are those of ``final`` by name, ``flows`` its transitions between neighbouring layers, [from, to].
    """
    found = [_balance(final)]
    sentences: tuple[tuple[str, Callable[[Measurement], str | None]], ...] = (
        ("domain_specialisation", lambda measurement: _few_sequences(final) or _domains(measurement)),
        ("domain_information", lambda measurement: None if _few_sequences(final) else _domain_information(measurement)),
        ("token_dependence", _tokens),
        ("saturation", _saturation),
        ("consecutive_repetition", _repetition),
        ("co_activation", lambda measurement: _pairs(measurement, final)),
    )
    for name, sentence in sentences:
        if name in measurements:
            found.append(sentence(measurements[name]))
    found += [_flow(flows, final), _delta_loss(delta_loss), _best_k(loss_by_k)]
    return [sentence for sentence in found if sentence]


def _balance(final: Record) -> str | None:
    if not final.layers or not final.n_tokens:
        return None
    shares = load(final)
    times = shares.over_chance
    if not np.isfinite(times).any():
        return None
    layer, expert = np.unravel_index(int(np.nanargmax(times)), times.shape)
    by_chance = max_violation(final).chance
    assert by_chance is not None
    random = 1 + float(np.broadcast_to(by_chance, len(final.layers))[layer])
    dead = int(np.nansum(times < DEAD))
    return (
        f"The busiest expert, number {expert} of layer {final.blocks[layer]}, gets {times[layer, expert]:.2f} times "
        f"its fair share (the busiest by chance: {random:.2f}); of the {int(np.isfinite(times).sum())} experts in all "
        f"layers {dead or 'none'} {'get' if dead > 1 else 'gets'} less than a tenth of it."
    )


def _few_sequences(final: Record) -> str | None:
    """What to say where no routing whatever could be told from shuffled domains."""
    n_sequences = len(np.unique(np.stack([final.sequence, final.domain]), axis=1).T)
    if n_sequences >= FEWEST_SEQUENCES:
        return None
    return (
        f"Whether domains have experts of their own cannot be told from {n_sequences} sequences: it takes "
        f"{FEWEST_SEQUENCES} for any routing to differ from shuffled domains."
    )


def _domains(measurement: Measurement) -> str | None:
    values = values_of(measurement)
    if not values or not {"layer", "domain", "expert"} <= set(values[0][0]):
        return None
    # A cell that few tokens reach can be many times nothing: the busiest excess, not the largest ratio.
    sure = [(named, value) for named, value in values if value.above(SOUGHT) and value.ratio >= CLEAR]
    if not sure:
        return (
            "No layer sends a domain to some experts more than it would if domains were shuffled: domain "
            "specialisation is no more than chance."
        )
    strongest: dict[tuple[str, str], float] = {}
    for named, value in sure:
        key = named["layer"], named["domain"]
        strongest[key] = max(strongest.get(key, 0.0), value.value - value.reference)
    sentences = []
    domains: set[str] = set()
    for (layer, domain), _ in sorted(strongest.items(), key=lambda item: -item[1]):
        if domain in domains or len(domains) == 2:
            continue
        domains.add(domain)
        cells = [pair for pair in sure if pair[0]["layer"] == layer and pair[0]["domain"] == domain]
        cells = sorted(cells, key=lambda pair: pair[1].reference - pair[1].value)[:MOST_EXPERTS]
        experts = _listed([named["expert"] for named, _ in cells])
        ratios = _listed([f"{value.ratio:.1f}" for _, value in cells])
        of_all = "its share" if len(cells) == 1 else "their shares"
        against = "of all text" if cells[0][1].is_null else "by chance"
        sentences.append(
            f"layer {layer} sends {domain} to {'expert' if len(cells) == 1 else 'experts'} {experts}: "
            f"{ratios} times {of_all} {against}"
        )
    text = "; ".join(sentences)
    return text[:1].upper() + text[1:] + "." if text else None


def _domain_information(measurement: Measurement) -> str | None:
    values = values_of(measurement, measure="nmi")
    if not values:
        return None
    named, most = max(values, key=lambda pair: pair[1].value)
    sentence = (
        f"The expert tells at most {_percent(most.value)} of the domain, in layer {named['layer']} "
        f"{most.held_against(_percent)}"
    )
    rest = values_of(measurement, measure="conditional", layer=named["layer"])
    if not rest:
        return sentence + "."
    left = rest[0][1]
    return f"{sentence}; with the token known, {_percent(left.value)} {left.held_against(_percent)}."


def _tokens(measurement: Measurement) -> str | None:
    values = values_of(measurement, choice="first") or values_of(measurement)
    if not values:
        return None
    named, most = max(values, key=lambda pair: pair[1].value)
    least_named, least = min(values, key=lambda pair: pair[1].value)
    sentence = (
        f"U(token): the token alone tells {_percent(most.value)} of its expert in layer {named['layer']} "
        f"{most.held_against(_percent)}"
    )
    if least_named["layer"] == named["layer"]:
        return sentence + "."
    return f"{sentence}, and {_percent(least.value)} in layer {least_named['layer']} {least.held_against(_percent)}."


def _saturation(measurement: Measurement) -> str | None:
    steps = next((axis.labels for axis in measurement.axes if axis.name == "step"), ())
    if len(steps) < 2:
        return None
    early = next(step for step in steps if float(step) >= EARLY * float(steps[-1]))
    if early == steps[-1]:  # which agrees with itself
        return None
    values = values_of(measurement, step=early, choice="any") or values_of(measurement, step=early)
    if not values or "layer" not in values[0][0]:
        return None
    mean = float(np.mean([value.value for _, value in values]))
    reference = float(np.mean([value.reference for _, value in values]))
    held = Value(mean, reference, math.nan, measurement.null is not None)
    named, slowest = min(values, key=lambda pair: pair[1].ratio)
    return (
        f"At step {early} of {steps[-1]}, {_percent(mean)} of the experts that tokens had in the end were chosen "
        f"{held.held_against(_percent)}; least in layer {named['layer']}, {_percent(slowest.value)}."
    )


def _pairs(measurement: Measurement, final: Record) -> str | None:
    if [axis.name for axis in measurement.axes] != ["layer", "expert", "other"]:
        return None
    tokens = {
        (str(layer.block), str(expert)): int(count)
        for layer in final.layers
        for expert, count in enumerate(expert_counts(layer)[0])
    }
    # The null has no deviation: that of a share of so many tokens.
    values = [
        (named, _counted(value, tokens.get((named["layer"], named["expert"]), 0)))
        for named, value in values_of(measurement)
    ]
    sure = [pair for pair in values if pair[1].above(SOUGHT) and pair[1].ratio >= CLEAR]
    if not sure:
        return NO_PAIR if values else None
    sure.sort(key=lambda pair: (pair[1].reference - pair[1].value) / pair[1].std)
    held = {str(layer.block): layer.selected for layer in final.layers}

    def firm(named: dict[str, str], value: Value) -> bool:
        selected = held[named["layer"]]
        of_expert = (selected == int(named["expert"])).any(axis=1)
        return _holds_over_sequences(value, (selected == int(named["other"])).any(axis=1), final, of_expert)

    firmest = next((pair for pair in sure[:MOST_TRIED] if firm(*pair)), None)
    if firmest is None:
        return NO_PAIR
    named, most = firmest
    return (
        f"The firmest pair: of the tokens of expert {named['expert']} in layer {named['layer']}, "
        f"{_percent(most.value)} go to expert {named['other']} too {most.held_against(_percent, SOUGHT)}."
    )


def _counted(value: Value, draws: int) -> Value:
    """With the standard deviation of a share of ``draws`` at random."""
    return replace(value, std=math.sqrt(max(value.reference * (1 - value.reference), 0.0) / max(draws, 1)))


def _holds_over_sequences(value: Value, hit: Bools, final: Record, drawn: Bools) -> bool:
    """Whether the share of ``drawn`` rows that are a ``hit`` is above chance by its standard error over sequences.

    Tokens of a sequence resemble each other, so that they are fewer draws than they seem. The error is that of a ratio
    of sums (Cochran 1977, "Sampling Techniques", eq. 2.46); a record of one sequence has none.
    """
    number = np.unique(final.sequence[drawn], return_inverse=True)[1].reshape(-1)
    residual = np.bincount(number, hit[drawn] - value.value)
    n = len(residual)
    if n < 2:
        return True
    error = math.sqrt(n / (n - 1) * float(np.square(residual).sum())) / int(drawn.sum())
    return replace(value, std=max(error, value.std)).above(SOUGHT)


def _repetition(measurement: Measurement) -> str | None:
    values = values_of(measurement)
    if not values or "layer" not in values[0][0]:
        return None
    named, most = max(values, key=lambda pair: pair[1].ratio)
    return (
        f"Two tokens in a row have the same first expert in {_percent(most.value)} of cases in layer {named['layer']} "
        f"{most.held_against(_percent)}."
    )


def _flow(flows: Sequence[Measurement], final: Record) -> str | None:
    sure = []
    first = [first_choice(layer) for layer in final.layers]
    for pair, (start, end), (one, other) in zip(flows, pairwise(final.blocks), pairwise(first), strict=True):
        for named, value in values_of(pair):
            counted = _counted(value, final.n_tokens)
            if counted.above(SOUGHT) and counted.ratio >= CLEAR:
                way = f"expert {named['from']} of layer {start} to expert {named['to']} of layer {end}"
                sure.append((counted, way, one, other, int(named["from"]), int(named["to"])))
    sure.sort(key=lambda found: found[0].reference - found[0].value)
    firm = (
        (most, way)
        for most, way, one, other, source, target in sure[:MOST_TRIED]
        if _holds_over_sequences(most, (one == source) & (other == target), final, (one != EMPTY) & (other != EMPTY))
    )
    found = next(firm, None)
    if found is None:
        return NO_WAY if flows else None
    most, way = found
    return (
        f"The way that most exceeds chance leads from {way}: {_percent(most.value)} of all tokens "
        f"{most.held_against(_percent, SOUGHT)}."
    )


def _delta_loss(measurement: Measurement | None) -> str | None:
    values = [] if measurement is None else values_of(measurement)
    if not values or not {"layer", "expert"} <= set(values[0][0]):
        return None
    median = float(np.median([value.value for _, value in values]))
    sure = [pair for pair in values if pair[1].above(SOUGHT)]
    if not sure:
        return "No expert's absence raises the loss of a domain by more than chance."
    named, most = max(sure, key=lambda pair: pair[1].value)
    on = f" on {named['domain']}" if "domain" in named else ""
    error = f" (standard error {most.std:.3f})" if math.isfinite(most.std) else ""
    return (
        f"Without expert {named['expert']} of layer {named['layer']} the loss{on} rises by {most.value:.3f} nats a "
        f"token{error}; the median over all experts{' and domains' if on else ''} is {median:.3f}."
    )


def _best_k(measurement: Measurement | None) -> str | None:
    names = [] if measurement is None else [axis.name for axis in measurement.axes]
    if measurement is None or names not in (["k"], ["k", "domain"]):
        return None
    by_domain = measurement.values.reshape(len(measurement.axes[0].labels), -1)
    # A domain without a scored token has no loss, whatever k.
    known = np.isfinite(by_domain).all(axis=0)
    if not known.any():
        return None
    losses = by_domain[:, known].mean(axis=1)
    best = int(losses.argmin())
    labels = measurement.axes[0].labels
    mean = "mean over domains, " if "domain" in names else ""
    return (
        f"Loss is lowest with {labels[best]} experts a token: {losses[best]:.3f} nats ({mean}with {labels[0]}: "
        f"{losses[0]:.3f}, with {labels[-1]}: {losses[-1]:.3f})."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
