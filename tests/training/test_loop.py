"""The training of a run: what a stop, a bad step, a split batch or a second process must not change."""

import io
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import moe.study
from moe import config_file
from moe.config import RouterConfig
from moe.data.prepare import PreparedCorpus
from moe.errors import UserError
from moe.inference.generate import generate
from moe.model.router import Router
from moe.model.routing import Routing
from moe.parallel.world import World, join_world, leave_world
from moe.study.recording import record_sample
from moe.study.storage import read_record
from moe.training import checkpoint
from moe.training import step as step_module
from moe.training.console import Console
from moe.training.evaluate import validate
from moe.training.loop import Training
from moe.training.metrics import read_metrics
from moe.training.objective import StepCounts
from moe.training.report import write_report
from moe.training.run_folder import RunFolder
from moe.training.step import update_selection_biases

Begin = Callable[..., Training]
Overrides = Mapping[str, object]

HARD: Overrides = {"model.dropout": 0.1, "training.accumulation": 4}
"""what resuming gets wrong most easily"""


@pytest.fixture
def begin(tiny: Path, corpus: PreparedCorpus, tmp_path: Path) -> Begin:
    """A training of 12 steps that reads the whole configuration, with changes; in a folder by name, which may exist."""

    def make(name: str = "run", overrides: Overrides | None = None, resume: bool = False) -> Training:
        texts = {key: json.dumps(value).strip('"') for key, value in (overrides or {}).items()}
        config = config_file.load(tiny, {"run.folder": str(tmp_path), "run.name": name} | texts)
        config = config.with_vocab(corpus.tokenizer.size)
        world = World()
        folder = RunFolder(tmp_path / name) if resume else RunFolder.create(config, "tiny", corpus, world)
        saved = checkpoint.newest(folder.checkpoints_path, print) if resume else None
        console = Console(config.training.steps, every=1, stream=io.StringIO())
        return Training(config, corpus, folder, torch.device("cpu"), world, console, saved)

    return make


def rows(training: Training, kind: str | None = None) -> list[dict[str, Any]]:
    """The metrics of the run without the speed, which no two runs share."""
    found = [row for row in read_metrics(training.run_folder.metrics_path) if kind in (None, row["kind"])]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in found]


def weights(training: Training) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}


def said(training: Training) -> str:
    return training.console._stream.getvalue()


def send_in_the_middle_of(training: Training, step: int, number: signal.Signals, validating: bool = False) -> None:
    """A signal to this process during a forward pass of step ``step`` (from 1), or of the validation before it."""

    def send(*_: object) -> None:
        if computed(training) == step and training.model.training is not validating:
            handle.remove()
            os.kill(os.getpid(), number)

    handle = training.model.blocks[1].register_forward_hook(send)


def poison_gradient(training: Training, steps: range | list[int], value: float = math.nan) -> None:
    """Put ``value`` into the gradient of one matrix in these steps (from 1)."""
    matrix = training.model.blocks[0].attention.query.weight
    matrix.register_hook(lambda gradient: gradient + value if computed(training) in steps else gradient)


def computed(training: Training) -> int:
    """The step (from 1) that is being computed, or would be next."""
    return training.progress.step + len(training._in_flight) + 1


# -------------------------------------------------------------------------------------------------------- stop, resume


NO_AUXILIARY: Overrides = {"model.balance.load_balance": 0, "model.balance.z_loss": 0}
SIGN: Overrides = NO_AUXILIARY | {"model.router.selection_bias": "sign", "model.router.bias_rate": 0.01}
QUANTILE: Overrides = NO_AUXILIARY | {"model.router.selection_bias": "quantile"}
REMOE: Overrides = NO_AUXILIARY | {
    "model.router.selection": "positive",
    "model.router.score": "relu",
    "model.router.normalise": False,
    "model.balance.sparsity": 1e-8,
}


@pytest.mark.parametrize(
    "router",
    [SIGN | {"model.router.jitter": 0.1}, QUANTILE, REMOE, {"model.router.noise": "shazeer"}],
    ids=["sign and jitter", "quantile", "remoe", "shazeer"],
)
def test_what_balances_is_resumed_to_the_bit(begin: Begin, router: Overrides) -> None:
    """Biases come back with the weights, the coefficient of the sparsity loss with the progress; noise has no state."""
    straight = begin("straight", HARD | router)
    straight.run()
    stopped = begin("stopped", HARD | router)
    send_in_the_middle_of(stopped, 4, signal.SIGTERM)
    assert not stopped.run()
    resumed = begin("stopped", HARD | router, resume=True)
    assert resumed.run()

    assert rows(resumed) == rows(straight)
    assert resumed.progress.sparsity_coefficient == straight.progress.sparsity_coefficient
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, straight.model.state_dict()[name]), name


