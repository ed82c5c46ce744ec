"""What this process computes on, and in what precision."""

import ctypes
import time
from contextlib import AbstractContextManager, suppress

import torch

from moe.config import Device, Precision
from moe.errors import UserError


def choose_device(wanted: Device, rank: int = 0) -> torch.device:
    """The device of the configuration; ``auto`` is a GPU if there is one. Raises UserError for a GPU that is not."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("training.device is cuda, and torch finds no CUDA device here; use cpu or auto")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def choose_precision(wanted: Precision, device: torch.device, d_model: int) -> Precision:
    """The precision of the configuration; ``auto`` is bf16 on a GPU, and on a CPU whichever is faster there.

    Some CPUs multiply bfloat16 twice as fast as float32 or better, others slower, and no table says which: a product
    of the model's width is timed in both, in turn, in a few hundredths of a second. bf16 has to be a fifth faster in
    every round but one, so that other work on the machine cannot decide.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16"
    rounds = [
        (_seconds_of_product(torch.float32, d_model), _seconds_of_product(torch.bfloat16, d_model)) for _ in range(8)
    ]
    wins = sum(bf16 * 1.2 < fp32 for fp32, bf16 in rounds)
    return "bf16" if wins >= len(rounds) - 1 else "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """bf16 autocast over float32 weights, or none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def keep_freed_memory() -> None:
    """Tell the C library to keep large freed blocks instead of returning them to the system.

    A training step frees and takes the same tens of megabytes over and over; each time the kernel would clear the
    pages anew. It concerns the whole process, so it is for programs to call, not for importers of a library. Where
    the C library is another one, nothing happens.
    """
    mmap_threshold, trim_threshold = -3, -1
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, 2**31 - 1)


def _seconds_of_product(dtype: torch.dtype, d_model: int) -> float:
    rows, weight = torch.randn(1024, d_model).to(dtype), torch.randn(4 * d_model, d_model).to(dtype)
    rows @ weight.t()  # the first one also prepares a kernel
    start = time.perf_counter()
    for _ in range(4):
        rows @ weight.t()
    return time.perf_counter() - start
