"""A rehearsed step allocates what the same step allocates when it is real."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moe import config_file
from moe.config import Config
from moe.model import short_attention
from moe.model.transformer import Transformer
from moe.rehearsal.rehearse import rehearse
from moe.rehearsal.trace import StepTrace
from moe.training.optimizer import build_optimizer
from moe.training.step import MicroBatch, TrainingStep

TOY = Path(__file__).parent.parent.parent / "configs/toy.yaml"


def toy(**flags: str) -> Config:
    """The toy in bfloat16, with flags whose dots are written as two underscores."""
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return config_file.load(TOY, {"training.precision": "bf16"} | named).with_vocab(512)


class Kept:
    """A linear layer's worth of storages, made by hand."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(256, 256))
        self.optimizer = torch.optim.SGD([self.weight], momentum=0.9)
        self.module = nn.ParameterList([self.weight])

    def step(self) -> None:
        x = torch.ones(1024, 256)
        (x @ self.weight).sin().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_the_parts_of_a_step_that_can_be_counted_by_hand() -> None:
    """W is 256 KiB, x and x W 1 MiB each; the busiest moment is that in which the gradient of x W is there too."""
    layer, trace = Kept(), StepTrace()
    trace.watch(layer.module, layer.optimizer)
    with trace:
        layer.step()
        trace.forget()
        layer.step()

    peak = trace.peak()

    assert peak.parts["parameters"] == peak.parts["optimizer"] == 256 * 1024
    assert peak.parts["activations"] >= 2 * 1024 * 1024
    # The cosine of x W, and its product with the gradient that came, 1 MiB each.
    assert peak.parts["temporaries"] == pytest.approx(2 * 1024 * 1024, abs=4096)
    assert peak.phase == "backward"
    assert trace.in_use == 2 * 256 * 1024


def traced(config: Config, tokens: Tensor) -> StepTrace:
    """The trace of the second of two steps on a CPU, by the expert back-end that never looks at its counts."""
    model = Transformer(config.model)
    model.activation_checkpointing = config.training.activation_checkpointing
    optimizer = build_optimizer(model, config.training.optimizer)
    trace = StepTrace()
    trace.watch(model, optimizer)
    step = TrainingStep(model, optimizer, precision="bf16", clip=1.0)
    with trace:
        for measured in (False, True):
            if measured:
                trace.forget()
            step([MicroBatch(tokens, tokens)], 1e-3)
    return trace


@pytest.mark.parametrize("checkpointing", ["none", "attention", "experts", "block"])
def test_a_fake_step_allocates_what_a_real_one_does(checkpointing: str) -> None:
    config = toy(model__experts__backend="grouped", training__activation_checkpointing=checkpointing)
    with patch.object(short_attention, "pays", lambda *_, **__: False):
        real = traced(config, torch.randint(512, (2, 128))).peak()
        with (
            FakeTensorMode(),
            patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor),
            patch("moe.training.step.Transfer", lambda numbers: None),
        ):
            fake = traced(config, torch.zeros(2, 128, dtype=torch.int64)).peak()

    assert fake.operator == real.operator
    # Attention keeps a few numbers more when it is real: its random state.
    assert fake.total == pytest.approx(real.total, rel=0.002)
    assert fake.parts == pytest.approx(real.parts, rel=0.01, abs=4096)


def test_weights_states_and_gradients_of_a_rehearsal_are_those_of_the_configuration() -> None:
    config = toy()
    n_params = sum(p.numel() for p in Transformer(config.model).parameters())

    rehearsal = rehearse(config, 2)

    assert rehearsal.peak.parts["parameters"] == pytest.approx(4 * n_params, rel=0.001)
    assert rehearsal.peak.parts["optimizer"] == pytest.approx(8 * n_params, rel=0.001)
    assert rehearsal.after == pytest.approx(12 * n_params, rel=0.001)


def test_checkpointing_and_more_micro_batches_need_what_they_should() -> None:
    plain = rehearse(toy(training__batch_size="8"), 8).peak
    block = rehearse(toy(training__activation_checkpointing="block"), 8).peak
    twice = rehearse(toy(training__accumulation="2"), 8).peak

    assert block.parts["activations"] < plain.parts["activations"] / 2
    # Gradients of the first micro-batch are there when the second is at its peak.
    assert twice.parts["gradients"] > plain.parts["gradients"]
    assert twice.parts["activations"] == pytest.approx(plain.parts["activations"], rel=0.02)
