from dataclasses import replace
from functools import partial

import pytest
import torch

from moe.bench import layers
from moe.bench.agreement import UnfitError
from moe.bench.layer import DenseTask, LayerCell, LayerTask
from moe.bench.layers import DenseBound, Layer, Weights, draw_weights
from moe.bench.shapes import LAYERS, LayerShape
from moe.errors import UserError

CPU = torch.device("cpu")


def task(build, tmp_path, precision="fp32", skew="balanced", low_precision=False, shape="mini"):
    return LayerTask(build, LayerCell(shape, precision, skew), CPU, tmp_path, low_precision=low_precision)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Turns of a few repetitions, and no collection of garbage between them."""
    monkeypatch.setattr("moe.bench.layer.SECONDS", 0.0)
    monkeypatch.setattr("moe.bench.layer.WARM_UP", 1)
    monkeypatch.setattr("moe.bench.layer.release", lambda device: None)


CONTESTANTS = {
    "reference": partial(layers.ours, backend="reference"),
    "grouped": partial(layers.ours, backend="grouped"),
    "segments": partial(layers.ours, backend="segments"),
    "plain loop": layers.plain_loop,
}


@pytest.mark.parametrize(("precision", "skew"), [("fp32", "balanced"), ("bf16", "zipf")])
@pytest.mark.parametrize("name", CONTESTANTS)
def test_what_computes_the_layer_agrees_and_is_timed(name, precision, skew, tmp_path):
    one = task(CONTESTANTS[name], tmp_path, precision, skew)
    facts = one.prepare()
    assert facts["error"] < (1e-5 if precision == "fp32" else 0.02)
    shape, size = LAYERS["mini"], 4 if precision == "fp32" else 2
    assert facts["kept_bytes"] >= shape.assignments * 2 * shape.d_ff * size, "at least the pre-activation is kept"
    taken = one.turn(0)
    assert [len(taken[phase]) for phase in ("forward", "all")] == [3, 3]
    assert len(one.turn(1)["all"]) == 3, "and again, with what was parked"


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_transformers_experts_agree(implementation, tmp_path):
    pytest.importorskip("transformers")
    facts = task(partial(layers.transformers_experts, implementation=implementation), tmp_path).prepare()
    assert facts["error"] < 1e-5


def spoiled(change):
    """The plain loop with one thing wrong."""

    def build(shape, weights):
        layer = layers.plain_loop(shape, weights)
        return replace(layer, **change(layer))

    return build


def forgets_the_weights(layer):
    return {"forward": lambda x, selected, weights: layer.forward(x, selected, weights * 0 + 0.5)}


def swaps_gate_and_value(layer):
    return {"ours": lambda gradients: Weights(gradients[0].roll(64, dims=1), gradients[1])}


@pytest.mark.parametrize(
    ("change", "quantity"), [(forgets_the_weights, "combine weights"), (swaps_gate_and_value, "gradient of w_in")]
)
def test_what_computes_something_else_is_refused_before_it_is_timed(change, quantity, tmp_path):
    with pytest.raises(UserError, match=quantity):
        task(spoiled(change), tmp_path).prepare()


def test_rounding_to_bf16_is_no_agreement_in_float32_unless_it_is_known(tmp_path):
    def rounding(layer):
        return {"forward": lambda x, selected, weights: layer.forward(x, selected, weights).bfloat16().float()}

    with pytest.raises(UserError, match=r"is off by 0\.00"):
        task(spoiled(rounding), tmp_path).prepare()
    assert task(spoiled(rounding), tmp_path, low_precision=True).prepare()["error"] > 1e-3


def test_a_layer_with_a_router_of_its_own_is_held_to_its_own_check(tmp_path):
    def build(shape, weights):
        w = torch.randn(shape.d_model, requires_grad=True)
        return Layer(lambda x, selected, combine: x * w, [w], None, lambda x: {"output": 0.7}, "a note")

    with pytest.raises(UserError, match=r"output is off by 0.7"):
        task(build, tmp_path).prepare()


def test_a_copy_of_all_weights_is_refused(monkeypatch):
    pytest.importorskip("transformers")
    shape = LAYERS["mini"]
    weights = draw_weights(shape, CPU, torch.float32)
    # 1024 assignments, 3 · 32 · 64 numbers of 4 bytes each: 24 MiB.
    monkeypatch.setattr(layers, "BATCHED_LIMIT", 24 * 2**20)
    layers.transformers_experts(shape, weights, implementation="batched_mm")
    monkeypatch.setattr(layers, "BATCHED_LIMIT", 24 * 2**20 - 1)
    with pytest.raises(UnfitError, match="copies the weights of every assignment"):
        layers.transformers_experts(shape, weights, implementation="batched_mm")


def test_weights_keep_the_scale_of_what_they_multiply():
    weights = draw_weights(LayerShape(1, 256, 512, 2, 1), CPU, torch.float32)
    assert weights.w_in.shape == (2, 1024, 256)
    assert weights.w_out.shape == (2, 256, 512)
    assert weights.w_in.std() == pytest.approx(1 / 16, rel=0.02)
    assert weights.w_out.std() == pytest.approx(512**-0.5, rel=0.02)


def test_the_bound_is_the_layers_products_and_nothing_else():
    # torch counts 2 · rows · columns · inner for each product.
    from torch.utils.flop_counter import FlopCounterMode

    shape = LAYERS["mini"]
    bound = DenseBound(shape, CPU, torch.float32)
    with FlopCounterMode(display=False) as counted:
        bound.both()
    assert counted.get_total_flops() == shape.flops()
    with FlopCounterMode(display=False) as counted:
        bound.forward()
    assert counted.get_total_flops() == shape.flops(backward=False)


def test_the_bound_has_a_time_in_each_phase():
    bound = DenseTask(LayerCell("mini", "fp32", "balanced"), CPU)
    assert bound.prepare()["error"] is None
    assert set(bound.turn(0)) == {"forward", "all"}
