"""Processes that work together in a test: forked, since that takes hundredths of a second, and joined over gloo."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe.parallel.world import leave_world

SECONDS = 60


Together = Callable[[Callable[[], Any], Path, int], list[Any]]


@pytest.fixture(scope="session")
def together() -> Together:
    """``together(work, folder, size)``: what ``work`` returns in each of so many processes that have joined."""
    return _together


def _together(work: Callable[[], Any], folder: Path, size: int) -> list[Any]:
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_member, args=(work, folder, rank, size)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def _member(work: Callable[[], Any], folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS))
    torch.save(work(), folder / f"{rank}.pt")
    leave_world()
