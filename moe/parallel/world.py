"""The processes that train together, as one value: who I am, how many we are, and sums over all of us."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.parallel.gradients import add_over, gradient_of


class World:
    """This process among its peers: alone, or one of a group of ``torch.distributed``, by default of all."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank: int = dist.get_rank(group) if together else 0
        self.size: int = dist.get_world_size(group) if together else 1
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
        dist.all_reduce(total, group=self.group)
        return total

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over the ranks: one reduction a dtype; a missing gradient counts as zero.

        Parameters that no rank gave a gradient keep None only where there is one rank, so that all ranks always take
        part in the same reductions.
        """
        if self.size == 1:
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = gradient_of(parameter, parameter)
        add_over(self.group or dist.group.WORLD, trained, 1 / self.size)

    @classmethod
    def alone(cls) -> "World":
        """A world of this process."""
        world = cls()
        world.rank, world.size = 0, 1
        return world

    def wait(self) -> None:
        """Return once every rank is here."""
        if self.size > 1:
            dist.barrier(self.group)


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


def is_first_process() -> bool:
    """Whether this is the first of all, by what ``torchrun`` says before they have joined."""
    return os.environ.get("RANK", "0") == "0"


def restarts() -> int:
    """How often ``torchrun`` has started all processes again because one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def launches() -> bool:
    """Whether ``torchrun`` was told to start them again."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def leave_world() -> None:
    """Leave the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
