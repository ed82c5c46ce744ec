"""The weights of a run as another library wants them: what represents the run, and its tensors one by one."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe.config import Config, ModelConfig
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError
from moe.interop.family import Families, Family
from moe.interop.links import Piece, shapes
from moe.interop.representation import obstacles
from moe.interop.shards import Shards
from moe.training import checkpoint
from moe.training.checkpoint import Checkpoint
from moe.training.run_folder import RunFolder

Say = Callable[[str], None]


@dataclass
class RunWeights:
    """A run at its newest sound checkpoint, ready to be written."""

    run: RunFolder
    config: Config
    tokenizer: Tokenizer
    saved: Checkpoint
    shards: Shards
    """the checkpoint's own file"""
    _latest: tuple[str, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, run: RunFolder, say: Say) -> "RunWeights":
        """The run in a folder; raises UserError where its checkpoint is not of its configuration."""
        config, tokenizer = run.config(), run.tokenizer()
        if config.model.vocab_size is None:
            raise UserError(f"{run.config_path}: model.vocab_size is null: this is no run that has begun")
        saved = checkpoint.newest(run.checkpoints_path, say)
        shards = Shards.open(saved.folder)
        wanted = {name: tuple(tensor.shape) for name, tensor in shapes(config.model).items()}
        there = {name: entry.shape for name, entry in shards.entries.items()}
        for name in sorted(wanted.keys() | there.keys()):
            if wanted.get(name) != there.get(name):
                raise UserError(
                    f"{saved.folder}: {name} is {_shown(there.get(name))}, and by {run.config_path} should be "
                    f"{_shown(wanted.get(name))}; use the configuration that it was saved with"
                )
        return cls(run, config, tokenizer, saved, shards)

    @property
    def tokenizer_json(self) -> dict[str, Any]:
        """The content of the run's tokenizer.json."""
        content: dict[str, Any] = json.loads(self.run.tokenizer_path.read_text(encoding="utf-8"))
        return content

    @property
    def model(self) -> ModelConfig:
        """The configuration of the model."""
        return self.config.model

    def family(self, families: Families, library: str) -> Family:
        """The first of ``families`` that represents the run; raises UserError that says what stands in the way of each.

        ``library`` is what has the families.
        """
        reasons = []
        for family in families.values():
            found = obstacles(self.model, family) or self._not_zero(family)
            if not found:
                return family
            reasons.append(f"  {family.name}: {'; '.join(found)}")
        raise UserError("\n".join([f"{self.run.path}: no architecture of {library} represents this run", *reasons]))

    def tensor(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """The tensor of theirs that ``piece`` is, contiguous or not, in ``dtype``."""
        if piece.ours is None:
            return torch.zeros(piece.shape, dtype=torch.float32 if piece.stays_float32 else dtype)
        view = piece.view(self._read(piece.ours)).reshape(piece.shape)
        return view.to(torch.float32 if piece.stays_float32 else dtype)

    def tensors(self, pieces: list[Piece], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of all of ``pieces`` that theirs have, one in memory at a time."""
        by_name: dict[str, list[Piece]] = {}
        for piece in pieces:
            if piece.theirs is not None:
                by_name.setdefault(piece.theirs, []).append(piece)
        for name, parts in by_name.items():
            yield name, self._joined(parts, dtype)

    def _joined(self, parts: list[Piece], dtype: torch.dtype) -> Tensor:
        """The tensor of theirs that ``parts`` make up."""
        if parts[0].place is None:
            return self.tensor(parts[0], dtype)
        joined = torch.empty(parts[0].shape, dtype=torch.float32 if parts[0].stays_float32 else dtype)
        for part in parts:
            assert part.ours is not None
            assert part.place is not None
            part.place(joined).copy_(part.view(self._read(part.ours)))
        return joined

    def _read(self, name: str) -> Tensor:
        # The experts of a layer come one after the other out of one tensor.
        if self._latest is None or self._latest[0] != name:
            self._latest = (name, self.shards.read(name))
        return self._latest[1]

    def _not_zero(self, family: Family) -> list[str]:
        """Why tensors that theirs have no place for stand in the way."""
        for piece in family.pieces(self.model):
            if piece.theirs is None and piece.ours is not None and bool(self._read(piece.ours).any()):
                return [f"{family.name} has no tensor for {piece.ours}, which is not all zeros"]
        return []


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
