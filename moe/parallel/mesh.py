"""Which processes work together on what: the groups that a layout makes of them, as torch's device meshes.

Processes = pipeline x data x tensor, and experts are spread within the data ranks: data = expert_data x expert, with
the ranks of one set of experts side by side. So the ranks that hold the same experts are as many as expert_data.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """This process's place in the layout. A group of one process is None: it has nothing to say to itself."""

    layout: ParallelConfig
    """with ``data`` filled in"""
    ranks: DeviceMesh
    """all processes: pipeline, data, tensor"""
    sparse: DeviceMesh | None
    """the same processes as the experts see them, where they are spread: pipeline, expert_data, expert, tensor"""
    dense_shards: DeviceMesh | None
    """over which FSDP cuts what is no expert: [shards], or for hybrid [replicas, shards]; None: it does not"""
    expert_shards: DeviceMesh | None
    """the same for experts that are spread over ranks; None where each rank keeps its experts whole"""

    @property
    def data_degree(self) -> int:
        """Ranks that share a batch."""
        assert self.layout.data is not None
        return self.layout.data

    @property
    def data_rank(self) -> int:
        """This process's number among those that share a batch."""
        return self.ranks.get_local_rank("data")

    @property
    def tensor_rank(self) -> int:
        """The part of each matrix that is here."""
        return self.ranks.get_local_rank("tensor")

    @property
    def pipeline_rank(self) -> int:
        """The stages that are here."""
        return self.ranks.get_local_rank("pipeline")

    @property
    def expert_rank(self) -> int:
        """The part of the experts that is here."""
        return 0 if self.sparse is None else self.sparse.get_local_rank("expert")

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """Those that share a batch."""
        return _group(self.ranks, "data")

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """Those that share every matrix."""
        return _group(self.ranks, "tensor")

    @property
    def pipeline_group(self) -> dist.ProcessGroup | None:
        """Those that have the other blocks."""
        return _group(self.ranks, "pipeline")

    @property
    def expert_group(self) -> dist.ProcessGroup | None:
        """Those that have the other experts."""
        return None if self.sparse is None else _group(self.sparse, "expert")

    @property
    def expert_data_group(self) -> dist.ProcessGroup | None:
        """Those that have the same experts."""
        return self.data_group if self.sparse is None else _group(self.sparse, "expert_data")


def build_mesh(layout: ParallelConfig, processes: int, device_type: str) -> Mesh:
    """The groups of ``layout`` over so many processes, which have joined; every one of them must call this.

    Raises ConfigError where the sizes do not multiply to the processes.
    """
    layout = layout.over(processes)
    pipeline, data, tensor, expert = layout.pipeline, layout.data, layout.tensor, layout.expert
    assert data is not None
    ranks = init_device_mesh(device_type, (pipeline, data, tensor), mesh_dim_names=("pipeline", "data", "tensor"))
    sparse = None
    if expert > 1:
        names = ("pipeline", "expert_data", "expert", "tensor")
        sparse = init_device_mesh(device_type, (pipeline, data // expert, expert, tensor), mesh_dim_names=names)
    dense_shards = expert_shards = None
    if layout.shard == "full" and data > 1:
        dense_shards = ranks["data"]
        expert_shards = sparse["expert_data"] if sparse is not None and data > expert else None
    if layout.shard == "hybrid" and (group := layout.shard_group or 1) > 1:
        dense_shards = _replicas_and_shards(device_type, layout, group, 1)
        if sparse is not None and group > expert:
            expert_shards = _replicas_and_shards(device_type, layout, group // expert, expert)
    return Mesh(layout, ranks, sparse, dense_shards, expert_shards)


def _replicas_and_shards(device_type: str, layout: ParallelConfig, shards: int, inner: int) -> DeviceMesh:
    """Groups of ``shards`` data ranks that are ``inner`` apart, and what repeats them."""
    assert layout.data is not None
    replicas = layout.data // (shards * inner)
    shape, names = (layout.pipeline, replicas, shards, inner, layout.tensor), ("p", "replica", "shard", "inner", "t")
    return init_device_mesh(device_type, shape, mesh_dim_names=names)["replica", "shard"]


def _group(mesh: DeviceMesh, name: str) -> dist.ProcessGroup | None:
    assert mesh.mesh_dim_names is not None
    return mesh.get_group(name) if mesh.size(mesh.mesh_dim_names.index(name)) > 1 else None
