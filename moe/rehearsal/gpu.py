"""Fake tensors that the model takes for a GPU's, on a machine without one.

torch's autograd refuses CUDA tensors, even fake ones, where torch was built for CPUs. So a rehearsal's tensors are fake
ones of the CPU that say ``is_cuda``, which is what the model and the training step ask before they choose an
implementation. Here is what else has to be told: the choices that go by the device's name, the kernels in Triton, which
cannot be launched on what is not there, and torch's own kernels that only a GPU has (attention, the fused norm). A
kernel's results are followed like any other storage; what it has in use inside is :func:`workspace`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from moe.model import experts, short_attention
from moe.model.experts import ExpertWeights, fused
from moe.model.router import fused as fused_router
from moe.training import head_loss, mixed_optimizer, step
from moe.training.mixed_optimizer import MixedOptimizer


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let fake tensors be computed on as a GPU's are."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(FakeTensor, "is_cuda", property(lambda tensor: True), create=True))
        stack.enter_context(patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor))  # it looks at its draws
        stack.enter_context(patch.object(short_attention, "pays", lambda *_, **__: False))
        stack.enter_context(patch.object(experts, "choose_backend", _experts_of_a_gpu))
        stack.enter_context(patch.object(fused_router, "HAS_TRITON", True))
        stack.enter_context(patch.object(head_loss, "_losses_and_gradient", _losses_and_gradient))
        stack.enter_context(patch.dict(head_loss.BLOCK_BYTES, cpu=head_loss.BLOCK_BYTES["cuda"]))
        # Triton moves bfloat16 weights in place, and a step's numbers have no host to go to.
        stack.enter_context(patch.object(mixed_optimizer, "adamw_in_bf16", lambda *_, **__: None))
        stack.enter_context(patch.object(mixed_optimizer, "move_in_bf16", lambda *_, **__: None))
        # On a CPU adding a tensor to many asks the host for its value.
        stack.enter_context(patch.object(MixedOptimizer, "_count_steps", MixedOptimizer._make_states))
        stack.enter_context(patch.object(step, "Transfer", lambda numbers: None))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _attention))
        stack.enter_context(patch.object(F, "rms_norm", _rms_norm))
        yield


def _attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention; of float32, of masks and of values of another width, what is called efficient attention."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        queries, keys, values = queries.to(dtype), keys.to(dtype), values.to(dtype)
    if queries.dtype == torch.float32 or attn_mask is not None or values.shape[-1] != queries.shape[-1]:
        if enable_gqa:
            keys, values = (t.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1) for t in (keys, values))
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        results = attend(queries, keys, values, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)
    else:
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        results = attend(queries, keys, values, dropout_p, is_causal, scale=scale)
    output: Tensor = results[0]
    return output


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    output: Tensor = _FusedNorm.apply(x, weight)  # type: ignore[no-untyped-call]
    return output


class _FusedNorm(torch.autograd.Function):
    """What the fused norm of a GPU keeps: its input, and of each row the inverse of its size. Taken apart, as torch
    does on a CPU, it would keep the normalised rows as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _experts_of_a_gpu(wanted: str, x: Tensor, weights: ExpertWeights, *_: str) -> str:
    """What :func:`~moe.model.experts.choose_backend` chooses on a GPU with Triton."""
    d_model, d_ff = weights.w_out.shape[1:]
    fits = weights.b_in is None and d_model % 8 == d_ff % 8 == 0
    fits = fits and experts.weights.compute_dtype(x) in fused.DTYPES
    return ("fused" if fits else "grouped") if wanted in ("auto", "fused") else wanted


def _losses_and_gradient(logits: Tensor, targets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel of the head's loss allocates: the losses; the gradient takes the logits' place."""
    return torch.empty(len(logits), dtype=torch.float32), logits


# ----------------------------------------------------------------------------------------------------- inside operators


def workspace(operator: Any, arguments: tuple[Any, ...], result: Any) -> int:
    """Bytes that a kernel has in use inside, beside its results, at its busiest moment."""
    rule = _WORKSPACES.get(operator)
    return rule(arguments, result) if rule is not None else 0


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _experts_forward(arguments: tuple[Any, ...], result: Any) -> int:
    """The activation and the outputs of all assignments (:func:`moe.model.experts.fused.launch.forward`)."""
    x, combine_weights, _, w_out, *_ = arguments
    return int(combine_weights.numel() * (w_out.shape[2] + w_out.shape[1]) * x.itemsize)


def _experts_backward(arguments: tuple[Any, ...], result: Any) -> int:
    """The activation, the gradient of hidden and a buffer of rows (:func:`moe.model.experts.fused.launch.backward`)."""
    grad_y, x, hidden, combine_weights, _, w_out, *_ = arguments
    n_rows, d_model, d_ff = combine_weights.numel(), w_out.shape[1], w_out.shape[2]
    cast = 0 if grad_y.dtype == x.dtype else _bytes(x)
    inner, rows = n_rows * d_ff * x.itemsize, n_rows * d_model * x.itemsize
    return int(_bytes(hidden) + inner + rows + cast)


def _flash_backward(arguments: tuple[Any, ...], result: Any) -> int:
    """The queries' gradient in float32, and, of grouped heads, each query head's own gradient of keys and values."""
    _, queries, keys, *_ = arguments
    grouped = queries.shape[1] // keys.shape[1]
    return int(queries.numel() * 4 + (2 * _bytes(keys) * grouped if grouped > 1 else 0))


_WORKSPACES = {
    torch.ops.moe.fused_experts.default: _experts_forward,
    torch.ops.moe.fused_experts_backward.default: _experts_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
}
