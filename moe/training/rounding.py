"""Weights in bfloat16 that small steps still move: rounded up or down by chance, so that they are right on average.

A bfloat16 has steps of 1/256 to 1/128 of itself. Rounded to the nearest, a weight of 0.02 does not move by less than
0.00006, and a second moment with β₂ = 0.999 never falls. Rounded up with the probability of what is cut off, both move
as far as they should, in expectation.

The chance is a function of (step, tensor, element) alone: the same in a resumed run, on every rank and on any device.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = 0x9E3779B9
"""2³² over the golden ratio: multiples of it are far apart"""
MIX = (0x85EBCA6B, 0xC2B2AE35)
"""the odd factors of MurmurHash3's 32-bit finaliser (Appleby 2011), in which every bit of input decides every bit"""
BITS_32 = 0xFFFFFFFF


def noise(step: Int[Tensor, ""], salt: int, n_elements: int) -> Int[Tensor, " n"]:
    """32 random bits for each element of the tensor called ``salt`` in optimizer step ``step``, as int64."""
    key = _mix(salt * GOLDEN + step.to(torch.int64))
    return _mix(torch.arange(n_elements, device=step.device) ^ key)


def round_by(bits: Int[Tensor, "*n"], x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """``x`` (float32) in bfloat16: up where its lower 16 bits and those of ``bits`` have a sum that carries."""
    carried = (x.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)) & -0x10000
    return carried.view(torch.float32).to(torch.bfloat16)


def _mix(value: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    value = value & BITS_32
    value = ((value ^ (value >> 16)) * MIX[0]) & BITS_32
    value = ((value ^ (value >> 13)) * MIX[1]) & BITS_32
    return value ^ (value >> 16)
