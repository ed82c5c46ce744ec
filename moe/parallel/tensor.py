"""Every matrix cut over ranks, and the sequence between them (Shoeybi et al. 2019; Korthikanti et al. 2022).

Between blocks a rank has its part of each sequence. Attention and MLPs gather the whole, and compute with the heads or
hidden units that are here; what they return is a part of a sum, which goes back to the parts of the sequence.

A mixture gathers the sequence too, and every rank routes all of it, alike: so a routing, its losses and its counts are
what they are without this. Of each expert a rank has a part, as of an MLP.

Parameters that are whole on every rank see a part of the sequence or of the heads, so their gradients are parts of a
sum as well; all but the router's, which are the same everywhere.
"""

from dataclasses import replace
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.model.attention import Attention
from moe.model.feed_forward import GATED, FeedForward
from moe.model.moe_layer import MoELayer
from moe.model.routing import Routing
from moe.parallel.communication import gather_sequence, scale_gradient, sum_gradients, sum_to_sequence
from moe.parallel.split import Split
from moe.parallel.vocabulary import PartOfEmbedding, PartOfHead

ROWS, COLUMNS = Split(0, "tensor"), Split(1, "tensor")


class PartOfOutput(nn.Module):
    """A linear layer of which each rank has some columns: Σ over the ranks, or with ``to_sequence`` its own part.

    Without, it returns this rank's part of the sum, and of the bias.
    """

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup, *, to_sequence: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.group, self.to_sequence = group, to_sequence

    def forward(self, x: Float[Tensor, "*T d"]) -> Float[Tensor, "*t D"]:
        """Map what this rank has of each token."""
        y = F.linear(x, self.weight)
        if self.to_sequence:
            y = sum_to_sequence(y, self.group)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return y if self.bias is None else y + (self.bias / self.group.size()).to(y.dtype)


def splits_of_attention(attention: Attention, prefix: str) -> dict[str, Split]:
    """Heads are cut; a single key head serves every rank."""
    splits = {f"{prefix}query.weight": ROWS, f"{prefix}query.bias": ROWS, f"{prefix}output.weight": COLUMNS}
    if attention.key.out_features > attention.head_dim:
        splits |= {f"{prefix}{name}.{kind}": ROWS for name in ("key", "value") for kind in ("weight", "bias")}
    return splits


def splits_of_mlp(mlp: FeedForward, prefix: str) -> dict[str, Split]:
    """Hidden units are cut: of a gated MLP, those of the gate and those of the value."""
    rows = replace(ROWS, halves=2 if mlp.activation in GATED else 1)
    return {f"{prefix}w_in.weight": rows, f"{prefix}w_in.bias": rows, f"{prefix}w_out.weight": COLUMNS}


def splits_of_experts(layer: MoELayer, prefix: str) -> dict[str, Split]:
    """Hidden units of each expert are cut."""
    rows = Split(1, "tensor", halves=2 if layer.experts.activation in GATED else 1)
    return {f"{prefix}w_in": rows, f"{prefix}b_in": rows, f"{prefix}w_out": Split(2, "tensor")}


def splits_of_vocabulary(model: nn.Module) -> dict[str, Split]:
    """The rows of embedding and head are cut."""
    ends = [name for name in ("embedding", "head") if getattr(model, name, None) is not None]
    return {f"{name}.weight": ROWS for name in ends}


def divide_attention(attention: Attention, group: dist.ProcessGroup) -> None:
    """Have ``attention``, whose parameters are cut, take and return parts of the sequence."""
    attention.add_module("output", PartOfOutput(attention.output, group, to_sequence=True))
    attention.register_forward_pre_hook(_gather_first(group))


def divide_mlp(mlp: FeedForward, group: dist.ProcessGroup) -> None:
    """Have a dense layer, whose parameters are cut, take and return parts of the sequence."""
    mlp.add_module("w_out", PartOfOutput(mlp.w_out, group, to_sequence=True))
    mlp.register_forward_pre_hook(_gather_first(group))


def divide_mixture(layer: MoELayer, group: dist.ProcessGroup) -> None:
    """Have a mixture take and return parts of the sequence, and route all of it."""
    layer.register_forward_pre_hook(_gather_first(group))
    layer.register_forward_hook(_sum_first(group))
    layer.router.register_forward_pre_hook(_scale_gradient_of_first(1 / group.size()))
    if layer.shared is not None:
        mlp = layer.shared.mlp
        mlp.add_module("w_out", PartOfOutput(mlp.w_out, group, to_sequence=False))
    if layer.special is not None:
        layer.special.register_forward_pre_hook(_sum_gradient_of_weights(group))
        layer.special.register_forward_hook(lambda module, inputs, y: y / group.size())


def divide_vocabulary(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Have embedding and head, whose weights are cut, work with parts of the sequence."""
    embedding, head = getattr(model, "embedding", None), getattr(model, "head", None)
    if embedding is not None:
        model.embedding = PartOfEmbedding(embedding.weight, group)
    if head is not None:
        model.head = PartOfHead(head.weight, group)


def _gather_first(group: dist.ProcessGroup) -> Any:
    return lambda module, inputs: (gather_sequence(inputs[0], group), *inputs[1:])


def _sum_first(group: dist.ProcessGroup) -> Any:
    def hook(module: nn.Module, inputs: Any, output: tuple[Tensor, Routing]) -> tuple[Tensor, Routing]:
        return sum_to_sequence(output[0], group), output[1]

    return hook


def _scale_gradient_of_first(factor: float) -> Any:
    return lambda module, inputs: (scale_gradient(inputs[0], factor), *inputs[1:])


def _sum_gradient_of_weights(group: dist.ProcessGroup) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, Routing]) -> tuple[Tensor, Routing]:
        x, routing = inputs
        return x, replace(routing, weights=sum_gradients(routing.weights, group))

    return hook
