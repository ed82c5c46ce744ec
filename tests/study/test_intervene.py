"""Interventions: each against what can be done by hand, and none leaves a trace."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe.config import AttentionConfig, ExpertsConfig, ModelConfig
from moe.inference.generate import generate
from moe.model.cache import KVCache
from moe.model.routing import Routing
from moe.model.transformer import Transformer
from moe.presets import model_config, presets
from moe.study.intervene import (
    _filled,
    change_k,
    edit_routing,
    force,
    knock_out,
    largest_k,
    mixture_layers,
    noise,
    random_routing,
    replay,
    swap,
)
from moe.study.record import Record
from moe.study.recording import layer_of

VOCABULARY, LENGTH, SEQUENCES, EXPERTS = 32, 8, 3, 8
TOKENS = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_layers": 2,
    "d_model": 16,
    "max_seq": 24,
    "init_std": 0.5,
    "attention": {"n_heads": 2, "head_dim": 8},
    "feed_forward": {"bias": True, "activation": "gelu"},
    "experts": {"n_experts": EXPERTS, "d_ff": 8, "backend": "reference"},
}


def small(preset: str = "mixtral", **settings: Any) -> Transformer:
    """A model of two blocks in float64 and evaluation mode, with experts that differ in their biases too."""
    if preset in ("deepseek_v2", "deepseek_v3"):
        # Four groups of two experts.
        settings = {"router": {"n_groups": 4, "top_groups": 2, "top_k": 2}} | settings
    model = Transformer(model_config(preset, **(SMALL | settings)), seed=0).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            for bias in (layer.experts.b_in, layer.experts.b_out):
                if bias is not None:
                    bias.copy_(torch.randn(bias.shape, generator=generator))
            for parameter in layer.router.parameters():
                # Some start at zero, and all experts would be tied.
                if parameter.dim() and not parameter.any():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def outputs(model: Transformer, tokens: Tensor = TOKENS, **arguments: Any) -> tuple[Tensor, list[Routing]]:
    with torch.no_grad():
        logits, routings = model(tokens, **arguments)
    return logits, routings


def rows(routing: Routing) -> list[set[int]]:
    """The experts that each token has, empty places left out."""
    held = torch.ones_like(routing.selected, dtype=torch.bool) if routing.assigned is None else routing.assigned
    return [
        {expert for expert, is_held in zip(*row, strict=True) if is_held}
        for row in zip(routing.selected.tolist(), held.tolist(), strict=True)
    ]


def same(one: Tensor, other: Tensor) -> bool:
    return bool(torch.equal(one, other))


# -------------------------------------------------------------------------------------------------------- no trace left

EVERY: dict[str, Callable[[Transformer], AbstractContextManager[None]]] = {
    "knock_out": lambda model: knock_out(model, {0: [0, 1, 2], 1: [3]}),
    "reroute": lambda model: knock_out(model, {0: [0, 1, 2]}, reroute=True),
    "force": lambda model: force(model, 1, [0, 3]),
    "replay": lambda model: replay(model, {0: outputs(small("random"))[1][0]}),
    "swap": lambda model: swap(model, 0, 2, 3),
    "change_k": lambda model: change_k(model, 4),
    "noise": lambda model: noise(model, 1.0),
    "random_routing": lambda model: random_routing(model),
    "edit_routing": lambda model: edit_routing(
        model, {0: lambda routing: replace(routing, weights=routing.weights * 2)}
    ),
}


def trace(model: Transformer) -> list[object]:
    """Everything that an intervention could leave behind."""
    hooks = [list(table.items()) for m in model.modules() for table in (m._forward_hooks, m._forward_pre_hooks)]
    objects = [(name, id(m), sorted(vars(m))) for name, m in model.named_modules()]
    tensors = [(name, id(t)) for name, t in [*model.named_parameters(), *model.named_buffers()]]
    configs = [id(layer.router.config) for layer in mixture_layers(model).values()]
    return [hooks, objects, tensors, configs]


@pytest.mark.parametrize("name", EVERY)
def test_every_intervention_acts_and_leaves_no_trace(name: str) -> None:
    model = small()
    before, traces = outputs(model)[0], trace(model)
    with EVERY[name](model):
        inside = outputs(model)[0]
    assert not same(inside, before)
    assert trace(model) == traces
    assert same(outputs(model)[0], before)


@pytest.mark.parametrize("name", EVERY)
def test_an_exception_inside_leaves_no_trace(name: str) -> None:
    model = small()
    traces = trace(model)
    with pytest.raises(KeyError), EVERY[name](model):
        raise KeyError
    assert trace(model) == traces


def test_all_interventions_nest_and_leave_no_trace() -> None:
    model = small()
    before, traces = outputs(model)[0], trace(model)
    with ExitStack() as stack:
        for enter in EVERY.values():
            stack.enter_context(enter(model))
        outputs(model)
    assert trace(model) == traces
    assert same(outputs(model)[0], before)


def test_a_refused_intervention_leaves_no_trace() -> None:
    model = small()
    traces = trace(model)
    with pytest.raises(ValueError, match="only 1 experts"), knock_out(model, {0: [0], 1: range(7)}, reroute=True):
        pass
    assert trace(model) == traces


def test_compiled_blocks_are_changed_too_and_are_used_again_after() -> None:
    model = small(n_layers=1)
    expected = outputs(model)[0]
    with knock_out(model, layer=0, experts=[1]):
        knocked_out = outputs(model)[0]
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        def run(*arguments: Any) -> Any:
            compiled.append(True)
            return graph(*arguments)

        return run

    for block in model.blocks:
        block.compile(backend=backend)
    torch.testing.assert_close(outputs(model)[0], expected)
    runs = len(compiled)
    assert runs > 0
    with knock_out(model, layer=0, experts=[1]):
        torch.testing.assert_close(outputs(model)[0], knocked_out)
    assert len(compiled) == runs
    torch.testing.assert_close(outputs(model)[0], expected)
    assert len(compiled) == 2 * runs


# ------------------------------------------------------------------------------------------------------------ knock out


@pytest.mark.parametrize("preset", presets())
def test_knocking_out_is_setting_the_output_to_zero_by_hand(preset: str) -> None:
    model = small(preset)
    with knock_out(model, {0: [1], 1: [0, 2]}):
        knocked_out, routings = outputs(model)
    with torch.no_grad():
        for number, experts in ((0, [1]), (1, [0, 2])):
            layer = mixture_layers(model)[number]
            assert layer.experts.b_out is not None
            layer.experts.w_out[experts] = 0.0
            layer.experts.b_out[experts] = 0.0
    by_hand, unchanged = outputs(model)
    torch.testing.assert_close(knocked_out, by_hand, rtol=0, atol=1e-12)
    # No MLP is computed, nothing is counted as load, and the rest stays where it was.
    assert routings[0].counts()[1] == 0
    assert (
        routings[0].counts()[[0, *range(2, EXPERTS)]].tolist()
        == unchanged[0].counts()[[0, *range(2, EXPERTS)]].tolist()
    )
    assert routings[1].counts()[[0, 2]].tolist() == [0, 0]
    assert routings[0].dropped_count() == 0


def test_knocking_out_a_special_expert_takes_what_it_gave() -> None:
    # One zero, one copy and two constant experts follow the MLPs; every token goes to the copy expert alone.
    model = small("moe_plus_plus", n_layers=1)
    layer = mixture_layers(model)[0]
    copy_expert = layer.router.n_experts - 3
    x = torch.randn(1, LENGTH, 16, dtype=torch.float64)
    ids, positions = TOKENS[:1], torch.arange(LENGTH)[None]
    with torch.no_grad(), force(model, 0, copy_expert, weights="equal"):
        y, routing = layer(x, token_ids=ids, positions=positions)
        total = routing.weights.sum(dim=1)
        torch.testing.assert_close(y, x * total[None, :, None])
        with knock_out(model, layer=0, experts=copy_expert):
            nothing, _ = layer(x, token_ids=ids, positions=positions)
    assert same(nothing, torch.zeros_like(x))


def test_rerouting_equals_a_model_without_the_experts_rows() -> None:
    # A top-k of softmax over the six that are left is that of a router that never had rows 2 and 5.
    model = small(router={"top_k": 3})
    router = mixture_layers(model)[0].router
    assert router.weight is not None
    with knock_out(model, {0: [2, 5]}, reroute=True):
        _, routings = outputs(model)
    _, before = outputs(model)
    kept = [0, 1, 3, 4, 6, 7]
    best = before[0].logits[:, kept].softmax(dim=-1).topk(3, dim=-1)
    assert routings[0].selected.tolist() == [[kept[place] for place in row] for row in best.indices.tolist()]
    torch.testing.assert_close(routings[0].weights, best.values / best.values.sum(dim=-1, keepdim=True))
    assert same(routings[0].logits, before[0].logits)
    assert routings[0].scores[:, [2, 5]].tolist() == [[0.0, 0.0]] * TOKENS.numel()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("preset", presets())
def test_rerouting_sends_no_token_to_the_banned_and_changes_none_that_had_none(preset: str, training: bool) -> None:
    model = small(preset)
    config = mixture_layers(model)[0].router.config
    draws = training and (config.noise != "none" or config.selection == "sampled" or bool(config.second_choice))
    compares = config.selection in ("expert_choice", "sinkhorn", "base") or config.capacity.factor is not None
    model.train(training)
    torch.manual_seed(0)
    _, before = outputs(model)
    torch.manual_seed(0)
    with knock_out(model, {0: [1, 4]}, reroute=True):
        _, routings = outputs(model)
    after = routings[0]
    assert after.counts()[[1, 4]].tolist() == [0, 0]
    assert torch.isfinite(after.weights).all()
    assert all(len(set(row)) == len(row) for row in after.selected.tolist())
    assert after.counts().sum() > 0
    if config.selection in ("top_k", "hash", "random") and not draws and not compares:
        for old, new in zip(rows(before[0]), rows(after), strict=True):
            assert old - {1, 4} <= new
            assert len(new) == config.top_k


def test_rerouting_within_groups_follows_the_rule_of_groups() -> None:
    # Groups {0 1} {2 3} {4 5} {6 7}, of which the two with the best sums serve two choices. Of {2 3} one expert is
    # left: no sum of two, so the group is not ranked, and its expert 3 never chosen.
    model = small("deepseek_v3")
    with knock_out(model, {0: [2]}, reroute=True):
        _, routings = outputs(model)
    assert routings[0].counts()[[2, 3]].tolist() == [0, 0]
    # Without {2 3}, {4 5} and one of {6 7}, a single group can be ranked, and two are needed.
    with pytest.raises(ValueError, match="only 0 experts"), knock_out(model, {0: [2, 4, 6]}, reroute=True):
        pass


def test_with_a_capacity_who_is_knocked_out_drops_nobody_and_rerouting_drops_anew() -> None:
    # ceil(0.5 · 24 / 8) = 2 places an expert.
    model = small("switch", router={"capacity": {"factor": 0.5, "in_evaluation": True}})
    before = outputs(model)[1][0]
    busiest = int(before.counts().argmax())
    overflow = int(before.counts()[busiest]) - 2
    assert overflow > 0
    with knock_out(model, layer=0, experts=busiest):
        knocked_out = outputs(model)[1][0]
    assert knocked_out.dropped_count() == before.dropped_count() - overflow
    # Nor does a record call the empty place a dropped one.
    assert knocked_out.dropped is not None
    assert not knocked_out.dropped[knocked_out.selected == busiest].any()
    with knock_out(model, layer=0, experts=busiest, reroute=True):
        rerouted = outputs(model)[1][0]
    assert rerouted.dropped_count() == (rerouted.counts() - 2).clamp(min=0).sum()
    assert rerouted.counts().sum() == TOKENS.numel()


def test_rerouting_hears_the_selection_bias() -> None:
    model = small("loss_free", router={"top_k": 2})
    router = mixture_layers(model)[0].router
    assert router.selection_bias is not None
    router.selection_bias[6] = 100.0
    with knock_out(model, {0: [1]}, reroute=True):
        assert outputs(model)[1][0].counts()[6] == TOKENS.numel()


def test_rerouting_comes_before_what_changes_decisions_wherever_it_is_entered() -> None:
    model = small()
    with force(model, 0, 5), knock_out(model, {0: [1]}, reroute=True):
        assert rows(outputs(model)[1][0]) == [{5}] * TOKENS.numel()


def test_two_bans_are_one() -> None:
    model = small()
    with knock_out(model, {0: [1, 4]}, reroute=True):
        together, _ = outputs(model)
    with knock_out(model, {0: [1]}, reroute=True), knock_out(model, {0: [4]}, reroute=True):
        nested, _ = outputs(model)
    assert same(together, nested)


def test_rerouting_and_another_k_go_in_any_order() -> None:
    model = small()
    with knock_out(model, {0: [1]}, reroute=True), change_k(model, 4):
        one, routings = outputs(model)
    with change_k(model, 4), knock_out(model, {0: [1]}, reroute=True):
        other, _ = outputs(model)
    assert same(one, other)
    assert routings[0].top_k == 4
    assert routings[0].counts()[1] == 0


def test_an_expert_that_is_not_there_is_refused() -> None:
    model = small(experts={"n_experts": EXPERTS, "d_ff": 8, "first_dense": 1})
    for bad, message in (({1: [8]}, "has experts 0 to 7"), ({0: [0]}, "those that have: 1")):
        with pytest.raises(ValueError, match=message), knock_out(model, bad):
            pass
    with pytest.raises(ValueError, match="of which layer"), knock_out(model, [0]):
        pass


# ---------------------------------------------------------------------------------------------------------------- force


def test_all_tokens_go_to_one_expert_with_the_weight_one() -> None:
    # Mixtral normalises: a single expert has all of the weight.
    model = small()
    with force(model, 0, 5):
        _, routings = outputs(model)
    assert rows(routings[0]) == [{5}] * TOKENS.numel()
    assert routings[0].weights.tolist() == [[1.0, 0.0]] * TOKENS.numel()


def test_without_normalisation_a_forced_expert_weighs_what_it_scores() -> None:
    model = small("olmoe", router={"top_k": 2})
    with force(model, 0, [5, 1]):
        _, routings = outputs(model)
    assert same(routings[0].weights, routings[0].scores[:, [5, 1]])


def test_chosen_token_ids_are_sent_and_the_others_stay() -> None:
    model = small()
    wanted = [int(TOKENS[0, 0]), int(TOKENS[1, 3])]
    _, before = outputs(model)
    with force(model, 0, [6, 0, 3], wanted):
        _, routings = outputs(model)
    sent = [token in wanted for token in TOKENS.flatten().tolist()]
    for is_sent, old, new in zip(sent, rows(before[0]), rows(routings[0]), strict=True):
        assert new == ({6, 0, 3} if is_sent else old)
    # Three places now, of which the others use two; no expert is in two of them.
    assert all(len(set(row)) == 3 for row in routings[0].selected.tolist())
    kept = ~torch.tensor(sent)
    assert same(routings[0].weights[kept, :2], before[0].weights[kept])
    assert routings[0].weights[kept, 2].tolist() == [0.0] * int(kept.sum())


def test_a_mask_of_places_sends_those_and_equal_weights_share_what_there_was() -> None:
    model = small("olmoe", router={"top_k": 2})
    mask = torch.zeros_like(TOKENS, dtype=torch.bool)
    mask[1, 4] = True
    _, before = outputs(model)
    with force(model, 0, [7, 2], mask, weights="equal"):
        _, routings = outputs(model)
    place = LENGTH + 4
    assert routings[0].selected[place].tolist() == [7, 2]
    half = before[0].weights[place].sum() / 2
    torch.testing.assert_close(routings[0].weights[place], torch.stack([half, half]))
    others = [index for index in range(TOKENS.numel()) if index != place]
    assert same(routings[0].weights[others], before[0].weights[others])
    with pytest.raises(ValueError, match="over 24 tokens, and the forward pass has 8"), force(model, 0, 7, mask):
        outputs(model, TOKENS[:1])


def test_a_forced_assignment_is_not_dropped_and_padding_gets_nothing() -> None:
    # A capacity of one place an expert drops nearly all; forced to expert 0, nobody is.
    model = small("switch", router={"capacity": {"factor": 0.1, "in_evaluation": True}})
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[0, 5:] = False
    assert outputs(model, mask=mask)[1][0].dropped_count() > 10
    with force(model, 0, 0):
        routing = outputs(model, mask=mask)[1][0]
    assert routing.dropped_count() == 0
    assert same(routing.weights[:, 0] > 0, mask.flatten())


def test_weights_by_scores_are_refused_where_the_rule_weighs_its_own_draw() -> None:
    with pytest.raises(ValueError, match='weights="equal"'), force(small("grin"), 0, 1):
        pass


# --------------------------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("preset", presets())
def test_replaying_its_own_routing_changes_nothing_bit_for_bit(preset: str, padded: bool, training: bool) -> None:
    model = small(preset).train(training)
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[0, 5:] = False
    arguments = {"mask": mask} if padded else {}
    torch.manual_seed(0)
    expected, recorded = outputs(model, **arguments)
    freeze = preset == "grin"
    torch.manual_seed(0)
    with replay(model, recorded, freeze=freeze):
        replayed, routings = outputs(model, **arguments)
    assert same(replayed, expected)
    for old, new in zip(recorded, routings, strict=True):
        assert same(new.weights, old.weights)
        assert same(new.counts(), old.counts())
        assert same(new.dropped_count(), old.dropped_count())


def test_dropped_and_empty_places_are_replayed() -> None:
    model = small("top_p", router={"capacity": {"factor": 0.5, "in_evaluation": True}})
    expected, recorded = outputs(model)
    assert recorded[0].dropped_count() > 0
    assert recorded[0].assigned is not None
    assert not recorded[0].assigned.all()
    for freeze in (False, True):
        with replay(model, recorded, freeze=freeze):
            assert same(outputs(model)[0], expected)


def record_of(routings: Sequence[Routing], blocks: Sequence[int], keep: np.ndarray[Any, Any]) -> Record:
    """The record of the tokens of :data:`TOKENS` that are kept."""
    sequence, position = np.divmod(np.arange(TOKENS.numel()), LENGTH)
    column = {name: np.zeros(int(keep.sum()), np.int32) for name in ("target_id", "predicted_id", "domain")}
    return Record(
        **column,
        token_id=TOKENS.flatten().numpy().astype(np.int32)[keep],
        loss=np.zeros(int(keep.sum()), np.float32),
        position=position.astype(np.int32)[keep],
        # A record of a later batch: its sequences do not begin at 0.
        sequence=sequence.astype(np.int32)[keep] + 7,
        domains=("all",),
        layers=tuple(layer_of(block, r, keep, scores=False) for block, r in zip(blocks, routings, strict=True)),
    )


@pytest.mark.parametrize("preset", ["mixtral", "top_p", "remoe", "moe_plus_plus", "expert_choice", "hash"])
def test_a_record_of_some_tokens_is_replayed_and_the_router_decides_for_the_rest(preset: str) -> None:
    model, other = small(preset), small("random")
    keep = np.ones(TOKENS.numel(), np.bool_)
    keep[[3, 10]] = False
    expected, own = outputs(model)
    with replay(model, record_of(own, (0, 1), keep)):
        assert same(outputs(model)[0], expected)
    if preset != "mixtral":
        return
    _, elsewhere = outputs(other)
    with replay(model, record_of(elsewhere[:1], (0,), keep)):
        _, routings = outputs(model)
    for index, (new, old, recorded) in enumerate(zip(rows(routings[0]), rows(own[0]), rows(elsewhere[0]), strict=True)):
        assert new == (recorded if keep[index] else old)


def test_replay_leaves_what_came_before_to_tokens_that_it_does_not_know() -> None:
    model = small()
    keep = np.arange(TOKENS.numel()) != 3
    recorded = record_of(outputs(model)[1][:1], (0,), keep)
    with force(model, 0, [7, 2], weights="equal"), replay(model, recorded):
        routing = outputs(model)[1][0]
    assert routing.selected[3].tolist() == [7, 2]
    torch.testing.assert_close(routing.weights[3], torch.full((2,), 0.5, dtype=torch.float64))


def test_empty_places_are_filled_with_experts_that_the_token_does_not_have() -> None:
    assert _filled(torch.tensor([[2, -1, 0, -1], [-1, -1, 1, 0]]), 5).tolist() == [[2, 1, 0, 3], [2, 3, 1, 0]]


def test_frozen_weights_are_the_recorded_ones_and_others_the_current_scores() -> None:
    model = small()
    _, recorded = outputs(small("random"))
    with replay(model, recorded, freeze=True):
        _, frozen = outputs(model)
    assert same(frozen[0].weights, recorded[0].weights)
    with replay(model, recorded):
        _, fresh = outputs(model)
    scores = fresh[0].scores.gather(1, recorded[0].selected)
    torch.testing.assert_close(fresh[0].weights, scores / scores.sum(dim=1, keepdim=True))


def test_gradients_flow_through_replay_into_the_router() -> None:
    # With the choice held, the loss is smooth in the router's weights: central differences know its slope.
    model = small()
    _, recorded = outputs(small("random"))
    weight = mixture_layers(model)[0].router.weight
    assert weight is not None

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(model(TOKENS)[0].flatten(0, 1), TOKENS.flatten())

    with replay(model, recorded):
        loss().backward()
        assert weight.grad is not None
        for place in ((0, 0), (3, 7), (6, 11)):
            step = 1e-5
            with torch.no_grad():
                weight[place] += step
                above = loss()
                weight[place] -= 2 * step
                below = loss()
                weight[place] += step
            torch.testing.assert_close(weight.grad[place], (above - below) / (2 * step), rtol=1e-5, atol=1e-9)
        assert weight.grad.abs().sum() > 0
        weight.grad = None
    with replay(model, recorded, freeze=True):
        loss().backward()
    # With frozen weights nothing in the output depends on the router.
    assert weight.grad is None or not weight.grad.any()


def test_a_recording_that_does_not_fit_is_refused() -> None:
    model = small()
    _, recorded = outputs(model)
    with pytest.raises(ValueError, match="1 routings for 2"), replay(model, recorded[:1]):
        pass
    with pytest.raises(ValueError, match="24 tokens were recorded"), replay(model, recorded):
        outputs(model, TOKENS[:2])
    with (
        pytest.raises(ValueError, match="has 8 experts, and the model's 4"),
        replay(small(experts={"n_experts": 4, "d_ff": 8}), recorded),
    ):
        pass
    with pytest.raises(ValueError, match="freeze=True"), replay(small("grin"), recorded):
        pass
    record = record_of(recorded, (0, 1), np.ones(TOKENS.numel(), np.bool_))
    with pytest.raises(ValueError, match="3 sequences were recorded"), replay(model, record):
        outputs(model, TOKENS[:2])


# ----------------------------------------------------------------------------------------------------------------- swap


def test_swapping_the_tokens_is_swapping_the_experts() -> None:
    model = small()
    with swap(model, 0, 2, 6):
        swapped, routings = outputs(model)
    _, before = outputs(model)
    assert same(routings[0].weights, before[0].weights)
    assert routings[0].counts()[[2, 6]].tolist() == before[0].counts()[[6, 2]].tolist()
    experts = mixture_layers(model)[0].experts
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[[2, 6]] = parameter[[6, 2]]
    torch.testing.assert_close(outputs(model)[0], swapped, rtol=0, atol=1e-12)


def test_experts_that_are_alike_do_not_care() -> None:
    model = small()
    with torch.no_grad():
        for parameter in mixture_layers(model)[0].experts.parameters():
            parameter[6] = parameter[2]
    with swap(model, 0, 2, 6):
        swapped, _ = outputs(model)
    torch.testing.assert_close(swapped, outputs(model)[0], rtol=0, atol=1e-12)


def test_swapping_twice_changes_nothing() -> None:
    model = small()
    with swap(model, 0, 2, 6), swap(model, 0, 6, 2):
        twice, _ = outputs(model)
    assert same(twice, outputs(model)[0])


# ------------------------------------------------------------------------------------------------------------- change k


@pytest.mark.parametrize("preset", presets())
def test_another_k_is_a_model_configured_with_it_or_is_refused(preset: str) -> None:
    model = small(preset)
    config = model.config
    if config.router.selection in ("top_p", "positive", "all"):
        with pytest.raises(ValueError, match="decides for itself"), change_k(model, 3):
            pass
        return
    if config.router.selection == "base":
        with pytest.raises(ValueError, match="from 1 to 1"), change_k(model, 2):
            pass
        return
    configured = Transformer(replace(config, router=replace(config.router, preset=None, normalise=False, top_k=3)))
    configured = configured.double().eval()
    configured.load_state_dict(model.state_dict())
    for layer, other in zip(
        mixture_layers(model).values(), mixture_layers(configured).values(), strict=True
    ):  # normalising one choice is refused by the configuration alone
        other.router.config = replace(layer.router.config, preset=None, top_k=3)
    with change_k(model, 3):
        changed, routings = outputs(model)
    assert same(changed, outputs(configured)[0])
    assert routings[0].counts().sum() == 3 * TOKENS.numel()
    with pytest.raises(ValueError, match="from 1 to"), change_k(model, largest_k(model) + 1):
        pass
    with pytest.raises(ValueError, match="from 1 to"), change_k(model, 0):
        pass
    with change_k(model, largest_k(model)):
        assert torch.isfinite(outputs(model)[0]).all()


def test_the_k_it_has_changes_nothing_and_a_single_normalised_expert_has_weight_one() -> None:
    model = small()
    with change_k(model, 2):
        assert same(outputs(model)[0], outputs(small())[0])
    with change_k(model, 1, layers=[1]):
        _, routings = outputs(model)
    assert routings[0].top_k == 2
    assert routings[1].weights.tolist() == [[1.0]] * TOKENS.numel()


# ------------------------------------------------------------------------------------------------ noise, random routing


def test_no_noise_changes_nothing_and_noise_is_what_its_seed_says() -> None:
    model = small()
    expected, before = outputs(model)
    with noise(model, 0.0):
        assert same(outputs(model)[0], expected)
    with noise(model, 0.5, seed=3):
        one, routings = outputs(model)
    with noise(model, 0.5, seed=3):
        assert same(outputs(model)[0], one)
    with noise(model, 0.5, seed=4):
        assert not same(outputs(model)[0], one)
    # Noise of deviation 0.5 on x moves each logit by a normal of deviation 0.5 |w|: over 24 tokens and 8 experts the
    # mean square of (move / |w|) is 0.25, give or take 0.25 · sqrt(2 / 192) = 0.026 each way.
    weight = mixture_layers(model)[0].router.weight
    assert weight is not None
    moves = (routings[0].logits - before[0].logits) / weight.detach().norm(dim=1)
    assert 0.15 < float(moves.square().mean()) < 0.35


def test_noise_differs_between_layers_and_between_places() -> None:
    # Two routers with the same matrix read nothing but the noise; one token id at 24 positions.
    model = small()
    routers = [layer.router for layer in mixture_layers(model).values()]
    routers[1].load_state_dict(routers[0].state_dict())
    zeros, ids = torch.zeros(24, 16, dtype=torch.float64), torch.zeros(24, dtype=torch.int64)
    with noise(model, 1.0):
        one, other = (router(zeros, token_ids=ids, positions=torch.arange(24)).logits for router in routers)
    assert len({*one[:, 0].tolist(), *other[:, 0].tolist()}) == 48


def test_noise_is_on_the_routers_input_alone() -> None:
    # The choice and its weights being held, the experts read what they did.
    model = small()
    expected, recorded = outputs(model)
    with noise(model, 2.0), replay(model, recorded, freeze=True):
        assert same(outputs(model)[0], expected)


@pytest.mark.parametrize("preset", ["hash", "random"])
def test_noise_is_refused_where_the_router_reads_nothing(preset: str) -> None:
    with pytest.raises(ValueError, match="computes nothing"), noise(small(preset), 1.0):
        pass


def test_random_routing_keeps_how_many_and_how_much_and_spreads_evenly() -> None:
    model = small(max_seq=512)
    tokens = torch.randint(VOCABULARY, (8, 512), generator=torch.Generator().manual_seed(5))
    _, before = outputs(model, tokens)
    with random_routing(model, seed=1):
        _, one = outputs(model, tokens)
    with random_routing(model, seed=2):
        _, other = outputs(model, tokens)
    assert same(one[0].weights, before[0].weights)
    # 8192 assignments over 8 experts: 1024 each, with a deviation of about 30; tokens repeat, so 5 of them.
    assert (one[0].counts() - 1024).abs().max() < 150
    # Two seeds, and two layers, agree in the first choice one time in eight: 512 of 4096, with a deviation of 21.
    for left, right in ((one[0], other[0]), (one[0], one[1])):
        agree = int((left.selected[:, 0] == right.selected[:, 0]).sum())
        assert abs(agree - 512) < 110


# ---------------------------------------------------------------------------------- where a model is used in other ways

PER_TOKEN: dict[str, Callable[[Transformer], AbstractContextManager[None]]] = {
    name: EVERY[name] for name in ("knock_out", "reroute", "force", "swap", "change_k", "noise", "random_routing")
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_with_a_cache_and_padding_a_token_is_treated_as_without(name: str) -> None:
    model = small()
    with PER_TOKEN[name](model), torch.no_grad():
        whole, _ = outputs(model, TOKENS[:1])
        # Two columns of padding on the left; six columns at once, then one by one.
        padded = torch.cat([torch.zeros(1, 2, dtype=torch.int64), TOKENS[:1]], dim=1)
        real = torch.ones_like(padded, dtype=torch.bool)
        real[:, :2] = False
        cache = KVCache(model.config, 1, LENGTH + 2, torch.device("cpu"), torch.float64)
        parts = [model(padded[:, :6], mask=real[:, :6], cache=cache)[0]]
        for column in range(6, LENGTH + 2):
            parts.append(model(padded[:, column : column + 1], mask=real[:, column : column + 1], cache=cache)[0])
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, 2:], whole, rtol=1e-9, atol=1e-9)


def test_generation_is_changed_and_a_record_replayed_with_a_cache() -> None:
    model = small()
    prompts = TOKENS.tolist()
    plain = generate(model, prompts, 6)
    with force(model, 0, 3), force(model, 1, 3):
        assert generate(model, prompts, 6) != plain
    _, elsewhere = outputs(small("random"))
    record = record_of(elsewhere, (0, 1), np.ones(TOKENS.numel(), np.bool_))
    with replay(model, record):
        assert generate(model, prompts, 6) != plain
    _, own = outputs(model)
    with replay(model, record_of(own, (0, 1), np.ones(TOKENS.numel(), np.bool_))):
        assert generate(model, prompts, 6) == plain


@pytest.mark.parametrize("name", EVERY)
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    model = small().train()
    gradients = []
    for model.activation_checkpointing in ("none", "block"):
        model.zero_grad()
        with EVERY[name](model):
            model(TOKENS)[0].square().sum().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_under_autocast_weights_stay_in_float32(name: str) -> None:
    model = small().float()
    with torch.autocast("cpu", torch.bfloat16), EVERY[name](model):
        logits, routings = outputs(model)
    assert torch.isfinite(logits).all()
    assert all(routing.weights.dtype == torch.float32 for routing in routings)


def test_a_residual_router_builds_on_finite_logits() -> None:
    model = small("moe_plus_plus")
    with knock_out(model, {0: [0, 1]}, reroute=True):
        assert torch.isfinite(outputs(model)[0]).all()


def test_a_dense_block_has_no_mixture_layer() -> None:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        n_layers=3,
        d_model=16,
        attention=AttentionConfig(n_heads=2, head_dim=8),
        experts=ExpertsConfig(n_experts=4, d_ff=8, every=3),
    )
    assert list(mixture_layers(Transformer(config))) == [2]
