"""The products for Hopper GPUs (compute capability 9), by warps with different tasks.

That takes Gluon, the language below Triton's own. In each program
- some warps *fetch*: blocks of both factors, by the tensor memory accelerator, or gathered row by row;
- two groups of four *multiply*, each 64 rows of a tile. Their sums stay in registers until the tile is done, and are
  then rounded and handed over in shared memory;
- the others *finish*: they apply the activation or its gradient, and write, while the next tile is multiplied.

So the tensor cores wait for a tile's end no longer than it takes to copy it. They wait for each other at barriers in
shared memory: ``full`` (there is something to read) and ``empty`` (it has been read). Warps of the three kinds also
differ in registers. Up to twelve warps a multiply takes 256 columns at once; beyond, only 128, as 128 registers is all
that sixteen warps are certain of. The gradient through the activation has the sixteen all the same: with two warps to
finish it, that took longer than the product.

The order of tiles, ragged descriptors and the order of sums are those of :mod:`.kernels`.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806 (what is known at compile time is upper case, as everywhere in Triton)
# ruff: noqa: RUF005, SIM108, SIM113 (the compiler knows neither starred tuples nor enumerate, and branches by `if`)

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
"""blocks of the factors in flight"""
PART = gl.constexpr(64)
"""columns of a tile that lie together in shared memory"""
AHEAD = gl.constexpr(3)
"""pieces of the pre-activation that are on their way while one is worked on"""
GROUP = gl.constexpr(8)
FAR = gl.constexpr(1 << 30)
"""rows that a ragged descriptor claims to have; see ``kernels._store_rows``"""

meet = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # Triton 3.6, and later


# ------------------------------------------------------------------------------------------------------- the products


@gluon.jit
def hidden_and_activation(
    x,  # pointer [T, D]
    w_in,  # descriptor [E * 2 F, D]
    hidden,  # ragged descriptor [N, 2 F], written
    activation,  # pointer [N, F], written
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
    """hidden[row] = W_in x[token of row], and SwiGLU of it. A tile has the columns of gate and of value."""
    tiles = (tile_expert, tile_row, n_tiles, F // (BLOCK_N // 2))
    stages = _stages(w_in.dtype, [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K], 64 + 1)
    result = _result(w_in.dtype)
    gl.warp_specialize(
        [
            (_multiply, (tiles, stages, result, D // BLOCK_K, 0, True, True, 256)),
            (_multiply, (tiles, stages, result, D // BLOCK_K, 1, True, True, 256)),
            (_finish_activation, (tiles, result, hidden, activation, ends, F)),
            (_fetch_hidden, (tiles, stages, x, w_in, assignment_of_row, D, F, last_row, K)),
        ],
        [4, 2, 2],  # warps
        [168, 168, 168],  # registers
    )


@gluon.jit
def inner_gradient(
    grad_y,  # pointer [T, D]
    w_out,  # descriptor [E * D, F]
    hidden,  # pointer [N, 2 F]
    weights,  # pointer [T * K]
    grad_hidden,  # pointer [N, 2 F], written
    inner,  # pointer [N, F], written: weight · activation
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
    """dA' = W_outᵀ dy, and from it the gradient of hidden, the weighted activation, the parts of the weights' gradient.

    It computes what ``kernels.rows_by_weight`` and ``kernels.activation_gradient`` do, with dA' rounded between them
    as there, but without dA' leaving the multiprocessor.
    """
    tiles = (tile_expert, tile_row, n_tiles, F // BLOCK_N)
    stages = _stages(w_out.dtype, [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N], 128 + 1)
    result = _result(w_out.dtype)
    finish = (tiles, result, hidden, weights, grad_hidden, inner, dots, assignment_of_row, ends, F, last_row)
    gl.warp_specialize(
        [
            (_multiply, (tiles, stages, result, D // BLOCK_K, 0, False, True, 128)),
            (_multiply, (tiles, stages, result, D // BLOCK_K, 1, False, True, 128)),
            (_finish_gradient, finish),
            (_fetch_factors, (tiles, stages, grad_y, w_out, assignment_of_row, D, last_row, K)),
        ],
        [4, 4, 4],
        [160, 136, 56],
    )


@gluon.jit
def rows_by_weight(
    rows,  # descriptor [N, I]
    weight,  # descriptor [E * O, I], or with TRANSPOSED [E * I, O]
    out,  # ragged descriptor [N, O], written
    tile_expert,
    tile_row,
    ends,
    n_tiles,
    inner_width,
    out_width,
    TRANSPOSED: gl.constexpr,
):
    """What ``kernels.rows_by_weight`` computes without GATHER, to the bit."""
    tiles = (tile_expert, tile_row, n_tiles, gl.cdiv(out_width, BLOCK_N))
    right_shape: gl.constexpr = [BLOCK_K, BLOCK_N] if TRANSPOSED else [BLOCK_N, BLOCK_K]
    stages = _stages(weight.dtype, [BLOCK_M, BLOCK_K], right_shape, 1)
    result = _result(weight.dtype)
    gl.warp_specialize(
        [
            (_multiply, (tiles, stages, result, inner_width // BLOCK_K, 0, not TRANSPOSED, False, 256)),
            (_multiply, (tiles, stages, result, inner_width // BLOCK_K, 1, not TRANSPOSED, False, 256)),
            (_finish_rows, (tiles, result, out, ends)),
            (_fetch_rows, (tiles, stages, rows, weight, inner_width, out_width, TRANSPOSED)),
        ],
        [4, 1, 1],
        [216, 24, 40],
    )


@gluon.jit
def weight_gradient(
    left,  # ragged descriptor [N, O]
    right,  # ragged descriptor [N, I]
    out,  # descriptor [E, O, I], written
    ends,
    busiest,
    n_experts,
    out_width,
    inner_width,
):
    """What ``kernels.weight_gradient`` computes, to the bit."""
    tiles = (ends, busiest, n_experts, gl.cdiv(out_width, BLOCK_M), gl.cdiv(inner_width, BLOCK_N))
    stages = _stages(out.dtype, [BLOCK_K, BLOCK_M], [BLOCK_K, BLOCK_N], 1)
    result = _result(out.dtype)
    gl.warp_specialize(
        [
            (_multiply_experts, (tiles, stages, result, 0, False)),
            (_multiply_experts, (tiles, stages, result, 1, False)),
            (_finish_expert, (tiles, result, out)),
            (_fetch_expert, (tiles, stages, left, right)),
        ],
        [4, 1, 1],
        [216, 24, 40],
    )


@gluon.jit
def weight_gradient_of_tokens(
    left,  # pointer [T, O]
    right,  # ragged descriptor [N, I]
    out,  # descriptor [E, O, I], written
    assignment_of_row,
    ends,
    busiest,
    n_experts,
    out_width,
    inner_width,
    last_row,
    K: gl.constexpr,
):
    """The same for a left factor with a row a token, which is gathered on the way."""
    tiles = (ends, busiest, n_experts, gl.cdiv(out_width, BLOCK_M), gl.cdiv(inner_width, BLOCK_N))
    stages = _stages(out.dtype, [BLOCK_K, BLOCK_M], [BLOCK_K, BLOCK_N], 64 + 1)
    result = _result(out.dtype)
    gl.warp_specialize(
        [
            (_multiply_experts, (tiles, stages, result, 0, True)),
            (_multiply_experts, (tiles, stages, result, 1, True)),
            (_finish_expert, (tiles, result, out)),
            (_fetch_expert_gathered, (tiles, stages, left, right, assignment_of_row, out_width, last_row, K)),
        ],
        [4, 1, 2],
        [208, 96, 96],
    )


# ------------------------------------------------------------------------------------------------------ shared memory


@gluon.jit
def _stages(dtype: gl.constexpr, left_shape: gl.constexpr, right_shape: gl.constexpr, arrivals: gl.constexpr):
    """Room for STAGES blocks of both factors; ``arrivals`` make one full: of each gathering thread, and of bytes."""
    left_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(left_shape, dtype)
    right_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(right_shape, dtype)
    left = gl.allocate_shared_memory(dtype, [STAGES, left_shape[0], left_shape[1]], left_layout)
    right = gl.allocate_shared_memory(dtype, [STAGES, right_shape[0], right_shape[1]], right_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=arrivals)
        mbarrier.init(empty.index(stage), count=2)  # both groups that multiply
    return left, right, full, empty


@gluon.jit
def _result(dtype: gl.constexpr):
    """Room for one tile that is done."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, PART], dtype)
    result = gl.allocate_shared_memory(dtype, [BLOCK_N // PART, BLOCK_M, PART], layout)
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=2)
    mbarrier.init(empty.index(0), count=1)
    fence_async_shared()
    meet()
    return result, full, empty


# ------------------------------------------------------------------------------------------------- those who multiply


@gluon.jit
def _multiply(
    tiles,
    stages,
    result,
    steps,
    half: gl.constexpr,
    RIGHT_TURNED: gl.constexpr,
    GATHERED: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """This half of the rows of one tile after the other."""
    _, _, n_tiles, column_tiles = tiles
    step = 0
    turn = 0
    for _ in range(gl.program_id(0), gl.load(n_tiles) * column_tiles, gl.num_programs(0)):
        sums, step = _multiply_tile(stages, step, steps, half, False, RIGHT_TURNED, GATHERED, COLUMNS)
        _hand_over(sums, result, turn, half)
        turn += 1


@gluon.jit
def _multiply_experts(tiles, stages, result, half: gl.constexpr, GATHERED: gl.constexpr):
    """The same for the weights' gradients, where a tile has as many steps as its expert has rows."""
    ends, busiest, n_experts, row_tiles, column_tiles = tiles
    step = 0
    # Looked up a tile ahead: this is on nobody's way then.
    n_rows = _rows_in_turn(0, ends, busiest, n_experts, row_tiles * column_tiles)
    for turn in range(_rounds(n_experts * row_tiles * column_tiles)):
        steps = gl.cdiv(n_rows, BLOCK_K)
        n_rows = _rows_in_turn(turn + 1, ends, busiest, n_experts, row_tiles * column_tiles)
        sums, step = _multiply_tile(stages, step, steps, half, True, False, GATHERED, 256)
        _hand_over(sums, result, turn, half)


@gluon.jit
def _multiply_tile(
    stages,
    step,
    steps,
    half: gl.constexpr,
    LEFT_TURNED: gl.constexpr,
    RIGHT_TURNED: gl.constexpr,
    GATHERED: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """The sums of half a tile, and the step after it. COLUMNS at a time: each instruction needs its sums at once."""
    left, right, full, empty = stages
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    sums = gl.zeros([BLOCK_M // 2, BLOCK_N], gl.float32, layout=layout)
    for k in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        if GATHERED:
            fence_async_shared()  # ordinary copies wrote it
        if LEFT_TURNED:
            a = left.index(stage).slice(half * (BLOCK_M // 2), BLOCK_M // 2, 1).permute((1, 0))
        else:
            a = left.index(stage).slice(half * (BLOCK_M // 2), BLOCK_M // 2, 0)
        if RIGHT_TURNED:
            b = right.index(stage).permute((1, 0))
        else:
            b = right.index(stage)
        sums = warpgroup_mma(a, b, sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=[sums])
        # The product before this one is done, and once the four warps have met, for all of them: its stage is free.
        meet()
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
        step += 1
    sums = warpgroup_mma_wait(0, deps=[sums])
    meet()
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=steps > 0)
    return sums, step


@gluon.jit
def _hand_over(sums, result, turn, half: gl.constexpr):
    """Round the sums, and leave them to those who finish."""
    buffer, full, empty = result
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    mbarrier.wait(empty.index(0), (turn & 1) ^ 1)
    parts = _quarters(sums)
    for part in gl.static_range(BLOCK_N // PART):
        rounded = gl.convert_layout(parts[part], layout).to(buffer.dtype)
        buffer.index(part).slice(half * (BLOCK_M // 2), BLOCK_M // 2, 0).store(rounded)
    fence_async_shared()
    meet()
    mbarrier.arrive(full.index(0), count=1)


@gluon.jit
def _quarters(x):
    """The columns of a tile in four parts, first to last; no register moves."""
    a, b = _halves(x)
    return _halves(a) + _halves(b)


@gluon.jit
def _halves(x):
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute([0, 2, 1]).split()


# ---------------------------------------------------------------------------------------------------- those who fetch


@gluon.jit
def _fetch_hidden(tiles, stages, x, w_in, assignment_of_row, D, F, last_row, K: gl.constexpr):
    """x, gathered, and the rows of W_in for gate and value."""
    tile_expert, tile_row, n_tiles, column_tiles = tiles
    left, right, full, empty = stages
    row_tiles = gl.load(n_tiles)
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles)
        gate_row = gl.load(tile_expert + row_tile) * 2 * F + column_tile * (BLOCK_N // 2)
        x_at = _tokens_of(x, gl.load(tile_row + row_tile), assignment_of_row, D, last_row, K)
        for k in range(0, D, BLOCK_K):
            stage = step % STAGES
            gates = right.index(stage).slice(0, BLOCK_N // 2, 0)
            values = right.index(stage).slice(BLOCK_N // 2, BLOCK_N // 2, 0)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), BLOCK_N * BLOCK_K * 2)
            tma.async_copy_global_to_shared(w_in, [gate_row, k], full.index(stage), gates)
            tma.async_copy_global_to_shared(w_in, [gate_row + F, k], full.index(stage), values)
            async_copy.async_copy_global_to_shared(left.index(stage), x_at + k)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            step += 1


@gluon.jit
def _fetch_factors(tiles, stages, grad_y, w_out, assignment_of_row, D, last_row, K: gl.constexpr):
    """dy, gathered, and W_out."""
    tile_expert, tile_row, n_tiles, column_tiles = tiles
    left, right, full, empty = stages
    row_tiles = gl.load(n_tiles)
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles)
        weight_row = gl.load(tile_expert + row_tile) * D
        grad_at = _tokens_of(grad_y, gl.load(tile_row + row_tile), assignment_of_row, D, last_row, K)
        for k in range(0, D, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), BLOCK_N * BLOCK_K * 2)
            at = [weight_row + k, column_tile * BLOCK_N]
            tma.async_copy_global_to_shared(w_out, at, full.index(stage), right.index(stage))
            async_copy.async_copy_global_to_shared(left.index(stage), grad_at + k)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            step += 1


@gluon.jit
def _tokens_of(x, row, assignment_of_row, D, last_row, K: gl.constexpr):
    """Where the first BLOCK_K columns of a tile's tokens are."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    token = gl.load(assignment_of_row + gl.minimum(rows, last_row)) // K
    columns = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    return x + token.to(gl.int64)[:, None] * D + columns[None, :]


@gluon.jit
def _fetch_rows(tiles, stages, rows, weight, inner_width, out_width, TRANSPOSED: gl.constexpr):
    """Rows as they lie, and their expert's weight."""
    tile_expert, tile_row, n_tiles, column_tiles = tiles
    left, right, full, empty = stages
    row_tiles = gl.load(n_tiles)
    programs = gl.num_programs(0)
    next_expert, next_row, next_column = _look_up(gl.program_id(0), tile_expert, tile_row, row_tiles, column_tiles)
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, programs):
        expert, row, column = next_expert, next_row, next_column
        next_expert, next_row, next_column = _look_up(tile + programs, tile_expert, tile_row, row_tiles, column_tiles)
        for k in range(0, inner_width, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            tma.async_copy_global_to_shared(rows, [row, k], full.index(stage), left.index(stage))
            if TRANSPOSED:
                at = [expert * inner_width + k, column]
            else:
                at = [expert * out_width + column, k]
            tma.async_copy_global_to_shared(weight, at, full.index(stage), right.index(stage))
            step += 1


@gluon.jit
def _look_up(tile, tile_expert, tile_row, row_tiles, column_tiles):
    """Expert, row and column of a tile; of the last one, where there are not so many."""
    tile = gl.maximum(gl.minimum(tile, row_tiles * column_tiles - 1), 0)
    row_tile, column_tile = _place(tile, row_tiles, column_tiles)
    return gl.load(tile_expert + row_tile), gl.load(tile_row + row_tile), column_tile * BLOCK_N


@gluon.jit
def _fetch_expert(tiles, stages, left_rows, right_rows):
    """The rows of one expert; zeros after their end."""
    ends, busiest, n_experts, row_tiles, column_tiles = tiles
    left, right, full, empty = stages
    step = 0
    for turn in range(_rounds(n_experts * row_tiles * column_tiles)):
        expert, left_column, right_column = _deal(turn, busiest, row_tiles, column_tiles)
        start, end = _rows_of(expert, ends)
        for row in range(start, end, BLOCK_K):
            stage = step % STAGES
            at = FAR - (end - row)
            left_block = left.index(stage).reshape([1, 1, BLOCK_K, BLOCK_M])
            right_block = right.index(stage).reshape([1, 1, BLOCK_K, BLOCK_N])
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            tma.async_copy_global_to_shared(left_rows, [FAR, end, at, left_column], full.index(stage), left_block)
            tma.async_copy_global_to_shared(right_rows, [FAR, end, at, right_column], full.index(stage), right_block)
            step += 1


@gluon.jit
def _fetch_expert_gathered(tiles, stages, x, right_rows, assignment_of_row, D, last_row, K: gl.constexpr):
    """The same, where the left rows are gathered: which ones is looked up a block ahead."""
    ends, busiest, n_experts, row_tiles, column_tiles = tiles
    left, right, full, empty = stages
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    rounds = _rounds(n_experts * row_tiles * column_tiles)
    step = 0
    for turn in range(rounds):
        expert, left_column, right_column = _deal(turn, busiest, row_tiles, column_tiles)
        start, end = _rows_of(expert, ends)
        x_at = x + (left_column + columns)[None, :]
        inside = (left_column + columns < D)[None, :]
        place = gl.load(assignment_of_row + gl.minimum(start + rows, last_row))
        for row in range(start, end, BLOCK_K):
            stage = step % STAGES
            at = x_at + (place // K).to(gl.int64)[:, None] * D
            live = (row + rows < end)[:, None]
            place = gl.load(assignment_of_row + gl.minimum(row + BLOCK_K + rows, last_row))
            right_block = right.index(stage).reshape([1, 1, BLOCK_K, BLOCK_N])
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), BLOCK_N * BLOCK_K * 2)
            ragged_at = [FAR, end, FAR - (end - row), right_column]
            tma.async_copy_global_to_shared(right_rows, ragged_at, full.index(stage), right_block)
            # Zeros after the end, for what another expert's token holds may be no number.
            async_copy.async_copy_global_to_shared(left.index(stage), at, mask=live & inside)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            step += 1


# --------------------------------------------------------------------------------------------------- those who finish


@gluon.jit
def _finish_rows(tiles, result, out, ends):
    """Write the tile."""
    tile_expert, tile_row, n_tiles, column_tiles = tiles
    buffer, full, empty = result
    row_tiles = gl.load(n_tiles)
    turn = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles)
        end = gl.load(ends + gl.load(tile_expert + row_tile))
        row = gl.load(tile_row + row_tile)
        mbarrier.wait(full.index(0), turn & 1)
        for part in gl.static_range(BLOCK_N // PART):
            _store_rows(out, row, end, column_tile * BLOCK_N + part * PART, buffer.index(part))
        tma.store_wait(0)
        meet()
        mbarrier.arrive(empty.index(0), count=1)
        turn += 1


@gluon.jit
def _finish_expert(tiles, result, out):
    """Write the tile of an expert's gradient."""
    _, busiest, n_experts, row_tiles, column_tiles = tiles
    buffer, full, empty = result
    for turn in range(_rounds(n_experts * row_tiles * column_tiles)):
        expert, row, column = _deal(turn, busiest, row_tiles, column_tiles)
        mbarrier.wait(full.index(0), turn & 1)
        for part in gl.static_range(BLOCK_N // PART):
            block = buffer.index(part).reshape([1, BLOCK_M, PART])
            tma.async_copy_shared_to_global(out, [expert, row, column + part * PART], block)
        tma.store_wait(0)
        meet()
        mbarrier.arrive(empty.index(0), count=1)


@gluon.jit
def _finish_activation(tiles, result, hidden, activation, ends, F):
    """Write gate and value, and the activation of what was written, some rows at a time."""
    tile_expert, tile_row, n_tiles, column_tiles = tiles
    buffer, full, empty = result
    ROWS: gl.constexpr = 4 * gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    at_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    at_column = gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
    row_tiles = gl.load(n_tiles)
    turn = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles)
        end = gl.load(ends + gl.load(tile_expert + row_tile))
        row = gl.load(tile_row + row_tile)
        column = column_tile * (BLOCK_N // 2)
        mbarrier.wait(full.index(0), turn & 1)
        for part in gl.static_range(2):
            _store_rows(hidden, row, end, column + part * PART, buffer.index(part))
            _store_rows(hidden, row, end, F + column + part * PART, buffer.index(2 + part))
        for first in gl.static_range(0, BLOCK_M, ROWS):
            rows = row + first + at_row
            at = activation + rows.to(gl.int64)[:, None] * F + (column + at_column)[None, :]
            for part in gl.static_range(2):
                gate = buffer.index(part).slice(first, ROWS, 0).load(layout).to(gl.float32)
                value = buffer.index(2 + part).slice(first, ROWS, 0).load(layout).to(gl.float32)
                inner = gate * _sigmoid(gate) * value
                gl.store(at + part * PART, inner.to(buffer.dtype), mask=(rows < end)[:, None])
        tma.store_wait(0)
        meet()
        mbarrier.arrive(empty.index(0), count=1)
        turn += 1


@gluon.jit
def _finish_gradient(tiles, result, hidden, weights, grad_hidden, inner, dots, assignment_of_row, ends, F, last_row):
    """The gradient through the activation, piece by piece: some rows, PART columns, then the columns after them."""
    tile_expert, tile_row, n_tiles, column_tiles = tiles
    buffer, full, empty = result
    ROWS: gl.constexpr = 4 * gl.num_warps()
    PARTS: gl.constexpr = BLOCK_N // PART
    PIECES: gl.constexpr = BLOCK_M // ROWS * PARTS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    at_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    at_column = gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
    dtype: gl.constexpr = buffer.dtype
    row_tiles = gl.load(n_tiles)
    turn = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles)
        end = gl.load(ends + gl.load(tile_expert + row_tile))
        rows = gl.load(tile_row + row_tile) + at_row
        columns = (column_tile * BLOCK_N + at_column)[None, :]
        # All that comes from far is asked for before it is needed.
        places = ()
        factors = ()
        coming = ()
        for group in gl.static_range(BLOCK_M // ROWS):
            places = places + (gl.load(assignment_of_row + gl.minimum(rows + group * ROWS, last_row)),)
        for group in gl.static_range(BLOCK_M // ROWS):
            factors = factors + (gl.load(weights + places[group]),)
        for piece in gl.static_range(AHEAD):
            coming = coming + _load_piece(hidden, rows + piece // PARTS * ROWS, columns + piece % PARTS * PART, end, F)
        mbarrier.wait(full.index(0), turn & 1)
        for piece in gl.static_range(PIECES):
            here = rows + piece // PARTS * ROWS
            if piece + AHEAD < PIECES:
                after = rows + (piece + AHEAD) // PARTS * ROWS
                coming = coming + _load_piece(hidden, after, columns + (piece + AHEAD) % PARTS * PART, end, F)
            if piece % PARTS == 0:
                total = gl.zeros([ROWS, PART], gl.float32, layout=layout)
            gate = coming[2 * piece].to(gl.float32)
            value = coming[2 * piece + 1].to(gl.float32)
            grad = buffer.index(piece % PARTS).slice(piece // PARTS * ROWS, ROWS, 0).load(layout).to(gl.float32)
            sigmoid = _sigmoid(gate)
            silu = gate * sigmoid
            activation = silu * value
            total += grad * activation
            weight = factors[piece // PARTS][:, None]
            grad = grad * weight
            grad_gate = grad * value * (sigmoid + silu * (1.0 - sigmoid))
            live = (here < end)[:, None]
            at = here.to(gl.int64)[:, None] * F + columns + piece % PARTS * PART
            gate_at = here.to(gl.int64)[:, None] * (2 * F) + columns + piece % PARTS * PART
            gl.store(grad_hidden + gate_at, grad_gate.to(dtype), mask=live)
            gl.store(grad_hidden + gate_at + F, (grad * silu).to(dtype), mask=live)
            gl.store(inner + at, (activation * weight).to(dtype), mask=live)
            if piece % PARTS == PARTS - 1:
                dots_at = dots + places[piece // PARTS].to(gl.int64) * column_tiles + column_tile
                gl.store(dots_at, gl.sum(total, axis=1), mask=here < end)
        meet()
        mbarrier.arrive(empty.index(0), count=1)
        turn += 1


@gluon.jit
def _load_piece(hidden, rows, columns, end, F):
    """Gate and value."""
    at = hidden + rows.to(gl.int64)[:, None] * (2 * F) + columns
    live = (rows < end)[:, None]
    return gl.load(at, mask=live, other=0.0), gl.load(at + F, mask=live, other=0.0)


@gluon.jit
def _sigmoid(x):
    """What ``kernels._sigmoid`` is with FAST."""
    half = gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=gl.float32, is_pure=True, pack=1
    )
    return 0.5 + 0.5 * half


@gluon.jit
def _store_rows(descriptor, row, end, column, buffer):
    """What ``kernels._store_rows`` does, from shared memory."""
    at = [FAR, end, FAR - (end - row), column]
    tma.async_copy_shared_to_global(descriptor, at, buffer.reshape([1, 1, BLOCK_M, PART]))


# -------------------------------------------------------------------------------------------------- the order of tiles


@gluon.jit
def _place(tile, row_tiles, column_tiles):
    """Row and column of a tile, in the order of ``kernels._place``."""
    width = GROUP * column_tiles
    first = tile // width * GROUP
    height = gl.minimum(row_tiles - first, GROUP)
    within = tile % width
    return first + within % height, within // height


@gluon.jit
def _deal(turn, busiest, row_tiles, column_tiles):
    """Expert, first row and first column of this program's tile of a weights' gradient, as ``kernels`` deals them."""
    tile = turn * gl.num_programs(0) + _seat(turn)
    row_tile, column_tile = _place(tile % (row_tiles * column_tiles), row_tiles, column_tiles)
    return gl.load(busiest + tile // (row_tiles * column_tiles)), row_tile * BLOCK_M, column_tile * BLOCK_N


@gluon.jit
def _rows_of(expert, ends):
    """Its first row, and the row after its last."""
    return gl.load(ends + expert - 1, mask=expert > 0, other=0), gl.load(ends + expert)


@gluon.jit
def _rows_in_turn(turn, ends, busiest, n_experts, tiles):
    """How many rows the expert of this program's tile has; of some expert, after the last turn."""
    tile = turn * gl.num_programs(0) + _seat(turn)
    start, end = _rows_of(gl.load(busiest + gl.minimum(tile // tiles, n_experts - 1)), ends)
    return end - start


@gluon.jit
def _rounds(tiles):
    """In how many turns this program has a tile."""
    programs = gl.num_programs(0)
    rounds = tiles // programs
    return rounds + (_seat(rounds) < tiles % programs).to(gl.int32)


@gluon.jit
def _seat(turn):
    """This program's place in a round: see ``kernels._seat``."""
    program = gl.program_id(0)
    return gl.where(turn % 2 == 0, program, gl.num_programs(0) - 1 - program)
