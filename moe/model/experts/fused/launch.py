"""The experts' forward and backward pass as a sequence of kernels.

Forward keeps x and the pre-activation ``hidden`` alone. The backward pass computes the activation again, and takes the
gradient of a combine weight from ⟨dA', A⟩, so that the experts' outputs need not be kept (as in SonicMoE, Guo et al.
2025). The products of the weights' gradients read rows that were gathered before: a gather inside them was slower.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.config import Activation
from moe.model.experts.fused import kernels
from moe.model.experts.fused.kernels import FAR
from moe.model.experts.fused.sort import SortedAssignments, TileSchedule, most_tiles, tile_schedule
from moe.model.experts.fused.tiles import Product, Tiles, choose_tiles
from moe.model.feed_forward import GATED


@dataclass(frozen=True)
class Problem:
    """What both passes need to know of a layer's experts and of where its assignments go."""

    w_in: Float[Tensor, "E H D"]
    w_out: Float[Tensor, "E D F"]
    weights: Float[Tensor, "T K"]
    """float32, what multiplies each expert's output"""
    assignments: SortedAssignments
    activation: Activation
    _schedules: dict[int, TileSchedule] = field(default_factory=dict)

    @property
    def top_k(self) -> int:
        """K."""
        return self.weights.shape[1]

    @property
    def n_rows(self) -> int:
        """N = T·K."""
        return self.weights.numel()

    @property
    def parts(self) -> int:
        """Rows of W_in for each hidden unit: gate and value, or one."""
        return 2 if self.activation in GATED else 1

    @property
    def n_computed(self) -> Tensor:
        """Rows that an expert computes, int32 [1]; those after them are nobody's."""
        return self.assignments.ends[-1:]

    def schedule(self, block_m: int) -> TileSchedule:
        """The tiles of ``block_m`` rows, cut once for all products of a pass."""
        if block_m not in self._schedules:
            ends = self.assignments.ends
            self._schedules[block_m] = tile_schedule(ends, block_m, most_tiles(self.n_rows, block_m, len(ends)))
        return self._schedules[block_m]


