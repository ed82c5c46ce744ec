"""The order in which the fused kernels work: assignments by expert, and tiles of rows that are one expert's.

Everything stays on the device: what follows is sized by numbers that the host knows (N assignments, E experts, a bound
on the tiles), and the kernels read from ``ends`` and ``n_tiles`` what there really is. So nothing waits, and the calls
can be recorded in a CUDA graph.

Each of the two functions has two implementations with the same results: ``..._in_torch``, which is the definition and
runs anywhere, and ``..._in_triton``, which takes one to three small kernels on a GPU.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, library

STEP, BLOCK = 128, 1024
"""assignments that the sort ranks at a time, by comparing each with each, and that one program ranks of many"""


class SortedAssignments(NamedTuple):
    """The N = T·K assignments (t·K + k for choice k of token t), one to a row: by expert, within an expert by token.

    The assignments that no expert computes have the last rows, in the same order.
    """

    assignment_of_row: Int[Tensor, " N"]
    """int32"""
    row_of_assignment: Int[Tensor, " N"]
    """int32, the inverse"""
    ends: Int[Tensor, " E"]
    """int32: the row after the last of each expert, which is the first of the next"""


class TileSchedule(NamedTuple):
    """Tiles of ``block_m`` rows or less, each within one expert; the n_tiles real ones first, in the order of rows."""

    tile_expert: Int[Tensor, " n_tiles_max"]
    """int32, -1 for an entry that is not used"""
    tile_row: Int[Tensor, " n_tiles_max"]
    """int32, the first row of a tile; 0 for an entry that is not used"""
    n_tiles: Int[Tensor, " 1"]
    """int32"""
    busiest: Int[Tensor, " E"]
    """int32, the experts by their rows, the most first; of equals, the lowest index first"""


def sort_assignments(
    selected: Int[Tensor, "T K"], executed: Bool[Tensor, "T K"] | None, n_experts: int
) -> SortedAssignments:
    """Sort the assignments by the expert that computes them; without atomics, so always in the same order.

    ``executed`` says which are computed at all (None: all); an id that is not in [0, ``n_experts``), a special
    expert's, is computed by no one either. Takes T = 0, and up to 2³⁰ assignments.
    """
    return SortedAssignments(*_sort_assignments(selected, executed, n_experts))


def tile_schedule(ends: Int[Tensor, " E"], block_m: int, n_tiles_max: int) -> TileSchedule:
    """Cut each expert's rows, which end at ``ends``, into tiles of ``block_m``, the last of an expert's may be shorter.

    ``n_tiles_max`` must be at least the number of tiles: see :func:`most_tiles`.
    """
    return TileSchedule(*_tile_schedule(ends, block_m, n_tiles_max))


def most_tiles(n_rows: int, block_m: int, n_experts: int) -> int:
    """How many tiles of ``block_m`` rows can be needed for ``n_rows`` rows of ``n_experts`` experts.

    Every expert can end in a tile that is not full; a tile has at least one row.
    """
    return min(n_rows // block_m + n_experts, n_rows)


# --------------------------------------------------------------------------------------------------- the definitions


def sort_in_torch(
    selected: Int[Tensor, "T K"], executed: Bool[Tensor, "T K"] | None, n_experts: int
) -> SortedAssignments:
    """:func:`sort_assignments` by torch's stable sort."""
    expert = selected.flatten()
    computed = (expert >= 0) & (expert < n_experts)
    if executed is not None:
        computed = computed & executed.flatten()
    sorted_expert, order = expert.where(computed, n_experts).sort(stable=True)
    experts = torch.arange(n_experts, device=expert.device, dtype=expert.dtype)
    ends = torch.searchsorted(sorted_expert, experts, right=True, out_int32=True)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return SortedAssignments(order.to(torch.int32), rows.to(torch.int32), ends)


def schedule_in_torch(ends: Int[Tensor, " E"], block_m: int, n_tiles_max: int) -> TileSchedule:
    """:func:`tile_schedule` by two prefix sums, a search and a stable sort."""
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    n_rows = ends - starts
    tiles = (n_rows + block_m - 1) // block_m
    tile_ends = tiles.cumsum(0)
    index = torch.arange(n_tiles_max, device=ends.device)
    expert = torch.searchsorted(tile_ends, index, right=True)
    used = expert < len(ends)
    clamped = expert.clamp(max=len(ends) - 1)
    row = starts[clamped] + (index - (tile_ends - tiles)[clamped]) * block_m
    return TileSchedule(
        expert.where(used, -1).to(torch.int32),
        row.where(used, 0).to(torch.int32),
        tile_ends[-1:].to(torch.int32),
        n_rows.argsort(stable=True, descending=True).to(torch.int32),
    )


