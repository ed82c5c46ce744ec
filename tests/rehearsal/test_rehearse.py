"""A rehearsed step allocates what the same step allocates when it is real."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moe import config_file
from moe.config import Config, ConfigError, parse_layout
from moe.config.parameters import count_parameters
from moe.errors import UserError
from moe.model import short_attention
from moe.model.transformer import Transformer
from moe.rehearsal.command import rehearse_command
from moe.rehearsal.rehearse import Rehearsal, rehearse
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


LAYOUTS = ["ep2,full", "tp2,pp2,ep2", "pp2,vp2,hybrid2"]


def rehearsed(layout: str, rank: int = 0) -> Rehearsal:
    """A rank of as many processes as the layout and four data ranks make, in this process's child."""
    parallel = replace(parse_layout(layout), data=4)
    config = replace(toy(training__accumulation=str(parallel.pipeline)), parallel=parallel)
    processes = parallel.pipeline * parallel.tensor * 4
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(rehearse, (config, 1), {"processes": processes, "rank": rank})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_rehearsed_and_holds_its_part_of_the_model(layout: str) -> None:
    """Parameters as they are divided, by hand, and the collectives that each kind of division makes."""
    parallel = parse_layout(layout)
    whole = count_parameters(toy().model)

    seen = rehearsed(layout)

    data_cut = {"replicate": 1, "full": 4, "hybrid": 2}[parallel.shard]
    cut = parallel.tensor * parallel.pipeline
    experts = whole.experts / parallel.expert / max(1, data_cut // parallel.expert)
    expected = 4 * (experts + (whole.total - whole.experts) / data_cut) / cut
    # The tied embedding is on the first stage alone, and norms and routers are not cut.
    assert seen.peak.parts["parameters"] == pytest.approx(expected, rel=0.25)
    assert seen.peak.parts["optimizer"] == pytest.approx(2 * seen.peak.parts["parameters"], rel=0.02)
    groups = {(collective.name, collective.group) for collective in seen.collectives}
    assert (("all_to_all", "expert") in groups) == (parallel.expert > 1)
    assert (("reduce_scatter", "tensor") in groups) == (parallel.tensor > 1)
    assert (("send", "pipeline") in groups) == (parallel.pipeline > 1)


def test_the_first_stage_keeps_more_micro_batches_than_the_last() -> None:
    first, last = (rehearsed("pp2", rank).peak.parts["activations"] for rank in (0, 4))

    assert first > last


def test_the_command_prints_parts_and_traffic_and_says_what_it_supposed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(TOY), "--layout", "pp2,dp2", "--micro-batch", "1", "--accumulation", "2", "--sequence", "64"]
    assert rehearse_command(arguments) == 0
    printed = capsys.readouterr().out
    assert rehearse_command([*arguments, "--rank", "3", "--json"]) == 0
    [rank] = json.loads(capsys.readouterr().out)["ranks"]

    for words in ("on 4 GPUs: pp2,dp2", "rank 0", "rank 2", "activations", "balanced load", "send"):
        assert words in printed
    assert rank["rank"] == 3 and rank["blocks"] == [[2, 3]]
    assert sum(rank["parts"].values()) == rank["peak"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layout", "pp2"], "--accumulation is 1, and a pipeline of 2"),
        (["--layout", "dp3"], r"training\.batch_size: 16 sequences cannot be divided among 3 data ranks"),
        (["--rank", "1"], "--rank is 1, and there are 1 ranks"),
        (["--micro-batch", "x"], "--micro-batch is 'x', and must be a whole number"),
        (["--layout", "tp3"], r"parallel\.tensor"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], message: str) -> None:
    with pytest.raises((UserError, ConfigError), match=message):
        rehearse_command([str(TOY), *flags])


def test_an_error_on_the_way_is_reported_for_its_rank(capsys: pytest.CaptureFixture[str]) -> None:
    """Forked processes have the patch too."""
    with patch("moe.rehearsal.command.rehearse", side_effect=RuntimeError("boom")):
        assert rehearse_command([str(TOY)]) == 1

    assert "rank 0 failed: RuntimeError: boom" in capsys.readouterr().out
