"""The Triton kernel of :mod:`.head_loss`: one program a row turns logits into their loss and their gradient, in place.

The row is read twice, the second time from the L2 cache, and written once; the same in torch takes six passes over
float32 copies.
"""

# mypy: ignore-errors
# ruff: noqa: N803 (compile-time arguments are upper case, as everywhere in Triton)

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 8192
"""columns of a row that one program holds at a time: 32 a thread"""


def losses_in_triton(logits: Tensor, targets: Tensor, share: Tensor | None) -> Tensor:
    """The float32 cross-entropy [T] of each row of ``logits`` [T, V], whose rows lie together.

    With ``share`` [T], float32, the logits become share · (softmax - onehot(target)); without it they are left alone.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        columns = min(COLUMNS, triton.next_power_of_2(logits.shape[1]))
        softmax_and_gradient[(len(logits),)](
            logits, targets, share, losses, logits.shape[1], logits.stride(0), COLUMNS=columns, num_warps=8
        )
    return losses


@triton.jit
def softmax_and_gradient(logits, targets, share, losses, n_columns, row_stride, COLUMNS: tl.constexpr):
    """One row: log Σ exp by a running maximum (Milakov & Gimelshein 2018, algorithm 3), then the gradient over it."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row)
    at_target = tl.load(logits + target).to(tl.float32)
    columns = tl.arange(0, COLUMNS)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, n_columns, COLUMNS):
        inside = start + columns < n_columns
        values = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(values))  # a NaN gets into the sum, if not in here
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger))
        largest = larger
    normaliser = largest + tl.log(total)
    tl.store(losses + row, normaliser - at_target)
    if share is not None:
        scale = tl.load(share + row)
        tl.debug_barrier()  # every thread has read the logit of the target before any overwrites it
        for start in range(0, n_columns, COLUMNS):
            inside = start + columns < n_columns
            values = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            probabilities = tl.exp(values - normaliser)
            gradient = scale * tl.where(start + columns == target, probabilities - 1, probabilities)
            tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=inside)
