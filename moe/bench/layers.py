"""One layer of experts in each implementation, given the routing and the same weights; and the dense bound."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.bench.agreement import UnfitError, relative_error
from moe.bench.shapes import LayerShape
from moe.config import ExpertBackend, ExpertsConfig, FeedForwardConfig
from moe.model.experts import Experts
from moe.model.routing import Routing


@dataclass(frozen=True)
class Weights:
    """Of all experts, laid out as :class:`~moe.model.experts.weights.ExpertWeights` has them."""

    w_in: Tensor
    """[E, 2 F, D]: the gate's rows, then the value's"""
    w_out: Tensor
    """[E, D, F]"""


@dataclass
class Layer:
    """An implementation that is differentiated by autograd."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    """x [T, D], selected [T, K], float32 weights [T, K] -> y [T, D]"""
    parameters: Sequence[Tensor]
    ours: Callable[[Sequence[Tensor]], Weights] | None
    """gradients of ``parameters`` in our layout; None where the weights are not ours"""
    own_check: Callable[[Tensor], dict[str, float]] | None = None
    """relative errors of a layer that cannot be given weights and routing, of its own"""
    note: str = ""


def draw_weights(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> Weights:
    """Random weights that keep the scale of their input."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        drawn: Tensor = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return drawn / math.sqrt(size[-1])

    return Weights(
        draw(shape.n_experts, 2 * shape.d_ff, shape.d_model), draw(shape.n_experts, shape.d_model, shape.d_ff)
    )


def leaf(tensor: Tensor) -> Tensor:
    """The same numbers as a contiguous parameter."""
    return tensor.detach().contiguous().requires_grad_()


def _in_our_layout(gradients: Sequence[Tensor]) -> Weights:
    return Weights(*gradients)


# ----------------------------------------------------------------------------------------------------------------- ours


def ours(shape: LayerShape, weights: Weights, *, backend: ExpertBackend, compiled: bool = False) -> Layer:
    """Our experts with one back-end."""
    with torch.device("meta"):
        experts = Experts(
            ExpertsConfig(n_experts=shape.n_experts, d_ff=shape.d_ff, backend=backend),
            FeedForwardConfig(activation="swiglu"),
            shape.d_model,
        )
    experts.w_in, experts.w_out = nn.Parameter(weights.w_in), nn.Parameter(weights.w_out)
    called: Callable[..., Tensor] = torch.compile(experts) if compiled else experts
    logits = torch.zeros(1, shape.n_experts, device=weights.w_in.device).expand(shape.tokens, -1)

    def forward(x: Tensor, selected: Tensor, combine: Tensor) -> Tensor:
        return called(x, Routing(logits=logits, scores=logits, selected=selected, weights=combine))

    return Layer(forward, [experts.w_in, experts.w_out], _in_our_layout)


def plain_loop(shape: LayerShape, weights: Weights) -> Layer:
    """What one writes first: sort the assignments, run each expert on its rows, add up."""
    w_in, w_out = leaf(weights.w_in), leaf(weights.w_out)

    def forward(x: Tensor, selected: Tensor, combine: Tensor) -> Tensor:
        order = selected.flatten().argsort(stable=True)
        token = order // shape.top_k
        counts = torch.bincount(selected.flatten(), minlength=shape.n_experts).tolist()
        outputs = []
        for expert, rows in enumerate(torch.split(x[token], counts)):
            gate, value = F.linear(rows, w_in[expert]).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * value, w_out[expert]))
        weighted = torch.cat(outputs) * combine.flatten()[order, None]
        return torch.zeros_like(weighted[: x.shape[0]]).index_add(0, token, weighted).to(x.dtype)

    return Layer(forward, [w_in, w_out], _in_our_layout)


