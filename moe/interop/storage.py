"""Tensors that live in files, so that a model larger than memory can be put together piece by piece."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


class Storage:
    """Tensors by name, each in a file below ``folder``, all zeros at first; the system keeps in memory what fits."""

    def __init__(self, folder: Path, like: Mapping[str, Tensor]) -> None:
        """``like`` gives names, shapes and dtypes; its tensors may be without memory.

        Raises OSError where the disk has no room: later it would be too late, and end the process.
        """
        folder.mkdir()
        self.tensors: dict[str, Tensor] = {}
        for number, (name, tensor) in enumerate(like.items()):
            if tensor.numel() == 0:
                self.tensors[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
                continue
            path = folder / f"{number}"
            _take_room(path, tensor.numel() * tensor.dtype.itemsize)
            flat = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
            self.tensors[name] = flat.view(tensor.shape)


def _take_room(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes, all 0, whose room on the disk is its own where the system can do that."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def give_memory(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make the parameters and buffers of ``model``, which is on the meta device, those of ``tensors``, by name.

    A tensor that has several names in the model needs one of them. What ``tensors`` does not have stays without memory.
    """
    placed: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{prefix}.{name}" if prefix else name
            if full in tensors and id(parameter) not in placed:
                placed[id(parameter)] = nn.Parameter(tensors[full])
            if id(parameter) in placed:
                setattr(module, name, placed[id(parameter)])
        for name, _ in list(module.named_buffers(recurse=False)):
            full = f"{prefix}.{name}" if prefix else name
            if full in tensors:
                setattr(module, name, tensors[full])
