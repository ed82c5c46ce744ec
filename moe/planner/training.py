"""From arithmetic to days and dollars, and how long a step takes under a layout."""

from dataclasses import dataclass

from moe.config import ModelConfig
from moe.planner.devices import Device
from moe.planner.flops import Flops, count_flops
from moe.planner.layout import Layout, share_of
from moe.planner.step import RECIPES, Step

DAY = 86_400
EFFICIENCY = 0.52
"""share of the peak that a device reaches while it computes, where nothing is given: what Narayanan et al. 2021 (table
1) measured for 1T parameters on A100s, counting what is computed again and the bubble's waiting"""


def training_days(flops: float, devices: int, peak: float, mfu: float) -> float:
    """Days that ``devices`` of ``peak`` FLOP/s need for ``flops`` at a model FLOPs utilisation of ``mfu``."""
    return flops / (devices * peak * mfu * DAY)


def mfu_of(flops: float, devices: int, peak: float, days: float) -> float:
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B): what was needed over what was there in ``days``."""
    return flops / (devices * peak * days * DAY)


def device_days(flops: float, peak: float, mfu: float) -> float:
    """Days that one device would need."""
    return training_days(flops, 1, peak, mfu)


def cost(devices: float, days: float, hourly: float) -> float:
    """Dollars, of ``devices`` at ``hourly`` dollars an hour each."""
    return devices * days * 24 * hourly


def megatron_days(parameters: float, tokens: float, devices: int, reached: float) -> float:
    """Days by the rule of thumb 8 T P / (n X) (Narayanan et al. 2021, eq. 4), which has the forward pass twice.

    ``reached`` are the FLOP/s that one device reaches, X there.
    """
    return 8 * tokens * parameters / (devices * reached) / DAY


# ------------------------------------------------------------------------------------------------------------- a step


def bubble(layout: Layout, n_micro_batches: float) -> float:
    """Share of a step that a pipeline waits: ((p - 1) / v) / (m + (p - 1) / v) (Narayanan et al. 2021, eq. 2)."""
    waiting = (layout.pipeline - 1) / layout.stages
    return waiting / (n_micro_batches + waiting)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one device sends in a step, by what for, and the seconds that takes on its links."""

    tensor: float
    """activations between the parts of each matrix"""
    expert: float
    """assignments to their experts and back"""
    pipeline: float
    """activations and gradients to the next stage"""
    data: float
    """gradients, and gathered weights where they are shared out"""
    tensor_seconds: float
    expert_seconds: float
    pipeline_seconds: float
    data_seconds: float


def traffic_of(model: ModelConfig, layout: Layout, step: Step, device: Device, rank: int = 0) -> Traffic:
    """What a device of pipeline rank ``rank`` sends in one step.

    Tensor (with sequence) parallel: four collectives a block forward and four backward, each of (t - 1) / t of a
    micro-batch's activations (Korthikanti et al. 2022). Expert parallel: each assignment goes there and comes back, in
    both passes. What is computed again is sent again, but for a block's last. Data parallel: an all-reduce of the
    gradients; with ZeRO-3 the weights gathered twice and the gradients summed once. Ranks count tensor first, then
    data, then pipeline: what spans more than a node goes over the network.
    """
    part = share_of(model, layout, rank)
    blocks = model.n_layers / layout.pipeline
    mixtures = len(model.moe_layers) / layout.pipeline
    width = step.tokens * model.d_model * step.dtype
    again = step.checkpointing == "block"
    t, e, m = layout.tensor, layout.expert, step.n_micro_batches

    tensor = m * blocks * (12 if again else 8) * width * (t - 1) / t
    rows = width * model.mlps_per_token / t
    expert = m * mixtures * (6 if again or step.checkpointing == "experts" else 4) * rows * (e - 1) / e
    pipeline = m * 2 * layout.stages * width / t if layout.pipeline > 1 else 0.0

    gradient = RECIPES[step.recipe].gradient
    rounds = 2.0  # a sum that all get: reduce-scatter and all-gather
    if layout.zero == 3:
        rounds = 1 + 2 * m
    replicas = layout.data // layout.expert
    data = rounds * gradient * (part.dense * (layout.data - 1) / layout.data + part.experts * (replicas - 1) / replicas)
    return Traffic(
        tensor=tensor,
        expert=expert,
        pipeline=pipeline,
        data=data,
        tensor_seconds=tensor / device.link_over(t),
        expert_seconds=expert / device.link_over(t * e),
        pipeline_seconds=pipeline / device.link_over(layout.devices),
        data_seconds=data / device.link_over(t * layout.data),
    )


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, by part; ``total`` is their sum."""

    compute: float
    recompute: float
    bubble: float
    tensor: float
    expert: float
    pipeline: float
    data: float
    """what of the sum of gradients is not hidden behind the backward pass"""
    mfu: float
    """of the whole step, scores counted causally"""

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.recompute + self.bubble + self.tensor + self.expert + self.pipeline + self.data


def step_time(
    model: ModelConfig,
    layout: Layout,
    step: Step,
    device: Device,
    *,
    efficiency: float = EFFICIENCY,
    flops: Flops | None = None,
) -> StepTime:
    """How long a step takes if devices reach ``efficiency`` of their peak while they compute.

    Messages of tensor, expert and pipeline parallelism are taken not to overlap with anything, those of data
    parallelism to overlap with the backward pass. A last, incomplete micro-batch counts as a whole one. A model and no
    measurement: it is for comparing layouts.
    """
    flops = count_flops(model, step.sequence) if flops is None else flops
    tokens = step.tokens * step.n_micro_batches / (layout.tensor * layout.pipeline)
    rate = device.flops * efficiency
    compute = tokens * flops.training() / rate
    recompute = tokens * flops.recomputed(step.checkpointing) / rate
    traffic = traffic_of(model, layout, step, device)
    busy = compute + recompute + traffic.tensor_seconds + traffic.expert_seconds + traffic.pipeline_seconds
    share = bubble(layout, step.n_micro_batches)
    waiting = busy * share / (1 - share)
    hidden = (compute * 2 / 3 + recompute) / (step.n_micro_batches if layout.zero < 3 else 1)
    exposed = max(0.0, traffic.data_seconds - hidden)
    total = busy + waiting + exposed
    return StepTime(
        compute=compute,
        recompute=recompute,
        bubble=waiting,
        tensor=traffic.tensor_seconds,
        expert=traffic.expert_seconds,
        pipeline=traffic.pipeline_seconds,
        data=exposed,
        mfu=tokens * flops.training() / device.flops / total,
    )
