"""How firmly a token belongs to its experts: over training, between two models, and under rounding."""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.model.router import Router
from moe.model.router.logits import score_function
from moe.model.router.selection import choose
from moe.model.routing import Routing
from moe.model.transformer import Transformer
from moe.study.measurement import Array, Axis, Measurement
from moe.study.metrics.load import first_choice
from moe.study.record import EMPTY, Bools, Ints, Layer, Record

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95)

# ------------------------------------------------------------------------------------------------------- over training


def saturation(records: Sequence[Record]) -> Measurement:
    """Mean over tokens of |E_s ∩ E_final| / |E_final|, for each of S records and the last: [layer, step, choice].

    choice any compares the K experts of a token, first its first choice alone. Muennighoff et al. 2024 (OLMoE, arXiv
    2409.02060, section 5.1). The last step is 1 by definition; chance is K/E (first: 1/E). The null is exact: what two
    steps share that agree on each expert's load and on nothing else, Σ_e P(e ∈ E_s) P(e ∈ E_final)/K, which is large
    where few experts take all tokens.

    Tokens without an expert in the last record are left out. Raises ValueError for fewer than 2 records, records of
    different tokens or layers, and steps that are unknown or do not increase.
    """
    if len(records) < 2:
        raise ValueError(f"{len(records)} record: saturation compares at least 2 steps")
    steps = [-1 if record.step is None else record.step for record in records]
    if min(steps) < 0 or any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"the records are of steps {[record.step for record in records]}: known and increasing needed")
    final = records[-1]
    for record in records[:-1]:
        _require_same_tokens(record, final)
    overlaps = np.array(
        [
            [[_overlap(*sets) for sets in _by_choice(layer, last)] for layer, last in zip(*pair, strict=True)]
            for pair in ((record.layers, final.layers) for record in records)
        ]
    ).reshape(len(records), len(final.layers), 2, 3)
    value, chance, null = overlaps.transpose(3, 1, 0, 2)
    return Measurement(
        "saturation",
        "Router saturation",
        "The share of a token's final experts that it already had at a step; early and high means settled early, but a "
        "falling learning rate makes late steps agree too, and the last step is 1 by definition.",
        value,
        (
            Axis("layer", final.blocks),
            Axis("step", tuple(str(step) for step in steps)),
            Axis("choice", ("any", "first")),
        ),
        "share",
        chance=chance,
        null=null,
    )


def flip_rate(one: Record, other: Record) -> Measurement:
    """Share of tokens that go elsewhere in ``other``: [layer, choice].

    choice set: any of the token's experts differs, whatever their order; first: its first choice does. For two
    precisions of one model, or two checkpoints in a row. Chance is 1 - 1/C(E, K) (first: 1 - 1/E); the null is exact:
    two records that agree on how often each set occurs and on nothing else.

    Raises ValueError for records of different tokens or layers.
    """
    _require_same_tokens(one, other)
    flips = np.array(
        [
            [_flips(*sets) for sets in _by_choice(layer, its)]
            for layer, its in zip(one.layers, other.layers, strict=True)
        ]
    ).reshape(len(one.layers), 2, 3)
    return Measurement(
        "flip_rate",
        "Tokens that change experts",
        "The share of tokens whose set of experts, or first choice, differs between the two records; 0 is the same "
        "routing, and chance that of models that know nothing of each other.",
        flips[..., 0],
        (Axis("layer", one.blocks), Axis("choice", ("set", "first"))),
        "share",
        chance=flips[..., 1],
        null=flips[..., 2],
    )