@pytest.mark.parametrize("stops", [(4, 7), (5, 10), (1, 11)], ids=str)
def test_stopped_and_resumed_twice_is_straight(begin: Begin, stops: tuple[int, int]) -> None:
    """To the bit: with accumulation and dropout, across an epoch of a domain and a validation; a stop may come right
    where a validation is due."""
    straight = begin("straight", HARD)
    assert straight.run()

    for sitting, (stop, number) in enumerate(zip(stops, (signal.SIGTERM, signal.SIGINT), strict=True)):
        stopped = begin("stopped", HARD, resume=sitting > 0)
        send_in_the_middle_of(stopped, stop, number)
        assert not stopped.run()
        assert stopped.progress.step == stop
        assert checkpoint.newest(stopped.run_folder.checkpoints_path, print).step == stop
    resumed = begin("stopped", HARD, resume=True)
    assert resumed.run()

    assert straight.batches.epochs(12)["lists"] > 1 > straight.batches.epochs(4)["lists"]
    assert [row["step"] for row in rows(straight, "validation")] == [5, 10, 12]
    assert rows(resumed) == rows(straight)
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(resumed).items())
    assert resumed.progress.tokens == straight.progress.tokens == 12 * 8 * 16


def test_a_stop_during_a_validation_is_at_once_and_leaves_it_to_the_next_sitting(begin: Begin) -> None:
    straight, stopped = begin("straight", HARD), begin("stopped", HARD)
    straight.run()
    send_in_the_middle_of(stopped, 6, signal.SIGTERM, validating=True)

    assert not stopped.run()
    assert (stopped.progress.step, rows(stopped, "validation")) == (5, [])
    resumed = begin("stopped", HARD, resume=True)
    assert resumed.run()

    assert rows(resumed) == rows(straight)


def test_a_stop_after_the_last_step_leaves_the_validation_to_the_next_sitting(begin: Begin) -> None:
    straight, stopped = begin("straight"), begin("stopped")
    straight.run()
    send_in_the_middle_of(stopped, 12, signal.SIGTERM)

    assert not stopped.run()
    resumed = begin("stopped", resume=True)
    assert resumed.run()

    assert resumed.validation.domains == straight.validation.domains
    assert rows(resumed) == rows(straight)


def test_a_finished_run_that_is_resumed_validates_again_and_logs_nothing(begin: Begin) -> None:
    first = begin()
    first.run()
    logged = first.run_folder.metrics_path.read_bytes()

    again = begin(resume=True)
    assert again.run()

    assert again.validation.domains == first.validation.domains
    assert again.run_folder.metrics_path.read_bytes() == logged


def test_a_longer_run_goes_on_where_a_shorter_one_ended(begin: Begin) -> None:
    """With a learning rate that does not depend on the length."""
    constant = {"training.schedule.shape": "constant"}
    straight = begin("straight", constant | {"training.steps": 9})
    straight.run()
    begin("short", constant | {"training.steps": 6}).run()
    longer = begin("short", constant | {"training.steps": 9}, resume=True)
    longer.run()

    assert rows(longer, "train") == rows(straight, "train")


