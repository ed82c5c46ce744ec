"""The Triton kernels of :mod:`.sort`: a stable counting sort by expert, and the cutting of its rows into tiles.

Nothing here depends on the order in which programs run: counts are integers, and every element is written once.
"""

# mypy: ignore-errors
# ruff: noqa: N803 (compile-time arguments are upper case, as everywhere in Triton)

import triton
import triton.language as tl


# Sizes that change from call to call are not specialised on: no new kernel for a number that 16 divides.
@triton.jit(do_not_specialize=["n_assignments", "n_experts"])
def count_experts(selected, executed, counts, n_assignments, n_experts, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """counts[e, b]: how many of the BLOCK assignments of block b expert e computes. One program a block."""
    block = tl.program_id(0)
    expert = _expert_of(selected, executed, block * BLOCK + tl.arange(0, BLOCK), n_assignments, n_experts)
    count = tl.histogram(expert, EXPERTS, mask=expert < n_experts)
    experts = tl.arange(0, EXPERTS)
    tl.store(counts + experts * tl.num_programs(0) + block, count, mask=experts < n_experts)


@triton.jit(do_not_specialize=["n_blocks"])
def sum_blocks(counts, totals, n_blocks, BLOCKS: tl.constexpr):
    """counts[e, b] becomes the sum over the blocks before b, and totals[e] that over all. One program an expert."""
    expert = tl.program_id(0)
    before = 0
    for first in range(0, n_blocks, BLOCKS):
        blocks = first + tl.arange(0, BLOCKS)
        at = counts + expert * n_blocks + blocks
        count = tl.load(at, mask=blocks < n_blocks, other=0)
        tl.store(at, before + tl.cumsum(count) - count, mask=blocks < n_blocks)
        before += tl.sum(count)
    tl.store(totals + expert, before)


@triton.jit(do_not_specialize=["n_assignments", "n_experts"])
def place_assignments(
    selected,
    executed,
    counts_before,
    totals,
    assignment_of_row,
    row_of_assignment,
    ends,
    n_assignments,
    n_experts,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Give each of the BLOCK assignments of a block its row, STEP at a time. One program a block.

    A row is the sum of what smaller experts hold, of what earlier blocks give this expert (``totals`` and
    ``counts_before``, which a single block does without), and of the assignments before this one in the block that go
    to the same expert: those of earlier steps are counted, those of the same step found by comparing all pairs.
    """
    block = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    known = experts < n_experts
    if totals is None:
        every = _expert_of(selected, executed, tl.arange(0, BLOCK), n_assignments, n_experts)
        total = tl.histogram(every, EXPERTS, mask=every < n_experts)
        before = tl.zeros_like(total)
    else:
        total = tl.load(totals + experts, mask=known, other=0)
        before = tl.load(counts_before + experts * tl.num_programs(0) + block, mask=known, other=0)
    end = tl.cumsum(total)
    if block == 0:
        tl.store(ends + experts, end, mask=known)

    place = tl.arange(0, STEP)
    for first in range(block * BLOCK, block * BLOCK + BLOCK, STEP):
        assignments = first + place
        expert = _expert_of(selected, executed, assignments, n_assignments, n_experts)
        busy = expert < n_experts
        same = (expert[:, None] == expert[None, :]) & (place[None, :] < place[:, None])
        rank = tl.sum(same.to(tl.int32), axis=1)
        first_busy = tl.gather(end - total + before, tl.where(busy, expert, 0), 0)
        first_idle = tl.sum(total) + first - tl.sum(before)
        row = rank + tl.where(busy, first_busy, first_idle)
        real = assignments < n_assignments
        tl.store(assignment_of_row + row, assignments, mask=real)
        tl.store(row_of_assignment + assignments, row, mask=real)
        before += tl.histogram(expert, EXPERTS, mask=busy)


@triton.jit
def _expert_of(selected, executed, assignments, n_assignments, n_experts):
    """The expert that computes each assignment; n_experts for none."""
    real = assignments < n_assignments
    expert = tl.load(selected + assignments, mask=real, other=n_experts)
    # An id out of range is nobody's, and must not be written with: it is compared before it loses its upper half.
    expert = tl.where((expert >= 0) & (expert < n_experts), expert, n_experts).to(tl.int32)
    if executed is not None:
        expert = tl.where(tl.load(executed + assignments, mask=real, other=0) != 0, expert, n_experts)
    return expert


@triton.jit(do_not_specialize=["n_experts", "n_tiles_max"])
def cut_into_tiles(
    ends, tile_expert, tile_row, n_tiles, busiest, n_experts, n_tiles_max, BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write one expert's tiles and its place by rows; the program after the last expert's writes what is left over."""
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    end = tl.load(ends + experts, mask=experts < n_experts, other=0)
    start = tl.load(ends + experts - 1, mask=(experts > 0) & (experts < n_experts), other=0)
    n_rows = end - start
    tiles = (n_rows + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0))
    first_row = tl.sum(tl.where(experts == expert, start, 0))
    past = tl.sum(tl.where(experts <= expert, tiles, 0))
    if expert == n_experts:
        tl.store(n_tiles, first_tile)
        past = n_tiles_max
    else:
        own = tl.sum(tl.where(experts == expert, n_rows, 0))
        before = (n_rows > own) | ((n_rows == own) & (experts < expert))
        tl.store(busiest + tl.sum(tl.where(before & (experts < n_experts), 1, 0)), expert)
    for tile in range(first_tile, past, TILES):
        index = tile + tl.arange(0, TILES)
        left_over = expert == n_experts
        tl.store(tile_expert + index, tl.where(left_over, -1, expert), mask=index < past)
        tl.store(
            tile_row + index, tl.where(left_over, 0, first_row + (index - first_tile) * BLOCK_M), mask=index < past
        )
