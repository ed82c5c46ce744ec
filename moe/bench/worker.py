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

from moe.bench.contestants import Contestant, contestants
from moe.bench.decode import DecodeCell, DecodeTask
from moe.bench.measure import release
from moe.bench.step import StepCell, StepTask
from moe.errors import UserError
from moe.training.machine import keep_freed_memory


class Task(Protocol):
    """What a contestant does in one cell."""

    def prepare(self) -> dict[str, Any]:
        """Build, check and measure memory."""

    def turn(self, number: int) -> list[float] | dict[str, list[float]]:
        """Seconds of each repetition of one turn."""


def make_task(bench: str, contestant: Contestant, cell: dict[str, Any], device: torch.device, folder: Path) -> Task:
    """The task of a contestant in a cell, which is given as its fields."""
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


def answer(request: dict[str, Any], tasks: dict[str, Task], start: Any) -> dict[str, Any]:
    """Carry out one request: prepare a cell, take a turn in it, or drop it."""
    key = json.dumps(request["cell"], sort_keys=True)
    if request["do"] == "prepare":
        tasks[key] = start(request["cell"])
        return tasks[key].prepare()
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
    # A back-end that cannot run here falls back to the loop with a warning: to time that under its name would mislead.
    warnings.filterwarnings("error", message="experts fall back")
    [contestant] = [c for c in contestants(settings["bench"]) if c.name == settings["contestant"]]
    tasks: dict[str, Task] = {}

    def start(cell: dict[str, Any]) -> Task:
        return make_task(settings["bench"], contestant, cell, device, Path(settings["folder"]))

    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), tasks, start)
        except Exception as error:
            traceback.print_exc()
            reply = {"failed": describe(error)}
            del error
            release(device)
        print(json.dumps(reply), file=answers, flush=True)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    first = (str(error).strip() or "no reason given").splitlines()[0]
    return first if isinstance(error, UserError | UserWarning) else f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    main(sys.argv[1])