@pytest.mark.parametrize("poisoned", [[], [3, 5, 12]], ids=["good", "three steps bad"])
def test_numbers_that_are_read_a_step_late_are_the_same(begin: Begin, poisoned: list[int]) -> None:
    """As on a GPU, which computes the next step meanwhile: same rows, weights and checkpoints, stopped on the way."""
    often = HARD | {"training.checkpoint_every": 4, "training.keep_checkpoints": 9}
    straight = begin("straight", often)
    poison_gradient(straight, poisoned)
    assert straight.run()

    late = begin("late", often)
    ahead = []
    launch = late._launch_step
    late._launch_step = lambda: (launch(), ahead.append(len(late._in_flight)))
    late._steps_ahead = 1
    poison_gradient(late, poisoned)
    send_in_the_middle_of(late, 7, signal.SIGTERM)
    assert not late.run()
    late = begin("late", often, resume=True)
    late._steps_ahead = 1
    poison_gradient(late, poisoned)
    assert late.run()

    assert max(ahead) == 2
    assert rows(late) == rows(straight)
    assert asdict(late.progress) | {"seconds": 0} == asdict(straight.progress) | {"seconds": 0}
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(late).items())
    steps = [checkpoint.newest(run.run_folder.checkpoints_path, print).step for run in (late, straight)]
    assert steps == [12, 12]
    folders = {path.name for path in straight.run_folder.checkpoints_path.iterdir()}
    assert folders <= {path.name for path in late.run_folder.checkpoints_path.iterdir()}


def test_ten_bad_steps_end_a_run_that_reads_late(begin: Begin) -> None:
    training = begin()
    training._steps_ahead = 1
    poison_gradient(training, range(1, 13))

    with pytest.raises(UserError, match=r"10 steps in a row .*; there is no checkpoint"):
        training.run()


def test_checkpoints_come_when_they_are_due(begin: Begin) -> None:
    training = begin(overrides={"training.checkpoint_every": 3, "training.keep_checkpoints": 3, "training.steps": 11})
    training.run()

    kept = sorted(path.name for path in training.run_folder.checkpoints_path.iterdir())
    assert kept == ["step-00000006", "step-00000009", "step-00000011"]


@pytest.mark.parametrize("deterministic", [False, True])
def test_trained_twice_is_trained_once(begin: Begin, deterministic: bool) -> None:
    first, second = (begin(name, {**HARD, "model.deterministic": deterministic}) for name in ("first", "second"))
    for training in (first, second):
        for _ in range(3):
            training.take_step()

    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(second).items())


def test_the_random_numbers_of_the_process_do_not_matter(begin: Begin) -> None:
    """Dropout is a function of the seed, the step and the rows."""
    first, second = begin("first", HARD), begin("second", HARD)
    torch.manual_seed(7)
    first.take_step()
    torch.manual_seed(8)
    second.take_step()

    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(second).items())


# ------------------------------------------------------------------------------------------------------------ bad steps


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, where: str, value: float
) -> None:
    training = begin()
    training.take_step()  # so that the optimizer has a state
    before = weights(training)
    state = {name: values.clone() for name, values in optimizer_state(training).items()}
    if where == "gradient":
        poison_gradient(training, [1], value)
    else:
        real = step_module.model_loss
        monkeypatch.setattr(step_module, "model_loss", lambda *arguments: real(*arguments) * value)

    step = training.take_step()

    assert step.skipped
    assert not math.isfinite(step.losses["lm_loss"] if where == "loss" else step.gradient_norm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(training).items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in optimizer_state(training).items())
    assert all(parameter.grad is None for parameter in training.model.parameters())


def optimizer_state(training: Training) -> dict[str, Tensor]:
    states = training.optimizer.state_dict()["state"]
    return {f"{index}/{kind}": tensor for index, state in states.items() for kind, tensor in state.items()}


def test_skipped_steps_are_counted_logged_and_said(begin: Begin) -> None:
    training = begin(overrides={"training.steps": 14})
    poison_gradient(training, [2, *range(4, 13)])  # nine in a row are not yet too many

    assert training.run()

    assert training.progress.skipped == 10
    assert training.progress.skipped_in_a_row == 0
    train = rows(training, "train")
    assert [row["skipped"] for row in train] == [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10]
    assert [math.isnan(row["gradient_norm"]) for row in train] == [step in (2, *range(4, 13)) for step in range(1, 15)]
    assert "step 2 skipped: its loss or gradient is not finite\n" in said(training)
    assert said(training).count("skipped") == 10


def test_ten_bad_steps_in_a_row_end_the_run_and_keep_a_good_checkpoint(begin: Begin) -> None:
    often = {"training.checkpoint_every": 2, "training.steps": 20}
    straight = begin("straight", often)
    straight.run()
    training = begin("poisoned", often)
    poison_gradient(training, range(6, 20))

    with pytest.raises(UserError, match=r"10 steps in a row .* not finite; the checkpoint of step 4 is kept: lower"):
        training.run()

    assert training.progress.step == 15
    kept = checkpoint.newest(training.run_folder.checkpoints_path, print)
    assert kept.step == 4
    assert kept.progress["skipped"] == 0
    resumed = begin("poisoned", often, resume=True)  # the poison is gone
    assert resumed.run()
    assert rows(resumed, "train") == rows(straight, "train")


