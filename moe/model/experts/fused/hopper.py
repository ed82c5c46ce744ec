"""The gradient through the activation in one kernel, written for Hopper GPUs (compute capability 9).

It computes what ``rows_by_weight`` and ``activation_gradient`` of :mod:`.kernels` compute in two, without dA' ever
leaving the multiprocessor: dA' = W_outᵀ dy stays in registers, and meets the pre-activation, which was fetched
meanwhile, there. That takes warps with different tasks, which Triton's own language does not offer and Gluon, the
language below it, does: two warps gather dy and fetch W_out, one fetches the pre-activation, and eight multiply, apply
the activation's gradient in parts of 32 columns, and write. Each waits for the others at barriers in shared memory:
``full`` (there is something to read) and ``empty`` (it has been read).

Needs SwiGLU, D a multiple of 64 and F of 256; everything else takes the two kernels.
"""

# mypy: ignore-errors
# ruff: noqa: N803 (compile-time arguments are upper case, as everywhere in Triton)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(64)
STAGES = gl.constexpr(3)
"""blocks of dy and W_out in flight"""
PART = gl.constexpr(32)
"""columns of the pre-activation that are taken at a time"""
SLOTS = gl.constexpr(4)
"""parts of the pre-activation in flight"""
GROUP = gl.constexpr(8)
FAR = gl.constexpr(1 << 30)
"""rows that a ragged descriptor claims to have; see ``kernels._store_rows``"""

meet = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # Triton 3.6, and later


@gluon.jit
def inner_gradient(
    grad_y,  # pointer [T, D]
    w_out,  # descriptor [E * D, F]
    hidden,  # descriptor [N, 2 F]
    weights,  # pointer [T * K]
    grad_hidden,  # ragged descriptor [N, 2 F], written
    inner,  # ragged descriptor [N, F], written: weight · activation
    dots,  # pointer [T * K, F / BLOCK_N], written: ⟨dA', activation⟩ over each tile's columns
    assignment_of_row,
    tile_expert,
    tile_row,
    ends,
    n_tiles,
    D,
    F,
    last_row,
    K: gl.constexpr,
):
    """The gradient of hidden, the weighted activation, and the parts of the weights' gradient."""
    dtype: gl.constexpr = w_out.dtype
    left_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], dtype)
    left = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], left_layout)
    right = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], w_out.layout)
    gates = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_M, PART], hidden.layout)
    values = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_M, PART], hidden.layout)
    out = gl.allocate_shared_memory(dtype, [BLOCK_M, PART], hidden.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    slot_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    slot_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=64 + 1)  # each gathering thread, and the bytes of W_out
        mbarrier.init(empty.index(stage), count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(slot_full.index(slot), count=1)
        mbarrier.init(slot_empty.index(slot), count=1)
    fence_async_shared()
    meet()
    tiles = (tile_expert, tile_row, n_tiles)
    stages = (left, right, full, empty)
    slots = (gates, values, slot_full, slot_empty)
    gl.warp_specialize(
        [
            (
                _compute,
                (tiles, stages, slots, out, weights, grad_hidden, inner, dots, assignment_of_row, ends, D, F, last_row),
            ),
            (_fetch_factors, (tiles, stages, grad_y, w_out, assignment_of_row, D, F, last_row, K)),
            (_fetch_hidden, (tiles, slots, hidden, F)),
        ],
        [2, 1],  # warps
        [80, 24],  # registers
    )


@gluon.jit
def _fetch_factors(tiles, stages, grad_y, w_out, assignment_of_row, D, F, last_row, K: gl.constexpr):
    """Fill the stages with blocks of dy, gathered, and of W_out."""
    tile_expert, tile_row, n_tiles = tiles
    left, right, full, empty = stages
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0])
    at_row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    at_column = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    row_tiles = gl.load(n_tiles)
    column_tiles = F // BLOCK_N
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles)
        expert = gl.load(tile_expert + row_tile)
        row = gl.load(tile_row + row_tile)
        token = gl.load(assignment_of_row + gl.minimum(row + at_row, last_row)) // K
        grad_at = grad_y + token.to(gl.int64)[:, None] * D + at_column[None, :]
        for k in range(0, D, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), BLOCK_N * BLOCK_K * 2)
            at = [expert * D + k, column_tile * BLOCK_N]
            tma.async_copy_global_to_shared(w_out, at, full.index(stage), right.index(stage))
            async_copy.async_copy_global_to_shared(left.index(stage), grad_at + k)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            step += 1


