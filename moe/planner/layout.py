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


@dataclass(frozen=True)
class Share:
    """Parameters that one device works with, of a block or of all it has, after tensor and expert parallelism and
    before any sharing."""

    dense: int
    """of everything but routed experts"""
    experts: int
    precise: int
    """of `dense`, those that stay float32 whatever the weights are: routers, norms, special experts"""

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts

    def __add__(self, other: "Share") -> "Share":
        return Share(self.dense + other.dense, self.experts + other.experts, self.precise + other.precise)


def layers_of(model: ModelConfig, layout: Layout, rank: int) -> list[int]:
    """The blocks of a pipeline rank: those of each of its stages, as even as can be, what is left over from the second
    stage on (as moe/parallel/pipeline.py cuts them)."""
    parts = layout.pipeline * layout.stages
    size, extra = divmod(model.n_layers, parts)
    ends = [sum(size + (1 <= stage <= extra) for stage in range(end + 1)) for end in range(parts)]
    return [
        layer
        for stage in range(rank, parts, layout.pipeline)
        for layer in range(ends[stage - 1] if stage else 0, ends[stage])
    ]


def share_of(model: ModelConfig, layout: Layout, rank: int) -> Share:
    """What a device of pipeline rank ``rank`` has: its blocks, at the ends embedding and head as well."""
    layers = layers_of(model, layout, rank)
    alike = {model.is_moe_layer(layer): layer for layer in layers}
    of_kind = {kind: share_of_block(model, layout, layer) for kind, layer in alike.items()}
    share = share_of_embedding(model, layout, rank) + share_of_head(model, layout, rank)
    return sum((of_kind[model.is_moe_layer(layer)] for layer in layers), share)


def share_of_block(model: ModelConfig, layout: Layout, layer: int) -> Share:
    """One block's."""
    counted, tensor, d_model = model.parameters(), layout.tensor, model.d_model
    norms = 2 * _norm(model)
    attention = _ceil(attention_parameters(model.attention, d_model), tensor) + _repeated_keys(model, tensor)
    if layer not in model.moe_layers:
        mlp = _ceil(mlp_parameters(model.feed_forward, d_model, model.dense_width(layer)), tensor)
        return Share(attention + norms + mlp, 0, norms)
    mixtures = len(model.moe_layers)
    router = (counted.router + counted.special) // mixtures
    shared = _ceil(counted.shared // mixtures, tensor)
    experts = _ceil(model.experts.n_experts * counted.per_expert, tensor * layout.expert)
    return Share(attention + norms + router + shared, experts, norms + router)


def share_of_embedding(model: ModelConfig, layout: Layout, rank: int) -> Share:
    """The embedding's, which the first pipeline rank has."""
    counted = model.parameters()
    return Share(_ceil(counted.embedding, layout.tensor) + counted.positions if rank == 0 else 0, 0, 0)


def share_of_head(model: ModelConfig, layout: Layout, rank: int) -> Share:
    """The head's and the last norm's, which the last pipeline rank has; a tied head is there once more if that is not
    the first."""
    if rank != layout.pipeline - 1:
        return Share(0, 0, 0)
    counted = model.parameters()
    again = counted.embedding if model.tie_embeddings and rank > 0 else 0
    return Share(_ceil(counted.head + again, layout.tensor) + _norm(model), 0, _norm(model))


def _norm(model: ModelConfig) -> int:
    return model.parameters().norms // (2 * model.n_layers + 1)


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
