"""One layer of experts without its router: forward, and forward and backward."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.bench.agreement import TOLERANCE, Agreement, relative_error
from moe.bench.layers import DenseBound, Layer, Weights, draw_weights
from moe.bench.loads import Skew, assign
from moe.bench.measure import kept_bytes, park, peak_bytes, release, timings, unpark
from moe.bench.shapes import LAYERS, LayerShape, Work
from moe.errors import UserError
from moe.model.experts.reference import reference_experts
from moe.model.experts.weights import ExpertWeights
from moe.model.routing import Routing

Build = Callable[[LayerShape, Weights], Layer]

INPUTS = 3
"""sets of input, routing and output gradient that take turns, so that none is still in a cache"""
WARM_UP = 3
REPETITIONS = {"cpu": 3, "cuda": 10}
SECONDS = 0.7
"""of each phase of one turn on a CPU, at least"""


@dataclass(frozen=True)
class LayerCell:
    """What all contestants compute."""

    shape: str
    precision: str
    skew: Skew

    @property
    def layer(self) -> LayerShape:
        """The sizes."""
        return LAYERS[self.shape]

    @property
    def work(self) -> Work:
        """What forward and backward do."""
        return Work(self.layer.tokens, self.layer.flops())

    @property
    def name(self) -> str:
        """As a heading."""
        s = self.layer
        sizes = f"T {s.tokens}, d {s.d_model}, F {s.d_ff}, E {s.n_experts}, k {s.top_k}"
        return f"{self.shape} ({sizes}), {self.precision}, {self.skew} load"


@dataclass
class Input:
    """One set of what a layer is given."""

    x: Tensor
    selected: Tensor
    weights: Tensor
    grad_y: Tensor


class LayerTask:
    """One contestant in one cell. Between its turns it holds no memory to speak of: the device is another's alone."""

    def __init__(
        self, build: Build, cell: LayerCell, device: torch.device, folder: Path, *, low_precision: bool
    ) -> None:
        """``low_precision``: it computes in bf16 where float32 was asked for. Nothing is shared in ``folder``."""
        del folder
        self.build, self.cell, self.device, self.low_precision = build, cell, device, low_precision
        self.dtype = torch.bfloat16 if cell.precision == "bf16" else torch.float32
        self.layer: Layer | None = None
        self.first_seconds = 0.0

    def warm(self) -> dict[str, Any]:
        """Build and run once, so that kernels get compiled."""
        self.layer = self.build(self.cell.layer, self._weights())
        self._first(self.layer, self._input(0))
        release(self.device)
        return {}

    def prepare(self) -> dict[str, Any]:
        """Check output and gradients against the float32 loop, and measure memory. Raises UserError if one is off."""
        weights = self._weights()
        if self.layer is None:
            self.layer = self.build(self.cell.layer, weights)
        layer, given = self.layer, self._input(0)
        self._first(layer, given)
        agreement = self._agreement(layer, weights, given)
        if not agreement.holds:
            raise UserError(agreement.failure())
        del weights
        release(self.device)

        def forward() -> Tensor:
            # Of a fresh input, which lives on only where the layer keeps it.
            return layer.forward(given.x.clone().requires_grad_(), given.selected, given.weights)

        kept = kept_bytes(forward, layer.parameters, self.device)
        release(self.device)
        peak = peak_bytes(lambda: self._both(layer, given), self.device)
        del given, forward
        park(layer.parameters)
        release(self.device)
        return {
            "error": agreement.worst,
            "note": agreement.note,
            "kept_bytes": kept,
            "peak_bytes": peak,
            "first_seconds": self.first_seconds,
        }

    def turn(self, number: int) -> dict[str, list[float]]:
        """Seconds of each forward pass, and of each forward and backward pass."""
        del number
        assert self.layer is not None
        layer = self.layer
        unpark(layer.parameters)
        with torch.no_grad():
            for parameter in layer.parameters:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        inputs = [self._input(index) for index in range(INPUTS)]
        release(self.device)

        def forward(call: int) -> None:
            given = inputs[call % INPUTS]
            layer.forward(given.x, given.selected, given.weights)

        def both(call: int) -> None:
            self._both(layer, inputs[call % INPUTS])

        taken = _both_phases(forward, both, self.device)
        park(layer.parameters)
        release(self.device)
        return taken

    def _first(self, layer: Layer, given: Input) -> None:
        """Run it forward and backward, and add what it takes to the time of the first use."""
        start = time.monotonic()
        self._both(layer, given)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.first_seconds += time.monotonic() - start

    def _weights(self) -> Weights:
        return draw_weights(self.cell.layer, self.device, self.dtype)

    def _input(self, index: int) -> Input:
        shape = self.cell.layer
        generator = torch.Generator(self.device).manual_seed(1 + index)
        size = (shape.tokens, shape.d_model)
        x = torch.randn(size, generator=generator, device=self.device, dtype=self.dtype)
        grad_y = torch.randn(size, generator=generator, device=self.device, dtype=self.dtype)
        selected, combine = assign(shape, self.cell.skew, seed=index)
        return Input(x.requires_grad_(), selected.to(self.device), combine.to(self.device).requires_grad_(), grad_y)

    def _both(self, layer: Layer, given: Input) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output, and the gradients of input, combine weights (none where the routing is its own) and parameters."""
        y = layer.forward(given.x, given.selected, given.weights)
        wanted = [given.x, *layer.parameters] if layer.ours is None else [given.x, given.weights, *layer.parameters]
        return y, torch.autograd.grad(y, wanted, given.grad_y)

    def _agreement(self, layer: Layer, weights: Weights, given: Input) -> Agreement:
        tolerance = TOLERANCE["bf16" if self.low_precision else self.cell.precision]
        if layer.ours is None:
            assert layer.own_check is not None
            return Agreement(layer.own_check(given.x.detach()), tolerance, layer.note)
        y, (grad_x, grad_combine, *of_parameters) = self._both(layer, given)
        gradients = layer.ours(of_parameters)
        wanted_y, wanted_x, wanted_combine, wanted_in, wanted_out = self._reference(weights, given)
        errors = {
            "output": relative_error(y, wanted_y),
            "gradient of x": relative_error(grad_x, wanted_x),
            "gradient of the combine weights": relative_error(grad_combine, wanted_combine),
            "gradient of w_in": relative_error(gradients.w_in, wanted_in),
            "gradient of w_out": relative_error(gradients.w_out, wanted_out),
        }
        return Agreement(errors, tolerance, layer.note)

    def _reference(self, weights: Weights, given: Input) -> tuple[Tensor, ...]:
        """Output and gradients of the loop over experts in float32, on the numbers that the layer has been given."""
        x, w_in, w_out = (t.detach().float().requires_grad_() for t in (given.x, weights.w_in, weights.w_out))
        combine = given.weights.detach().requires_grad_()
        logits = torch.zeros(1, self.cell.layer.n_experts, device=self.device).expand(len(x), -1)
        routing = Routing(logits=logits, scores=logits, selected=given.selected, weights=combine)
        y = reference_experts(x, routing, ExpertWeights(w_in, w_out, None, None, "swiglu"))
        return y, *torch.autograd.grad(y, [x, combine, w_in, w_out], given.grad_y.float())


class DenseTask:
    """The dense bound in one cell: nothing to check, for it computes no layer."""

    def __init__(self, cell: LayerCell, device: torch.device) -> None:
        self.cell, self.device = cell, device
        self.dtype = torch.bfloat16 if cell.precision == "bf16" else torch.float32

    def prepare(self) -> dict[str, Any]:
        """Nothing but to see that it runs."""
        bound = DenseBound(self.cell.layer, self.device, self.dtype)
        bound.both()
        del bound
        release(self.device)
        return {"error": None, "note": "", "kept_bytes": None, "peak_bytes": None}

    def turn(self, number: int) -> dict[str, list[float]]:
        """Seconds of two products, and of six."""
        del number
        bounds = [DenseBound(self.cell.layer, self.device, self.dtype) for _ in range(2)]
        return _both_phases(lambda call: bounds[call % 2].forward(), lambda call: bounds[call % 2].both(), self.device)


def _both_phases(
    forward: Callable[[int], object], both: Callable[[int], object], device: torch.device
) -> dict[str, list[float]]:
    taken = {}
    for phase, work in (("forward", forward), ("all", both)):
        for call in range(WARM_UP):
            work(call)
        taken[phase] = timings(work, device, REPETITIONS[device.type], SECONDS)
    release(device)
    return taken
