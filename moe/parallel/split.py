"""How a parameter is cut over ranks, and put together again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Over = Literal["expert", "tensor"]


@dataclass(frozen=True)
class Split:
    """A parameter is cut along ``dim`` into equal parts, one for each rank of the group ``over``.

    With ``halves`` 2 it is two matrices one above the other along ``dim`` (the gate and the value of a gated MLP), and
    a rank's part is its part of the first above its part of the second.
    """

    dim: int
    over: Over
    halves: int = 1

    def cut(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """The part of one rank, in memory of its own."""
        parts = [half.chunk(ranks, dim=self.dim)[rank] for half in whole.chunk(self.halves, dim=self.dim)]
        return torch.cat(parts, dim=self.dim) if self.halves > 1 else parts[0].clone()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole, from the parts of all ranks."""
        halves = [part.chunk(self.halves, dim=self.dim) for part in parts]
        return torch.cat([half[i] for i in range(self.halves) for half in halves], dim=self.dim)