def test_a_run_whose_last_step_is_bad_is_saved_with_the_weights_it_had(begin: Begin) -> None:
    training = begin()
    poison_gradient(training, [12])

    assert training.run()

    saved = checkpoint.newest(training.run_folder.checkpoints_path, print)
    assert (saved.step, saved.progress["skipped_in_a_row"]) == (12, 1)


def test_bad_from_the_first_step_there_is_no_checkpoint_to_name(begin: Begin) -> None:
    training = begin()
    poison_gradient(training, range(1, 13))

    with pytest.raises(UserError, match=r"10 steps in a row .*; there is no checkpoint: lower training.optimizer.lr"):
        training.run()


# --------------------------------------------------------------------------------------------------------- one gradient


def gradients_of_a_step(training: Training) -> dict[str, Tensor]:
    """What the optimizer gets, clipped."""
    found: dict[str, Tensor] = {}
    names = training.model.named_parameters
    training.optimizer.register_step_pre_hook(lambda *_: found.update((n, p.grad.clone()) for n, p in names()))
    training.take_step()
    return found


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_micro_batches_add_up_to_the_batch(begin: Begin, accumulation: int) -> None:
    whole = gradients_of_a_step(begin("whole", NO_AUXILIARY))
    parts = gradients_of_a_step(begin("parts", NO_AUXILIARY | {"training.accumulation": accumulation}))

    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_the_coefficient_of_a_loss_does_not_grow_with_accumulation(begin: Begin, scope: str) -> None:
    """The mean over four micro-batches of what each adds, not the sum: a factor of four would show."""
    overrides = {"model.balance.load_balance": 1.0, "model.balance.scope": scope}
    one = begin("one", overrides).take_step()
    four = begin("four", overrides | {"training.accumulation": 4}).take_step()

    assert 1 < one.losses["load_balance"] < 2
    assert four.losses["load_balance"] == pytest.approx(one.losses["load_balance"], rel=0.2)
    assert four.losses["z_loss"] == pytest.approx(one.losses["z_loss"], rel=1e-5)
    assert four.gradient_norm == pytest.approx(one.gradient_norm, rel=0.1)
    assert torch.equal(four.counts, one.counts)


def test_clipping_limits_the_gradient_and_reports_its_norm_before(begin: Begin) -> None:
    whole = gradients_of_a_step(begin("free", {"training.optimizer.clip": None}))
    small = gradients_of_a_step(begin("clipped", {"training.optimizer.clip": 0.01}))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in whole.values()))
    reported = begin("reported", {"training.optimizer.clip": 0.01}).take_step().gradient_norm

    assert reported == pytest.approx(norm, rel=1e-5)
    assert norm > 0.1
    for name, gradient in small.items():
        torch.testing.assert_close(gradient, whole[name] * 0.01 / norm, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("router", [{}, SIGN, QUANTILE, REMOE], ids=["softmax", "sign", "quantile", "remoe"])
@pytest.mark.parametrize("part", ["attention", "experts", "block"])
def test_recomputing_activations_changes_no_number(begin: Begin, router: Overrides, part: str) -> None:
    """Nor any bias: an assignment that was counted twice would move it twice."""
    settings = HARD | router | {"training.steps": 4}
    plain = begin("plain", settings)
    plain.run()
    recomputing = begin("recomputing", settings | {"training.activation_checkpointing": part})
    assert recomputing.model.activation_checkpointing == part
    recomputing.run()

    assert rows(recomputing) == rows(plain)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(recomputing.model.state_dict()[name], tensor), name


def test_captured_blocks_train_as_plain_ones(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile captures of a mixture, forward and backward, run without the minute of generating code."""
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile_block(block, backend="aot_eager"))
    assert_same_two_steps(begin, {})


def test_a_validation_compiles_nothing(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches have other shapes than those of training, and the last of a domain another one yet."""
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile_block(block, backend="eager"))
    training = begin(overrides={"training.compile": True})
    training.take_step()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    validate(training.model, training.corpus, 16, 8, "fp32")

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0


def test_compiled_blocks_train_as_plain_ones(begin: Begin) -> None:
    assert_same_two_steps(begin, {"model.n_layers": 1, "model.dense_twin": True})


def assert_same_two_steps(begin: Begin, overrides: Overrides) -> None:
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    plain, compiled = begin("plain", overrides), begin("compiled", overrides | {"training.compile": True})
    expected, actual = [[training.take_step() for _ in range(2)] for training in (plain, compiled)]

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    for one, other in zip(actual, expected, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=1e-5)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)
        assert one.skipped is other.skipped is False


