"""A model whose logits for a prompt are the same bits whatever else is computed beside it (``model.deterministic``).

A matrix library sums a product in an order that it chooses by the product's size, so the same token gets other last
digits in another batch, and a greedy choice between near equals flips (He et al. 2025, "Defeating nondeterminism in LLM
inference"). Here every sum has an order that the batch has no say in:

- a product of T rows (:mod:`.products`) is cut into tiles of rows, the last one padded, so that the library sees one
  size only; on a GPU one kernel with one tiling takes its place;
- attention (:mod:`.attention`) goes through the keys in blocks counted from a sequence's first token, not from the
  first column; within a window, and on a GPU, from the query backwards;
- the experts (:mod:`.experts`) compute tiles of each expert's rows, and sum a token's outputs choice by choice;
- activations and scores (:mod:`.elementwise`) do not round differently at the end of a tensor.

What is left (norms, rotation, softmax of the router) looks at one row at a time, and was found to give it the same bits
in any company; the tests hold it to that.
"""

from functools import partial

from torch import nn

from moe.config import ModelConfig
from moe.model.attention import Attention
from moe.model.experts import Experts
from moe.model.feed_forward import FeedForward
from moe.model.invariant.attention import attend
from moe.model.invariant.elementwise import activate, score_function
from moe.model.invariant.experts import invariant_experts
from moe.model.invariant.products import InvariantLinear, logits
from moe.model.latent_attention import LatentAttention
from moe.model.router import Router

__all__ = ["InvariantLinear", "attend", "invariant_experts", "make_invariant"]


def make_invariant(model: nn.Module, config: ModelConfig) -> None:
    """Let every product, attention and mixture in ``model`` sum in an order of its own; parameters stay what they are.

    ``model`` is one of ``config``, or a part of one. Doing it twice is doing it once.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = InvariantLinear
        elif isinstance(module, Attention | LatentAttention):
            module.attend = partial(attend, window=config.attention.window_of(module.layer))
        elif isinstance(module, Experts):
            module.compute = invariant_experts
        elif isinstance(module, Router):
            module.product, module.score = logits, score_function
        elif isinstance(module, FeedForward):
            module.activate = activate