# ------------------------------------------------------------------------------------------------------- the kernels


def sort_in_triton(
    selected: Int[Tensor, "T K"], executed: Bool[Tensor, "T K"] | None, n_experts: int
) -> SortedAssignments:
    """:func:`sort_assignments` by counting: in each block, over the blocks before it, and within the block.

    One block needs its own counts alone, which is one kernel; more take three.
    """
    from moe.model.experts.fused import sort_kernels as kernels

    n_assignments = selected.numel()
    assignment_of_row = torch.empty(n_assignments, dtype=torch.int32, device=selected.device)
    row_of_assignment = torch.empty_like(assignment_of_row)
    if not n_assignments:
        return SortedAssignments(
            assignment_of_row, row_of_assignment, torch.zeros(n_experts, dtype=torch.int32, device=selected.device)
        )
    ends = torch.empty(n_experts, dtype=torch.int32, device=selected.device)
    selected = selected.contiguous()
    executed = None if executed is None else executed.contiguous()
    step = min(STEP, _power_of_two(n_assignments))
    # In between, more programs of one step each fill more of the device.
    block = step if BLOCK < n_assignments <= BLOCK * STEP else min(BLOCK, _power_of_two(n_assignments))
    n_blocks = -(-n_assignments // block)
    experts = _power_of_two(n_experts)
    counts = totals = None
    if n_blocks > 1:
        counts = torch.empty(n_experts, n_blocks, dtype=torch.int32, device=selected.device)
        totals = torch.empty_like(ends)
        kernels.count_experts[(n_blocks,)](
            selected, executed, counts, n_assignments, n_experts, BLOCK=block, EXPERTS=experts
        )
        kernels.sum_blocks[(n_experts,)](counts, totals, n_blocks, BLOCKS=min(1024, _power_of_two(n_blocks)))
    kernels.place_assignments[(n_blocks,)](
        selected,
        executed,
        counts,
        totals,
        assignment_of_row,
        row_of_assignment,
        ends,
        n_assignments,
        n_experts,
        BLOCK=block,
        STEP=step,
        EXPERTS=experts,
    )
    return SortedAssignments(assignment_of_row, row_of_assignment, ends)


def schedule_in_triton(ends: Int[Tensor, " E"], block_m: int, n_tiles_max: int) -> TileSchedule:
    """:func:`tile_schedule` in one kernel, a program an expert."""
    from moe.model.experts.fused import sort_kernels as kernels

    n_experts = len(ends)
    tile_expert = torch.empty(n_tiles_max, dtype=torch.int32, device=ends.device)
    tile_row = torch.empty_like(tile_expert)
    n_tiles = torch.empty(1, dtype=torch.int32, device=ends.device)
    busiest = torch.empty_like(ends)
    kernels.cut_into_tiles[(n_experts + 1,)](
        ends,
        tile_expert,
        tile_row,
        n_tiles,
        busiest,
        n_experts,
        n_tiles_max,
        BLOCK_M=block_m,
        EXPERTS=_power_of_two(n_experts),
        TILES=128,
    )
    return TileSchedule(tile_expert, tile_row, n_tiles, busiest)


def _power_of_two(n: int) -> int:
    """The next power of two, and at least the 32 lanes of a warp."""
    return max(32, 1 << (n - 1).bit_length())


# --------------------------------------------------------------------------------- one operator each for torch.compile


@library.custom_op("moe::sort_assignments", mutates_args=())
def _sort_assignments(selected: Tensor, executed: Tensor | None, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    sort = sort_in_triton if selected.is_cuda else sort_in_torch
    return sort(selected, executed, n_experts)


@_sort_assignments.register_fake
def _(selected: Tensor, executed: Tensor | None, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = selected.new_empty(selected.numel(), dtype=torch.int32)
    return rows, torch.empty_like(rows), selected.new_empty(n_experts, dtype=torch.int32)


@library.custom_op("moe::tile_schedule", mutates_args=())
def _tile_schedule(ends: Tensor, block_m: int, n_tiles_max: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    schedule = schedule_in_triton if ends.is_cuda else schedule_in_torch
    return schedule(ends, block_m, n_tiles_max)


@_tile_schedule.register_fake
def _(ends: Tensor, block_m: int, n_tiles_max: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles = ends.new_empty(n_tiles_max, dtype=torch.int32)
    return tiles, torch.empty_like(tiles), ends.new_empty(1, dtype=torch.int32), torch.empty_like(ends)