def test_bf16_stays_close_to_fp32(begin: Begin) -> None:
    full, half = begin("full"), begin("half", {"training.precision": "bf16"})
    full.run()
    half.run()

    losses = [[row["lm_loss"] for row in rows(training, "train")] for training in (full, half)]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert half.validation.pooled.bits_per_byte == pytest.approx(full.validation.pooled.bits_per_byte, rel=5e-3)


BF16: Overrides = {"training.precision": "bf16", "training.weight_dtype": "bf16"}
MUON: Overrides = {"training.optimizer.name": "muon"}


def test_weights_in_bf16_stay_close_to_fp32(begin: Begin) -> None:
    """And what decides where a token goes, and the gains, stay in float32."""
    full, half = begin("full"), begin("half", BF16)
    full.run()
    half.run()

    losses = [[row["lm_loss"] for row in rows(training, "train")] for training in (full, half)]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert half.validation.pooled.bits_per_byte == pytest.approx(full.validation.pooled.bits_per_byte, rel=1e-2)
    in_float32 = {name for name, weight in half.model.named_parameters() if weight.dtype == torch.float32}
    assert in_float32 == {
        name for name, _ in half.model.named_parameters() if name.endswith("norm.weight") or ".router." in name
    }
    state = half.optimizer.state_dict()["state"]
    assert {value.dtype for values in state.values() for value in values.values()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("settings", [BF16, MUON, BF16 | MUON], ids=["bf16", "muon", "both"])
def test_other_optimizers_are_resumed_to_the_bit(begin: Begin, settings: Overrides) -> None:
    """Rounding by chance draws nothing that would have to be saved; a bad step on the way counts for nothing."""
    settings = HARD | settings
    straight = begin("straight", settings)
    poison_gradient(straight, [3])
    straight.run()
    stopped = begin("stopped", settings)
    poison_gradient(stopped, [3])
    send_in_the_middle_of(stopped, 5, signal.SIGTERM)
    assert not stopped.run()
    resumed = begin("stopped", settings, resume=True)
    assert resumed.run()

    assert straight.progress.skipped == 1
    assert rows(resumed) == rows(straight)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, straight.model.state_dict()[name]), name
    assert all(torch.equal(t, optimizer_state(straight)[name]) for name, t in optimizer_state(resumed).items())


def test_a_run_in_bf16_is_studied_and_continued_in_float32(begin: Begin) -> None:
    """What the checkpoint holds is widened, which changes no number; text and records come of it as of any run."""
    training = begin("half", BF16 | {"training.steps": 4})
    training.run()

    model = training.run_folder.load_model()

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, weight in training.model.named_parameters():
        assert torch.equal(model.get_parameter(name), weight.float()), name
    assert len(generate(model, [[1, 2, 3]], 4)[0]) == 4
    assert len(generate(training.model, [[1, 2, 3], [4]], 4)[0]) == 4
    study = moe.study.load(training.run_folder.path, say=lambda line: None)
    assert study.final.n_tokens > 0


def test_a_run_in_bf16_writes_records_and_its_report(begin: Begin) -> None:
    training = begin("half", BF16 | {"training.steps": 4, "training.record_every": 2})
    training.recorder = record_sample
    training.run()

    assert "bits/byte" in write_report(training)
    assert sorted(path.name for path in training.run_folder.records_path.iterdir()) == [
        f"step-{step:08d}" for step in (0, 2, 4)
    ]


