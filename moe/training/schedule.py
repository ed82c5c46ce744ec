"""The learning rate as a pure function of the step, so that there is no state to save."""

import math

from moe.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """The rate of step ``step`` (from 0) of ``steps``: the lower of the warm-up and the shape.

    The warm-up is linear and reaches ``peak`` at step ``warmup_steps - 1``. The shapes: ``constant``; ``cosine`` from
    the warm-up's end down to ``final_fraction`` (Loshchilov & Hutter 2017, eq. 5); or ``wsd``, constant until the last
    ``decay_fraction`` of the run and linear from there (Hägele et al. 2024). The last step's rate is just above
    ``final_fraction`` · peak.
    """
    warm_up = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.shape == "constant":
        return peak * warm_up
    if config.shape == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        height = (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2
    else:
        decay_steps = config.decay_fraction * steps
        height = 1.0 if decay_steps == 0 else min(1.0, max(0.0, (steps - step) / decay_steps))
    return peak * min(warm_up, config.final_fraction + (1 - config.final_fraction) * height)
