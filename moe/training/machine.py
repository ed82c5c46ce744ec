"""What this process computes on, in what precision and by which routines: what is fastest here is measured, once.

What concerns the whole process (:func:`keep_freed_memory`, :func:`use_fastest_float32`) is for programs to call, and
never done by importing.
"""

import ctypes
import os
import time
from contextlib import AbstractContextManager, suppress

import torch

from moe.config import AttentionConfig, Device, ExpertBackend, ExpertsConfig, ModelConfig, Precision
from moe.errors import UserError
from moe.model import native
from moe.model.transformer import Transformer
from moe.training.measurements import measured_once

CPU_BACKENDS: tuple[ExpertBackend, ...] = ("segments", "grouped", "reference")
"""the usual one first: another has to be faster by :data:`MARGIN`"""
ROUNDS = 6
MARGIN = 1.03
"""and so has another way of multiplying float32: what differs by less may be either"""


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
    of the model's width is timed in both, in turn, in a few hundredths of a second, and the answer remembered. bf16 has
    to be a fifth faster in every round but one, so that other work on the machine cannot decide.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16"
    products = float32_products()
    found = measured_once(
        f"precision at width {d_model}, float32 products {products}",
        ("bf16", "fp32"),
        lambda: _faster_precision(d_model),
    )
    return "bf16" if found == "bf16" else "fp32"


def _faster_precision(d_model: int) -> Precision:
    rounds = [
        (_seconds_of_product(torch.float32, d_model), _seconds_of_product(torch.bfloat16, d_model)) for _ in range(8)
    ]
    wins = sum(bf16 * 1.2 < fp32 for fp32, bf16 in rounds)
    return "bf16" if wins >= len(rounds) - 1 else "fp32"


def use_fastest_float32() -> None:
    """Have this process multiply float32 through oneDNN where that is faster than torch's own choice (MKL).

    On some CPUs MKL runs at half the rate that the units have. Asked for "bf16", oneDNN computes in full float32 where
    there are no units that would round (AMX): without them alone it is tried, and its result compared. What is timed is
    a small block, forward and backward, since attention by SDPA is slow beside it.
    """
    answer = measured_once(f"float32 products of a block{_with_kernels()}", ("onednn", "default"), _faster_float32)
    if answer == "onednn":
        set_float32_products("bf16")


def float32_products() -> str:
    """torch's setting of how a CPU multiplies float32."""
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


def set_float32_products(setting: str) -> None:
    """Set it: "none" is torch's own choice."""
    torch.backends.mkldnn.matmul.fp32_precision = setting  # type: ignore[attr-defined]


def _faster_float32() -> str:
    # At a width of 128 they differed by less than the noise, at 256 by a tenth.
    before, block = float32_products(), _Block("segments", d_model=256)
    try:
        if not _onednn_is_exact():
            return "default"
        times: dict[str, list[float]] = {"none": [], "bf16": []}
        for _ in range(ROUNDS + 1):
            for name, seconds in times.items():
                set_float32_products(name)
                seconds.append(block.seconds("fp32"))
    finally:
        set_float32_products(before)
    return "onednn" if min(times["bf16"][1:]) * MARGIN < min(times["none"][1:]) else "default"


def _onednn_is_exact() -> bool:
    """Whether float32 products through oneDNN are float32 here; leaves that setting on."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or torch.cpu._is_amx_tile_supported():
        return False
    set_float32_products("bf16")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().t()
    return float((left @ right.t() - exact).norm() / exact.norm()) < 2e-6


def fastest_backend(precision: Precision) -> ExpertBackend:
    """How a CPU computes experts fastest in ``precision``: by a small block with each, forward and backward."""

    def measure() -> str:
        blocks = {backend: _Block(backend) for backend in CPU_BACKENDS}
        times: dict[ExpertBackend, list[float]] = {backend: [] for backend in CPU_BACKENDS}
        for _ in range(ROUNDS + 1):
            for backend, block in blocks.items():
                times[backend].append(block.seconds(precision))
        usual, *others = CPU_BACKENDS
        best = min(others, key=lambda backend: min(times[backend][1:]))
        return best if min(times[best][1:]) * MARGIN < min(times[usual][1:]) else usual

    answer = measured_once(f"experts in {precision}{_with_kernels()}", CPU_BACKENDS, measure)
    return next(backend for backend in CPU_BACKENDS if backend == answer)


def _with_kernels() -> str:
    """What is measured with the kernels of :mod:`moe.model.native` is not what is measured without."""
    return "" if native.kernels() is None else ", with kernels in C++"


class _Block:
    """A model of one layer, of the shape ``tiny`` of the bench or wider, and a thousand tokens."""

    def __init__(self, backend: ExpertBackend, d_model: int = 128) -> None:
        self.model = Transformer(
            ModelConfig(
                vocab_size=64,
                n_layers=1,
                d_model=d_model,
                attention=AttentionConfig(n_heads=8, head_dim=d_model // 8),
                experts=ExpertsConfig(n_experts=16, d_ff=2 * d_model, backend=backend),
            )
        )
        self.tokens = torch.randint(64, (8, 128), generator=torch.Generator().manual_seed(0))

    def seconds(self, precision: Precision) -> float:
        """Of forward and backward."""
        start = time.perf_counter()
        with torch.enable_grad(), autocast(torch.device("cpu"), precision):
            hidden, _ = self.model.hidden(self.tokens)
            torch.autograd.backward(hidden.float().sum())
        self.model.zero_grad(set_to_none=True)
        return time.perf_counter() - start


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """bf16 autocast over float32 weights, or none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def repeat_exactly() -> None:
    """Let torch choose the kernels that give the same bits again; call it before the first product on a GPU.

    cuBLAS needs to be told of a fixed workspace for that. An operator without such a kernel warns.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


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