@pytest.mark.parametrize("clip", [None, 0.05])
def test_muon_lowers_the_loss(begin: Begin, clip: float | None) -> None:
    training = begin(overrides=MUON | {"training.steps": 40, "training.optimizer.clip": clip})
    training.run()

    losses = [row["lm_loss"] for row in rows(training, "train")]
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_falls(begin: Begin) -> None:
    """From nearly that of a uniform guess."""
    training = begin(overrides={"training.steps": 60, "training.optimizer.lr": 0.01})
    training.run()

    losses = [row["lm_loss"] for row in rows(training, "train")]
    assert losses[0] == pytest.approx(math.log(320), rel=0.05)
    assert losses[-1] < 0.75 * losses[0]


# -------------------------------------------------------------------------------------------------- selection biases


def biases(training: Training) -> list[Tensor]:
    return [router.selection_bias.clone() for router in training.step_on.routers]


def test_a_step_moves_every_bias_by_the_sign_of_its_layers_error(begin: Begin) -> None:
    training = begin(overrides=SIGN | {"training.accumulation": 4})

    counts = training.take_step().counts

    fair = counts.sum(1, keepdim=True) / 4
    expected = [
        [0.01 if c < f else -0.01 if c > f else 0.0 for c in row] for row, f in zip(counts.tolist(), fair, strict=True)
    ]
    assert len(expected) == 2
    for bias, row in zip(biases(training), expected, strict=True):
        assert bias.tolist() == pytest.approx(row)
    assert any(any(row) for row in expected)


@pytest.mark.parametrize("router", [SIGN, QUANTILE], ids=["sign", "quantile"])
@pytest.mark.parametrize("accumulation", [2, 8])
def test_one_update_a_step_however_the_batch_is_cut(begin: Begin, router: Overrides, accumulation: int) -> None:
    """To rounding where the logits decide, to the bit where the counts do."""
    whole, parts = begin("whole", router), begin("parts", router | {"training.accumulation": accumulation})
    whole.take_step()
    parts.take_step()

    for one, other in zip(biases(parts), biases(whole), strict=True):
        assert other.ne(0).any()
        torch.testing.assert_close(one, other, rtol=0, atol=0 if router is SIGN else 1e-6)


@pytest.mark.parametrize("router", [SIGN, QUANTILE], ids=["sign", "quantile"])
def test_a_validation_moves_no_bias(begin: Begin, router: Overrides) -> None:
    training = begin(overrides=router)
    training.take_step()
    before = biases(training)

    validate(training.model, training.corpus, 16, 8, "fp32")

    assert all(bias.ne(0).any() for bias in before)
    assert all(torch.equal(now, then) for now, then in zip(biases(training), before, strict=True))


@pytest.mark.parametrize("router", [SIGN, QUANTILE, REMOE], ids=["sign", "quantile", "remoe"])
def test_a_step_that_is_not_finite_moves_no_bias_and_no_coefficient(begin: Begin, router: Overrides) -> None:
    training = begin(overrides=router)
    training.take_step()
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    coefficient = training.progress.sparsity_coefficient
    poison_gradient(training, [1])

    assert training.take_step().skipped

    assert all(torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items())
    assert training.progress.sparsity_coefficient == coefficient


def test_a_layer_without_a_bias_does_not_keep_later_layers_from_theirs() -> None:
    config = RouterConfig(top_k=1, normalise=False)
    plain, biased = (Router(replace(config, selection_bias=rule), d_model=8, n_experts=4) for rule in ("none", "sign"))
    scores = torch.eye(4)[:1]
    routing = Routing(scores, scores, torch.tensor([[0]]), torch.ones(1, 1))
    counts = StepCounts(World())
    counts.add([routing, routing])

    update_selection_biases([plain, biased], counts)

    assert plain.selection_bias is None
    assert biased.selection_bias.tolist() == pytest.approx([-0.001, 0.001, 0.001, 0.001])


def test_a_quantile_evens_out_a_skewed_load(begin: Begin) -> None:
    """Routers that are made to like expert 0, and weights that hardly learn: what evens the load is the bias alone."""

    def busiest(name: str, router: Overrides) -> float:
        """Largest load over the fair share in the last 10 of 40 steps, the mean over steps and layers."""
        training = begin(
            name, router | {"model.router.bias": True, "training.steps": 40, "training.optimizer.lr": 1e-6}
        )
        with torch.no_grad():
            for own in training.step_on.routers:
                own.bias[0] += 3.0
        loads = []
        for _ in range(40):
            loads += [summary.max_over_fair for summary in training.take_step().load]
            training.progress.step += 1
        return sum(loads[-20:]) / 20

    assert busiest("none", NO_AUXILIARY) > 1.9  # a favourite of all is one of two choices: half of the load, not 1/4
    assert busiest("quantile", QUANTILE) < 1.3


