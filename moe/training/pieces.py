"""Tensors in safetensors files: whole, or in the pieces that the processes of a spread model have.

Beside a piece stands how it was cut from the whole: a list of cuts, each of what the one before left. From those any
tensor is put together again, whatever the layout that saved it; the layout that loads it then takes its own part.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe.errors import UserError
from moe.parallel.spread import Spread

PIECES = "pieces"
"""where the metadata of a file says how its tensors were cut"""


@dataclass(frozen=True)
class Cut:
    """Of ``halves`` equal parts of a tensor along ``dim``, the ``rank``-th of ``ranks`` pieces of each, joined."""

    dim: int
    rank: int
    ranks: int
    halves: int = 1
    joined: bool = False
    """whether the tensor's first two dimensions are made one before"""

    @property
    def copies(self) -> bool:
        """Whether a piece is not surely a view."""
        return self.halves > 1 or self.joined

    def take(self, tensor: Tensor) -> Tensor:
        """The piece, a view unless it :attr:`copies`. Empty where there are fewer pieces than ranks."""
        tensor = tensor.flatten(0, 1) if self.joined else tensor
        parts = []
        for half in tensor.chunk(self.halves, dim=self.dim):
            pieces = half.chunk(self.ranks, dim=self.dim)
            parts.append(pieces[self.rank] if self.rank < len(pieces) else half.narrow(self.dim, 0, 0))
        return parts[0] if self.halves == 1 else torch.cat(parts, dim=self.dim)

    def put(self, tensor: Tensor, piece: Tensor) -> None:
        """Write the piece where it was taken."""
        if self.joined:
            flat = tensor.flatten(0, 1)
            replace(self, joined=False).put(flat, piece)
            tensor.copy_(flat.view_as(tensor))
            return
        halves = tensor.chunk(self.halves, dim=self.dim)
        for half, part in zip(halves, piece.chunk(self.halves, dim=self.dim), strict=True):
            half.chunk(self.ranks, dim=self.dim)[self.rank].copy_(part)


@dataclass(frozen=True)
class Piece:
    """What one process has of a tensor of ``shape``."""

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]

    def take(self, whole: Tensor) -> Tensor:
        """The piece of ``whole``."""
        for cut in self.cuts:
            whole = cut.take(whole)
        return whole

    def put(self, whole: Tensor, piece: Tensor) -> None:
        """Write the piece into its place in ``whole``."""
        _put(whole, self.cuts, piece)


def _put(target: Tensor, cuts: tuple[Cut, ...], piece: Tensor) -> None:
    if not cuts:
        target.copy_(piece)
        return
    part = cuts[0].take(target)
    _put(part, cuts[1:], piece)
    if cuts[0].copies:  # perhaps a copy, which has to go back
        cuts[0].put(target, part)


def piece_here(spread: Spread, name: str) -> Piece:
    """What this process has of a parameter."""
    cuts = []
    for split in spread.splits.get(name, ()):
        group = spread.group(split.over)
        cuts.append(Cut(split.dim, group.rank(), group.size(), split.halves))
    parameter = spread.own(name)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for i, placement in enumerate(parameter.placements):
            if placement.is_shard():
                dim = cast(Any, placement).dim
                cuts.append(Cut(dim, mesh.get_local_rank(i), mesh.size(i), joined=name in spread.joined))
    return Piece(tuple(spread.shapes[name]), tuple(cuts))


def metadata(pieces: Mapping[str, Piece]) -> dict[str, str]:
    """What a file of pieces says of them."""
    return {PIECES: json.dumps({name: asdict(piece) for name, piece in pieces.items()})}


class StoredTensors:
    """The tensors of one or more files, by name; nothing is read before it is asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)
        self._files: list[Any] = [safe_open(path, framework="pt") for path in self.paths]
        self._where: dict[str, list[tuple[int, Piece]]] = {}
        for number, file in enumerate(self._files):
            told = json.loads((file.metadata() or {}).get(PIECES, "{}"))
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                whole = Piece(tuple(file.get_slice(name).get_shape()), ())
                self._where.setdefault(name, []).append((number, _piece(told[name]) if name in told else whole))

    def names(self) -> list[str]:
        """All of them."""
        return list(self._where)

    def like(self, name: str) -> Tensor:
        """A tensor without memory, of the shape and dtype of this one."""
        number, piece = self._where[name][0]
        file = self._files[number]
        dtype = file.get_tensor(name).dtype if not piece.shape else _dtype(file.get_slice(name).get_dtype())
        return torch.empty(piece.shape, dtype=dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own; raises UserError where pieces are missing."""
        places = self._where[name]
        number, piece = places[0]
        if not piece.cuts:
            return cast(Tensor, self._files[number].get_tensor(name)).clone()
        whole = torch.empty(piece.shape, dtype=self.like(name).dtype)
        filled = 0
        for number, piece in places:
            part = self._files[number].get_tensor(name)
            piece.put(whole, part)
            filled += part.numel()
        if filled != whole.numel():
            raise UserError(
                f"{self.paths[number]}: the pieces of {name} are {filled:,} of its {whole.numel():,} numbers"
            )
        return whole

    def metadata(self, key: str) -> list[str]:
        """What each file says under ``key``, of those that do."""
        found = [(file.metadata() or {}).get(key) for file in self._files]
        return [text for text in found if text is not None]


def _piece(told: dict[str, object]) -> Piece:
    cuts = tuple(Cut(**cut) for cut in cast(list[dict[str, Any]], told["cuts"]))
    return Piece(tuple(cast(list[int], told["shape"])), cuts)


def _dtype(name: str) -> torch.dtype:
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    known |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
    return (known | {"U8": torch.uint8, "BOOL": torch.bool})[name]
