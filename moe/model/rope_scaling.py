"""Rotary frequencies for texts longer than those that a model was first trained on.

A dimension pair with frequency f turns L f / 2π times in the original context of L tokens. Pairs that turn often tell
neighbours apart and had better stay as they are; pairs that never came round would meet angles that they have not seen,
and are slowed down by the factor s of the longer context (interpolated). The scalings differ in what is in between.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moe.config import ModelConfig, RopeConfig


def scaled(frequencies: Float[Tensor, " n"], config: ModelConfig) -> Float[Tensor, " n"]:
    """The ``frequencies`` θ^(-2i/d) of the n = d / 2 pairs, as ``config.attention.rope.scaling`` changes them.

    linear: f / s for all pairs (Chen et al. 2023). ntk: the base θ becomes θ s^(d / (d - 2)), so that the fastest pair
    stays and the slowest becomes f / s (bloc97 2023). yarn and llama3: a blend of f and f / s for each pair.
    """
    rope = config.attention.rope
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "ntk":
        last = max(1, len(frequencies) - 1)
        return frequencies * rope.factor ** -(torch.arange(len(frequencies), device=frequencies.device) / last)
    keep = yarn_share(frequencies, config) if rope.scaling == "yarn" else llama3_share(frequencies, config)
    return frequencies * keep + frequencies / rope.factor * (1 - keep)


def yarn_share(frequencies: Float[Tensor, " n"], config: ModelConfig) -> Float[Tensor, " n"]:
    """Share of its own frequency that each pair keeps: a ramp over the pairs' numbers (Peng et al. 2023, section 3.2).

    It falls from 1 at the pair that turns ``beta_fast`` times in the original context to 0 at ``beta_slow`` times. With
    ``truncate`` both ends are rounded outwards to whole pairs.
    """
    rope, width = config.attention.rope, 2 * len(frequencies)

    def pair_that_turns(times: float) -> float:
        """The number i, a fraction as a rule, for which L θ^(-2i/d) = 2π times."""
        turns = original_context(config) / (2 * math.pi * times)
        return width * math.log(turns) / (2 * math.log(config.attention.rope_theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    number = torch.arange(len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
    return 1 - ((number - first) / max(last - first, 1e-3)).clamp(0, 1)


def llama3_share(frequencies: Float[Tensor, " n"], config: ModelConfig) -> Float[Tensor, " n"]:
    """Share of its own frequency that each pair keeps: a ramp over how often it turns in the original context.

    It rises from 0 at ``low_freq_factor`` turns to 1 at ``high_freq_factor`` (Llama 3.1's released code).
    """
    low, high = config.attention.rope.low_freq_factor, config.attention.rope.high_freq_factor
    turns = frequencies * original_context(config) / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def original_context(config: ModelConfig) -> float:
    """Tokens of the context before scaling, with the default resolved."""
    return float(config.attention.rope.original_max_seq or config.max_seq / config.attention.rope.factor)


def rotation_factor(rope: RopeConfig) -> float:
    """What YaRN multiplies rotated queries and keys by: m(mscale) / m(mscale_all_dim), the latter 1 unless given."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    whole = 0.0 if rope.mscale_all_dim is None else rope.mscale_all_dim
    return _temperature(rope, 1.0 if rope.mscale is None else rope.mscale) / _temperature(rope, whole)


def softmax_factor(rope: RopeConfig) -> float:
    """What the scores are multiplied by beside 1 / √d: m(mscale_all_dim)², as in DeepSeek-V2's code, else 1."""
    return 1.0 if rope.mscale_all_dim is None else _temperature(rope, rope.mscale_all_dim) ** 2


def _temperature(rope: RopeConfig, weight: float) -> float:
    """m = 0.1 · weight · ln s + 1 (Peng et al. 2023, section 3.4)."""
    return 0.1 * weight * math.log(rope.factor) + 1.0
