"""From a model as one process has it to the part of it that this process has, by the configured layout.

The files of the model know nothing of this: modules are replaced, or given hooks, from outside, and keep the names of
their parameters.
"""

from typing import TypeVar

import torch
from torch import nn

from moe.config import Config
from moe.model.attention import Attention
from moe.model.feed_forward import FeedForward
from moe.model.moe_layer import MoELayer
from moe.parallel import tensor
from moe.parallel.data import blocks_of, divisible_dimensions, shard_over_data
from moe.parallel.expert import PartOfExperts, SharedBeside
from moe.parallel.mesh import Mesh
from moe.parallel.split import Split
from moe.parallel.spread import ATTRIBUTE, Spread

SEE_ALL_TOKENS_ALIKE = (".router.",)
"""parameters, as parts of names, whose gradient is the same on all ranks that share matrices, and no part of a sum"""


Model = TypeVar("Model", bound=nn.Module)


def parallelize(model: Model, config: Config, mesh: Mesh, device: torch.device, *, balanced: bool = False) -> Model:
    """Leave of ``model`` what belongs on this process, on ``device``, and have it compute with the others.

    ``model`` is a :class:`~moe.model.transformer.Transformer`, or a pipeline's stage: a module with some of its blocks
    and perhaps ``embedding``, ``norm`` and ``head``. All ranks give the same; it may be on the meta device, or made of
    fake tensors. With ``balanced`` it is taken, and not asked, that every expert gets as many tokens as any other,
    since such tensors cannot say. :func:`~moe.parallel.spread.spread_of` the model says which part is here.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    splits = _splits(model, mesh)
    _cut(model, splits, mesh)
    summed = _summed(model, splits) if mesh.tensor_group is not None else frozenset()
    experts = frozenset(name for name, own in splits.items() if any(split.over == "expert" for split in own))
    if mesh.tensor_group is not None:
        _divide(model, mesh)
    _replace_experts(model, mesh, balanced)
    joined = frozenset(
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, PartOfExperts) and module.has_joined_rows
        for own, _ in module.named_parameters()
    )
    if {parameter.device for parameter in model.parameters()} - {device, torch.device("meta")}:
        model.to(device)
    if mesh.dense_shards is not None:
        shard_over_data(model, mesh, config.training.precision)
    object.__setattr__(model, ATTRIBUTE, Spread(model, mesh, splits, experts, summed, joined, shapes))
    return model


def _splits(model: nn.Module, mesh: Mesh) -> dict[str, tuple[Split, ...]]:
    """How each parameter is to be cut: experts by number first, then matrices."""
    by_expert: dict[str, Split] = {}
    by_matrix: dict[str, Split] = tensor.splits_of_vocabulary(model)
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            by_expert |= {f"{name}.experts.{own}": Split(0, "expert") for own, _ in module.experts.named_parameters()}
            by_matrix |= tensor.splits_of_experts(module, f"{name}.experts.")
        elif isinstance(module, FeedForward):
            by_matrix |= tensor.splits_of_mlp(module, f"{name}.")
        elif isinstance(module, Attention):
            by_matrix |= tensor.splits_of_attention(module, f"{name}.")
    splits: dict[str, tuple[Split, ...]] = {}
    for wanted, group in ((by_expert, mesh.expert_group), (by_matrix, mesh.tensor_group)):
        for name in [name for name, _ in model.named_parameters() if name in wanted and group is not None]:
            splits[name] = (*splits.get(name, ()), wanted[name])
    return splits


def _cut(model: nn.Module, splits: dict[str, tuple[Split, ...]], mesh: Mesh) -> None:
    """Put in place of each parameter what belongs here of it. A parameter of two names stays one."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            if names.get(parameter) not in splits:
                continue
            if parameter not in replaced:
                part = parameter.detach()
                for split in splits[names[parameter]]:
                    group = mesh.expert_group if split.over == "expert" else mesh.tensor_group
                    assert group is not None
                    part = split.cut(part, group.rank(), group.size())
                replaced[parameter] = nn.Parameter(part, parameter.requires_grad)
            setattr(module, own, replaced[parameter])


def _summed(model: nn.Module, splits: dict[str, tuple[Split, ...]]) -> frozenset[str]:
    """The parameters that every rank of the tensor group has whole, and gives a part of the gradient."""
    return frozenset(
        name
        for name, _ in model.named_parameters()
        if not any(split.over == "tensor" for split in splits.get(name, ()))
        and not any(part in name for part in SEE_ALL_TOKENS_ALIKE)
    )


def _divide(model: nn.Module, mesh: Mesh) -> None:
    group = mesh.tensor_group
    assert group is not None
    for block in blocks_of(model):
        assert isinstance(block.attention, Attention)  # the configuration refuses latent attention here
        tensor.divide_attention(block.attention, group)
        if isinstance(block.feed_forward, MoELayer):
            tensor.divide_mixture(block.feed_forward, group)
        else:
            tensor.divide_mlp(block.feed_forward, group)
    tensor.divide_vocabulary(model, group)


def _replace_experts(model: nn.Module, mesh: Mesh, balanced: bool) -> None:
    """Where experts are spread, or so few that FSDP could not cut them evenly."""
    for block in blocks_of(model):
        layer = block.feed_forward
        if not isinstance(layer, MoELayer):
            continue
        shards = mesh.dense_shards if mesh.expert_group is None else mesh.expert_shards
        uneven = shards is not None and not all(
            divisible_dimensions(parameter, shards.size(shards.ndim - 1)) for parameter in layer.experts.parameters()
        )
        if mesh.tensor_group is None and mesh.expert_group is None and not uneven:
            continue
        beside = None
        # Who weighs first gives the experts other rows than the shared ones see.
        weighs_first = layer.router.config.apply == "before"
        if layer.shared is not None and mesh.expert_group is not None and not weighs_first:
            layer.shared = beside = SharedBeside(layer.shared)
        layer.experts = PartOfExperts(
            layer.experts,
            expert_group=mesh.expert_group,
            tensor_group=mesh.tensor_group,
            beside=beside,
            balanced=balanced,
        )
        if uneven:
            layer.experts.join_rows()