@gluon.jit
def _fetch_hidden(tiles, slots, hidden, F):
    """Fill the slots with parts of gate and value."""
    _, tile_row, n_tiles = tiles
    gates, values, slot_full, slot_empty = slots
    row_tiles = gl.load(n_tiles)
    column_tiles = F // BLOCK_N
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles)
        row = gl.load(tile_row + row_tile)
        for part in range(BLOCK_N // PART):
            slot = step % SLOTS
            column = column_tile * BLOCK_N + part * PART
            mbarrier.wait(slot_empty.index(slot), ((step // SLOTS) & 1) ^ 1)
            mbarrier.expect(slot_full.index(slot), 2 * BLOCK_M * PART * 2)
            tma.async_copy_global_to_shared(hidden, [row, column], slot_full.index(slot), gates.index(slot))
            tma.async_copy_global_to_shared(hidden, [row, F + column], slot_full.index(slot), values.index(slot))
            step += 1


@gluon.jit
def _compute(tiles, stages, slots, out, weights, grad_hidden, inner, dots, assignment_of_row, ends, D, F, last_row):
    """dA' by the tensor cores, then the gradient part by part; results go out through the slot that they came from."""
    tile_expert, tile_row, n_tiles = tiles
    left, right, full, empty = stages
    gates, values, slot_full, slot_empty = slots
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, PART, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    dtype: gl.constexpr = grad_hidden.dtype
    row_tiles = gl.load(n_tiles)
    column_tiles = F // BLOCK_N
    step = 0
    part_step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles)
        row = gl.load(tile_row + row_tile)
        end = gl.load(ends + gl.load(tile_expert + row_tile))
        sums = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=sums_layout)
        for k in range(0, D, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            fence_async_shared()
            sums = warpgroup_mma(left.index(stage), right.index(stage), sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=[sums])
            # The product before this one is done, and once all warps have met, for all of them: its stage is free.
            meet()
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        sums = warpgroup_mma_wait(0, deps=[sums])
        meet()
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)

        rows = row + gl.arange(0, BLOCK_M, layout=row_layout)
        place = gl.load(assignment_of_row + gl.minimum(rows, last_row))
        weight = gl.load(weights + place)[:, None]
        parts = _eighths(sums)
        total = gl.zeros([BLOCK_M], gl.float32, layout=row_layout)
        for part in gl.static_range(BLOCK_N // PART):
            slot = part_step % SLOTS
            gate_slot, value_slot = gates.index(slot), values.index(slot)
            grad = gl.convert_layout(parts[part], layout)
            mbarrier.wait(slot_full.index(slot), (part_step // SLOTS) & 1)
            gate = gate_slot.load(layout).to(gl.float32)
            value = value_slot.load(layout).to(gl.float32)
            sigmoid = 0.5 + 0.5 * gl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * gate], dtype=gl.float32, is_pure=True, pack=1
            )
            silu = gate * sigmoid
            total += gl.sum(grad * (silu * value), axis=1)
            grad = grad * weight
            grad_gate = (grad * value * (sigmoid + silu * (1.0 - sigmoid))).to(dtype)
            grad_value = (grad * silu).to(dtype)
            weighted = (silu * value * weight).to(dtype)
            # What the part before wrote is on its way: its slot is free, and the buffer of the activation.
            tma.store_wait(0)
            meet()
            if part > 0:
                mbarrier.arrive(slot_empty.index((part_step + SLOTS - 1) % SLOTS), count=1)
            gate_slot.store(grad_gate)
            value_slot.store(grad_value)
            out.store(weighted)
            fence_async_shared()
            meet()
            column = column_tile * BLOCK_N + part * PART
            _store_rows(grad_hidden, row, end, column, gate_slot)
            _store_rows(grad_hidden, row, end, F + column, value_slot)
            _store_rows(inner, row, end, column, out)
            part_step += 1
        gl.store(dots + place.to(gl.int64) * column_tiles + column_tile, total, mask=rows < end)
        tma.store_wait(0)
        meet()
        mbarrier.arrive(slot_empty.index((part_step + SLOTS - 1) % SLOTS), count=1)


@gluon.jit
def _store_rows(descriptor, row, end, column, buffer):
    """What ``kernels._store_rows`` does, from shared memory."""
    at = [FAR, end, FAR - (end - row), column]
    tma.async_copy_shared_to_global(descriptor, at, buffer.reshape([1, 1, BLOCK_M, PART]))


@gluon.jit
def _eighths(x):
    """The columns of a tile in eight parts, first to last; no register moves."""
    a, b = _halves(x)
    a1, a2 = _halves(a)
    b1, b2 = _halves(b)
    return _halves(a1) + _halves(a2) + _halves(b1) + _halves(b2)


@gluon.jit
def _halves(x):
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _place(tile, row_tiles, column_tiles):
    """Row and column of a tile, in the order of ``kernels._place``."""
    width = GROUP * column_tiles
    first = tile // width * GROUP
    height = gl.minimum(row_tiles - first, GROUP)
    within = tile % width
    return first + within % height, within // height