# ------------------------------------------------------------------------------------------------------------ sparsity


def test_the_coefficient_follows_the_share_of_gates_that_are_on(begin: Begin) -> None:
    """Two layers of 128 tokens and four experts; with k = 2 half of the 1024 gates shall be on. A step trains with the
    coefficient that the steps before have left."""
    training = begin(overrides=REMOE | {"training.accumulation": 2, "training.steps": 6})
    coefficient = 1e-8
    for _ in range(6):
        step = training.take_step()
        training.progress.step += 1
        on = int(step.counts.sum())
        assert step.losses["sparsity/coefficient"] == coefficient
        assert step.losses["sparsity/off"] == pytest.approx(1 - on / 1024)
        coefficient = coefficient * 1.2 if on > 512 else coefficient / 1.2 if on < 512 else coefficient
        assert training.progress.sparsity_coefficient == coefficient
    assert coefficient != 1e-8


def test_a_large_coefficient_closes_gates(begin: Begin) -> None:
    """Down from most of them, to the target and near it."""
    training = begin(
        overrides=REMOE
        | {"model.balance.sparsity": 0.01, "training.steps": 60, "model.router.top_k": 1, "training.optimizer.lr": 0.01}
    )
    training.run()

    off = [row["sparsity/off"] for row in rows(training, "train")]
    assert off[0] < 0.6
    assert max(off) > 0.7


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_log_has_the_experts_that_a_token_used(begin: Begin) -> None:
    """Gates that are open: every assignment is to an MLP, so the gates on over all gates times four experts."""
    training = begin(overrides=REMOE | {"training.accumulation": 2})
    training.run()

    for row in rows(training, "train"):
        used = row["load/0/mlps_per_token"] + row["load/1/mlps_per_token"]
        assert used == pytest.approx(2 * 4 * (1 - row["sparsity/off"]))


LOAD = [f"load/{layer}/{name}" for layer in (0, 1) for name in ("max_over_fair", "min_over_fair", "dead", "entropy")]
LOAD += [f"load/{layer}/{name}" for layer in (0, 1) for name in ("dropped", "mlps_per_token")]


def test_a_row_has_these_numbers_and_no_others(begin: Begin) -> None:
    training = begin()
    training.run()

    [train, *_] = read_metrics(training.run_folder.metrics_path)
    steps = ["step", "kind", "lm_loss", "gradient_norm", "learning_rate", "tokens", "skipped", "tokens_per_second"]
    losses = ["load_balance", "load_balance/common", "z_loss", "z_loss/common"]
    assert sorted(train) == sorted([*steps, *losses, *LOAD])
    [validation, *_] = rows(training, "validation")
    assert sorted(validation) == sorted(
        ["step", "kind", "cross_entropy", "bits_per_byte", "bits_per_byte/prose", "bits_per_byte/lists", *LOAD]
    )