class DenseBound:
    """The six matrix products of the layer, as if all assignments went to one expert: no routing, no activation."""

    def __init__(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> None:
        def draw(*size: int) -> Tensor:
            drawn: Tensor = torch.randn(size, device=device, dtype=dtype)
            return drawn / math.sqrt(size[-1])

        rows, width = shape.assignments, shape.d_ff
        self.x, self.inner = draw(rows, shape.d_model), draw(rows, width)
        self.grad_y, self.grad_hidden = draw(rows, shape.d_model), draw(rows, 2 * width)
        self.w_in, self.w_out = draw(2 * width, shape.d_model), draw(shape.d_model, width)

    def forward(self) -> None:
        """Two products."""
        torch.mm(self.x, self.w_in.t())
        torch.mm(self.inner, self.w_out.t())

    def both(self) -> None:
        """The two, and the four of the backward pass."""
        self.forward()
        torch.mm(self.grad_y, self.w_out)
        torch.mm(self.grad_y.t(), self.inner)
        torch.mm(self.grad_hidden, self.w_in)
        torch.mm(self.grad_hidden.t(), self.x)


# --------------------------------------------------------------------------------------------- peers, given the routing

BATCHED_LIMIT = 2 << 30
"""bytes of copied weights beyond which batched_mm is not tried"""


def transformers_experts(shape: LayerShape, weights: Weights, *, implementation: str, compiled: bool = False) -> Layer:
    """transformers' MixtralExperts with one of its implementations."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    copied = 3 * shape.assignments * shape.d_model * shape.d_ff * weights.w_in.element_size()
    if implementation == "batched_mm" and copied > BATCHED_LIMIT:
        raise UnfitError(f"batched_mm copies the weights of every assignment: {copied / 2**30:.0f} GiB here")
    described: dict[str, Any] = {"experts_implementation": implementation}
    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_local_experts=shape.n_experts,
        num_experts_per_tok=shape.top_k,
        **described,
    )
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = nn.Parameter(weights.w_in), nn.Parameter(weights.w_out)
    called: Callable[..., Tensor] = torch.compile(experts) if compiled else experts

    def forward(x: Tensor, selected: Tensor, combine: Tensor) -> Tensor:
        return called(x, selected, combine)

    return Layer(forward, [experts.gate_up_proj, experts.down_proj], _in_our_layout)


def torchtitan_experts(shape: LayerShape, weights: Weights, *, compiled: bool = False) -> Layer:
    """torchtitan's RoutedExperts, its counts of tokens included; computes in bf16 whatever x is."""
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    with torch.device("meta"):
        experts: Any = RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=shape.d_model, hidden_dim=shape.d_ff, num_experts=shape.n_experts),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=shape.n_experts, top_k=shape.top_k),
        ).build()
    inner = experts.inner_experts
    gate, value = weights.w_in.chunk(2, dim=1)
    inner.w1_EFD = nn.Parameter(gate.contiguous())
    inner.w3_EFD = nn.Parameter(value.contiguous())
    inner.w2_EDF = nn.Parameter(weights.w_out)

    def routed(x: Tensor, selected: Tensor, combine: Tensor) -> Tensor:
        chosen = torch.zeros(x.shape[0], shape.n_experts, dtype=torch.bool, device=x.device).scatter_(1, selected, True)
        y: Tensor = experts(x[None], combine[None], selected[None], chosen.sum(dim=0))
        return y[0]

    called: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(routed) if compiled else routed
    return Layer(
        called,
        [inner.w1_EFD, inner.w3_EFD, inner.w2_EDF],
        lambda gradients: Weights(torch.cat([gradients[0], gradients[1]], dim=1), gradients[2]),
    )


def liger_experts(shape: LayerShape, weights: Weights) -> Layer:
    """Liger-Kernel's fused mixture of experts."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    del shape
    w_in, w_out = leaf(weights.w_in), leaf(weights.w_out)

    def forward(x: Tensor, selected: Tensor, combine: Tensor) -> Tensor:
        y: Tensor = LigerFusedMoEFunction.apply(x, w_in, w_out, selected.int(), combine)
        return y

    return Layer(forward, [w_in, w_out], _in_our_layout)


def moe_ops_experts(shape: LayerShape, weights: Weights) -> Layer:
    """moe-ops' primitives put together as its readme does, with SwiGLU in torch."""
    from moe_ops import grouped_gemm, permute, unpermute

    require_bf16(weights, "moe-ops")
    w_in, w_out = leaf(weights.w_in), leaf(weights.w_out)

    def forward(x: Tensor, selected: Tensor, combine: Tensor) -> Tensor:
        rows, row_of, offsets = permute(x, selected.int(), E=shape.n_experts)
        gate, value = grouped_gemm(rows, w_in, offsets, trans_b=True).chunk(2, dim=-1)
        output = grouped_gemm(F.silu(gate) * value, w_out, offsets, trans_b=True)
        y: Tensor = unpermute(output, row_of, combine, num_tokens=x.shape[0], num_topK=shape.top_k)
        return y

    return Layer(forward, [w_in, w_out], _in_our_layout)


def require_bf16(weights: Weights, name: str) -> None:
    """Raises UnfitError for weights of another precision."""
    if weights.w_in.dtype != torch.bfloat16:
        raise UnfitError(f"{name} has no {weights.w_in.dtype}")


# ----------------------------------------------------------------------------- peers that route, and drop, on their own

