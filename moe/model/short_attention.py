"""Causal attention for training on short sequences on a CPU, by kernels in C++ (``native/attention.cpp``).

``scaled_dot_product_attention`` on a CPU is made for long sequences and wide heads: with 128 to 512 tokens its backward
took 2.5 to 14 times as long as what is here, which keeps a head's keys and values in a core's cache (dev/LOG.md).
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, library

from moe.model import native

LONGEST = 1024
"""tokens of a sequence: at so many SDPA took 1.5 to 1.8 times as long, and beyond nothing was measured"""
WIDEST = 128
"""of a head; up to 64 was measured"""


def pays(
    queries: Float[Tensor, "B H S d"],
    keys: Float[Tensor, "B H_kv L d"],
    values: Float[Tensor, "B H_kv L d_v"],
    *,
    causal: bool,
) -> bool:
    """Whether :func:`short_attention` can be used on these, and is the faster way."""
    _, _, length, width = queries.shape
    fits = causal and 0 < length == keys.shape[2] <= LONGEST and width == values.shape[3] <= WIDEST
    return fits and queries.dtype == keys.dtype == values.dtype and native.computes(queries, keys, values)


def short_attention(
    queries: Float[Tensor, "B H S d"], keys: Float[Tensor, "B H_kv S d"], values: Float[Tensor, "B H_kv S d"]
) -> Float[Tensor, "B H S d"]:
    """What causal ``scaled_dot_product_attention`` computes, query head h attending to key head h // (H / H_kv)."""
    # torch.compile is given one operator to call as it is; to call that without it takes longer than the function.
    compute: Callable[..., Any] = _operator if torch.compiler.is_compiling() else _ShortAttention.apply
    output: Tensor
    output, _ = compute(queries, keys, values)
    return output


def _forward(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and log2 Σ exp(score) of each query, float32 [B, H, S]."""
    output, logs = _by_token(queries), queries.new_empty(queries.shape[:3], dtype=torch.float32)
    name = f"attention_forward_{native.DTYPES[queries.dtype]}"
    native.call(name, *native.heads(queries, keys, values, output), logs, native.Sizes.of(queries, keys))
    return output, logs


def _backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, output: Tensor, logs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    gradients = _by_token(queries), _by_token(keys), _by_token(values)
    native.call(
        f"attention_backward_{native.DTYPES[queries.dtype]}",
        *native.heads(grad.to(queries.dtype), queries, keys, values, output),
        logs,
        *native.heads(*gradients),
        native.Sizes.of(queries, keys),
    )
    return gradients


def _by_token(like: Float[Tensor, "B H S d"]) -> Float[Tensor, "B H S d"]:
    """Uninitialised, with a token's heads beside each other in memory, as the layer after attention reads them."""
    batch, n_heads, length, width = like.shape
    return like.new_empty(batch, length, n_heads, width).transpose(1, 2)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


class _ShortAttention(torch.autograd.Function):
    """The two directions as one function."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_remember)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(grad, *ctx.saved_tensors)


_operator = library.custom_op("moe::short_attention", _forward, mutates_args=())
_backward_operator = library.custom_op("moe::short_attention_backward", _backward, mutates_args=())
_operator.register_autograd(lambda ctx, grad, _: _backward_operator(grad, *ctx.saved_tensors), setup_context=_remember)


@_operator.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return _by_token(queries), queries.new_empty(queries.shape[:3], dtype=torch.float32)


@_backward_operator.register_fake
def _(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, output: Tensor, logs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _by_token(queries), _by_token(keys), _by_token(values)
