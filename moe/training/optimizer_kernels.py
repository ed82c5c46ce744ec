"""The Triton kernels that move weights in bfloat16: every number is read once and written once.

What they compute is defined in torch, by :mod:`.adamw` and :mod:`.rounding`.
"""

# mypy: ignore-errors
# ruff: noqa: N803, SIM102 (compile-time arguments are upper case; a None is known then, what it points to is not)

import triton
import triton.language as tl

BLOCK = 2048
"""elements a program: 16 a thread, which are two loads of 16 bytes from each tensor"""


def grid(n_elements: int) -> tuple[int]:
    """How many programs there are."""
    return (triton.cdiv(n_elements, BLOCK),)


@triton.jit(do_not_specialize=["salt"])
def adamw(
    parameter, gradient, first, second, step, found_inf, factor, lr, beta1, beta2, eps, weight_decay, salt, n_elements,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of AdamW on BLOCK elements of one tensor; nothing where found_inf is not 0."""
    if found_inf is not None:
        if tl.load(found_inf) != 0.0:
            return
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < n_elements
    number = tl.load(step)
    p = tl.load(parameter + element, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + element, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(first + element, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second + element, mask=inside, other=0.0).to(tl.float32)
    if factor is not None:
        g *= tl.load(factor)
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    correction1 = 1 - tl.exp(number * tl.log(beta1))
    correction2 = 1 - tl.exp(number * tl.log(beta2))
    p -= lr * weight_decay * p + lr / correction1 * m / (tl.sqrt(v / correction2) + eps)
    bits = _noise(number, salt, element)
    tl.store(parameter + element, _round_by(bits, p), mask=inside)
    tl.store(first + element, m.to(tl.bfloat16), mask=inside)
    tl.store(second + element, _round_by(bits >> 16, v), mask=inside)


@triton.jit(do_not_specialize=["salt"])
def move(parameter, direction, step, found_inf, decay, rate, salt, n_elements, BLOCK: tl.constexpr):
    """parameter · decay - rate · direction on BLOCK elements of one tensor; nothing where found_inf is not 0."""
    if found_inf is not None:
        if tl.load(found_inf) != 0.0:
            return
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < n_elements
    p = tl.load(parameter + element, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(direction + element, mask=inside, other=0.0).to(tl.float32)
    bits = _noise(tl.load(step), salt, element)
    tl.store(parameter + element, _round_by(bits, p * decay - rate * d), mask=inside)


@triton.jit
def _noise(number, salt, element):
    """32 random bits for each element, as :func:`moe.training.rounding.noise` draws them."""
    key = _mix(salt.to(tl.uint32) * 0x9E3779B9 + number.to(tl.uint32))
    return _mix(element.to(tl.uint32) ^ key)


@triton.jit
def _mix(value):
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    return value ^ (value >> 16)


@triton.jit
def _round_by(bits, x):
    """x in bfloat16: up where its lower 16 bits and those of ``bits`` have a sum that carries."""
    carried = (x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
    return carried.to(tl.float32, bitcast=True).to(tl.bfloat16)
