"""Cross-entropy of a linear head, computed a few rows at a time, so that no tensor of tokens × vocabulary exists.

For a small model the logits are its largest tensor by far: written, normalised and read again they cost more time than
a layer, and on a GPU most of the memory. Here a block of logits lives just long enough to give its loss and, at once,
its gradient: for p = softmax(logits), ∂loss/∂logits = p - onehot(target). On a CPU a block fits the cache. On a GPU it
is as large as makes the products fast, stays in the dtype of the product, and one kernel (:mod:`.head_loss_kernel`,
where Triton is installed) puts the gradient in its place.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.model.experts.weights import compute_dtype
from moe.model.transformer import Transformer
from moe.parallel.spread import spread_of
from moe.parallel.vocabulary import divided_head_loss, divided_token_losses
from moe.training.gpu import triton_is_installed

BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}
"""largest block of logits, counted as float32: what fits a CPU's cache; on a GPU, 8192 rows of 32768"""


def head_loss(
    hidden: Float[Tensor, "B S D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "B S"],
    scored: Bool[Tensor, "B S"] | None = None,
    bias: Float[Tensor, " V"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the targets (the ``scored`` ones) under the logits ``hidden`` Wᵀ + ``bias``.

    The products run in the autocast dtype, softmax and sums in at least float32.
    """
    counted = torch.ones_like(targets, dtype=torch.bool) if scored is None else scored
    share = counted.to(torch.promote_types(hidden.dtype, torch.float32)) / counted.sum().clamp(min=1)
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, 1), weight, bias, targets.flatten(), share.flatten(), compute_dtype(hidden)
    )
    return loss


def model_loss(model: Transformer, hidden: Float[Tensor, "B s D"], targets: Int[Tensor, "B S"]) -> Float[Tensor, ""]:
    """:func:`head_loss` under the model's own head, of which this process may have a part, as of the sequence."""
    spread = spread_of(model)
    if spread is None or spread.tensor_group is None:
        return head_loss(hidden, model.head.weight, targets, bias=model.head.bias)
    return divided_head_loss(hidden, model.head.weight, targets, spread.tensor_group)


def model_token_losses(
    model: Transformer, hidden: Float[Tensor, "B s D"], targets: Int[Tensor, "B S"]
) -> Float[Tensor, "B S"]:
    """:func:`token_losses` likewise."""
    spread = spread_of(model)
    if spread is None or spread.tensor_group is None:
        return token_losses(hidden, model.head.weight, targets, model.head.bias)
    return divided_token_losses(hidden, model.head.weight, targets, spread.tensor_group)


def token_losses(
    hidden: Float[Tensor, "B S D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "B S"],
    bias: Float[Tensor, " V"] | None = None,
) -> Float[Tensor, "B S"]:
    """Cross-entropy of each target in nats, without a gradient."""
    dtype = compute_dtype(hidden)
    rows, matrix, wanted = hidden.detach().flatten(0, 1).to(dtype), weight.detach().to(dtype), targets.flatten()
    offset = None if bias is None else bias.detach().to(dtype)
    losses = [
        _losses(_logits(rows[start:end], matrix, offset), wanted[start:end]) for start, end in _blocks(rows, weight)
    ]
    return torch.cat(losses).view_as(targets)


class _HeadLoss(torch.autograd.Function):
    """Σ_t share_t · loss_t; its gradients are ready when it is."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        share: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        rows, matrix, offset = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=sum_dtype)
        share = share.to(sum_dtype)
        for start, end in _blocks(rows, weight):
            logits = _logits(rows[start:end], matrix, offset)
            losses, gradient = _losses_and_gradient(logits, targets[start:end], share[start:end])
            total += (losses * share[start:end]).sum()  # as a product of matrices, autocast would round it to bfloat16
            torch.mm(gradient, matrix, out=grad_rows[start:end])
            grad_weight = _add_product(grad_weight, gradient.t(), rows[start:end])
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0, dtype=sum_dtype)
        ctx.save_for_backward(
            grad_rows.to(hidden.dtype),
            grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_weight, grad_bias = ctx.saved_tensors
        return (
            grad_rows * grad_total.to(grad_rows.dtype),
            grad_weight * grad_total.to(grad_weight.dtype),
            None if grad_bias is None else grad_bias * grad_total.to(grad_bias.dtype),
            None,
            None,
            None,
        )


def _logits(
    rows: Float[Tensor, "T D"], matrix: Float[Tensor, "V D"], bias: Float[Tensor, " V"] | None
) -> Float[Tensor, "T V"]:
    return rows @ matrix.t() if bias is None else torch.addmm(bias, rows, matrix.t())


def _losses_and_gradient(
    logits: Float[Tensor, "T V"], targets: Int[Tensor, " T"], share: Float[Tensor, " T"]
) -> tuple[Float[Tensor, " T"], Float[Tensor, "T V"]]:
    """Loss of each row, in at least float32, and the gradient of Σ share · loss in the logits' dtype (and memory)."""
    if _kernel_takes(logits):
        from moe.training.head_loss_kernel import losses_in_triton

        return losses_in_triton(logits, targets, share), logits
    log_probabilities = _log_softmax(logits)
    losses = -log_probabilities.gather(1, targets[:, None]).squeeze(1)
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, targets[:, None], torch.full_like(losses[:, None], -1.0))
    return losses, gradient.mul_(share[:, None]).to(logits.dtype)


def _losses(logits: Float[Tensor, "T V"], targets: Int[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Loss of each row, in at least float32."""
    if _kernel_takes(logits):
        from moe.training.head_loss_kernel import losses_in_triton

        return losses_in_triton(logits, targets, None)
    return -_log_softmax(logits).gather(1, targets[:, None]).squeeze(1)


def _log_softmax(logits: Float[Tensor, "T V"]) -> Float[Tensor, "T V"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _kernel_takes(logits: Float[Tensor, "T V"]) -> bool:
    return logits.is_cuda and logits.dtype != torch.float64 and triton_is_installed()


def _add_product(total: Float[Tensor, "V D"], a: Float[Tensor, "V T"], b: Float[Tensor, "T D"]) -> Float[Tensor, "V D"]:
    """``total`` + a b, summed in the dtype of ``total``, which is that of a and b or float32."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    # A CPU has no product of bfloat16 with a result in float32.
    return total.add_(torch.mm(a, b, out_dtype=total.dtype) if a.is_cuda else a @ b)


def _blocks(rows: Float[Tensor, "T D"], weight: Float[Tensor, "V D"]) -> list[tuple[int, int]]:
    """(start, end) of blocks of rows whose logits fit the block size."""
    n_rows = max(1, BLOCK_BYTES.get(rows.device.type, 64 << 20) // (4 * weight.shape[0]))
    return [(start, min(start + n_rows, len(rows))) for start in range(0, len(rows), n_rows)]
