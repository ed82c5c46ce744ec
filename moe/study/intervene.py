"""What would the model do if its tokens went elsewhere? Context managers that change routing, and leave no trace.

    with knock_out(model, layer=1, experts=[3]):
        loss_without = loss_of(model)

A routing decision is a value, so an intervention is a function ``Routing -> Routing`` put between a router and its
experts: a forward hook on the router, torch's own mechanism. Hence it acts wherever the router is called: in training
and evaluation, with a cache, under padding, autocast and in the recomputation of activation checkpointing (so call
``backward`` within the ``with``). ``layer`` is the number of the block.

Interventions nest. Those that change the router's rule come first, in whatever order they are entered: :func:`noise`,
:func:`change_k` and :func:`knock_out` with ``reroute``. The others change what the router decided, in the order in
which they are entered, each what the one before left: to knock out an expert of a replayed routing, replay first. What
an intervention does not name stays as it was: an assignment dropped beyond capacity is not taken back because another
expert has room now.

Within an intervention torch.compile is off: a compiled block, which knows of no hook, runs as it is written, and the
compiled one is used again after. An intervention is on the model, for every thread that calls it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.config import RouterConfig
from moe.model.moe_layer import MoELayer
from moe.model.router import Router
from moe.model.router.logits import score_function
from moe.model.router.selection import Choice, choose
from moe.model.router.weights import equal_scores
from moe.model.routing import Routing
from moe.model.transformer import Transformer
from moe.study.record import EMPTY, Layer, Record

Edit = Callable[[Routing], Routing]

NOISE_ROWS = 4096
"""different noise vectors a layer: a token's is picked by its id and position"""

HOW_MANY_BY_ITSELF = ("top_p", "positive", "all")
"""selections in which top_k plays no part"""


class _Call(NamedTuple):
    """What a router was called with."""

    router: Router
    mask: Bool[Tensor, " T"] | None
    token_ids: Int[Tensor, " T"] | None
    positions: Int[Tensor, " T"] | None


_EditOfCall = Callable[[_Call, Routing], Routing]


def mixture_layers(model: Transformer) -> dict[int, MoELayer]:
    """The mixture layers by the number of their block."""
    layers = {number: block.feed_forward for number, block in enumerate(model.blocks)}
    return {number: layer for number, layer in layers.items() if isinstance(layer, MoELayer)}


