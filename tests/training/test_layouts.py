"""The whole command under layouts: begun on one, gone on with on others, a run has the numbers of one process."""

import json
import multiprocessing
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe.study.recording import record_sample
from moe.training import command
from moe.training.metrics import read_metrics

FLAGS = {
    "model.balance.scope": "global_batch",
    "model.router.selection_bias": "sign",
    "model.balance.load_balance": "0.1",
    "training.optimizer.eps": "1e-3",  # else Adam makes a whole step out of a gradient that is rounding error
    "training.schedule.shape": "constant",
    "training.batch_size": "4",
    "training.record_every": "3",
    "training.evaluate_every": "3",
}


def train(size: int, arguments: list[str], folder: Path) -> list[int]:
    """The command in ``size`` processes; their exit statuses."""
    meeting = folder / f"meeting-{len(list(folder.glob('meeting*')))}"
    meeting.touch()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_member, args=(rank, size, arguments, meeting)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def _member(rank: int, size: int, arguments: list[str], meeting: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timeout)
    status = command.main(arguments, Path("unused"), recorder=record_sample)
    raise SystemExit(status)


def flags_of(settings: dict[str, str]) -> list[str]:
    return [text for key, value in settings.items() for text in (f"--{key}", value)]


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    skip = ("tokens_per_second",)
    return [
        {name: value for name, value in row.items() if name not in skip}
        for row in read_metrics(run / "metrics.jsonl")
        if row["kind"] == kind
    ]


def test_a_run_that_changes_its_layout_has_the_numbers_of_one_process(
    tiny: Path, corpus: object, tmp_path: Path
) -> None:
    """Three steps on two ranks with spread experts, three with every matrix cut, three alone."""

    def begin(name: str, settings: dict[str, str]) -> list[str]:
        return [str(tiny), *flags_of(FLAGS | {"run.folder": str(tmp_path), "run.name": name} | settings)]

    def go_on(settings: dict[str, str]) -> list[str]:
        return ["--resume", str(tmp_path / "changing"), *flags_of(settings)]

    assert command.main(begin("straight", {"training.steps": "9"}), Path("unused"), recorder=record_sample) == 0
    spread = {"parallel.expert": "2", "parallel.shard": "full"}
    assert train(2, begin("changing", {"training.steps": "3"} | spread), tmp_path) == [0, 0]
    cut = {"parallel.expert": "1", "parallel.shard": "replicate", "parallel.tensor": "2"}
    assert train(2, go_on({"training.steps": "6"} | cut), tmp_path) == [0, 0]
    assert command.main(go_on({"training.steps": "9", "parallel.tensor": "1"}), Path("unused")) == 0

    for kind, n_rows in (("train", 9), ("validation", 3)):
        straight, changing = rows(tmp_path / "straight", kind), rows(tmp_path / "changing", kind)
        assert len(straight) == len(changing) == n_rows
        for mine, theirs in zip(changing, straight, strict=True):
            assert mine == {
                name: pytest.approx(value, rel=2e-5, abs=1e-6) if isinstance(value, float) else value
                for name, value in theirs.items()
            }
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("straight", "changing")]
    assert summaries[0]["active_parameters"] == summaries[1]["active_parameters"]
    assert len(list((tmp_path / "changing" / "records").iterdir())) == 3


def test_a_run_through_a_pipeline_has_the_numbers_of_one_process(tiny: Path, corpus: object, tmp_path: Path) -> None:
    """As many micro-batches as the pipeline needs, tied embeddings, validation and records; gone on with alone."""

    def begin(name: str, settings: dict[str, str]) -> list[str]:
        return [str(tiny), *flags_of(FLAGS | {"run.folder": str(tmp_path), "run.name": name} | settings)]

    alone = {"training.steps": "6", "training.accumulation": "2"}
    assert command.main(begin("straight", alone), Path("unused"), recorder=record_sample) == 0
    assert train(2, begin("pipeline", {"training.steps": "3", "parallel.pipeline": "2"}), tmp_path) == [0, 0]
    on = ["--resume", str(tmp_path / "pipeline"), "--training.steps", "6", "--parallel.pipeline", "1"]
    assert command.main(on, Path("unused"), recorder=record_sample) == 0

    for kind, n_rows in (("train", 6), ("validation", 2)):
        straight, through = rows(tmp_path / "straight", kind), rows(tmp_path / "pipeline", kind)
        assert len(straight) == len(through) == n_rows
        for mine, theirs in zip(through, straight, strict=True):
            assert mine == {
                name: pytest.approx(value, rel=2e-5, abs=1e-6) if isinstance(value, float) else value
                for name, value in theirs.items()
            }
    assert len(list((tmp_path / "pipeline" / "records").iterdir())) == 3


def test_what_the_processes_cannot_share_is_said_once(tiny: Path, tmp_path: Path, capfd: Any) -> None:
    arguments = [str(tiny), "--run.folder", str(tmp_path), "--run.name", "x", "--parallel.pipeline", "1"]
    wrong = [*arguments, "--parallel.data", "3"]

    assert train(2, wrong, tmp_path) == [2, 2]
    assert capfd.readouterr().err.splitlines() == [
        "parallel.data: is 3, and pipeline 1 x tensor 1 x data 3 is 3, but there are 2 processes; "
        "give torchrun as many (--nproc-per-node), or leave data null"
    ]
