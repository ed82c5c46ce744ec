"""How a model is laid over devices, and which part of it each device then has."""

import re
from dataclasses import dataclass, replace

from moe.config import ModelConfig, ParallelConfig, parse_layout
from moe.config.checks import at_least, require
from moe.config.parameters import attention_parameters, mlp_parameters


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Devices = tensor x pipeline x data; experts are spread over ``expert`` of the data ranks, so they count once."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1
    stages: int = 1
    """stages a pipeline rank has, interleaved"""
    zero: int = 0
    """what data ranks share out instead of repeating it (Rajbhandari et al. 2020): 0 nothing, 1 the optimizer's state,
    2 gradients too, 3 weights too (FSDP)"""
    shard_group: int | None = None
    """data ranks that share; None: all of them"""

    def __post_init__(self) -> None:
        at_least(self, 1, "tensor", "pipeline", "data", "expert", "stages", "shard_group")
        require(self.zero in (0, 1, 2, 3), "zero", f"is {self.zero}, and must be 0, 1, 2 or 3")
        require(self.data % self.expert == 0, "expert", f"is {self.expert}, and must divide the {self.data} data ranks")

    @property
    def devices(self) -> int:
        """How many it takes."""
        return self.tensor * self.pipeline * self.data

    @property
    def sharing(self) -> int:
        """Data ranks that share out what ZeRO shares out."""
        return 1 if self.zero == 0 else self.shard_group or self.data

    def sharing_experts(self) -> int:
        """Of those, the ones that have the same experts."""
        return max(1, self.sharing // self.expert)

    def words(self) -> str:
        """In short: tp8,pp15,dp208,ep16,zero1."""
        sizes = {"tp": self.tensor, "pp": self.pipeline, "dp": self.data, "ep": self.expert, "vp": self.stages}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return ",".join([*words, *([f"zero{self.zero}"] if self.zero else [])]) or "dp1"


def layout_of(parallel: ParallelConfig) -> Layout:
    """The layout of a run; ``data`` is 1 where the run takes what there is."""
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=parallel.data or 1,
        expert=parallel.expert,
        stages=parallel.stages,
        zero=0 if parallel.shard == "replicate" else 3,
        shard_group=parallel.shard_group,
    )


def layout_in_words(text: str, base: ParallelConfig) -> Layout:
    """The layout that ``text`` names over that of a run: the words of :func:`~moe.config.parse_layout`, and ``zero1``
    or ``zero2``, which other engines have. Raises ConfigError for what is no layout."""
    words = [word.strip() for word in text.split(",")]
    levels = [word for word in words if re.fullmatch(r"zero[0-3]", word)]
    layout = layout_of(parse_layout(",".join(word for word in words if word not in levels), base))
    return replace(layout, zero=int(levels[-1][-1])) if levels else layout


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The parameters that one device works with, after tensor and expert parallelism and before any sharing."""

    dense: int
    """of everything but routed experts"""
    experts: int
    precise: int
    """of `dense`, those that stay float32 whatever the weights are: routers, norms, special experts"""
    has_head: bool
    largest_block: int
    """parameters of the largest of its blocks"""

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts


def layers_of(model: ModelConfig, layout: Layout, rank: int) -> list[int]:
    """The blocks of a pipeline rank: those of each of its stages, which are as even as can be, early ones longer."""
    parts = layout.pipeline * layout.stages
    size, extra = divmod(model.n_layers, parts)
    firsts = {stage: stage * size + min(stage, extra) for stage in range(rank, parts, layout.pipeline)}
    return [layer for stage, first in firsts.items() for layer in range(first, first + size + (stage < extra))]


def slice_of(model: ModelConfig, layout: Layout, stage: int) -> Slice:
    """What a device of pipeline rank ``stage`` has."""
    layers = layers_of(model, layout, stage)
    counted, tensor, d_model = model.parameters(), layout.tensor, model.d_model
    norm = counted.norms // (2 * model.n_layers + 1)
    mixtures = max(1, len(model.moe_layers))
    router = (counted.router + counted.special) // mixtures
    attention = _ceil(attention_parameters(model.attention, d_model), tensor) + _repeated_keys(model, tensor)
    dense = experts = precise = largest = 0
    for layer in layers:
        block_dense, block_experts = attention + 2 * norm, 0
        precise += 2 * norm
        if layer in model.moe_layers:
            block_experts = _ceil(model.experts.n_experts * counted.per_expert, tensor * layout.expert)
            block_dense += router + _ceil(counted.shared // mixtures, tensor)
            precise += router
        else:
            block_dense += _ceil(mlp_parameters(model.feed_forward, d_model, model.dense_width(layer)), tensor)
        dense, experts = dense + block_dense, experts + block_experts
        largest = max(largest, block_dense + block_experts)
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        dense += _ceil(counted.embedding, tensor) + counted.positions
    if last:
        tied_elsewhere = counted.embedding if model.tie_embeddings and not first else 0
        dense += _ceil(counted.head + tied_elsewhere, tensor) + norm
        precise += norm
    return Slice(
        dense=dense,
        experts=experts,
        precise=precise,
        has_head=last,
        largest_block=largest,
    )


def _repeated_keys(model: ModelConfig, tensor: int) -> int:
    """Parameters of key and value heads that are on every tensor rank, because there are fewer heads than ranks."""
    attention = model.attention
    if attention.is_latent or attention.kv_heads >= tensor:
        return 0
    width = attention.kv_heads * attention.head_dim
    whole = 2 * (model.d_model + attention.bias) * width
    return whole - whole // tensor


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
