"""The processes that train together, as one value: who I am, how many we are, and sums over all of us."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


class World:
    """This process among its peers: alone, or one of ``torch.distributed``'s default group.

    Data parallel is all it knows: every rank holds the whole model and a slice of each batch.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if together else 0
        self.size: int = dist.get_world_size() if together else 1
        self.device = torch.device("cuda") if together and dist.get_backend() == "nccl" else torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all ranks, on every rank; the argument is left alone."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over the ranks: one reduction a dtype; a missing gradient counts as zero.

        Parameters that no rank gave a gradient keep None only where there is one rank, so that all ranks always take
        part in the same reductions.
        """
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            flat = torch.cat([_gradient(parameter).flatten() for parameter in parameters])
            dist.all_reduce(flat)
            flat /= self.size
            start = 0
            for parameter in parameters:
                parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()

    def wait(self) -> None:
        """Return once every rank is here."""
        if self.size > 1:
            dist.barrier()


def join_world(device: torch.device) -> World:
    """Join the group that ``torchrun`` prepared, if it did, and return this process's place in it.

    ``device`` is this process's own. Nobody is given up within two hours: the first rank may have a corpus to prepare.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=timedelta(hours=2), device_id=device if on_gpu else None
        )
    return World()


def local_rank() -> int:
    """This process's number among those of its machine, as ``torchrun`` gives it; 0 without it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def leave_world() -> None:
    """Leave the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
