"""A model that is spread over processes: which part of it is here, and what its gradients still need.

The model computes as ever, on parameters that are parts: cut over the ranks that share experts and over those that
share matrices (:mod:`.split`), and what is left over data ranks, by FSDP. This is where the parts are accounted for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moe.parallel.gradients import add_over, gradient_of
from moe.parallel.mesh import Mesh
from moe.parallel.split import Over, Split

ATTRIBUTE = "_spread"


@dataclass
class Spread:
    """What :func:`~moe.parallel.parallelize.parallelize` made of a model."""

    model: nn.Module
    mesh: Mesh
    splits: dict[str, tuple[Split, ...]]
    """by parameter's name: how it was cut before FSDP, first cut first; not there: it was not"""
    experts: frozenset[str]
    """parameters of which there are others on the other ranks of the expert group"""
    summed: frozenset[str]
    """parameters whose gradients on the ranks of the tensor group are parts of a sum"""
    joined: frozenset[str]
    """parameters whose first two dimensions are one, here, between these cuts and FSDP's"""
    shapes: dict[str, torch.Size]
    """of the whole parameters"""
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """what is here of each parameter, as a plain tensor in the same memory: what an optimizer is given"""
    _own: dict[str, nn.Parameter] = field(default_factory=dict)
    """the model's parameters between two steps; while it computes, FSDP puts gathered ones in place of its own"""

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Take up the model's memory, once more where it has been given other (``to_empty``)."""
        self._own = dict(self.model.named_parameters())
        self.parameters = {
            name: nn.Parameter(parameter.to_local().detach(), parameter.requires_grad)
            if isinstance(parameter, DTensor)
            else parameter
            for name, parameter in self._own.items()
        }

    @torch.no_grad()
    def fill(self, draw: Callable[[str, Tensor], None], device: torch.device) -> None:
        """Give a model without memory its own on ``device``, and what is here of the values that ``draw`` gives.

        ``draw`` fills a whole parameter, by its name; there is one of them at a time.
        """
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for own, parameter in module.named_parameters(recurse=False):
                places.setdefault(parameter, []).append((module, own))
        self.model.to_empty(device=device)
        for (first, first_own), *others in places.values():  # which that has made parameters of their own
            for module, own in others:
                setattr(module, own, getattr(first, first_own))
        self.refresh()
        for name, here in self.parameters.items():
            whole = torch.empty(self.shapes[name], dtype=torch.promote_types(here.dtype, torch.float32))
            draw(name, whole)
            here.copy_(self.part(name, whole))

    def reshard(self) -> None:
        """Let FSDP drop what it has gathered; after a forward pass without a backward one, all ranks alike."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """Those that share every matrix."""
        return self.mesh.tensor_group

    @property
    def is_cut(self) -> bool:
        """Whether any parameter is not whole on every rank."""
        return bool(self.splits or self.mesh.pipeline_group) or any(
            isinstance(parameter, DTensor) for parameter in self._own.values()
        )

    def begin_backward(self, *, last: bool) -> None:
        """Say before the backward pass of a micro-batch whether it is the step's last: replicas wait for it."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_all_reduce(last)

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """After a step's backward passes: every gradient that of the mean of the data ranks' losses, in ``parameters``.

        FSDP has done its own. What is whole here is averaged over those who have the same; a missing gradient is 0.
        """
        whole: dict[str, list[nn.Parameter]] = {"dense": [], "experts": []}
        for name, parameter in self._own.items():
            if not parameter.requires_grad:
                continue
            here = self.parameters[name]
            if isinstance(parameter, DTensor):
                here.grad = gradient_of(parameter, here)
                if name in self.experts:  # FSDP took the mean over those with the same experts, not over all
                    here.grad *= 1 / self._expert_ranks
            else:
                here.grad = gradient_of(here, here)
                whole["experts" if name in self.experts else "dense"].append(here)
        add_over(self.mesh.data_group, whole["dense"], 1 / self.mesh.data_degree)
        add_over(self.mesh.expert_data_group, whole["experts"], 1 / self.mesh.data_degree)
        if self.tensor_group is not None:
            parts = [self.parameters[name] for name in sorted(self.summed) if self.parameters[name].requires_grad]
            add_over(self.tensor_group, parts, 1.0)

    def forget_gradients(self) -> None:
        """Let go of all gradients."""
        for parameter in (*self._own.values(), *self.parameters.values()):
            parameter.grad = None

    @torch.no_grad()
    def gradient_norm(self) -> Float[Tensor, ""]:
        """The norm of the whole gradient, the same on every rank: each part of it counts once."""
        squares: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
        for name, parameter in self._own.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                squares.setdefault(self._groups_that_cut(name, parameter), []).append(gradient)
        device = next(iter(self.parameters.values())).device
        total = torch.zeros((), dtype=torch.float32, device=device)
        for groups, gradients in squares.items():
            by_dtype: dict[torch.dtype, list[Tensor]] = {}
            for gradient in gradients:
                by_dtype.setdefault(gradient.dtype, []).append(gradient)
            norms = [norm for same in by_dtype.values() for norm in torch._foreach_norm(same, 2, _sum_dtype(same[0]))]
            square = torch.stack([norm.to(torch.promote_types(norm.dtype, torch.float32)) for norm in norms]).square()
            part = square.sum()
            for group in groups:
                dist.all_reduce(part, group=group)
            total = total + part
        return total.sqrt()

    def whole(self, name: str, part: Tensor | None = None) -> Tensor:
        """The whole of a parameter, or of a tensor ``part`` that is cut as it is, on every rank; all must ask."""
        parameter = self._own[name]
        here = self.parameters[name].detach() if part is None else part
        if isinstance(parameter, DTensor):
            here = DTensor.from_local(
                here, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            ).full_tensor()
        if name in self.joined:
            here = here.view(-1, *self._cut_shape(name)[1:])
        for split in reversed(self.splits.get(name, ())):
            group = self.group(split.over)
            parts = [torch.empty_like(here) for _ in range(group.size())]
            dist.all_gather(parts, here.contiguous(), group=group)
            here = split.join(parts)
        return here

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What belongs here of the whole of a parameter, or of a tensor of its shape."""
        for split in self.splits.get(name, ()):
            group = self.group(split.over)
            whole = split.cut(whole, group.rank(), group.size())
        if name in self.joined:
            whole = whole.flatten(0, 1)
        parameter = self._own[name]
        if isinstance(parameter, DTensor):
            return shard_of(whole, parameter)
        return whole

    def own(self, name: str) -> nn.Parameter:
        """The model's parameter, as it is between two steps."""
        return self._own[name]

    def keeps(self, name: str) -> bool:
        """Whether, of all who have what is here of a parameter, this process is the first."""
        mesh, splits, parameter = self.mesh, self.splits.get(name, ()), self._own[name]
        if self.is_copy(name):
            return False
        if mesh.tensor_rank != 0 and not any(split.over == "tensor" for split in splits):
            return False
        if isinstance(parameter, DTensor):
            ranks = parameter.device_mesh
            return all(
                placement.is_shard() or ranks.get_local_rank(i) == 0 for i, placement in enumerate(parameter.placements)
            )
        if name in self.experts:
            assert mesh.sparse is not None
            return mesh.sparse.get_local_rank("expert_data") == 0
        return mesh.data_rank == 0

    def is_copy(self, name: str) -> bool:
        """Whether the first stage of a pipeline has this parameter too: the last one's tied embedding."""
        return self.mesh.pipeline_rank != 0 and name == "embedding.weight"

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of those that have its blocks."""
        return self.mesh.data_rank == 0 and self.mesh.tensor_rank == 0

    def group(self, over: Over) -> dist.ProcessGroup:
        """The ranks that have the other parts."""
        group = self.mesh.expert_group if over == "expert" else self.mesh.tensor_group
        assert group is not None
        return group

    def _cut_shape(self, name: str) -> list[int]:
        """The shape of a parameter after the cuts, before FSDP's."""
        shape = list(self.shapes[name])
        for split in self.splits.get(name, ()):
            shape[split.dim] //= self.group(split.over).size()
        return shape

    @property
    def _expert_ranks(self) -> int:
        return 1 if self.mesh.expert_group is None else self.mesh.expert_group.size()

    def _groups_that_cut(self, name: str, parameter: nn.Parameter) -> tuple[dist.ProcessGroup, ...]:
        groups = [self.group(split.over) for split in self.splits.get(name, ())]
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            groups += [mesh.get_group(i) for i, placement in enumerate(parameter.placements) if placement.is_shard()]
        return tuple(groups)


def spread_of(model: nn.Module) -> Spread | None:
    """How ``model`` is spread; None for a model that one process has alone."""
    return cast(Spread | None, getattr(model, ATTRIBUTE, None))


def shard_of(whole: Tensor, parameter: DTensor) -> Tensor:
    """What FSDP would leave here of ``whole``, as it did of ``parameter``: equal pieces, the last ones shorter."""
    for i, placement in enumerate(parameter.placements):
        if placement.is_shard():
            dim = cast(Any, placement).dim
            pieces = whole.chunk(parameter.device_mesh.size(i), dim=dim)
            rank = parameter.device_mesh.get_local_rank(i)
            empty = whole.narrow(dim, 0, 0)
            whole = pieces[rank] if rank < len(pieces) else empty
    return whole


def _sum_dtype(gradient: Tensor) -> torch.dtype:
    """bfloat16 gradients are squared in float32: two digits would be left."""
    return torch.promote_types(gradient.dtype, torch.float32)
