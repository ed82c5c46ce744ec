"""The Triton kernels of :mod:`.fused`: from logits to scores, selected experts, weights and sums, and the way back.

A program has a tile of tokens by columns, a column an expert. Columns are numbered by groups of experts, each padded to
a power of two, so that a group is a row of a reshaped tile; without groups all experts are one.

What decides and what is kept is float32 to its last bits: quotients are rounded, and exp is better than the device's
approximation, whose error grows with its argument.
"""

# mypy: ignore-errors
# ruff: noqa: N803 (compile-time arguments are upper case, as everywhere in Triton)

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.44269502162933349609375)
"""log2 e, and what float32 leaves of it"""
LOG2_E_REST = tl.constexpr(1.925963033500711e-08)
LN_2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(-(2**31))
"""the key of a column that cannot be chosen (any more): below that of every float32"""
NO_COLUMN = tl.constexpr(2**31 - 1)
LEAST_SUM = tl.constexpr(2.0**-103)
"""tiny / eps of float32, below which a token's weights are not divided by their sum"""
TINY = tl.constexpr(2.0**-126)
"""the smallest normal float32"""


@triton.jit(do_not_specialize=["n_tokens", "first_zero", "past_zero"])
def route(
    logits,  # [T, E]
    selection_bias,  # [E] or None
    mask,  # [T] or None
    scores,  # [T, E], written
    selected,  # [T, K], written
    weights,  # [T, K], written
    counts,  # [programs, E + 1], written; last the tokens that have shares
    share_sums,  # [programs, E], written
    n_tokens,
    n_experts,
    scale,
    first_zero,  # zero experts, which take no weight: from this one
    past_zero,  # to before this one
    SCORE: tl.constexpr,
    BIAS_ON_LOGITS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    N_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_TWO: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Route TOKENS tokens at a time; the sums of all those that a program routes are one row of the partial sums."""
    column = tl.arange(0, GROUPS * MEMBERS)
    group_size = n_experts // N_GROUPS
    if N_GROUPS == 1:
        real_column = column < n_experts
        expert = column
    else:
        real_column = (column // MEMBERS < N_GROUPS) & (column % MEMBERS < group_size)
        expert = column // MEMBERS * group_size + column % MEMBERS
    place = tl.arange(0, CHOICES)[None, :]
    if selection_bias is not None:
        bias = tl.load(selection_bias + expert, mask=real_column, other=0.0)[None, :]

    count = tl.zeros([GROUPS * MEMBERS], tl.int32)
    share_sum = tl.zeros([GROUPS * MEMBERS], tl.float32)
    n_scored = 0
    for first in range(tl.program_id(0) * TOKENS, n_tokens, tl.num_programs(0) * TOKENS):
        token = first + tl.arange(0, TOKENS)
        in_range = token < n_tokens
        row = token.to(tl.int64)[:, None]
        at = row * n_experts + expert[None, :]
        here = in_range[:, None] & real_column[None, :]
        logit = tl.load(logits + at, mask=here, other=0.0)
        score = _score(logit, real_column[None, :], SCORE)
        tl.store(scores + at, score, mask=here)
        real = in_range
        if mask is not None:
            real = real & (tl.load(mask + token, mask=in_range, other=0) != 0)

        preference = logit if BIAS_ON_LOGITS else score
        if selection_bias is not None:
            preference = preference + bias
        preference = tl.where(real_column[None, :], preference, -float("inf"))
        if N_GROUPS > 1:
            preference = _within_best_groups(preference, N_GROUPS, TOP_GROUPS, TOP_TWO, TOKENS, GROUPS, MEMBERS)
        key = tl.where(real_column[None, :], _order_key(preference), NEVER)
        chosen = tl.zeros([TOKENS, CHOICES], tl.int32)
        for choice in tl.static_range(TOP_K):
            best = _first_of_best(key, column[None, :])
            chosen = tl.where(place == choice, best[:, None], chosen)
            key = tl.where(column[None, :] == best[:, None], NEVER, key)

        weight = tl.where(place < TOP_K, tl.gather(score, chosen, 1), 0.0)
        if N_GROUPS > 1:
            chosen = chosen // MEMBERS * group_size + chosen % MEMBERS
        weight = tl.where((chosen >= first_zero) & (chosen < past_zero), 0.0, weight)
        if NORMALISE:
            weight = tl.div_rn(weight, tl.zeros_like(weight) + _divisor(weight)[:, None])
        weight = tl.where(real[:, None], weight * scale, 0.0)
        at = row * TOP_K + place
        tl.store(selected + at, chosen.to(tl.int64), mask=in_range[:, None] & (place < TOP_K))
        tl.store(weights + at, weight, mask=in_range[:, None] & (place < TOP_K))

        count += tl.sum(((key == NEVER) & real[:, None]).to(tl.int32), axis=0)
        if SCORE != "softmax":
            total = tl.sum(score, axis=1)
            real = real & (total > 0)
            score = tl.div_rn(score, tl.zeros_like(score) + tl.where(total > 0, total, 1.0)[:, None])
        share_sum += tl.sum(tl.where(real[:, None], score, 0.0), axis=0)
        n_scored += tl.sum(real.to(tl.int32))

    counts += tl.program_id(0) * (n_experts + 1)
    tl.store(counts + expert, count, mask=real_column)
    tl.store(counts + n_experts, n_scored)
    tl.store(share_sums + tl.program_id(0) * n_experts + expert, share_sum, mask=real_column)


@triton.jit(do_not_specialize=["n_tokens", "first_zero", "past_zero"])
def route_backward(
    grad_scores,  # [T, E] or None
    grad_weights,  # [T, K] or None
    grad_share_sums,  # [E] or None
    logits,  # [T, E], of sqrt_softplus; else None
    scores,  # [T, E]
    selected,  # [T, K]
    mask,  # [T] or None
    grad_logits,  # [T, E], written
    n_tokens,
    n_experts,
    scale,
    first_zero,
    past_zero,
    SCORE: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """The gradient of the logits of TOKENS tokens. One program a tile."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)[None, :]
    place = tl.arange(0, CHOICES)[None, :]
    in_range = token < n_tokens
    row = token.to(tl.int64)[:, None]
    here = in_range[:, None] & (expert < n_experts)
    at = row * n_experts + expert
    score = tl.load(scores + at, mask=here, other=0.0)
    real = in_range
    if mask is not None:
        real = real & (tl.load(mask + token, mask=in_range, other=0) != 0)

    grad = tl.zeros([TOKENS, EXPERTS], tl.float32)
    if grad_scores is not None:
        grad += tl.load(grad_scores + at, mask=here, other=0.0)
    if grad_share_sums is not None:
        grad_share = tl.load(grad_share_sums + expert, mask=expert < n_experts, other=0.0)
        if SCORE == "softmax":
            grad += tl.where(real[:, None], grad_share, 0.0)
        else:
            # share_e = s_e / S: its gradient has the mean of the shares' gradients taken off.
            total = tl.sum(score, axis=1)[:, None]
            mean = tl.sum(score * grad_share, axis=1)[:, None] / tl.where(total > 0, total, 1.0)
            grad += tl.where(real[:, None] & (total > 0), (grad_share - mean) / tl.where(total > 0, total, 1.0), 0.0)
    if grad_weights is not None:
        there = real[:, None] & (place < TOP_K)
        chosen = tl.load(selected + row * TOP_K + place, mask=there, other=0).to(tl.int32)
        there = there & ((chosen < first_zero) | (chosen >= past_zero))
        grad_weight = tl.load(grad_weights + row * TOP_K + place, mask=there, other=0.0) * scale
        if NORMALISE:
            weight = tl.load(scores + row * n_experts + chosen, mask=there, other=0.0)
            total = tl.sum(weight, axis=1)[:, None]
            divided = total >= LEAST_SUM
            divisor = tl.where(divided, total, 1.0)
            mean = tl.sum(grad_weight * weight, axis=1)[:, None] / divisor
            grad_weight = tl.where(there, (grad_weight - tl.where(divided, mean, 0.0)) / divisor, 0.0)
        for choice in tl.static_range(TOP_K):
            to = tl.sum(tl.where(place == choice, chosen, 0), axis=1)[:, None]
            grad += tl.where(expert == to, tl.sum(tl.where(place == choice, grad_weight, 0.0), axis=1)[:, None], 0.0)

    if SCORE == "softmax":
        grad = score * (grad - tl.sum(tl.where(here, score * grad, 0.0), axis=1)[:, None])
    elif SCORE == "sigmoid":
        grad = grad * score * (1 - score)
    elif SCORE == "relu":
        grad = tl.where(score > 0, grad, 0.0)
    else:
        grad = grad * _sigmoid(tl.load(logits + at, mask=here, other=0.0)) / (2 * score)
    tl.store(grad_logits + at, grad, mask=here)


@triton.jit
def _score(logit, real_column, SCORE: tl.constexpr):
    """Scores of a tile of logits, 0 in the columns that are no experts."""
    if SCORE == "softmax":
        top = tl.max(tl.where(real_column, logit, -float("inf")), axis=1)[:, None]
        power = tl.where(real_column, _exp(logit - top), 0.0)
        score = tl.div_rn(power, tl.zeros_like(power) + tl.sum(power, axis=1)[:, None])
    elif SCORE == "sigmoid":
        score = _sigmoid(logit)
    elif SCORE == "relu":
        score = tl.where(logit < 0, 0.0, logit)
    else:
        softplus = _softplus(logit)
        # As clamp does, which lets NaN pass.
        score = tl.sqrt_rn(tl.where(softplus < TINY, TINY, softplus))
    return tl.where(real_column, score, 0.0)


@triton.jit
def _within_best_groups(
    preference,
    N_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_TWO: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """The tile with -inf outside each token's best groups, by their best expert or the sum of their best two."""
    grouped = tl.reshape(preference, [TOKENS, GROUPS, MEMBERS])
    rank = tl.max(grouped, axis=2)
    if TOP_TWO:
        member = tl.arange(0, MEMBERS)[None, None, :]
        first = tl.min(tl.where(grouped == rank[:, :, None], member, MEMBERS), axis=2)
        rank += tl.max(tl.where(member == first[:, :, None], -float("inf"), grouped), axis=2)
    group = tl.arange(0, GROUPS)[None, :]
    key = tl.where(group < N_GROUPS, _order_key(rank), NEVER)
    for _ in tl.static_range(TOP_GROUPS):
        key = tl.where(group == _first_of_best(key, group)[:, None], NEVER, key)
    grouped = tl.where((key == NEVER)[:, :, None], grouped, -float("inf"))
    return tl.reshape(grouped, [TOKENS, GROUPS * MEMBERS])


@triton.jit
def _order_key(value):
    """An integer that orders as the value does, 0 and -0 alike; NaN gets one too, above all or below by its sign."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _first_of_best(key, column):
    """For each row the lowest of the columns with the largest key."""
    best = tl.max(key, axis=1)[:, None]
    return tl.min(tl.where(key == best, column, NO_COLUMN), axis=1)


@triton.jit
def _divisor(weight):
    """Each token's sum of weights, or 1 where it is so small that a gradient divided by it could overflow."""
    total = tl.sum(weight, axis=1)
    return tl.where(total < LEAST_SUM, 1.0, total)


@triton.jit
def _sigmoid(x):
    power = _exp(-x)
    return tl.div_rn(tl.zeros_like(power) + 1.0, 1 + power)


@triton.jit
def _softplus(x):
    """log(1 + exp x); x itself from 20 on, where float32 cannot tell them apart."""
    power = _exp(tl.where(x > 20, 0.0, x))
    sum_ = 1 + power
    # log1p: what the sum lost to rounding is made good by the quotient (Higham 2002, section 1.14.1).
    logarithm = tl.where(sum_ == 1, power, tl.log(sum_) * tl.div_rn(power, tl.where(sum_ == 1, 1.0, sum_ - 1)))
    return tl.where(x > 20, x, logarithm)


@triton.jit
def _exp(x):
    """exp x = 2^(x log2 e), the product in two parts: rounded to one, its error would grow with x."""
    # Beyond, the result is 0 or infinite anyway, and the parts of an infinite product would be NaN.
    x = tl.where(x < -150, -150.0, tl.where(x > 150, 150.0, x))
    product = x * LOG2_E
    rest = tl.fma(x, tl.zeros_like(x) + LOG2_E, -product) + x * LOG2_E_REST
    return tl.exp2(product) * (1 + rest * LN_2)