def _require_same_tokens(one: Record, other: Record) -> None:
    for name in ("token_id", "position", "sequence"):
        if not np.array_equal(getattr(one, name), getattr(other, name)):
            raise ValueError(f"the records are of different tokens: {name} differs")
    shapes = [[(layer.block, layer.n_experts) for layer in record.layers] for record in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the records are of different layers: (block, experts) are {shapes[0]} and {shapes[1]}")


def _by_choice(one: Layer, other: Layer) -> tuple[tuple[Bools, Bools], tuple[Bools, Bools]]:
    """Both layers' sets of experts, and both layers' first choices."""
    return (_sets(one), _sets(other)), (_first(one), _first(other))


def _sets(layer: Layer) -> Bools:
    """[N, E] which experts a token has."""
    return _indicators(layer.selected, layer.n_experts)


def _first(layer: Layer) -> Bools:
    """[N, E] which expert a token's first choice is."""
    return _indicators(first_choice(layer)[:, None], layer.n_experts)


def _indicators(selected: Ints, n_experts: int) -> Bools:
    """[N, E] True for the experts of each row of ``selected`` [N, K]."""
    sets = np.zeros((len(selected), n_experts), dtype=np.bool_)
    token, place = np.nonzero(selected != EMPTY)
    sets[token, selected[token, place]] = True
    return sets


def _overlap(one: Bools, final: Bools) -> tuple[float, float, float]:
    """Mean |one ∩ final| / |final|, its chance value and its null."""
    size = final.sum(axis=1, keepdims=True)
    held = size[:, 0] > 0
    if not held.any():
        return math.nan, math.nan, math.nan
    one, weighted = one[held], final[held] / size[held]
    value = (weighted * one).sum(axis=1).mean()
    probability = one.mean(axis=0)
    return float(value), float(probability.mean()), float(probability @ weighted.mean(axis=0))


def _flips(one: Bools, other: Bools) -> tuple[float, float, float]:
    """Share of rows that differ, its chance value and its null."""
    n, n_experts = one.shape
    if n == 0:
        return math.nan, math.nan, math.nan
    differ = (one != other).any(axis=1).mean()
    sizes, counts = np.unique(other.sum(axis=1), return_counts=True)
    agree_by_chance = (
        sum(count / math.comb(n_experts, int(size)) for size, count in zip(sizes, counts, strict=True)) / n
    )
    _, kind = np.unique(np.packbits(np.concatenate([one, other]), axis=1), axis=0, return_inverse=True)
    kind = kind.ravel()
    frequency = [np.bincount(part, minlength=kind.max() + 1) / n for part in (kind[:n], kind[n:])]
    return float(differ), 1 - float(agree_by_chance), 1 - float(frequency[0] @ frequency[1])


# ------------------------------------------------------------------------------------------------------------- margins


def selection_margin(record: Record) -> Measurement:
    """Quantiles over tokens of the least score selected minus the greatest not selected: [layer, quantile].

    That is the k-th score minus the next where the scores decide; below 0 where something else decided (a selection
    bias, groups, balance). Scores are recorded in float16, so a margin is known to about 1/1000 of the scores. There is
    no chance value: the size of a margin is that of the scores, about 1/E for probabilities.

    A token whose selection was all experts or none has no margin; NaN where no token has one. Raises ValueError where
    the record has no scores.
    """
    margins = [_margins(layer) for layer in record.layers]
    values = [np.quantile(margin, QUANTILES) if margin.size else np.full(len(QUANTILES), np.nan) for margin in margins]
    return Measurement(
        "selection_margin",
        "Margin of the selection",
        "How far the last selected expert's score is above the first not selected, at quantiles over tokens; a token "
        "near 0 changes experts at a touch, and one below 0 was not selected by its score.",
        np.array(values).reshape(len(margins), len(QUANTILES)),
        (Axis("layer", record.blocks), Axis("quantile", tuple(f"{quantile:.0%}" for quantile in QUANTILES))),
        "score",
    )


def near_ties(record: Record, margin: float = 1e-3) -> Measurement:
    """Share of tokens whose margin (:func:`selection_margin`) lies within ± ``margin``, in units of score: [layer].

    No chance value, as there; rounding scores to bfloat16 moves each by up to 1/512 of itself. Raises ValueError where
    the record has no scores.
    """
    margins = [_margins(layer) for layer in record.layers]
    return Measurement(
        "near_ties",
        "Near ties",
        f"The share of tokens whose last selected expert and first not selected are within {margin:g} of each other in "
        "score: rounding or a small step of training can send them elsewhere.",
        np.array([(np.abs(its) <= margin).mean() if its.size else np.nan for its in margins]),
        (Axis("layer", record.blocks),),
        "share",
    )


def _margins(layer: Layer) -> Array:
    """[n] of the tokens that have a margin."""
    if layer.scores is None:
        raise ValueError(f"block {layer.block}: the scores of the experts were not recorded")
    sets = _sets(layer)
    partial = sets.any(axis=1) & ~sets.all(axis=1)
    scores, chosen = layer.scores[partial].astype(np.float32), sets[partial]
    least = np.where(chosen, scores, np.inf).min(axis=1, initial=np.inf)
    greatest = np.where(chosen, -np.inf, scores).max(axis=1, initial=-np.inf)
    margins: Array = least - greatest
    return margins


# ----------------------------------------------------------------------------------------------------------- precision


def precision_flips(model: Transformer, tokens: Int[Tensor, "B S"]) -> Measurement:
    """Share of tokens that bfloat16 sends elsewhere than float32: [layer, precision, choice].

    - bf16 model: everything in bfloat16 under autocast, but the router, as in training here. The router sees other
      hidden states, and each layer inherits what the layers before changed.
    - bf16 router: the router's weights, input and logits in bfloat16, on the hidden states of float32, each layer by
      itself. Products are summed in float32, as matrix units do.
    - bf16 logits: the router's product in float32, and its logits rounded after. What remains of the flips shows that a
      cast of the logits alone is no cure.

    choice set: any of the token's experts differs; first: its first choice does. Chance is 1 - 1/C(E, K) and 1 - 1/E.
    The model's mode is restored. Raises ValueError for a model without mixture layers, or whose weights are not float32
    (or float64) to begin with.
    """
    if model.embedding.weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the weights are {model.embedding.weight.dtype}: there is no float32 to compare with")
    calls = _routing_calls(model, tokens)
    if not calls:
        raise ValueError("the model has no mixture layers")
    device = tokens.device.type
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        under_autocast = _in_evaluation(model, tokens)
    rates = []
    for call, rounded in zip(calls, under_autocast, strict=True):
        exact = _sets_of(call.routing)
        others = (_sets_of(rounded), call.with_logits(call.in_sixteen_bits()), call.with_logits(call.routing.logits))
        rates.append([[_flips(*pair)[:2] for pair in zip(exact, other, strict=True)] for other in others])
    flips = np.array(rates)
    return Measurement(
        "precision_flips",
        "Tokens that bfloat16 sends elsewhere",
        "The share of tokens whose experts differ from those in float32, when the model around the router, the router, "
        "or only its logits are bfloat16.",
        flips[..., 0],
        (
            Axis("layer", tuple(str(call.router.layer) for call in calls)),
            Axis("precision", ("bf16 model", "bf16 router", "bf16 logits")),
            Axis("choice", ("set", "first")),
        ),
        "share",
        chance=flips[..., 1],
    )


class _Call(NamedTuple):
    """One layer's router, what it was called with in float32, and what it decided."""

    router: Router
    x: Float[Tensor, "T D"]
    keywords: dict[str, Any]
    routing: Routing

    def in_sixteen_bits(self) -> Float[Tensor, "T E"]:
        """The logits of this router with weights and input in bfloat16, summed in float32."""
        router = copy.deepcopy(self.router).to(torch.bfloat16)
        rounded = {
            name: value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.keywords.items()
        }
        logits: Tensor = router(self.x.to(torch.bfloat16), **rounded).logits
        return logits

    def with_logits(self, logits: Float[Tensor, "T E"]) -> tuple[Bools, Bools]:
        """Sets and first choices by ``logits`` rounded to bfloat16."""
        logits = logits.to(torch.bfloat16).float()
        choice = choose(
            self.router.config,
            logits,
            score_function(logits, self.router.config.score),
            self.router.selection_bias,
            None,
            training=False,
            layer=self.router.layer,
            token_ids=self.keywords["token_ids"],
            positions=self.keywords["positions"],
        )
        return _both_sets(choice.selected, choice.assigned, logits.shape[1])


@torch.no_grad()
def _routing_calls(model: Transformer, tokens: Int[Tensor, "B S"]) -> list[_Call]:
    """What each router was called with, in float32."""
    calls: list[_Call] = []

    def watch(router: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], routing: Routing) -> None:
        calls.append(_Call(router, arguments[0], keywords, routing))

    handles = [
        module.register_forward_hook(watch, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, Router)
    ]
    try:
        with torch.autocast(tokens.device.type, enabled=False):
            _in_evaluation(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _in_evaluation(model: Transformer, tokens: Int[Tensor, "B S"]) -> list[Routing]:
    was_training = model.training
    model.eval()
    try:
        return model.hidden(tokens)[1]
    finally:
        model.train(was_training)


def _sets_of(routing: Routing) -> tuple[Bools, Bools]:
    """[T, E] the sets of experts, and the first choices."""
    return _both_sets(routing.selected, routing.present, routing.n_experts)


def _both_sets(selected: Tensor, assigned: Tensor | None, n_experts: int) -> tuple[Bools, Bools]:
    """[T, E] the sets of experts, and the first choices."""
    places = selected if assigned is None else selected.masked_fill(~assigned, EMPTY)
    chosen = places.to(torch.int32).cpu().numpy()
    nothing = np.zeros(chosen.shape)
    layer = Layer(0, n_experts, chosen, nothing.astype(np.float32), nothing.astype(np.bool_))
    return _sets(layer), _first(layer)
