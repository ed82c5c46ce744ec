"""A process that is killed: all are started again, as torchrun does it, and go on from the last checkpoint."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moe.training import command
from moe.training.loop import Training
from moe.training.metrics import read_metrics

STEPS, KILLED_IN = 6, 5


def arguments(tiny: Path, folder: Path, name: str) -> list[str]:
    return [
        *(str(tiny), "--run.folder", str(folder), "--run.name", name, "--training.steps", str(STEPS)),
        *("--training.checkpoint_every", "2", "--training.evaluate_every", "100"),
        *("--parallel.expert", "2", "--parallel.shard", "full", "--training.batch_size", "4"),
    ]


def worker(flags: list[str]) -> int:
    """Train; in the first launch the second rank is gone in the middle of a step, as a lost machine is."""
    take_step = Training._begin_step

    def step_or_die(training: Training) -> object:
        if training.progress.step + 1 == KILLED_IN and training.world.rank == 1 and os.environ["KILL"] == "yes":
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(training)

    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        os.environ["KILL"] = "no"
    Training._begin_step = step_or_die  # type: ignore[method-assign, assignment]
    status = command.main(flags, Path("unused"))
    if status:
        raise SystemExit(status)
    return status


def launch(flags: list[str], kill: str) -> None:
    os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "KILL": kill, "OMP_NUM_THREADS": "1"}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        monitor_interval=0.05,
    )
    elastic_launch(config, worker)(flags)


def in_a_process(*work: object) -> int | None:
    """The launcher takes signals for itself, so it has a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=launch, args=work)
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
    return process.exitcode


def test_a_run_goes_on_after_a_kill_with_the_numbers_that_it_would_have_had(
    tiny: Path, corpus: object, tmp_path: Path
) -> None:
    assert in_a_process(arguments(tiny, tmp_path, "straight"), "no") == 0
    assert in_a_process(arguments(tiny, tmp_path, "killed"), "yes") == 0

    straight, killed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "killed"))
    losses = [[row["lm_loss"] for row in rows if row["kind"] == "train"] for rows in (straight, killed)]
    assert len(losses[0]) == STEPS
    assert losses[1] == losses[0]
    state = json.loads((tmp_path / "killed" / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
    assert state["step"] == STEPS


def test_a_run_without_a_name_could_not_be_found_again(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")

    assert command.main([str(tiny)], Path("unused")) == 2
    assert capsys.readouterr().err.startswith(
        "run.name: is null, and torchrun --max-restarts goes on with a run by its"
    )


@pytest.mark.parametrize(("rank", "said"), [("0", "toy.yaml: there is no such file"), ("1", "")])
def test_a_mistake_that_every_process_sees_is_said_once(
    rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)

    assert command.main(["nowhere/toy.yaml"], Path("unused")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(said) and all(said in line for line in lines)
