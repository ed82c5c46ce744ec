"""Seconds and bytes of one piece of work, on a CPU and on a CUDA device."""

import ctypes
import gc
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def timings(work: Callable[[int], object], device: torch.device, repetitions: int, seconds: float) -> list[float]:
    """Seconds of each call of ``work(0)``, ``work(1)``, ...: at least ``repetitions``, on until ``seconds`` are over.

    On CUDA the calls are queued one behind the other between events, as in training, with one wait at the end, and
    ``seconds`` does not count: what a call takes there includes the device's waiting for its host.
    """
    if device.type == "cuda":
        return _event_timings(work, repetitions)
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < repetitions or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        work(len(taken))
        taken.append(time.perf_counter() - before)
    return taken


def _event_timings(work: Callable[[int], object], repetitions: int) -> list[float]:
    events = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(repetitions + 1)
    ]
    torch.cuda.synchronize()
    events[0].record()
    for call, event in enumerate(events[1:]):
        work(call)
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]


def kept_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor], device: torch.device) -> int:
    """Bytes that ``forward`` leaves in memory for the backward pass, its result and the parameters left out.

    On CUDA the growth of the allocated memory. On a CPU, where no allocator counts, the storages that autograd is given
    to save; what a function keeps in another way is not seen. ``forward`` takes its input from nothing that lives on,
    so that an input counts where it is kept.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        result = forward()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device) - before - result.untyped_storage().nbytes()
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    return sum(saved.values())


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most memory in use during ``work``: allocated on CUDA, resident in the process on a CPU (None off Linux)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (Linux, proc_pid_clear_refs)
    except OSError:
        work()
        return None
    work()
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def park(tensors: Iterable[Tensor]) -> None:
    """Give the memory of ``tensors`` back, each alone on its storage; they stay, with what was compiled for them."""
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def unpark(tensors: Iterable[Tensor]) -> None:
    """Give parked tensors memory again; what is in it is to be written."""
    for tensor in tensors:
        tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())


def release(device: torch.device) -> None:
    """Give memory that is free back to the system or the device, for the process whose turn is next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
