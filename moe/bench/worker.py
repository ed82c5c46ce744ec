"""The process of one contestant: it does what it is told on standard input, one line of JSON at a time, and answers so.

``python -m moe.bench.worker '{"bench": "step", "contestant": "dense twin", ...}'``, started by :mod:`moe.bench.rounds`.
Whatever a library prints goes to standard error, so that answers stay alone on standard output.
"""

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch

from moe.bench.agreement import UnfitError
from moe.bench.contestants import Contestant, contestants
from moe.bench.decode import DecodeCell, DecodeTask
from moe.bench.layer import DenseTask, LayerCell, LayerTask
from moe.bench.measure import release
from moe.bench.step import StepCell, StepTask
from moe.errors import UserError
from moe.training.machine import keep_freed_memory, use_fastest_float32

FALL_BACK = "experts fall back"
"""how the warning begins with which a back-end that cannot run here gives way to the loop: to time that under its name
would mislead, so that here it is an error"""


class Task(Protocol):
    """What a contestant does in one cell."""

    def prepare(self) -> dict[str, Any]:
        """Build, check and measure memory."""

    def turn(self, number: int) -> list[float] | dict[str, list[float]]:
        """Seconds of each repetition of one turn."""


def make_task(bench: str, contestant: Contestant, cell: dict[str, Any], device: torch.device, folder: Path) -> Task:
    """The task of a contestant in a cell, which is given as its fields."""
    if bench == "layer":
        if contestant.bound:
            return DenseTask(LayerCell(**cell), device)
        return LayerTask(contestant.build, LayerCell(**cell), device, folder, low_precision=contestant.low_precision)
    if bench == "step":
        return StepTask(
            contestant.build,
            StepCell(**cell),
            device,
            folder,
            dense_twin=contestant.dense_twin,
            low_precision=contestant.low_precision,
        )
    return DecodeTask(contestant.build, DecodeCell(**cell), device, folder)


def answer(request: dict[str, Any], tasks: dict[str, Task], start: Any, warm: Any) -> dict[str, Any]:
    """Carry out one request: compile for a cell, prepare it, take a turn in it, or drop it."""
    key = json.dumps(request["cell"], sort_keys=True)
    if request["do"] in ("warm", "prepare"):
        if key not in tasks:
            tasks[key] = start(request["cell"])
        return tasks[key].prepare() if request["do"] == "prepare" else warm(tasks[key])
    if request["do"] == "turn":
        return {"seconds": tasks[key].turn(request["round"])}
    tasks.pop(key, None)
    torch.compiler.reset()
    return {}


def main(description: str) -> None:
    """Serve requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(description)
    device = torch.device(settings["device"])
    if settings["settings"] == "ours":
        keep_freed_memory()
        if device.type == "cpu":
            use_fastest_float32()
    warnings.filterwarnings("error", message=FALL_BACK)
    [contestant] = [c for c in contestants(settings["bench"]) if c.name == settings["contestant"]]
    tasks: dict[str, Task] = {}

    def start(cell: dict[str, Any]) -> Task:
        return make_task(settings["bench"], contestant, cell, device, Path(settings["folder"]))

    def warm(task: Task) -> dict[str, Any]:
        assert contestant.warm is not None and isinstance(task, LayerTask)
        with contestant.warm():
            return task.warm()

    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), tasks, start, warm)
        except Exception as error:
            traceback.print_exc()
            reply = {"failed": describe(error), "unfit": is_unfit(error)}
            del error
            release(device)
        print(json.dumps(reply), file=answers, flush=True)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    first = (str(error).strip() or "no reason given").splitlines()[0]
    if FALL_BACK in first:
        return first[first.index(FALL_BACK) :].partition(": ")[2]
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def is_unfit(error: BaseException) -> bool:
    """Whether a contestant is not made for what was asked, which is no fault of it."""
    return isinstance(error, UnfitError) or FALL_BACK in str(error)


if __name__ == "__main__":
    main(sys.argv[1])
