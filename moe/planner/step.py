"""What decides the memory of a training step beside the model and its layout."""

from dataclasses import dataclass
from typing import Literal

from moe.config import Checkpointing, WeightDtype

Recipe = Literal["fp32", "bf16", "mixed", "mixed_fp32_gradients"]


@dataclass(frozen=True, kw_only=True)
class BytesPerParameter:
    """What a parameter takes: its weight, its gradient, and what the optimizer keeps of it."""

    weight: int
    gradient: int
    optimizer: int


RECIPES: dict[Recipe, BytesPerParameter] = {
    "fp32": BytesPerParameter(weight=4, gradient=4, optimizer=8),
    "bf16": BytesPerParameter(weight=2, gradient=2, optimizer=4),
    "mixed": BytesPerParameter(weight=2, gradient=2, optimizer=12),
    "mixed_fp32_gradients": BytesPerParameter(weight=2, gradient=4, optimizer=12),
}
"""fp32 and bf16 are ours (training.weight_dtype) with AdamW's two moments. mixed is what large models are trained with
elsewhere: bfloat16 weights, and in the optimizer a float32 copy and float32 moments (Megatron-LM has float32 gradients
as well)"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What decides the memory of a training step beside the model and its layout."""

    sequence: int
    """tokens of a sequence"""
    micro_batch: int
    """sequences that a replica computes at once"""
    n_micro_batches: int
    """of a step, on each replica"""
    recipe: Recipe = "bf16"
    checkpointing: Checkpointing = "none"
    bf16: bool = True
    """whether matrix products are in bfloat16"""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.sequence * self.micro_batch

    @property
    def dtype(self) -> int:
        """Bytes of an operand of a product."""
        return 2 if self.bf16 else 4

    @property
    def stream(self) -> int:
        """Bytes of a number in the residual stream: that of the weights."""
        return RECIPES[self.recipe].weight

    @property
    def casts_weights(self) -> bool:
        """Whether products take copies of the weights in their own dtype, which autograd keeps."""
        return self.bf16 and self.stream == 4


def recipe_of(dtype: WeightDtype) -> Recipe:
    """What :mod:`moe.training` keeps of a parameter of such weights."""
    return "fp32" if dtype == "fp32" else "bf16"
