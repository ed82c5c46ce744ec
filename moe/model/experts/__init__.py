"""The expert MLPs of a layer: the stacked parameters, and the choice among the back-ends that compute them.

Every back-end has one signature, ``(x, routing, weights) -> y``. ``reference`` is the definition.
"""

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.config import ExpertBackend, ExpertsConfig, FeedForwardConfig
from moe.model.experts import few, fused, grouped, segments
from moe.model.experts.fused import fused_experts
from moe.model.experts.grouped import grouped_experts
from moe.model.experts.reference import one_expert, reference_experts
from moe.model.experts.segments import segment_experts
from moe.model.experts.weights import ExpertWeights
from moe.model.feed_forward import input_width
from moe.model.routing import Routing

__all__ = ["ExpertWeights", "Experts", "fused_experts", "grouped_experts", "reference_experts", "segment_experts"]

Backend = Callable[[Tensor, Routing, ExpertWeights], Tensor]
_BACKENDS: dict[str, Backend] = {
    "reference": reference_experts,
    "grouped": grouped_experts,
    "fused": fused_experts,
    "segments": segment_experts,
}
_UNSUPPORTED = {"grouped": grouped.unsupported, "segments": segments.unsupported, "fused": fused.unsupported}


class Experts(nn.Module):
    """E expert MLPs, their weights stacked in one parameter a matrix."""

    def __init__(self, config: ExpertsConfig, feed_forward: FeedForwardConfig, d_model: int) -> None:
        super().__init__()
        self.backend = config.backend
        self.on_cpu: ExpertBackend = "segments"
        """what ``auto`` takes on a CPU; training measures which is fastest there"""
        self.compute: Backend | None = None
        """what computes them in place of a back-end"""
        self.activation = feed_forward.activation
        width_in = input_width(feed_forward.activation, config.d_ff)
        self.w_in = nn.Parameter(torch.empty(config.n_experts, width_in, d_model))
        self.w_out = nn.Parameter(torch.empty(config.n_experts, d_model, config.d_ff))
        self.b_in = nn.Parameter(torch.empty(config.n_experts, width_in)) if feed_forward.bias else None
        self.b_out = nn.Parameter(torch.empty(config.n_experts, d_model)) if feed_forward.bias else None

    def forward(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Send each token through its selected experts and sum their weighted outputs."""
        weights = self.weights
        if self.compute is not None:
            return self.compute(x, routing, weights)
        if self.backend == "auto" and few.fits(x, routing):
            return few.few_experts(x, routing, weights)
        return _BACKENDS[choose_backend(self.backend, x, weights, self.on_cpu)](x, routing, weights)

    def one(self, expert: int, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The output of one expert for every token, unweighted."""
        return one_expert(x, expert, self.weights)

    @property
    def weights(self) -> ExpertWeights:
        """The parameters as a back-end is given them."""
        return ExpertWeights(self.w_in, self.w_out, self.b_in, self.b_out, self.activation)


def choose_backend(
    wanted: ExpertBackend, x: Tensor, weights: ExpertWeights, on_cpu: ExpertBackend = "segments"
) -> ExpertBackend:
    """The back-end to use on ``x``: the one wanted if it fits, else the reference loop, with a warning that says why.

    ``auto`` takes ``on_cpu`` on a CPU, if that fits; elsewhere ``fused`` where its kernels run, else ``grouped``.
    """
    backend: ExpertBackend = wanted
    if wanted == "auto":
        on_gpu: ExpertBackend = "grouped" if fused.unsupported(x, weights) else "fused"
        fits = on_cpu not in _UNSUPPORTED or _UNSUPPORTED[on_cpu](x, weights) is None
        backend = (on_cpu if fits else "segments") if x.device.type == "cpu" else on_gpu
    reason = _UNSUPPORTED[backend](x, weights) if backend in _UNSUPPORTED else None
    if reason is None:
        return backend
    _announce(f"experts fall back from {backend} to the reference loop: {reason}")
    return "reference"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


# Nor can it trace a warning.
_announce = torch.compiler.disable(_warn)  # type: ignore[no-untyped-call]
