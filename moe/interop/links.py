"""Where each tensor of theirs lies among ours: by name and by declared piece, never guessed from a shape.

A table is a list of :class:`Link`. ``{layer}`` in a name counts the blocks, ``{expert}`` in one of theirs the experts,
which are one stack here. A link whose tensor of ours the model does not have (a bias, a norm, the MLP of a dense layer
where there is a mixture) is left out, so one table serves every variant of a family.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.model.transformer import Transformer

Part = Callable[[Tensor, ModelConfig], Tensor]
"""the piece of a tensor of ours that theirs is: a view, where models are read as well as written"""
Shape = tuple[int, ...]
ShapeOf = Callable[[ModelConfig], Shape]

SELECTION_BIAS = "router.selection_bias"
"""end of the name of a tensor that stays float32: bfloat16, which has no numbers between 0.5 and 0.504, would make it
another one"""


def whole(tensor: Tensor, config: ModelConfig) -> Tensor:
    """All of it."""
    return tensor


def gate_rows(tensor: Tensor, config: ModelConfig) -> Tensor:
    """Of W_in of a SwiGLU, [2F, D] or [E, 2F, D], what is multiplied and then activated: the first F rows."""
    return tensor.chunk(2, dim=-2)[0]


def value_rows(tensor: Tensor, config: ModelConfig) -> Tensor:
    """Of W_in of a SwiGLU, what the activated gate multiplies: the last F rows."""
    return tensor.chunk(2, dim=-2)[1]


def gate_bias(tensor: Tensor, config: ModelConfig) -> Tensor:
    """The bias of :func:`gate_rows`."""
    return tensor.chunk(2, dim=-1)[0]


def value_bias(tensor: Tensor, config: ModelConfig) -> Tensor:
    """The bias of :func:`value_rows`."""
    return tensor.chunk(2, dim=-1)[1]


def transposed(part: Part = whole) -> Part:
    """A piece as ``x W`` wants it, where ours is as ``x Wᵀ`` does: inputs before outputs."""
    return lambda tensor, config: part(tensor, config).transpose(-1, -2)


def third(number: int) -> Part:
    """One of three equal pieces of theirs, side by side in its last dimension."""
    return lambda tensor, config: tensor.chunk(3, dim=-1)[number]


def every_second(first: int) -> Part:
    """Columns ``first``, ``first`` + 2, ... of theirs: gate and value alternate."""
    return lambda tensor, config: tensor[..., first::2]


@dataclass(frozen=True)
class Link:
    """One tensor of theirs, and the piece of a tensor of ours that it is."""

    theirs: str | None
    """its name; None: they have no place for this tensor of ours, which must be all zeros"""
    ours: str
    """name of our tensor; an expert of it, where ``theirs`` counts them"""
    part: Part = whole
    """which piece of that tensor, or of that expert"""
    instead: str | None = None
    """the tensor that is meant where our model does not have that one"""
    place: Part = whole
    """which piece of theirs that is, where theirs holds several of ours"""
    shape: ShapeOf | None = None
    """of theirs, then"""
    zeros: ShapeOf | None = None
    """where our model has no such tensor, theirs is made of zeros, of this shape, in every mixture layer"""


@dataclass(frozen=True)
class Piece:
    """A :class:`Link` of one layer and one expert."""

    theirs: str | None
    ours: str | None
    """None: theirs is zeros"""
    view: Callable[[Tensor], Tensor]
    """from our tensor to the piece"""
    shape: Shape
    """of theirs"""
    stays_float32: bool
    """whether it is float32 whatever the rest is"""
    place: Callable[[Tensor], Tensor] | None = None
    """from theirs to where in it the piece lies; None: it is all of theirs"""


def pieces(links: Sequence[Link], config: ModelConfig) -> list[Piece]:
    """Every tensor of theirs, of a model with ``config``, and what it is of ours, in the order of the layers."""
    ours = shapes(config)
    found: list[Piece] = []
    for layer in range(config.n_layers):
        for link in links:
            if layer == 0 or "{layer}" in link.ours:
                found += _of_layer(link, layer, config, ours)
    return found


def _of_layer(link: Link, layer: int, config: ModelConfig, ours: Mapping[str, Tensor]) -> list[Piece]:
    name, stays_float32 = link.ours.format(layer=layer), link.ours.endswith(SELECTION_BIAS)
    if name not in ours and link.instead is not None:
        name = link.instead.format(layer=layer)
    if name not in ours:
        if link.zeros is None or link.theirs is None or ("{layer}" in link.ours and layer not in config.moe_layers):
            return []
        return [Piece(link.theirs.format(layer=layer), None, lambda tensor: tensor, link.zeros(config), stays_float32)]
    if link.theirs is None:
        return [Piece(None, name, lambda tensor: tensor, tuple(ours[name].shape), stays_float32)]
    counts_experts = "{expert}" in link.theirs
    experts: Sequence[int | None] = range(config.experts.n_experts) if counts_experts else [None]
    found = []
    for expert in experts:

        def view(tensor: Tensor, expert: int | None = expert) -> Tensor:
            return link.part(tensor if expert is None else tensor[expert], config)

        theirs = link.theirs.format(layer=layer, expert=expert)
        shape, place = tuple(view(ours[name]).shape), None
        if link.shape is not None:
            shape, place = link.shape(config), lambda tensor: link.place(tensor, config)
        found.append(Piece(theirs, name, view, shape, stays_float32, place))
    return found


def shapes(config: ModelConfig) -> dict[str, Tensor]:
    """Every parameter and buffer of a model by its name in a checkpoint, without memory; a tied one once."""
    with torch.device("meta"):
        model = Transformer(config)
    first_names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first_names.setdefault(id(tensor), name)
    return {name: tensor for name, tensor in model.state_dict().items() if name in first_names.values()}


def homeless(links: Sequence[Link], config: ModelConfig) -> list[str]:
    """Our tensors that the links do not account for, or only in part."""
    ours = shapes(config)
    left = {name: tensor.numel() for name, tensor in ours.items()}
    for piece in pieces(links, config):
        if piece.ours is not None:
            left[piece.ours] -= piece.view(ours[piece.ours]).numel()
    return [name for name, elements in left.items() if elements > 0]
