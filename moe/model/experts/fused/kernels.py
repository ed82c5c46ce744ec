"""The Triton kernels of the experts: three matrix products, and what moves rows about between them.

Rows are assignments, sorted by expert; T tokens, N rows, K choices a token, D model width, F expert width, E experts.
A product works on tiles: BLOCK_M rows of one expert (from the tile schedule) by BLOCK_N columns. As many programs as
the GPU has multiprocessors go through them, GROUP tiles of rows at a time, so that what they share is in the cache.

How a program reads and writes is what makes them fast (measured in dev/LOG.md):
- operands come through the tensor memory accelerator, by descriptors; rows that must be gathered by ordinary
  asynchronous copies;
- a tile may hang over the end of its expert's rows: it then reads rows of the next expert, whose results are not
  written. A *ragged* descriptor knows that end: it writes no row beyond, and reads zeros there;
- the results are written in parts, because a whole tile's addresses or temporaries do not fit the registers.

All accumulate in float32. Nothing is added atomically, so the same input gives the same bits, and the sum over the
inner dimension runs in one order whatever the tiles and the other tokens are.
"""

# mypy: ignore-errors
# ruff: noqa: N803, SIM108 (compile-time arguments are upper case, as everywhere in Triton)

import triton
import triton.language as tl

FAR = tl.constexpr(1 << 30)
"""rows that a ragged descriptor claims to have; see :func:`_store_rows`"""
NAN = tl.constexpr(tl.PropagateNan.ALL)
"""what is no number stays none, as in torch; left out, the hardware takes the bound instead"""