def test_the_logged_loss_is_the_cross_entropy_and_nothing_else(begin: Begin) -> None:
    training = begin(overrides={"model.balance.load_balance": 5.0, "model.balance.z_loss": 5.0})
    batch = training.batches.batch(0)
    with torch.no_grad():
        logits, routings = training.model(batch.tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    step = training.take_step()

    assert step.losses["lm_loss"] == pytest.approx(float(expected), rel=1e-6)
    assert step.counts.tolist() == [torch.bincount(r.selected.flatten(), minlength=4).tolist() for r in routings]
    mean_z = sum(float(routing.logits.logsumexp(-1).square().mean()) for routing in routings) / 2
    assert step.losses["z_loss"] == pytest.approx(mean_z, rel=1e-5)
    assert step.losses["z_loss/common"] == pytest.approx(mean_z / math.log(4) ** 2, rel=1e-5)
    assert step.losses["load_balance/common"] == step.losses["load_balance"]


def test_the_logged_learning_rate_is_the_optimizers(begin: Begin) -> None:
    """Warm-up over two steps to 0.003, the second half of the twelve falling to nothing."""
    training = begin(overrides={"training.optimizer.lr": 0.003})
    training.run()

    rates = [row["learning_rate"] for row in rows(training, "train")]
    assert rates == pytest.approx([0.0015, *[0.003] * 6, *[0.003 * left / 6 for left in (5, 4, 3, 2, 1)]])
    assert {group["lr"] for group in training.optimizer.param_groups} == {rates[-1]}


def test_the_dense_twin_trains_without_a_load(begin: Begin) -> None:
    training = begin(overrides={"model.dense_twin": True})
    assert training.run()

    [train, *_] = rows(training, "train")
    assert sorted(train) == ["gradient_norm", "kind", "learning_rate", "lm_loss", "skipped", "step", "tokens"]
    assert training.validation.counts is None


# -------------------------------------------------------------------------------------------------------- two processes

ON_RANKS: Overrides = {
    "model.balance.scope": "global_batch",
    "model.balance.load_balance": 0.1,
    "model.balance.z_loss": 0.01,
    "training.steps": 4,
    "training.optimizer.eps": 1e-3,  # else Adam makes a whole step out of a gradient that is rounding error
}


def together(work: Callable[[World], Any], folder: Path) -> list[Any]:
    """What ``work`` returns in each of two processes that have joined over gloo."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_member, args=(work, folder, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _member(work: Callable[[World], Any], folder: Path, rank: int) -> None:
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    torch.save(work(join_world(torch.device("cpu"))), folder / f"{rank}.pt")
    leave_world()


@pytest.mark.parametrize("poisoned", [[], [2]], ids=["good", "one step bad on one rank"])
def test_two_ranks_are_one_process(begin: Begin, tmp_path: Path, poisoned: list[int]) -> None:
    def work(world: World) -> dict[str, Any]:
        training = begin("apart", ON_RANKS)
        if world.rank == world.size - 1:
            poison_gradient(training, poisoned)
        assert training.run()
        return {"weights": weights(training), "skipped": training.progress.skipped}

    first, second = together(work, tmp_path)
    apart = rows(begin("apart", ON_RANKS, resume=True))
    (tmp_path / "apart").rename(tmp_path / "there")
    alone = work(World())

    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert first["skipped"] == second["skipped"] == len(poisoned)
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-6)
    expected = rows(begin("apart", ON_RANKS, resume=True))
    assert len(apart) == len(expected) == 5
    for row, reference in zip(apart, expected, strict=True):
        assert row == {
            name: pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True) if isinstance(value, float) else value
            for name, value in reference.items()
        }


def test_a_signal_to_one_rank_stops_both_after_the_same_step(begin: Begin, tmp_path: Path) -> None:
    def work(world: World) -> list[bool | int]:
        training = begin(overrides=ON_RANKS)
        if world.rank == 1:
            send_in_the_middle_of(training, 2, signal.SIGTERM)
        return [training.run(), training.progress.step, training.saved_step]

    first, second = together(work, tmp_path)

    assert first == second == [False, 2, 2]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints", print).step == 2


def test_a_batch_that_the_ranks_cannot_share_is_refused(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "__init__", lambda world: world.__dict__.update(rank=0, size=3))

    with pytest.raises(UserError, match=r"training.batch_size: 8 sequences cannot be divided among 3 ranks"):
        begin()


# ------------------------------------------------------------------------------------------------------ routing records


def test_records_are_written_at_the_first_step_every_few_and_the_last(begin: Begin) -> None:
    training = begin("run", {"training.record_every": 5})
    written: list[int] = []
    training.recorder = lambda model, corpus, records, step, **settings: written.append(step)

    training.run()

    assert written == [0, 5, 10, 12]


def test_recording_leaves_training_as_it_is(begin: Begin) -> None:
    """To the bit, dropout and noise included; the records are what a straight look at the model gives."""
    plain = begin("plain", {"model.dropout": 0.1, "model.router.jitter": 0.1})
    recorded = begin("recorded", {"model.dropout": 0.1, "model.router.jitter": 0.1, "training.record_every": 4})
    recorded.recorder = partial(record_sample, tokens=64)

    plain.run()
    recorded.run()

    assert rows(recorded) == rows(plain)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(recorded).items())
    folders = sorted(path.name for path in recorded.run_folder.records_path.iterdir())
    assert folders == ["step-00000000", "step-00000004", "step-00000008", "step-00000012"]
    last = read_record(recorded.run_folder.records_path / folders[-1])
    assert last.step == 12
    assert last.n_tokens > 0
