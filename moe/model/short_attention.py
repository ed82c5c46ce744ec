"""Causal attention as plain products over all scores, for training on short sequences on a CPU.

``scaled_dot_product_attention`` on a CPU never holds the scores; its backward pays for that with small products at a
fraction of a bfloat16 unit's speed, several times the work of the forward. Where the scores of a few heads fit the
cache, plain products over them are faster: ``softmax(Q Kᵀ / √d + mask) V``, a few
heads at a time, the probabilities kept for the backward pass.
"""

import math
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, library

LONGEST = 512
"""tokens of a sequence beyond which SDPA is faster: it skips what lies beyond the diagonal, which is masked here"""
CACHE_BYTES = 4 << 20
"""scores of so many heads at a time, about what the second-level caches of two cores hold"""


def pays(queries: Float[Tensor, "B H S d"], keys: Float[Tensor, "B H_kv L d"], *, causal: bool) -> bool:
    """Whether :func:`short_attention` can be used on these, and is the faster way.

    In bfloat16 without a gradient it is not: the forward of SDPA is fast. In float32 SDPA is the faster, but where
    products go through oneDNN: there its many small ones take two to six times as long, forward and backward.
    """
    if not (causal and queries.device.type == "cpu" and 0 < queries.shape[2] == keys.shape[2] <= LONGEST):
        return False
    if queries.dtype == torch.float32:
        through_onednn: bool = _float32_goes_through_onednn()
        return through_onednn
    trained = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)
    return trained and queries.dtype == torch.bfloat16


# A setting of the process, which torch.compile cannot read.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _float32_goes_through_onednn() -> bool:
    return str(torch.backends.mkldnn.matmul.fp32_precision) == "bf16"  # type: ignore[attr-defined]


def short_attention(
    queries: Float[Tensor, "B H S d"], keys: Float[Tensor, "B H_kv S d"], values: Float[Tensor, "B H_kv S d"]
) -> Float[Tensor, "B H S d"]:
    """What causal ``scaled_dot_product_attention`` computes, query head h attending to key head h // (H / H_kv)."""
    batch, n_heads, length, width = queries.shape
    # The query heads that share a key head follow each other as rows of one matrix.
    rows = queries.reshape(batch * keys.shape[1], -1, width)
    keys, values = keys.reshape(-1, length, width), values.reshape(-1, length, width)
    # torch.compile is given one operator to call as it is, since what it would make of this is slower; to call that
    # without it takes longer than the function.
    output: Tensor
    if torch.compiler.is_compiling():
        output, _ = _operator(rows, keys, values)
    else:
        output, _ = _ShortAttention.apply(rows, keys, values)  # type: ignore[no-untyped-call]
    return output.view(batch, n_heads, length, width)


def _forward(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Output [N, R, d] and probabilities [N, R, S] of N key heads with R = S · H / H_kv queries each."""
    length = keys.shape[1]
    mask = _causal_mask(length, queries.shape[1] // length, queries.dtype)
    scale = 1 / math.sqrt(queries.shape[2])
    output, probabilities = torch.empty_like(queries), queries.new_empty(*queries.shape[:2], length)
    for part in _parts(probabilities):
        scores = torch.baddbmm(mask, queries[part], keys[part].transpose(1, 2), alpha=scale)
        torch.softmax(scores, dim=-1, out=probabilities[part])
        torch.bmm(probabilities[part], values[part], out=output[part])
    return output, probabilities


def _backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, probabilities: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    grad_queries, grad_keys, grad_values = (torch.empty_like(t) for t in (queries, keys, values))
    for part in _parts(probabilities):
        p = probabilities[part]
        torch.bmm(p.transpose(1, 2), grad[part], out=grad_values[part])
        grad_p = torch.bmm(grad[part], values[part].transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
        torch.bmm(grad_scores, keys[part], out=grad_queries[part])
        torch.bmm(grad_scores.transpose(1, 2), queries[part], out=grad_keys[part])
    scale = 1 / math.sqrt(queries.shape[2])
    return grad_queries.mul_(scale), grad_keys.mul_(scale), grad_values


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


class _ShortAttention(torch.autograd.Function):
    """The two directions as one function."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_remember)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(grad.contiguous(), *ctx.saved_tensors)


_operator = library.custom_op("moe::short_attention", _forward, mutates_args=())
_backward_operator = library.custom_op("moe::short_attention_backward", _backward, mutates_args=())
_operator.register_autograd(
    lambda ctx, grad, _: _backward_operator(grad.contiguous(), *ctx.saved_tensors), setup_context=_remember
)


@_operator.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), queries.new_empty(*queries.shape[:2], keys.shape[1])


@_backward_operator.register_fake
def _(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, probabilities: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)


def _parts(probabilities: Float[Tensor, "N R S"]) -> list[slice]:
    """Which of the N to compute at a time."""
    size = max(1, CACHE_BYTES // (probabilities[0].numel() * probabilities.element_size()))
    return [slice(start, start + size) for start in range(0, len(probabilities), size)]


@cache
def _causal_mask(length: int, repeats: int, dtype: torch.dtype) -> Float[Tensor, "R S"]:
    """-inf for the keys after a query, else 0; once for each of the ``repeats`` query heads of a key head."""
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.zeros(length, length, dtype=dtype).masked_fill(later, float("-inf")).repeat(repeats, 1)