@triton.jit
def hidden_and_activation(
    x,  # pointer [T, D]
    w_in,  # descriptor [E, H / F, F, D]
    hidden,  # ragged descriptor [N, H / F, F], written
    activation,  # ragged descriptor [N, F], written
    assignment_of_row,
    tile_expert,
    tile_row,
    ends,
    n_tiles,
    D,
    F,
    last_row,
    K: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """hidden[row] = W_in x[token of row], and its activation; for a gated one a tile has the gate and the value."""
    row_tiles = tl.load(n_tiles)
    column_tiles = tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        expert = tl.load(tile_expert + row_tile)
        row = tl.load(tile_row + row_tile)
        n_rows = tl.load(ends + expert) - row
        token = tl.load(assignment_of_row + tl.minimum(row + tl.arange(0, BLOCK_M), last_row)) // K
        x_at = x + token.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
        column = column_tile * BLOCK_N
        dtype = hidden.dtype
        if GATED:
            sums = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
            for k in tl.range(0, D, BLOCK_K):
                left = _columns(x_at, k, D, WHOLE_BLOCKS, BLOCK_K)
                right = w_in.load([expert, 0, column, k]).reshape(2 * BLOCK_N, BLOCK_K)
                sums = tl.dot(left, right.T, sums, input_precision="ieee")
            gate, value = sums.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
            _store_part(hidden, row, n_rows, 0, column, gate.to(dtype))
            _store_part(hidden, row, n_rows, 1, column, value.to(dtype))
            inner = _activate(gate, value, KIND, FAST)
        else:
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in tl.range(0, D, BLOCK_K):
                left = _columns(x_at, k, D, WHOLE_BLOCKS, BLOCK_K)
                right = w_in.load([expert, 0, column, k]).reshape(BLOCK_N, BLOCK_K)
                sums = tl.dot(left, right.T, sums, input_precision="ieee")
            _store_part(hidden, row, n_rows, 0, column, sums.to(dtype))
            inner = _activate(sums, sums, KIND, FAST)
        _store_rows(activation, row, n_rows, column, inner.to(dtype))


@triton.jit
def rows_by_weight(
    rows,  # descriptor [N, I], or with GATHER pointer [T, I]
    weight,  # descriptor [E, O, I], or with TRANSPOSED [E, I, O]
    out,  # ragged descriptor [N, O], written
    assignment_of_row,
    tile_expert,
    tile_row,
    ends,
    n_tiles,
    inner_width,
    out_width,
    last_row,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out[row] = W rows[row], or with TRANSPOSED Wᵀ rows[row], with the W of the row's expert."""
    row_tiles = tl.load(n_tiles)
    column_tiles = tl.cdiv(out_width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        expert = tl.load(tile_expert + row_tile)
        row = tl.load(tile_row + row_tile)
        n_rows = tl.load(ends + expert) - row
        column = column_tile * BLOCK_N
        if GATHER:
            token = tl.load(assignment_of_row + tl.minimum(row + tl.arange(0, BLOCK_M), last_row)) // K
            rows_at = rows + token.to(tl.int64)[:, None] * inner_width + tl.arange(0, BLOCK_K)[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, inner_width, BLOCK_K):
            if GATHER:
                left = _columns(rows_at, k, inner_width, WHOLE_BLOCKS, BLOCK_K)
            else:
                left = rows.load([row, k])
            if TRANSPOSED:
                right = weight.load([expert, k, column]).reshape(BLOCK_K, BLOCK_N)
                sums = tl.dot(left, right, sums, input_precision="ieee")
            else:
                right = weight.load([expert, column, k]).reshape(BLOCK_N, BLOCK_K)
                sums = tl.dot(left, right.T, sums, input_precision="ieee")
        first, second = sums.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        _store_rows(out, row, n_rows, column, first.to(out.dtype))
        _store_rows(out, row, n_rows, column + BLOCK_N // 2, second.to(out.dtype))


@triton.jit
def weight_gradient(
    left,  # ragged descriptor [N, O]
    right,  # ragged descriptor [N, I]
    out,  # descriptor [E, O, I], written
    ends,
    busiest,
    n_experts,
    out_width,
    inner_width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[e] = leftᵀ right over the rows of expert e; zeros where it has none.

    A tile takes as long as its expert has rows. So the busiest experts come first, and every other round of tiles is
    dealt to the programs in the opposite order: who had the longest of one round has the shortest of the next.
    """
    row_tiles = tl.cdiv(out_width, BLOCK_M)
    column_tiles = tl.cdiv(inner_width, BLOCK_N)
    tiles = row_tiles * column_tiles
    programs = tl.num_programs(0)
    rounds, rest = n_experts * tiles // programs, n_experts * tiles % programs
    rounds += (_seat(rounds, programs) < rest).to(tl.int32)
    for turn in tl.range(0, rounds):
        tile = turn * programs + _seat(turn, programs)
        expert = tl.load(busiest + tile // tiles)
        row_tile, column_tile = _place(tile % tiles, row_tiles, column_tiles, GROUP)
        start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        n_rows = tl.load(ends + expert) - start
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, n_rows, BLOCK_K):
            a = _load_rows(left, start + k, n_rows - k, row_tile * BLOCK_M, BLOCK_K, BLOCK_M)
            b = _load_rows(right, start + k, n_rows - k, column_tile * BLOCK_N, BLOCK_K, BLOCK_N)
            sums = tl.dot(a.T, b, sums, input_precision="ieee")
        column = column_tile * BLOCK_N
        first, second = sums.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        out.store([expert, row_tile * BLOCK_M, column], first.to(out.dtype).reshape(1, BLOCK_M, BLOCK_N // 2))
        out.store(
            [expert, row_tile * BLOCK_M, column + BLOCK_N // 2],
            second.to(out.dtype).reshape(1, BLOCK_M, BLOCK_N // 2),
        )


@triton.jit
def gather_rows(x, row_of_assignment, out, n_tokens, D, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[row] = x[token of row], token by token: each is read once, and written K times."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = tokens < n_tokens
    inside = real[:, None] & (columns < D)[None, :]
    values = tl.load(x + tokens.to(tl.int64)[:, None] * D + columns[None, :], mask=inside)
    for choice in tl.static_range(K):
        row = tl.load(row_of_assignment + tokens * K + choice, mask=real, other=0)
        tl.store(out + row.to(tl.int64)[:, None] * D + columns[None, :], values, mask=inside)


@triton.jit
def sum_choices(
    rows,
    weights,
    row_of_assignment,
    n_computed,
    out,
    n_tokens,
    D,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = Σ_k weight_tk · rows[row of (t, k)], choice by choice in float32; rows that no expert computed are 0."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = tokens < n_tokens
    inside = real[:, None] & (columns < D)[None, :]
    end = tl.load(n_computed)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for choice in tl.static_range(K):
        place = tokens * K + choice
        row = tl.load(row_of_assignment + place, mask=real, other=0)
        at = rows + row.to(tl.int64)[:, None] * D + columns[None, :]
        term = tl.load(at, mask=inside & (row < end)[:, None], other=0.0).to(tl.float32)
        if WEIGHTED:
            term = term * tl.load(weights + place, mask=real, other=0.0)[:, None]
        total += term
    out_at = out + tokens.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def activation_gradient(
    grad_inner,
    hidden,
    weights,
    assignment_of_row,
    n_computed,
    grad_hidden,
    out,
    grad_weights,
    F,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """From dA' = W_outᵀ dy: the gradient of hidden, that of the weight, ⟨dA', A⟩, and in ``out`` the weighted A."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    end = tl.load(n_computed)
    real = rows < end
    wide = rows.to(tl.int64)[:, None]
    place = tl.load(assignment_of_row + rows, mask=real, other=0)
    weight = tl.load(weights + place, mask=real, other=0.0)[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for first in range(0, F, BLOCK_F):
        columns = first + tl.arange(0, BLOCK_F)[None, :]
        inside = real[:, None] & (columns < F)
        grad = tl.load(grad_inner + wide * F + columns, mask=inside, other=0.0).to(tl.float32)
        gate, value = _halves(hidden, wide, columns, inside, F, GATED)
        inner, grad_gate, grad_value = _activate_with_gradient(gate, value, grad * weight, KIND, FAST)
        total += grad * inner
        dtype = grad_hidden.dtype.element_ty
        tl.store(out + wide * F + columns, (inner * weight).to(dtype), mask=inside)
        if GATED:
            grad_at = grad_hidden + wide * (2 * F) + columns
            tl.store(grad_at, grad_gate.to(dtype), mask=inside)
            tl.store(grad_at + F, grad_value.to(dtype), mask=inside)
        else:
            tl.store(grad_hidden + wide * F + columns, grad_gate.to(dtype), mask=inside)
    tl.store(grad_weights + place, tl.sum(total, axis=1), mask=real)


@triton.jit
def _seat(turn, programs):
    """This program's place in a round: its number, counted from the other end in every other round."""
    program = tl.program_id(0)
    return tl.where(turn % 2 == 0, program, programs - 1 - program)


@triton.jit
def _place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile, in the order that goes down GROUP rows before it goes to the next column."""
    width = GROUP * column_tiles
    first = tile // width * GROUP
    height = min(row_tiles - first, GROUP)
    within = tile % width
    return first + within % height, within // height


@triton.jit
def _store_rows(out, row, n_rows, column, values):
    """Write tile ``values`` at [row, column] of a ragged descriptor, no more than ``n_rows`` rows of it.

    The hardware clips at a tensor's size alone, which is no expert's end. So the descriptor says that there are FAR
    rows, and the tile is put where only ``n_rows`` of them are left; two more axes, of strides s and 2^34 - s for a
    row's stride s, bring the address back: FAR (2^34 - s) + (row + n_rows) s + (FAR - n_rows) s = 2^64 + row s, and
    an address has 64 bits. (The idea is that of triton.tools.ragged_tma.)
    """
    out.store([FAR, row + n_rows, FAR - n_rows, column], values.reshape(1, 1, values.shape[0], values.shape[1]))


@triton.jit
def _store_part(out, row, n_rows, part, column, values):
    """The same at [row, part, column] of a ragged descriptor of three axes."""
    tile = values.reshape(1, 1, values.shape[0], 1, values.shape[1])
    out.store([FAR, row + n_rows, FAR - n_rows, part, column], tile)


@triton.jit
def _load_rows(rows, row, n_rows, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile at [row, column] of a ragged descriptor, with zeros after ``n_rows`` rows: see :func:`_store_rows`."""
    return rows.load([FAR, row + n_rows, FAR - n_rows, column]).reshape(ROWS, COLUMNS)


@triton.jit
def _columns(at, k, width, WHOLE_BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K columns from k on of gathered rows; zeros beyond the width."""
    if WHOLE_BLOCKS:
        return tl.load(at + k)
    return tl.load(at + k, mask=(k + tl.arange(0, BLOCK_K) < width)[None, :], other=0.0)


@triton.jit
def _halves(hidden, wide, columns, inside, F, GATED: tl.constexpr):
    """Gate and value in float32; without a gate, the same twice."""
    if GATED:
        gate = tl.load(hidden + wide * (2 * F) + columns, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(hidden + wide * (2 * F) + F + columns, mask=inside, other=0.0).to(tl.float32)
        return gate, value
    gate = tl.load(hidden + wide * F + columns, mask=inside, other=0.0).to(tl.float32)
    return gate, gate


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    """With FAST by the hardware's tanh: one special function instead of two, an absolute error of 2^-12."""
    if FAST:
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * half
    return tl.sigmoid(x)


@triton.jit
def _twice_the_tanh_of_gelu(x):
    """2 u for u = √(2/π) (x + 0.044715 x³), in terms of which (1 + tanh u) / 2 is a sigmoid."""
    return 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)


@triton.jit
def _activate(gate, value, KIND: tl.constexpr, FAST: tl.constexpr):
    """moe.model.feed_forward.activate, in float32."""
    if KIND == "swiglu":
        return gate * _sigmoid(gate, FAST) * value
    if KIND == "swiglu_clamped":
        gate = tl.minimum(gate, 7.0, NAN)
        return gate * _sigmoid(1.702 * gate, FAST) * (tl.clamp(value, -7.0, 7.0, NAN) + 1.0)
    if KIND == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    if KIND == "gelu_tanh":
        return gate * _sigmoid(_twice_the_tanh_of_gelu(gate), FAST)
    return tl.maximum(gate, 0.0, NAN)


@triton.jit
def _activate_with_gradient(gate, value, grad, KIND: tl.constexpr, FAST: tl.constexpr):
    """The activation, and the gradients of gate and value (of gate alone, where there is no value)."""
    if KIND == "swiglu":
        sigmoid = _sigmoid(gate, FAST)
        silu = gate * sigmoid
        return silu * value, grad * value * (sigmoid + silu * (1.0 - sigmoid)), grad * silu
    if KIND == "swiglu_clamped":
        low = tl.minimum(gate, 7.0, NAN)
        sigmoid = _sigmoid(1.702 * low, FAST)
        silu = low * sigmoid
        one_more = tl.clamp(value, -7.0, 7.0, NAN) + 1.0
        grad_gate = grad * one_more * (sigmoid + 1.702 * silu * (1.0 - sigmoid))
        # As torch's clamp: at the bound itself the gradient passes.
        grad_gate = tl.where(gate <= 7.0, grad_gate, 0.0)
        grad_value = tl.where((value >= -7.0) & (value <= 7.0), grad * silu, 0.0)
        return silu * one_more, grad_gate, grad_value
    if KIND == "gelu":
        below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        return gate * below, grad * (below + gate * density), gate
    if KIND == "gelu_tanh":
        sigmoid = _sigmoid(_twice_the_tanh_of_gelu(gate), FAST)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        return gate * sigmoid, grad * sigmoid * (1.0 + gate * slope * (1.0 - sigmoid)), gate
    return tl.maximum(gate, 0.0, NAN), tl.where(gate > 0.0, grad, 0.0), gate
