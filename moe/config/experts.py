"""Settings of the feed-forward layers: dense, expert, shared and special."""

from dataclasses import dataclass
from typing import Literal

from moe.config.checks import at_least, require

Activation = Literal["swiglu", "swiglu_clamped", "gelu", "gelu_tanh", "relu"]
ExpertBackend = Literal["auto", "reference", "grouped", "segments", "fused"]


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """What every feed-forward layer shares (dense, expert and shared expert), and the width of the dense ones."""

    activation: Activation = "swiglu"
    """swiglu (three matrices; swiglu_clamped is that of GPT-OSS), or gelu / gelu_tanh (GPT-2) / relu (two matrices)"""
    bias: bool = False
    """biases on both projections"""
    d_ff: int | None = None
    """hidden width of dense layers; null: the width that a token sees in an MoE layer (top_k + shared experts)"""

    def __post_init__(self) -> None:
        at_least(self, 1, "d_ff")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The expert MLPs of a mixture-of-experts layer, and which layers are one."""

    n_experts: int = 16
    """experts a layer"""
    d_ff: int = 256
    """hidden width of one expert"""
    every: int = 1
    """an MoE layer in every n-th block (the last of each n), the others dense"""
    first_dense: int = 0
    """the first n blocks are dense whatever `every` says"""
    backend: ExpertBackend = "auto"
    """how experts are computed: auto (the fastest here), reference (loop), grouped, segments (CPU), fused (Triton)"""

    def __post_init__(self) -> None:
        at_least(self, 1, "n_experts", "d_ff", "every")
        at_least(self, 0, "first_dense")


@dataclass(frozen=True, kw_only=True)
class SharedExpertsConfig:
    """Experts that every token passes through, beside the routed ones."""

    n_experts: int = 0
    """shared experts (one MLP of n_experts x d_ff)"""
    d_ff: int | None = None
    """hidden width of one shared expert; null: that of a routed expert"""
    gated: bool = False
    """weigh the shared output with a sigmoid gate per token (Qwen2-MoE)"""

    def __post_init__(self) -> None:
        at_least(self, 0, "n_experts")
        at_least(self, 1, "d_ff")
        require(not self.gated or self.n_experts > 0, "gated", "is true, but n_experts is 0: there is nothing to gate")
        require(
            self.d_ff is None or self.n_experts > 0, "d_ff", "is given, but n_experts is 0: there is no shared expert"
        )


@dataclass(frozen=True, kw_only=True)
class SpecialExpertsConfig:
    """Experts without an MLP, routed to like the others (MoE++, LongCat); they come after the MLPs, in this order."""

    zero: int = 0
    """experts whose output is 0: a token that chooses one does less"""
    copy: int = 0
    """experts whose output is their input"""
    constant: int = 0
    """experts that mix their input with a learned vector"""

    def __post_init__(self) -> None:
        at_least(self, 0, "zero", "copy", "constant")

    @property
    def total(self) -> int:
        """All special experts of a layer."""
        return self.zero + self.copy + self.constant
