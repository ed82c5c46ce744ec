"""The experts' forward and backward pass as a sequence of kernels.

Forward keeps x and the pre-activation ``hidden`` alone. The backward pass computes the activation again, and takes the
gradient of a combine weight from ⟨dA', A⟩, so that the experts' outputs need not be kept (as in SonicMoE, Guo et al.
2025). The products of the weights' gradients read rows that were gathered before, but for W_out's where a gather on
the way is faster; for W_in's, whose gathered tiles are twice as wide, it never was.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.config import Activation
from moe.model.experts.fused import kernels
from moe.model.experts.fused.kernels import FAR
from moe.model.experts.fused.sort import SortedAssignments, TileSchedule, most_tiles, tile_schedule
from moe.model.experts.fused.tiles import Product, Tiles, choose_tiles, speaks_gluon
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
    grad_w_out = torch.empty_like(problem.w_out)
    _weight_gradient_of_tokens(grad_y, inner, grad_w_out, problem, rows)
    _rows_by_weight(grad_hidden, problem.w_in, rows, problem, transposed=True, gather=False)
    grad_x = torch.empty_like(x)
    _sum_choices(rows, problem, grad_x, weighted=False)
    _gather_rows(x, problem, rows)
    grad_w_in = torch.empty_like(problem.w_in)
    _weight_gradient(grad_hidden, rows, grad_w_in, problem)
    return grad_x, grad_weights, grad_w_in, grad_w_out


# ----------------------------------------------------------------------------------------------------- the products


def _hidden_and_activation(x: Tensor, problem: Problem, hidden: Tensor, inner: Tensor) -> None:
    if _on_hopper(x, problem):
        from moe.model.experts.fused import launch_hopper

        launch_hopper.hidden_and_activation(x, problem, hidden, inner)
        return
    w_in, parts = problem.w_in, problem.parts
    n_experts, width, d_model = w_in.shape
    d_ff = width // parts

    def run(tiles: Tiles) -> None:
        schedule = problem.schedule(tiles.block_m)
        # A tile's columns of gate and value together are what other products call a tile's columns.
        block_n = tiles.block_n // parts
        kernels.hidden_and_activation[programs(x)](
            x,
            descriptor(w_in.view(n_experts, parts, d_ff, d_model), [1, parts, block_n, tiles.block_k]),
            ragged(hidden.view(-1, parts, d_ff), [tiles.block_m, 1, block_n]),
            ragged(inner, [tiles.block_m, block_n]),
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
        if tiles.specialised:
            from moe.model.experts.fused import launch_hopper

            launch_hopper.rows_by_weight(rows, weight, out, problem, transposed=transposed)
            return
        schedule = problem.schedule(tiles.block_m)
        block = [1, tiles.block_k, tiles.block_n] if transposed else [1, tiles.block_n, tiles.block_k]
        kernels.rows_by_weight[programs(rows)](
            rows if gather else descriptor(rows, [tiles.block_m, tiles.block_k]),
            descriptor(weight, block),
            ragged(out, [tiles.block_m, tiles.block_n // 2]),
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
    def run(tiles: Tiles) -> None:
        _weight_gradient_by(tiles, left, right, out, problem)

    product = Product("weight gradient", out.shape[1], out.shape[2], out.shape[0], left.dtype)
    run(choose_tiles(product, left.device, run))


def _weight_gradient_of_tokens(left: Tensor, right: Tensor, out: Tensor, problem: Problem, rows: Tensor) -> None:
    """The same for a ``left`` with a row a token; ``rows`` is room for the gathered ones, if it takes them."""

    def run(tiles: Tiles) -> None:
        if tiles.gather:
            from moe.model.experts.fused import launch_hopper

            launch_hopper.weight_gradient_of_tokens(left, right, out, problem)
        else:
            _gather_rows(left, problem, rows)
            _weight_gradient_by(tiles, rows, right, out, problem)

    product = Product("weight gradient, gathered", out.shape[1], out.shape[2], out.shape[0], left.dtype)
    run(choose_tiles(product, left.device, run))


def _weight_gradient_by(tiles: Tiles, left: Tensor, right: Tensor, out: Tensor, problem: Problem) -> None:
    if tiles.specialised:
        from moe.model.experts.fused import launch_hopper

        launch_hopper.weight_gradient(left, right, out, problem)
        return
    constants = tiles.constants()
    del constants["FLATTEN"]  # the length of the inner loop differs from expert to expert
    kernels.weight_gradient[programs(left)](
        ragged(left, [tiles.block_k, tiles.block_m]),
        ragged(right, [tiles.block_k, tiles.block_n]),
        descriptor(out, [1, tiles.block_m, tiles.block_n // 2]),
        problem.assignments.ends,
        problem.schedule(tiles.block_m).busiest,
        *out.shape,
        **constants,
    )


def _inner_gradient(grad_y: Tensor, hidden: Tensor, problem: Problem, inner: Tensor, grad_hidden: Tensor) -> Tensor:
    """Write the weighted activation and the gradient of hidden; return that of the weights."""
    if _on_hopper(grad_y, problem):
        from moe.model.experts.fused import launch_hopper

        return launch_hopper.inner_gradient(grad_y, hidden, problem, inner, grad_hidden)
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


# ------------------------------------------------------------------------------------------------- the moves of data


def _gather_rows(x: Tensor, problem: Problem, out: Tensor) -> None:
    block_t, block_d = 8, 1024
    grid = (triton.cdiv(x.shape[0], block_t), triton.cdiv(x.shape[1], block_d))
    kernels.gather_rows[grid](
        x,
        problem.assignments.row_of_assignment,
        out,
        *x.shape,
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


def programs(x: Tensor) -> tuple[int]:
    """One a multiprocessor; on a CPU, in Triton's interpreter, two, so that there is more than one."""
    return (torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2,)


def _fast(x: Tensor) -> bool:
    """Whether the hardware's approximate tanh is there, and exact enough for the dtype."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def descriptor(tensor: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """What the tensor memory accelerator needs to read or write blocks of it."""
    return TensorDescriptor.from_tensor(tensor, list(block))


def ragged(tensor: Float[Tensor, "N *axes"], block: Sequence[int]) -> TensorDescriptor:
    """A descriptor whose tiles end where the kernel says: see ``kernels._store_rows``."""
    stride = tensor.stride(0)
    return TensorDescriptor(
        tensor,
        [0x7FFF0000, 0x7FFF0000, FAR.value, *tensor.shape[1:]],
        [2**34 - stride, stride, *tensor.stride()],
        [1, 1, *block],
    )


def _on_hopper(x: Tensor, problem: Problem) -> bool:
    """Whether :mod:`.hopper` has the kernels with the activation in them for this problem and this device."""
    _, d_model, d_ff = problem.w_out.shape
    return problem.activation == "swiglu" and d_model % 64 == 0 and d_ff % 256 == 0 and speaks_gluon(x.device)
