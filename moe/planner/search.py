"""The layouts that fit, fastest first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from moe.config import Checkpointing, ModelConfig
from moe.planner.devices import Device
from moe.planner.flops import count_flops
from moe.planner.layout import Layout
from moe.planner.memory import Memory, largest
from moe.planner.step import Step
from moe.planner.training import EFFICIENCY, StepTime, step_time


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with what it takes."""

    layout: Layout
    step: Step
    memory: Memory
    """of the pipeline rank that holds most"""
    time: StepTime
    tokens_per_second: float
    """of all devices; the batch alone counts, not what fills up a last micro-batch"""
    mfu: float
    """of these tokens, scores counted causally"""


def search(
    model: ModelConfig,
    device: Device,
    devices: int,
    base: Step,
    batch: int,
    *,
    usable: float = 0.9,
    efficiency: float = EFFICIENCY,
    zero: tuple[int, ...] = (0, 1, 3),
) -> list[Candidate]:
    """Every layout on at most ``devices`` that divides the model and whose memory fits, by tokens a second.

    ``batch`` sequences make a step. ``base`` gives sequence and recipe; micro-batches are of one sequence or more, and
    checkpointing is none, the experts or whole blocks. ``usable`` is the share of a device's memory to be filled.
    Tensor parallelism stays within a node. Of layouts that differ in checkpointing, micro-batch and ZeRO alone the
    fastest is kept.
    """
    flops = count_flops(model, base.sequence)
    found: list[Candidate] = []
    for layout in _layouts(model, device, devices, batch):
        best: Candidate | None = None
        for stage in zero if layout.data > 1 else (0,):
            laid = replace(layout, zero=stage)
            for step in _steps(base, layout, batch):
                time = step_time(model, laid, step, device, efficiency=efficiency, flops=flops)
                speed = batch * base.sequence / time.total
                if best is not None and speed <= best.tokens_per_second:
                    continue
                _, memory = largest(model, laid, step)
                if memory.total <= usable * device.memory:
                    mfu = speed * flops.training() / (laid.devices * device.flops)
                    best = Candidate(layout=laid, step=step, memory=memory, time=time, tokens_per_second=speed, mfu=mfu)
        if best is not None:
            found.append(best)
    return sorted(found, key=lambda candidate: -candidate.tokens_per_second)


def _layouts(model: ModelConfig, device: Device, devices: int, batch: int) -> Iterator[Layout]:
    heads, experts = model.attention.n_heads, model.experts.n_experts if model.moe_layers else 1
    for tensor in _divisors(device.node):
        if heads % tensor or model.experts.d_ff % tensor or (model.vocab_size or 0) % tensor:
            continue
        for pipeline in _divisors(model.n_layers):
            ranks = devices // (tensor * pipeline)
            for expert in _divisors(experts):
                data = min(ranks, batch) // expert * expert
                if data:
                    yield Layout(tensor=tensor, pipeline=pipeline, data=data, expert=expert)


def _steps(base: Step, layout: Layout, batch: int) -> Iterator[Step]:
    per_replica = -(-batch // layout.data)
    for micro_batch in (1, 2, 4, 8):
        if micro_batch > per_replica:
            return
        for checkpointing in get_args(Checkpointing):
            if checkpointing != "attention":
                yield replace(
                    base,
                    micro_batch=micro_batch,
                    n_micro_batches=-(-per_replica // micro_batch),
                    checkpointing=checkpointing,
                )


def _divisors(n: int) -> list[int]:
    return [divisor for divisor in range(1, n + 1) if n % divisor == 0]
