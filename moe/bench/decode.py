"""Greedy decoding with a cache of keys and values: new tokens a second, prompts of equal length included."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.bench.measure import peak_bytes, release, timings
from moe.bench.models import ModelUnderTest, our_transformer
from moe.bench.shapes import MODELS, ModelShape, Work
from moe.errors import UserError

Build = Callable[[ModelShape, torch.device, torch.dtype], ModelUnderTest]

PROMPT = 32
"""tokens of each prompt"""
REGRET = {"fp32": 1e-4, "bf16": 0.01}
"""how far below the best logit a chosen token's may lie, in standard deviations of the logits, in the mean of tokens"""
REPETITIONS = {"cpu": 1, "cuda": 2}
SECONDS = 1.0
"""of one turn on a CPU, at least"""


@dataclass(frozen=True)
class DecodeCell:
    """What all contestants write."""

    shape: str
    batch: int
    precision: str

    @property
    def model(self) -> ModelShape:
        """The shape with as many sequences as are written at once."""
        return MODELS[self.shape].with_batch(self.batch)

    @property
    def new_tokens(self) -> int:
        """Tokens written after each prompt: 96, or what the model's longest sequence leaves."""
        return min(96, self.model.sequence - PROMPT)

    @property
    def work(self) -> Work:
        """What one writing does; decoding is bound by memory and by calls, so that no FLOPs are given."""
        return Work(self.batch * self.new_tokens, None)

    @property
    def name(self) -> str:
        """As a heading."""
        return f"{self.shape}, {self.precision}, batch {self.batch}"


class DecodeTask:
    """One contestant in one cell: built, its tokens checked, and timed turn by turn."""

    def __init__(self, build: Build, cell: DecodeCell, device: torch.device, folder: Path) -> None:
        del folder  # nothing is shared: the check needs the contestant's own tokens
        self.build, self.cell, self.device = build, cell, device
        self.dtype = torch.bfloat16 if cell.precision == "bf16" else torch.float32
        self.model: ModelUnderTest | None = None

    def prepare(self) -> dict[str, Any]:
        """Build, write once, and check every token against our uncached float32 model. Raises UserError if it fails.

        A token counts as right where no other has a larger logit, but for rounding; what is compared is by how much
        it falls short, since nearly equal logits may be rounded either way.
        """
        written: list[Tensor] = []
        peak = peak_bytes(lambda: written.append(self._write(0)), self.device)
        [new] = written
        if new.shape != (self.cell.batch, self.cell.new_tokens):
            raise UserError(f"it wrote {tuple(new.shape)} tokens, not {(self.cell.batch, self.cell.new_tokens)}")
        regret, agreeing = self._regret(self._prompts(0), new)
        if not regret <= REGRET[self.cell.precision]:
            raise UserError(
                f"its tokens' logits lie {regret:.2g} standard deviations below the best "
                f"(at most {REGRET[self.cell.precision]:g})"
            )
        release(self.device)
        return {
            "error": regret,
            "note": "" if agreeing > 0.9 else f"{agreeing:.0%} of its tokens are those of float32",
            "kept_bytes": None,
            "peak_bytes": peak,
            "parameters": sum(parameter.numel() for parameter in self._built().module.parameters()),
        }

    def turn(self, number: int) -> list[float]:
        """Seconds of each writing of a turn."""
        taken = timings(
            lambda call: self._write(1000 * (number + 1) + call), self.device, REPETITIONS[self.device.type], SECONDS
        )
        release(self.device)
        return taken

    def _built(self) -> ModelUnderTest:
        if self.model is None:
            self.model = self.build(self.cell.model, self.device, self.dtype)
            self.model.module.eval()
        return self.model

    def _prompts(self, number: int) -> Tensor:
        shape = self.cell.model
        generator = torch.Generator().manual_seed(number)
        return torch.randint(shape.vocabulary, (self.cell.batch, PROMPT), generator=generator).to(self.device)

    def _write(self, number: int) -> Tensor:
        model = self._built()
        assert model.generate is not None
        return model.generate(self._prompts(number), self.cell.new_tokens)

    @torch.no_grad()
    def _regret(self, prompts: Tensor, new: Tensor) -> tuple[float, float]:
        """How far the written tokens fall short of the best in float32, and the share of tokens that are the best."""
        reference = our_transformer(self.cell.model, "reference", self.device, self.dtype).float().eval()
        logits, _ = reference(torch.cat([prompts, new], dim=1))
        logits = logits[:, PROMPT - 1 : -1]
        chosen = logits.gather(-1, new[..., None]).squeeze(-1)
        short = (logits.amax(-1) - chosen) / logits.std(-1)
        return float(short.mean()), float((short == 0).float().mean())
