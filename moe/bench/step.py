"""A whole training step: forward, backward and fused AdamW, on fresh random tokens each time."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.bench.agreement import MODEL_TOLERANCE, Agreement, pooled_error
from moe.bench.measure import kept_bytes, park, peak_bytes, release, timings
from moe.bench.models import ModelUnderTest, reference_gradients, refill
from moe.bench.shapes import MODELS, ModelShape, Work
from moe.errors import UserError
from moe.training.machine import autocast

Build = Callable[[ModelShape, torch.device, torch.dtype], ModelUnderTest]

TRAINED_IN = {"cpu": "bf16 autocast over float32 weights", "cuda": "bf16 weights and optimizer states"}
REPETITIONS = {"cpu": 2, "cuda": 4}
SECONDS = 1.0
"""of one turn on a CPU, at least"""


@dataclass(frozen=True)
class StepCell:
    """What all contestants train."""

    shape: str
    precision: str
    batch: int | None = None
    """sequences; None: those of the shape"""

    @property
    def model(self) -> ModelShape:
        """The shape with its batch."""
        model = MODELS[self.shape]
        return model if self.batch is None else model.with_batch(self.batch)

    @property
    def work(self) -> Work:
        """What one step does."""
        return Work(self.model.tokens, self.model.tokens * self.model.flops_per_token)

    @property
    def name(self) -> str:
        """As a heading."""
        return f"{self.shape}, {self.precision}, {self.model.batch} sequences of {self.model.sequence}"


class StepTask:
    """One contestant in one cell: built, checked, and timed turn by turn.

    Between its turns it holds weights alone, so that many wait beside each other; on CUDA, where models are large, not
    even these (:func:`~moe.bench.measure.park`).
    """

    def __init__(
        self, build: Build, cell: StepCell, device: torch.device, folder: Path, *, dense_twin: bool, low_precision: bool
    ) -> None:
        """``folder`` is where contestants share the reference; ``low_precision``: bf16 where float32 was asked for."""
        self.build, self.cell, self.device, self.folder = build, cell, device, folder
        self.dense_twin, self.low_precision = dense_twin, low_precision
        bf16_weights = cell.precision == "bf16" and device.type == "cuda"
        self.dtype = torch.bfloat16 if bf16_weights else torch.float32
        self.model: ModelUnderTest | None = None

    def prepare(self) -> dict[str, Any]:
        """Build, check loss and gradients against the float32 loop, and measure memory. Raises UserError if it fails
        the check."""
        wanted_loss, wanted = self._reference()
        model = self._built()
        tokens, targets = self._batch(0)
        start = time.monotonic()
        with self._precision():
            loss = model.loss(tokens, targets)
        torch.autograd.backward(loss)
        value = loss.item()
        first_seconds = time.monotonic() - start
        precision = "bf16" if self.low_precision else self.cell.precision
        errors = {}
        if model.names:
            errors["gradients"] = pooled_error(model.gradients(), wanted)
            errors["loss"] = abs(value - wanted_loss) / wanted_loss
        elif not math.isfinite(value):
            raise UserError(f"its loss is {value}")
        agreement = Agreement(errors, MODEL_TOLERANCE[precision])
        if not agreement.holds:
            raise UserError(agreement.failure())
        model.module.zero_grad(set_to_none=True)
        del loss

        def forward() -> Tensor:
            with self._precision():
                return model.loss(tokens, targets)

        kept = kept_bytes(forward, model.module.parameters(), self.device)
        optimizer = model.optimizer()
        self._step(model, optimizer, 0)
        peak = peak_bytes(lambda: self._step(model, optimizer, 1), self.device)
        del optimizer
        self._rest()
        return {
            "error": agreement.worst,
            "note": "" if model.names else "its weights are its own: only its loss was checked, to be finite",
            "first_seconds": first_seconds,
            "kept_bytes": kept,
            "peak_bytes": peak,
            "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
        }

    def turn(self, number: int) -> list[float]:
        """Seconds of each step of one turn, after one that is not counted."""
        model = self._built()
        optimizer = model.optimizer()
        first = 1000 * (number + 1)
        self._step(model, optimizer, first)
        taken = timings(
            lambda call: self._step(model, optimizer, first + 1 + call),
            self.device,
            REPETITIONS[self.device.type],
            SECONDS,
        )
        del optimizer
        self._rest()
        return taken

    def _built(self) -> ModelUnderTest:
        if self.model is None:
            self.model = self.build(self.cell.model, self.device, self.dtype)
            self.model.module.train()
        elif self.device.type == "cuda":
            refill(self.model, self.cell.model)
        return self.model

    def _rest(self) -> None:
        assert self.model is not None
        self.model.module.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            park(self.model.module.parameters())
        release(self.device)

    def _precision(self) -> Any:
        return autocast(
            self.device, "bf16" if self.cell.precision == "bf16" and self.dtype == torch.float32 else "fp32"
        )

    def _batch(self, number: int) -> tuple[Tensor, Tensor]:
        shape = self.cell.model
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(shape.vocabulary, (shape.batch, shape.sequence + 1), generator=generator).to(self.device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def _step(self, model: ModelUnderTest, optimizer: torch.optim.Optimizer, number: int) -> None:
        tokens, targets = self._batch(number)
        with self._precision():
            loss = model.loss(tokens, targets)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _reference(self) -> tuple[float, dict[str, Tensor]]:
        """The float32 loss and gradients of batch 0, computed by the first contestant that needs them."""
        kind = "twin" if self.dense_twin else "mixture"
        path = self.folder / f"{self.cell.shape}-{self.cell.model.batch}-{self.dtype}-{kind}.pt"
        if path.exists():
            saved: tuple[float, dict[str, Tensor]] = torch.load(path)
            return saved
        tokens, targets = self._batch(0)
        computed = reference_gradients(
            self.cell.model, self.device, self.dtype, tokens, targets, dense_twin=self.dense_twin
        )
        release(self.device)
        partial = path.with_suffix(".part")
        torch.save(computed, partial)
        partial.rename(path)
        return computed