GROUP = 256
"""tokens among which these count a capacity, as a sequence of that length would"""
OWN_ROUTER = "its own router is timed with it; checked against float32 with a capacity at which nothing is dropped"


def mixture_of_experts(shape: LayerShape, weights: Weights) -> Layer:
    """lucidrains' mixture-of-experts: top-2, capacity 2.5, GELU experts of two matrices of 1.5 F (as many weights)."""
    from mixture_of_experts import MoE

    _require_top_2(shape, "mixture-of-experts")
    like = weights.w_in
    with torch.device(like.device):
        torch.manual_seed(0)
        layer = MoE(
            shape.d_model,
            num_experts=shape.n_experts,
            hidden_dim=shape.d_ff * 3 // 2,
            activation=nn.GELU,
            second_policy_train="all",
            capacity_factor_train=2.5,
        )

    def dense(x: Tensor) -> Tensor:
        """Every expert on every token, in float32, weighted by the two largest gates."""
        inner = F.gelu(torch.einsum("td,edh->teh", x, layer.experts.w1.float()))
        outputs = torch.einsum("teh,ehd->ted", inner, layer.experts.w2.float())
        return _two_best(outputs, x @ layer.gate.w_gating.float())

    return _routing_on_its_own(layer, dense, shape, like.dtype)


def st_moe(shape: LayerShape, weights: Weights) -> Layer:
    """lucidrains' st-moe-pytorch: top-2, capacity 2.5, GEGLU experts of width F with biases."""
    from st_moe_pytorch import MoE

    _require_top_2(shape, "st-moe-pytorch is compared at top-2, and it")
    like = weights.w_in
    with torch.device(like.device):
        torch.manual_seed(0)
        layer = MoE(
            shape.d_model,
            num_experts=shape.n_experts,
            expert_hidden_mult=1.5 * shape.d_ff / shape.d_model,
            gating_top_n=2,
            threshold_train=1e-9,
            capacity_factor_train=2.5,
        )

    def dense(x: Tensor) -> Tensor:
        outputs = []
        for expert in layer.experts.experts:
            first, activation, second = expert.net
            value, gate = F.linear(x, first.weight.float(), first.bias.float()).chunk(2, dim=-1)
            inner = F.gelu(gate) * value * activation.mult_bias.float()
            outputs.append(F.linear(inner, second.weight.float(), second.bias.float()))
        return _two_best(torch.stack(outputs, dim=1), x @ layer.gate.to_gates.weight.float().t())

    return _routing_on_its_own(layer, dense, shape, like.dtype)


def _require_top_2(shape: LayerShape, name: str) -> None:
    if shape.top_k != 2:
        raise UnfitError(f"{name} has top-2 alone, and this shape has top-{shape.top_k}")


def _two_best(outputs: Tensor, logits: Tensor) -> Tensor:
    """Σ of the outputs [T, E, D] of the two experts with the largest gates, weighted by those, made to sum to 1."""
    gates, chosen = logits.softmax(dim=-1).topk(2, dim=-1)
    gates = gates / gates.sum(dim=-1, keepdim=True)
    picked = outputs.gather(1, chosen[..., None].expand(-1, -1, outputs.shape[-1]))
    return (picked * gates[..., None]).sum(dim=1)


def _routing_on_its_own(layer: Any, dense: Callable[[Tensor], Tensor], shape: LayerShape, dtype: torch.dtype) -> Layer:
    """A layer with a router, whose output without a capacity is ``dense`` of x.

    In bf16 under autocast, for its weights have to be float32: it mixes dtypes.
    """
    layer.train()
    gate = layer.gate

    def forward(x: Tensor, selected: Tensor, combine: Tensor) -> Tensor:
        del selected, combine
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            y: Tensor = layer(x.view(-1, GROUP, x.shape[-1]).float())[0]
        return y.view_as(x).to(dtype)

    def own_check(x: Tensor) -> dict[str, float]:
        usual = dict(vars(gate))
        gate.capacity_factor_train = float(shape.n_experts)
        gate.straight_through_dispatch_tensor = False  # st-moe-pytorch's gradient is another on purpose
        theirs, wanted = leaf(x[:GROUP]), leaf(x[:GROUP].float())
        y, wanted_y = forward(theirs, x, x), dense(wanted)
        [gradient] = torch.autograd.grad(y.float().square().sum(), theirs)
        [wanted_gradient] = torch.autograd.grad(wanted_y.square().sum(), wanted)
        vars(gate).update(usual)
        return {"output": relative_error(y, wanted_y), "gradient of x": relative_error(gradient, wanted_gradient)}

    return Layer(forward, list(layer.parameters()), None, own_check, OWN_ROUTER)