@contextmanager
def edit_routing(model: Transformer, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Put a function of your own between router and experts: ``{layer: lambda routing: replace(routing, ...)}``.

    What it returns is what the experts compute, and what the model returns. An empty place is one where ``assigned`` is
    False; its weight must be 0. Raises ValueError for a block that is no mixture.
    """

    def ignoring_call(edit: Edit) -> _EditOfCall:
        return lambda _, routing: edit(routing)

    with _edited(model, {layer: ignoring_call(edit) for layer, edit in edits.items()}):
        yield


# -------------------------------------------------------------------------------------------------- what is not there


@contextmanager
def knock_out(
    model: Transformer,
    experts: Mapping[int, Collection[int]] | Collection[int] | int,
    *,
    layer: int | None = None,
    reroute: bool = False,
) -> Iterator[None]:
    """Take ``experts`` out: those of ``layer``, or of several as ``{layer: [expert, ...]}``.

    As if their output were zero: their assignments become empty places (weight 0, no MLP computed, counted neither as
    load nor as dropped), and the other weights stay as they are. So the loss says what the expert contributed.

    With ``reroute``, as if they had never been there: the router chooses and normalises over the others alone, by its
    own rule. So the loss says what the others could not replace. A hashed or random choice takes the key's next best
    expert; a group of which a single expert is left is not ranked where groups are by their best two. The model's
    routing keeps the logits of all experts.

    Raises ValueError for a block or an expert that is not there, and where too few experts would be left to choose.
    """
    if not isinstance(experts, Mapping):
        if layer is None:
            raise ValueError("of which layer? Give layer, or experts as {layer: [expert, ...]}")
        experts = {layer: [experts] if isinstance(experts, int) else experts}
    elif layer is not None:
        raise ValueError("give either layer or a mapping from layers to experts")
    chosen = {number: _experts_of(model, number, of_layer) for number, of_layer in experts.items()}
    with ExitStack() as stack:
        if reroute:
            stack.enter_context(_edited(model, {number: _Ban(ids) for number, ids in chosen.items()}, first=True))
            for number in chosen:
                _remaining(_router_of(model, number))
        else:
            stack.enter_context(edit_routing(model, {number: _emptying(ids) for number, ids in chosen.items()}))
        yield


def _emptying(experts: Sequence[int]) -> Edit:
    def edit(routing: Routing) -> Routing:
        hit = torch.isin(routing.selected, torch.tensor(experts, device=routing.selected.device))
        return replace(
            routing,
            weights=routing.weights.masked_fill(hit, 0.0),
            assigned=~hit if routing.assigned is None else routing.assigned & ~hit,
            # An empty place is not a dropped assignment.
            dropped=None if routing.dropped is None else routing.dropped & ~hit,
        )

    return edit


@dataclass(frozen=True)
class _Ban:
    """Choose anew among the experts that no ban on this router names."""

    experts: Sequence[int]

    def __call__(self, call: _Call, routing: Routing) -> Routing:
        remaining = _remaining(call.router)
        scores, choice = _choose_among(call, routing, torch.tensor(remaining, device=routing.selected.device))
        weights, assigned = call.router.weigh(scores, choice)
        if routing.mask is not None:
            weights = weights.masked_fill(~routing.mask[:, None], 0.0)
        chosen = replace(
            routing, scores=scores, selected=choice.selected, weights=weights, assigned=assigned, dropped=None
        )
        return call.router.within_capacity(chosen)


def _choose_among(call: _Call, routing: Routing, kept: Int[Tensor, " n"]) -> tuple[Float[Tensor, "T E"], Choice]:
    """The scores and the choice of a router that has the ``kept`` experts alone; the others score 0."""
    router, config = call.router, call.router.config
    n_experts, logits, bias = router.n_experts, routing.logits, router.selection_bias
    banned = torch.ones(n_experts, dtype=torch.bool, device=kept.device).index_fill_(0, kept, False)

    def chosen(config: RouterConfig, logits: Tensor, scores: Tensor, bias: Tensor | None) -> Choice:
        return choose(
            config,
            logits,
            scores,
            bias,
            routing.mask,
            training=router.training,
            layer=router.layer,
            token_ids=call.token_ids,
            positions=call.positions,
        )

    if config.selection in ("hash", "random"):
        # Which experts come next does not depend on who was banned, as it would if the rest were numbered anew.
        further = _unchecked(config, top_k=min(n_experts, config.top_k + n_experts - len(kept)))
        selected = chosen(further, logits, logits, None).selected
        order = banned[selected].to(torch.uint8).argsort(dim=1, stable=True)[:, : config.top_k]
        choice = Choice(selected.gather(1, order))
    few_scores = score_function(logits[:, kept], config.score)
    scores = torch.zeros_like(logits).index_copy(1, kept, few_scores)
    if config.selection == "group_limited":
        # Groups keep their places; -inf in the bias lets no banned expert in, wherever scores lie.
        bias = (torch.zeros_like(logits[0]) if bias is None else bias).masked_fill(banned, -torch.inf)
        choice = chosen(config, logits.masked_fill(banned, -torch.inf), scores, bias)
    elif config.selection not in ("hash", "random"):
        few = chosen(config, logits[:, kept], few_scores, None if bias is None else bias[kept])
        choice = few._replace(selected=kept[few.selected])
    if not config.has_logits:
        scores = equal_scores(choice.selected, n_experts, logits.dtype)
    return scores, choice


def _remaining(router: Router) -> list[int]:
    """The experts that no ban on ``router`` names; raises ValueError where they are too few for its rule."""
    config = router.config
    edits = [hook.edit for hook in router._forward_hooks.values() if isinstance(hook, _Hook)]
    banned = {expert for edit in edits if isinstance(edit, _Ban) for expert in edit.experts}
    remaining = [expert for expert in range(router.n_experts) if expert not in banned]
    needed = 1 if config.selection in HOW_MANY_BY_ITSELF else config.top_k
    reachable = len(remaining)
    if config.selection == "group_limited":
        assert config.n_groups is not None
        assert config.top_groups is not None
        size = router.n_experts // config.n_groups
        left = [sum(expert // size == group for expert in remaining) for group in range(config.n_groups)]
        ranked = sorted(n for n in left if n >= (1 if config.group_score == "max" else 2))
        # The worst a token can meet: that its best groups are those with the fewest experts left.
        reachable = sum(ranked[: config.top_groups]) if len(ranked) >= config.top_groups else 0
    if reachable < needed:
        raise ValueError(f"only {reachable} experts of layer {router.layer} would be left to choose {needed} from")
    return remaining


# ------------------------------------------------------------------------------------------------- who gets the tokens


@contextmanager
def force(
    model: Transformer,
    layer: int,
    experts: Collection[int] | int,
    tokens: Bool[Tensor, "..."] | Int[Tensor, "..."] | Collection[int] | None = None,
    *,
    weights: Literal["scores", "equal"] = "scores",
) -> Iterator[None]:
    """Send tokens to the given experts of ``layer``, and to no other.

    ``tokens`` are the ids of those to send, or a mask over the B·S places of a forward pass; None: all. By ``scores``
    the weights are what the router's own rule makes of the scores of these experts (with normalisation, they sum to
    its scale; a score of 0, as ReLU gives, remains a weight of 0); ``equal`` shares out evenly what the token's weights
    summed to. A forced assignment is never dropped.

    Raises ValueError for a block or expert that is not there, a mask of another size, and weights by ``scores`` where
    the rule draws experts by their logits (its weights belong to its draw).
    """
    chosen = _experts_of(model, layer, [experts] if isinstance(experts, int) else experts)
    if not chosen:
        raise ValueError("force needs an expert to send tokens to")
    if weights == "scores":
        _require_weights_of_scores(_router_of(model, layer), 'give weights="equal"')
    wanted = None if tokens is None else torch.as_tensor(tokens if isinstance(tokens, Tensor) else list(tokens))

    def edit(call: _Call, routing: Routing) -> Routing:
        device = routing.selected.device
        forced = _places_of(wanted, call, routing)[:, None]
        places = max(routing.top_k, len(chosen))
        routing = _widened(routing, places)
        row = torch.tensor([*chosen, *[EMPTY] * (places - len(chosen))], device=device)
        selected = _filled(row[None], routing.n_experts).where(forced, routing.selected)
        held = torch.ones_like(selected, dtype=torch.bool) if routing.assigned is None else routing.assigned
        assigned = (row != EMPTY)[None].where(forced, held)
        if weights == "equal":
            given = (routing.weights.sum(dim=1, keepdim=True) / len(chosen)).expand_as(selected)
            given = given.masked_fill(~assigned, 0.0)
        else:
            given = _weigh(call.router, routing, selected, assigned)
        return replace(
            routing,
            selected=selected,
            weights=given.where(forced, routing.weights),
            assigned=assigned,
            dropped=None if routing.dropped is None else routing.dropped & ~forced,
        )

    with _edited(model, {layer: edit}):
        yield


def _places_of(wanted: Tensor | None, call: _Call, routing: Routing) -> Bool[Tensor, " T"]:
    """Which of the T tokens are ``wanted``, by a mask over them or by their ids."""
    device = routing.selected.device
    if wanted is None:
        return torch.ones(routing.n_tokens, dtype=torch.bool, device=device)
    if wanted.dtype != torch.bool:
        if call.token_ids is None:
            raise ValueError("tokens are given by their ids, and the layer was called without token_ids")
        return torch.isin(call.token_ids, wanted.to(device))
    if wanted.numel() != routing.n_tokens:
        raise ValueError(f"the mask is over {wanted.numel()} tokens, and the forward pass has {routing.n_tokens}")
    return wanted.to(device).flatten()


@contextmanager
def swap(model: Transformer, layer: int, one: int, other: int) -> Iterator[None]:
    """Send the tokens of expert ``one`` of ``layer`` to ``other`` and the other way round, with the weights they had.

    Raises ValueError for a block or an expert that is not there.
    """
    _experts_of(model, layer, [one, other])

    def edit(routing: Routing) -> Routing:
        expert = torch.arange(routing.n_experts, device=routing.selected.device)
        expert[one], expert[other] = other, one
        return replace(routing, selected=expert[routing.selected])

    with edit_routing(model, {layer: edit}):
        yield


@contextmanager
def random_routing(model: Transformer, *, seed: int = 0, layers: Collection[int] | None = None) -> Iterator[None]:
    """Send every token to random experts, as a control: as many as it had, with the weights that it had, in rank order.

    So only who computes is random, not how much of it counts. Which experts is a fixed function of ``seed``, the layer,
    the token's id and its position (the selection rule ``random``): the same with a cache, under padding and in
    recomputation. All experts are equally likely, special ones included. Raises ValueError for a block that is no
    mixture.
    """

    def edit(call: _Call, routing: Routing) -> Routing:
        choice = choose(
            RouterConfig(selection="random", weights="equal", top_k=routing.top_k),
            routing.logits,
            routing.scores,
            None,
            routing.mask,
            training=call.router.training,
            layer=call.router.layer + seed * model.config.n_layers,
            token_ids=call.token_ids,
            positions=call.positions,
        )
        return replace(routing, selected=choice.selected)

    with _edited(model, dict.fromkeys(_numbers(model, layers), edit)):
        yield


# --------------------------------------------------------------------------------------------------- a recorded choice


@contextmanager
def replay(
    model: Transformer, recorded: Record | Sequence[Routing] | Mapping[int, Routing], *, freeze: bool = False
) -> Iterator[None]:
    """Send tokens where they went before; the weights are recomputed from the current scores, so gradients flow.

    ``recorded`` are the routings that the model returned for the same batch (all of them, or some as ``{layer:
    routing}``), or a record. With a record, the sequences of a forward pass are the record's, in its order, and a token
    goes by its position; of tokens that it has no row for, such as the last of a text or new ones, the router decides.
    Empty places and drops are replayed too; weights are normalised over the places that hold an assignment.
    With ``freeze`` the recorded weights are used, as constants.

    Replaying its own routing changes nothing, bit for bit. Raises ValueError where the numbers of layers, experts,
    tokens or sequences differ; and for weights to recompute where the rule draws experts by their logits (its weights
    belong to its draw).
    """
    edits: dict[int, _EditOfCall] = {}
    if isinstance(recorded, Record):
        rows = _rows_by_place(recorded)
        for layer in recorded.layers:
            _require_experts(model, layer.block, layer.n_experts)
            edits[layer.block] = _replaying_record(layer, rows, freeze)
    else:
        if not isinstance(recorded, Mapping):
            layers = list(mixture_layers(model))
            if len(layers) != len(recorded):
                raise ValueError(f"{len(recorded)} routings for {len(layers)} mixture layers")
            recorded = dict(zip(layers, recorded, strict=True))
        for number, routing in recorded.items():
            _require_experts(model, number, routing.n_experts)
            edits[number] = _replaying_routing(routing, freeze)
    if not freeze:
        for number in edits:
            _require_weights_of_scores(_router_of(model, number), "give freeze=True")
    with _edited(model, edits):
        yield


def _replaying_routing(recorded: Routing, freeze: bool) -> _EditOfCall:
    def edit(call: _Call, routing: Routing) -> Routing:
        if routing.n_tokens != recorded.n_tokens:
            raise ValueError(f"{recorded.n_tokens} tokens were recorded, and the forward pass has {routing.n_tokens}")
        device = routing.selected.device
        selected = recorded.selected.to(device)
        assigned = None if recorded.assigned is None else recorded.assigned.to(device)
        dropped = None if recorded.dropped is None else recorded.dropped.to(device)
        frozen = recorded.weights.detach().to(routing.weights) if freeze else None
        return _replayed(call.router, routing, selected, assigned, dropped, frozen)

    return edit


def _replaying_record(layer: Layer, row_of: Int[Tensor, "n_sequences length"], freeze: bool) -> _EditOfCall:
    columns = [torch.from_numpy(column) for column in (layer.selected, layer.weights, layer.dropped)]
    all_assigned, none_dropped = bool(layer.assigned.all()), not layer.dropped.any()

    def edit(call: _Call, routing: Routing) -> Routing:
        n_sequences, length = row_of.shape
        if routing.n_sequences != n_sequences:
            raise ValueError(f"{n_sequences} sequences were recorded, and the forward pass has {routing.n_sequences}")
        if call.positions is None:
            raise ValueError("a record is replayed by position, and the layer was called without positions")
        device = routing.selected.device
        sequence = torch.arange(n_sequences, device=device).repeat_interleave(routing.n_tokens // n_sequences)
        row = row_of.to(device)[sequence, call.positions.clamp(max=length - 1)]
        known = ((row >= 0) & (call.positions < length))[:, None]
        selected, weights, dropped = (column.to(device)[row.clamp(min=0)] for column in columns)

        places = max(routing.top_k, layer.top_k)
        own = _widened(routing, places)
        selected = F.pad(selected.long(), (0, places - layer.top_k), value=EMPTY)
        held = torch.ones_like(selected, dtype=torch.bool) if own.assigned is None else own.assigned
        own_dropped = torch.zeros_like(held) if own.dropped is None else own.dropped
        assigned = (selected != EMPTY).where(known, held)
        selected = _filled(selected, routing.n_experts).where(known, own.selected)
        dropped = F.pad(dropped, (0, places - layer.top_k)).where(known, own_dropped)
        frozen = F.pad(weights, (0, places - layer.top_k)).to(own.weights).where(known, own.weights) if freeze else None
        replayed = _replayed(
            call.router,
            own,
            selected,
            None if own.assigned is None and all_assigned and places == layer.top_k else assigned,
            None if own.dropped is None and none_dropped else dropped,
            frozen,
        )
        return replace(replayed, weights=replayed.weights.where(known, own.weights))

    return edit


def _rows_by_place(record: Record) -> Int[Tensor, "n_sequences length"]:
    """The row of each position of each sequence, in the order of the sequences; -1 where there is none."""
    _, sequence = torch.unique(torch.from_numpy(record.sequence), return_inverse=True)
    position = torch.from_numpy(record.position).long()
    if record.n_tokens == 0:
        raise ValueError("the record has no rows")
    row_of = torch.full((int(sequence.max()) + 1, int(position.max()) + 1), -1, dtype=torch.int64)
    row_of[sequence, position] = torch.arange(record.n_tokens)
    return row_of


def _replayed(
    router: Router,
    routing: Routing,
    selected: Int[Tensor, "T K"],
    assigned: Bool[Tensor, "T K"] | None,
    dropped: Bool[Tensor, "T K"] | None,
    frozen: Float[Tensor, "T K"] | None,
) -> Routing:
    weights = _weigh(router, routing, selected, assigned) if frozen is None else frozen
    if routing.mask is not None:
        weights = weights.masked_fill(~routing.mask[:, None], 0.0)
    chosen = replace(routing, selected=selected, weights=weights, assigned=assigned, dropped=None)
    return chosen if dropped is None else chosen.dropping(dropped)


# ------------------------------------------------------------------------------------------------------ the rule itself


@contextmanager
def change_k(model: Transformer, k: int, *, layers: Collection[int] | None = None) -> Iterator[None]:
    """Let the router choose ``k`` experts a token, fewer or more than it was trained for, by its own rule.

    Weights are normalised, or not, as ever: with normalisation, a single expert has the weight 1, and without it more
    experts add more. With expert choice k is the mean. Raises ValueError where the rule decides itself how many (top_p,
    positive, all), where it is for one expert (base), and for more experts than the rule can choose.
    """
    numbers = _numbers(model, layers)
    for number in numbers:
        _require_possible(k, _router_of(model, number))
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for number in numbers:
            router = _router_of(model, number)
            stack.callback(setattr, router, "config", router.config)
            router.config = _unchecked(router.config, top_k=k)
        yield


def largest_k(model: Transformer) -> int:
    """The most experts a token that :func:`change_k` takes for every mixture layer; raises ValueError as it does."""
    routers = [layer.router for layer in mixture_layers(model).values()]
    if not routers:
        raise ValueError("the model has no mixture layer")
    return min(_largest_k(router) for router in routers)


def _largest_k(router: Router) -> int:
    config = router.config
    if config.selection in HOW_MANY_BY_ITSELF:
        raise ValueError(f"selection {config.selection} decides for itself how many experts a token gets: it has no k")
    if config.selection == "base":
        return 1
    if config.selection == "group_limited":
        assert config.n_groups is not None
        assert config.top_groups is not None
        return router.n_experts // config.n_groups * config.top_groups
    return router.n_experts


def _require_possible(k: int, router: Router) -> None:
    most = _largest_k(router)
    if not 1 <= k <= most:
        raise ValueError(f"k is {k}, and selection {router.config.selection} can choose from 1 to {most} experts here")


@contextmanager
def noise(model: Transformer, std: float, *, seed: int = 0, layers: Collection[int] | None = None) -> Iterator[None]:
    """Add Gaussian noise to what the router reads; the experts read what they always do.

    ``std`` is in units of the router's input, which comes out of a norm and is of order 1. A token's noise is one of
    :data:`NOISE_ROWS` vectors, picked by its id and position and drawn by ``seed`` and the layer: the same with a
    cache, under padding and in recomputation. It is added in at least float32. Raises ValueError for a block that is no
    mixture and for a router that reads nothing (hash, random).
    """
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for number in _numbers(model, layers):
            router = _router_of(model, number)
            if not router.config.has_logits:
                raise ValueError(
                    f"selection {router.config.selection} with equal weights computes nothing from the router's input"
                )
            generator = torch.Generator().manual_seed(seed * model.config.n_layers + number)
            vectors = std * torch.randn(NOISE_ROWS, model.config.d_model, generator=generator)
            stack.enter_context(router.register_forward_pre_hook(_adding(vectors), with_kwargs=True))
        yield


def _adding(vectors: Float[Tensor, "n D"]) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(router: Router, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, call = args[0], _call_of(router, args, kwargs)
        if call.token_ids is None or call.positions is None:
            raise ValueError("noise goes by token_ids and positions: pass them to the layer")
        # Two large odd factors, and the high bits of the sum, so that neighbours have nothing in common.
        row = ((call.token_ids * 0x9E3779B1 + call.positions * 0x85EBCA77) >> 15) % NOISE_ROWS
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (x.to(dtype) + vectors.to(x.device, dtype)[row], *args[1:]), kwargs

    return hook


# ------------------------------------------------------------------------------------------------------------ mechanism


@dataclass(frozen=True, eq=False)
class _Hook:
    """A forward hook that hands the router's decision on as ``edit`` changes it."""

    edit: _EditOfCall

    def __call__(self, router: Router, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> Routing:
        return self.edit(_call_of(router, args, kwargs), routing)


@contextmanager
def _edited(model: Transformer, edits: Mapping[int, _EditOfCall], *, first: bool = False) -> Iterator[None]:
    routers = {number: _router_of(model, number) for number in edits}
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for number, edit in edits.items():
            stack.enter_context(routers[number].register_forward_hook(_Hook(edit), with_kwargs=True, prepend=first))
        yield


def _call_of(router: Router, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
    mask = args[1] if len(args) > 1 else kwargs.get("mask")
    return _Call(router, mask, kwargs.get("token_ids"), kwargs.get("positions"))


def _router_of(model: Transformer, number: int) -> Router:
    layers = mixture_layers(model)
    if number not in layers:
        known = ", ".join(map(str, layers)) or "none"
        raise ValueError(f"block {number} has no mixture in it; those that have: {known}")
    return layers[number].router


def _numbers(model: Transformer, layers: Collection[int] | None) -> list[int]:
    return list(mixture_layers(model) if layers is None else layers)


def _experts_of(model: Transformer, number: int, experts: Collection[int]) -> list[int]:
    """``experts`` as a list, without repetition; raises ValueError for one that the layer does not have."""
    n_experts = _router_of(model, number).n_experts
    for expert in experts:
        if not 0 <= expert < n_experts:
            raise ValueError(f"layer {number} has experts 0 to {n_experts - 1}, and no {expert}")
    return list(dict.fromkeys(experts))


def _require_experts(model: Transformer, number: int, n_experts: int) -> None:
    actual = _router_of(model, number).n_experts
    if n_experts != actual:
        raise ValueError(f"the recorded layer {number} has {n_experts} experts, and the model's {actual}")


def _require_weights_of_scores(router: Router, instead: str) -> None:
    if router.config.selection == "sampled":
        raise ValueError(
            f"selection sampled weighs experts by its own draw, so weights of others cannot be told: {instead}"
        )


def _unchecked(config: RouterConfig, **values: Any) -> RouterConfig:
    """``config`` with other values, even such as no router should be trained with: a single normalised weight."""
    other = copy(config)
    for name, value in values.items():
        object.__setattr__(other, name, value)
    return other


def _weigh(
    router: Router, routing: Routing, selected: Int[Tensor, "T K"], assigned: Bool[Tensor, "T K"] | None
) -> Float[Tensor, "T K"]:
    """The weights of these places by the router's own rule, with its scores; padding and empty places get 0."""
    thins_out = router.config.second_choice is not None and router.training
    # Which second choices are kept is decided already; those that were not had their part of the sum nonetheless.
    decided = copy(router)
    decided.config = _unchecked(router.config, second_choice=None)
    weights, _ = decided.weigh(routing.scores, Choice(selected, None if thins_out else assigned))
    if assigned is not None:
        weights = weights.masked_fill(~assigned, 0.0)
    return weights if routing.mask is None else weights.masked_fill(~routing.mask[:, None], 0.0)


def _widened(routing: Routing, places: int) -> Routing:
    """``routing`` with at least so many places a token; those that are new are empty."""
    more = places - routing.top_k
    if more <= 0:
        return routing
    held = torch.ones_like(routing.selected, dtype=torch.bool) if routing.assigned is None else routing.assigned
    return replace(
        routing,
        selected=_filled(F.pad(routing.selected, (0, more), value=EMPTY), routing.n_experts),
        weights=F.pad(routing.weights, (0, more)),
        assigned=F.pad(held, (0, more)),
        dropped=None if routing.dropped is None else F.pad(routing.dropped, (0, more)),
    )


def _filled(selected: Int[Tensor, "T K"], n_experts: int) -> Int[Tensor, "T K"]:
    """``selected`` with an expert that the token does not have in each EMPTY place: none may be there twice."""
    empty = selected == EMPTY
    slot = selected.masked_fill(empty, n_experts)
    taken = torch.zeros(len(selected), n_experts + 1, dtype=torch.uint8, device=selected.device)
    free = taken.scatter_(1, slot, 1)[:, :n_experts].argsort(dim=1, stable=True)
    return free.gather(1, (empty.cumsum(dim=1) - 1).clamp(min=0)).where(empty, selected)
