from functools import partial

import pytest
import torch

from moe.bench import models
from moe.bench.agreement import UnfitError
from moe.bench.decode import DecodeCell, DecodeTask
from moe.bench.measure import park
from moe.bench.shapes import MODELS
from moe.bench.step import StepCell, StepTask
from moe.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Turns of a few repetitions, and no collection of garbage between them."""
    for bench in ("step", "decode"):
        monkeypatch.setattr(f"moe.bench.{bench}.release", lambda device: None)
    monkeypatch.setattr("moe.bench.step.SECONDS", 0.0)
    monkeypatch.setattr("moe.bench.decode.SECONDS", 0.0)


def step(build, folder, precision="fp32", dense_twin=False):
    return StepTask(build, StepCell("mini", precision), CPU, folder, dense_twin=dense_twin, low_precision=False)


def decode(build, folder, batch=2, precision="fp32"):
    return DecodeTask(build, DecodeCell("mini", batch, precision), CPU, folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dense_twin", [False, True])
def test_our_model_has_the_gradients_of_the_loop_and_is_timed(dense_twin, precision, tmp_path):
    one = step(partial(models.ours, backend="segments", dense_twin=dense_twin), tmp_path, precision, dense_twin)
    facts = one.prepare()
    assert facts["error"] < (1e-5 if precision == "fp32" else 0.05)
    assert facts["kept_bytes"] > 0
    assert len(one.turn(0)) == 2


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_mixtral_with_our_weights_is_our_model(experts, attention, tmp_path):
    pytest.importorskip("transformers")
    facts = step(partial(models.mixtral, experts=experts, attention=attention), tmp_path).prepare()
    assert facts["error"] < 1e-5
    assert facts["parameters"] == models.our_transformer(MODELS["mini"], "auto", CPU, torch.float32).num_params()


def test_transformers_llama_with_our_weights_is_our_dense_twin(tmp_path):
    pytest.importorskip("transformers")
    assert step(models.llama, tmp_path, dense_twin=True).prepare()["error"] < 1e-5


def test_the_reference_is_computed_once_for_all(tmp_path, monkeypatch):
    step(models.ours, tmp_path).prepare()
    monkeypatch.setattr("moe.bench.step.reference_gradients", None)
    step(partial(models.ours, backend="grouped"), tmp_path).prepare()


def with_other_loss(shape, device, dtype):
    model = models.ours(shape, device, dtype)
    loss = model.loss
    model.loss = lambda tokens, targets: loss(tokens, targets.roll(1, dims=1))
    return model


def test_a_model_with_another_loss_is_refused(tmp_path):
    with pytest.raises(UserError, match="gradients is off"):
        step(with_other_loss, tmp_path).prepare()


def test_a_model_whose_weights_are_its_own_must_at_least_have_a_finite_loss(tmp_path):
    def own(shape, device, dtype, factor):
        model = models.ours(shape, device, dtype)
        loss = model.loss
        model.loss = lambda tokens, targets: loss(tokens, targets) * factor
        model.names = {}
        return model

    assert "its own" in step(partial(own, factor=1.0), tmp_path).prepare()["note"]
    with pytest.raises(UserError, match="its loss is inf"):
        step(partial(own, factor=float("inf")), tmp_path).prepare()


def test_a_grafted_layer_learns_with_the_rest(tmp_path):
    one = step(partial(models.grafted, layer=lambda shape: torch.nn.Linear(32, 32)), tmp_path)
    assert one.prepare()["error"] is None
    before = one.model.module.blocks[0].feed_forward.weight.clone()
    one.turn(0)
    assert not torch.equal(one.model.module.blocks[0].feed_forward.weight, before)


def test_a_parked_model_gets_its_weights_again():
    shape = MODELS["mini"]
    model = models.ours(shape, CPU, torch.float32)
    model.names = {name: parts for name, parts in model.names.items() if name != "head.weight"}
    wanted = {name: parameter.clone() for name, parameter in model.module.named_parameters()}
    park(model.module.parameters())
    models.refill(model, shape)
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, wanted[name]) == (name != "head.weight")
    assert float(model.module.head.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_weights_in_bfloat16_are_those_in_float32_rounded():
    shape = MODELS["mini"]
    full, half = (models.our_transformer(shape, "auto", CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    for (name, parameter), rounded in zip(full.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(parameter.bfloat16().float(), rounded.float()), name
    assert half.blocks[0].feed_forward.router.weight.dtype == torch.float32


@pytest.mark.parametrize("build", [models.ours, partial(models.mixtral, decoding=True)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_greedy_tokens_are_the_best_of_the_whole_sequence(build, precision, tmp_path):
    if build is not models.ours:
        pytest.importorskip("transformers")
    one = decode(build, tmp_path, precision=precision)
    facts = one.prepare()
    assert facts["error"] <= (1e-6 if precision == "fp32" else 0.01)
    assert len(one.turn(0)) == 1


def writing(change):
    def build(shape, device, dtype):
        model = models.ours(shape, device, dtype)
        right = model.generate
        model.generate = lambda prompts, n: change(right(prompts, n))
        return model

    return build


def test_other_tokens_are_refused(tmp_path):
    with pytest.raises(UserError, match="standard deviations below the best"):
        decode(writing(lambda tokens: (tokens + 1) % 64), tmp_path).prepare()
    with pytest.raises(UserError, match=r"it wrote \(2, 31\) tokens, not \(2, 32\)"):
        decode(writing(lambda tokens: tokens[:, 1:]), tmp_path).prepare()


def test_a_copy_of_all_weights_is_refused(monkeypatch):
    pytest.importorskip("transformers")
    shape = MODELS["mini"]
    monkeypatch.setattr(models, "BATCHED_LIMIT", 1 << 20)
    with pytest.raises(UnfitError, match="copies the weights of every assignment"):
        models.mixtral(shape, CPU, torch.float32, experts="batched_mm")
    # Decoding has one token a sequence: 2 · 2 assignments of 24 KiB.
    models.mixtral(shape, CPU, torch.float32, experts="batched_mm", decoding=True)
