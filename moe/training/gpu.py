"""What a training step needs to know of a GPU, so that it never waits for one: on a CPU each of these does nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""The implementations of attention in the order in which they are tried: torch's own order has cuDNN's last, which on a
Hopper GPU is the fastest"""


@contextmanager
def preferred_attention(device: torch.device) -> Iterator[None]:
    """Let ``scaled_dot_product_attention`` on a GPU take the first of :data:`ATTENTION` that takes its input."""
    if device.type == "cuda":
        with sdpa_kernel(ATTENTION, set_priority=True):
            yield
    else:
        yield


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. From pinned memory, since from ordinary memory a copy waits for the work before it."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Transfer:
    """Numbers on their way to the host."""

    def __init__(self, numbers: Float[Tensor, " n"]) -> None:
        self._numbers, self._arrival = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()

    def read(self) -> list[float]:
        """The numbers, as soon as they are there; later work of the device is not waited for."""
        if self._arrival is not None:
            self._arrival.synchronize()
        values: list[float] = self._numbers.tolist()
        return values


@cache
def triton_is_installed() -> bool:
    """Whether kernels in Triton can be used; torch's builds for CUDA bring it along."""
    return find_spec("triton") is not None