def forward(x: Float[Tensor, "T D"], problem: Problem, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return y [T, D] in ``out_dtype`` and hidden [N, H]; rows of ``hidden`` that no expert computes are undefined."""
    hidden = x.new_empty(problem.n_rows, problem.w_in.shape[1])
    inner = x.new_empty(problem.n_rows, problem.w_out.shape[2])
    _hidden_and_activation(x, problem, hidden, inner)
    output = torch.empty(problem.n_rows, x.shape[1], dtype=x.dtype, device=x.device)
    _rows_by_weight(inner, problem.w_out, output, problem, transposed=False, gather=False)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    _sum_choices(output, problem, y, weighted=True)
    return y, hidden


def backward(
    grad_y: Float[Tensor, "T D"], x: Float[Tensor, "T D"], hidden: Float[Tensor, "N H"], problem: Problem
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the weights (float32), of W_in and of W_out, for ``grad_y`` in the dtype of x."""
    n_rows, d_model, d_ff = problem.n_rows, x.shape[1], problem.w_out.shape[2]
    inner, grad_hidden = x.new_empty(n_rows, d_ff), torch.empty_like(hidden)
    grad_weights = _inner_gradient(grad_y, hidden, problem, inner, grad_hidden)
    rows = x.new_empty(n_rows, d_model)  # of dy, of the gradient of x, and of x, one after the other
    _gather_rows(grad_y, problem, rows)
    grad_w_out = torch.empty_like(problem.w_out)
    _weight_gradient(rows, inner, grad_w_out, problem)
    _rows_by_weight(grad_hidden, problem.w_in, rows, problem, transposed=True, gather=False)
    grad_x = torch.empty_like(x)
    _sum_choices(rows, problem, grad_x, weighted=False)
    _gather_rows(x, problem, rows)
    grad_w_in = torch.empty_like(problem.w_in)
    _weight_gradient(grad_hidden, rows, grad_w_in, problem)
    return grad_x, grad_weights, grad_w_in, grad_w_out


# ----------------------------------------------------------------------------------------------------- the products


def _hidden_and_activation(x: Tensor, problem: Problem, hidden: Tensor, inner: Tensor) -> None:
    w_in, parts = problem.w_in, problem.parts
    n_experts, width, d_model = w_in.shape
    d_ff = width // parts

    def run(tiles: Tiles) -> None:
        schedule = problem.schedule(tiles.block_m)
        # A tile's columns of gate and value together are what other products call a tile's columns.
        block_n = tiles.block_n // parts
        kernels.hidden_and_activation[_programs(x)](
            x,
            _descriptor(w_in.view(n_experts, parts, d_ff, d_model), [1, parts, block_n, tiles.block_k]),
            _ragged(hidden.view(-1, parts, d_ff), [tiles.block_m, 1, block_n]),
            _ragged(inner, [tiles.block_m, block_n]),
            problem.assignments.assignment_of_row,
            *schedule[:2],
            problem.assignments.ends,
            schedule.n_tiles,
            d_model,
            d_ff,
            problem.n_rows - 1,
            K=problem.top_k,
            KIND=problem.activation,
            GATED=parts == 2,
            WHOLE_BLOCKS=d_model % tiles.block_k == 0,
            FAST=_fast(x),
            **tiles.constants(block_n=block_n),
        )

    kind = "hidden" if parts == 2 else "hidden, no gate"
    run(choose_tiles(Product(kind, d_model, width, n_experts, x.dtype), x.device, run))


def _rows_by_weight(
    rows: Tensor, weight: Tensor, out: Tensor, problem: Problem, *, transposed: bool, gather: bool
) -> None:
    n_experts = weight.shape[0]
    out_width, inner_width = (weight.shape[2], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[2])

    def run(tiles: Tiles) -> None:
        schedule = problem.schedule(tiles.block_m)
        block = [1, tiles.block_k, tiles.block_n] if transposed else [1, tiles.block_n, tiles.block_k]
        kernels.rows_by_weight[_programs(rows)](
            rows if gather else _descriptor(rows, [tiles.block_m, tiles.block_k]),
            _descriptor(weight, block),
            _ragged(out, [tiles.block_m, tiles.block_n // 2]),
            problem.assignments.assignment_of_row,
            *schedule[:2],
            problem.assignments.ends,
            schedule.n_tiles,
            inner_width,
            out_width,
            problem.n_rows - 1,
            K=problem.top_k,
            GATHER=gather,
            TRANSPOSED=transposed,
            WHOLE_BLOCKS=inner_width % tiles.block_k == 0,
            **tiles.constants(),
        )

    kind = "transposed" if transposed else "plain"
    product = Product(f"{kind}, gathered" if gather else kind, inner_width, out_width, n_experts, rows.dtype)
    run(choose_tiles(product, rows.device, run))


def _weight_gradient(left: Tensor, right: Tensor, out: Tensor, problem: Problem) -> None:
    n_experts, out_width, inner_width = out.shape

    def run(tiles: Tiles) -> None:
        constants = tiles.constants()
        del constants["FLATTEN"]  # the length of the inner loop differs from expert to expert
        kernels.weight_gradient[_programs(left)](
            _ragged(left, [tiles.block_k, tiles.block_m]),
            _ragged(right, [tiles.block_k, tiles.block_n]),
            _descriptor(out, [1, tiles.block_m, tiles.block_n // 2]),
            problem.assignments.ends,
            problem.schedule(tiles.block_m).busiest,
            n_experts,
            out_width,
            inner_width,
            **constants,
        )

    product = Product("weight gradient", out_width, inner_width, n_experts, left.dtype)
    run(choose_tiles(product, left.device, run))


def _inner_gradient(grad_y: Tensor, hidden: Tensor, problem: Problem, inner: Tensor, grad_hidden: Tensor) -> Tensor:
    """Write the weighted activation and the gradient of hidden; return that of the weights."""
    if _on_hopper(grad_y, problem):
        return _inner_gradient_in_one(grad_y, hidden, problem, inner, grad_hidden)
    grad_inner = torch.empty_like(inner)
    _rows_by_weight(grad_y, problem.w_out, grad_inner, problem, transposed=True, gather=True)
    grad_weights = torch.zeros_like(problem.weights)
    block_t = 4
    kernels.activation_gradient[(triton.cdiv(problem.n_rows, block_t),)](
        grad_inner,
        hidden,
        problem.weights,
        problem.assignments.assignment_of_row,
        problem.n_computed,
        grad_hidden,
        inner,
        grad_weights,
        inner.shape[1],
        KIND=problem.activation,
        GATED=problem.parts == 2,
        FAST=_fast(hidden),
        BLOCK_T=block_t,
        BLOCK_F=256,
        num_warps=4,
    )
    return grad_weights


def _inner_gradient_in_one(
    grad_y: Tensor, hidden: Tensor, problem: Problem, inner: Tensor, grad_hidden: Tensor
) -> Tensor:
    from triton.experimental.gluon.language import bfloat16, float16
    from triton.experimental.gluon.language._layouts import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    from moe.model.experts.fused import hopper

    def in_gluon(descriptor: TensorDescriptor) -> GluonDescriptor:
        dtype = bfloat16 if descriptor.base.dtype == torch.bfloat16 else float16
        block = list(descriptor.block_shape)
        layout = NVMMASharedLayout.get_default_for(block, dtype)
        return GluonDescriptor(descriptor.base, list(descriptor.shape), list(descriptor.strides), block, layout)

    n_experts, d_model, d_ff = problem.w_out.shape
    block_m, block_n, block_k, part = (
        size.value for size in (hopper.BLOCK_M, hopper.BLOCK_N, hopper.BLOCK_K, hopper.PART)
    )
    schedule = problem.schedule(block_m)
    dots = torch.zeros(*problem.weights.shape, d_ff // block_n, device=hidden.device)
    hopper.inner_gradient[_programs(hidden)](
        grad_y,
        in_gluon(_descriptor(problem.w_out.view(n_experts * d_model, d_ff), [block_k, block_n])),
        in_gluon(_descriptor(hidden, [block_m, part])),
        problem.weights,
        in_gluon(_ragged(grad_hidden, [block_m, part])),
        in_gluon(_ragged(inner, [block_m, part])),
        dots,
        problem.assignments.assignment_of_row,
        *schedule[:2],
        problem.assignments.ends,
        schedule.n_tiles,
        d_model,
        d_ff,
        problem.n_rows - 1,
        K=problem.top_k,
        num_warps=8,
    )
    return dots.sum(dim=-1)


# ------------------------------------------------------------------------------------------------- the moves of data


def _gather_rows(x: Tensor, problem: Problem, out: Tensor) -> None:
    block_t, block_d = 32, 256
    grid = (triton.cdiv(problem.n_rows, block_t), triton.cdiv(x.shape[1], block_d))
    kernels.gather_rows[grid](
        x,
        problem.assignments.assignment_of_row,
        out,
        problem.n_rows,
        x.shape[1],
        K=problem.top_k,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=8,
    )


def _sum_choices(rows: Tensor, problem: Problem, out: Tensor, *, weighted: bool) -> None:
    block_t, block_d = 8, 1024
    grid = (triton.cdiv(out.shape[0], block_t), triton.cdiv(out.shape[1], block_d))
    kernels.sum_choices[grid](
        rows,
        problem.weights,
        problem.assignments.row_of_assignment,
        problem.n_computed,
        out,
        *out.shape,
        K=problem.top_k,
        WEIGHTED=weighted,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=8,
    )


# -------------------------------------------------------------------------------------------------- what they need


def _programs(x: Tensor) -> tuple[int]:
    """One a multiprocessor; on a CPU, in Triton's interpreter, two, so that there is more than one."""
    return (torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2,)


def _fast(x: Tensor) -> bool:
    """Whether the hardware's approximate tanh is there, and exact enough for the dtype."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _descriptor(tensor: Tensor, block: Sequence[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block))


def _ragged(tensor: Float[Tensor, "N *axes"], block: Sequence[int]) -> TensorDescriptor:
    """A descriptor whose tiles end where the kernel says: see ``kernels._store_rows``."""
    stride = tensor.stride(0)
    return TensorDescriptor(
        tensor,
        [0x7FFF0000, 0x7FFF0000, FAR.value, *tensor.shape[1:]],
        [2**34 - stride, stride, *tensor.stride()],
        [1, 1, *block],
    )


def _on_hopper(x: Tensor, problem: Problem) -> bool:
    """Whether :mod:`.hopper` has a kernel for this problem and this device, and its language is there."""
    _, d_model, d_ff = problem.w_out.shape
    fits = problem.activation == "swiglu" and d_model % 64 == 0 and d_ff % 256 == 0
    return fits and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9 and _gluon_is_known()


@cache
def _gluon_is_known() -> bool:
    """Gluon is experimental, and its names change: these versions were tried."""
    return (3, 6) <= tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 8)
