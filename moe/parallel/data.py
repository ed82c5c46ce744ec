"""Parameters cut over the ranks that share a batch, by FSDP2: gathered block by block when they are needed.

What decides where a token goes, and gains (:data:`~moe.model.weight_dtype.IN_FLOAT32`), are left whole: they are small,
and stay float32 while the matrices are gathered in bfloat16.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from moe.config import Precision
from moe.model.transformer import Block
from moe.model.weight_dtype import IN_FLOAT32
from moe.parallel.expert import PartOfExperts
from moe.parallel.mesh import Mesh


def shard_over_data(model: nn.Module, mesh: Mesh, precision: Precision) -> None:
    """Cut what ``mesh`` says over data ranks, matrices of blocks gathered in the dtype of ``precision``'s products.

    Experts that are spread over ranks are cut over those that have the same ones, all others over all.
    """
    assert mesh.dense_shards is not None
    whole = {parameter for name, parameter in model.named_parameters() if any(part in name for part in IN_FLOAT32)}
    dense, kept = mesh.dense_shards, mesh.layout.reshard
    in_blocks = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks_of(model):
        experts = next((module for module in block.modules() if isinstance(module, PartOfExperts)), None)
        if experts is not None and mesh.sparse is not None:
            if mesh.expert_shards is None:
                whole |= set(experts.parameters())
            else:
                _cut(experts, mesh.expert_shards, in_blocks, whole, reshard=kept)
        _cut(block, dense, in_blocks, whole, reshard=kept)
    outside = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    # The head is used after the forward pass is over.
    _cut(model, dense, outside, whole, reshard=False)
    if hasattr(model, "part"):
        register_fsdp_forward_method(model, "part")


def blocks_of(model: nn.Module) -> Iterator[Block]:
    """The blocks of a model, or of a stage of one."""
    return (module for module in model.modules() if isinstance(module, Block))


def _cut(
    module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, whole: set[nn.Parameter], *, reshard: bool
) -> None:
    ranks = mesh.size(mesh.ndim - 1)
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=reshard,
        shard_placement_fn=lambda parameter: Shard(_dimension(parameter, ranks)),
        mp_policy=policy,
        ignored_params=whole,
    )


def divisible_dimensions(parameter: nn.Parameter, ranks: int) -> list[int]:
    """The dimensions that so many ranks can share evenly."""
    return [dim for dim, size in enumerate(parameter.shape) if size % ranks == 0]


def _dimension(parameter: nn.Parameter, ranks: int) -> int:
    """The first dimension that the ranks divide; the first of all, unevenly, where they divide none."""
    return next(iter(divisible_dimensions(parameter, ranks)), 0)
