"""One training step on fake tensors, among fake processes: the real model, cut and spread by the real code.

What tensors hold is not known here, so where a number of rows depends on it, balanced load is supposed: every expert
gets as many tokens as any other, and every rank as many rows as it sends.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining.schedules import _PipelineSchedule

from moe.config import Config
from moe.errors import UserError
from moe.model.transformer import Transformer
from moe.model.weight_dtype import keep_weights
from moe.parallel.mesh import build_mesh
from moe.parallel.parallelize import parallelize
from moe.parallel.pipeline import Pipeline, cut, spans_here
from moe.parallel.spread import spread_of
from moe.parallel.world import World
from moe.rehearsal.gpu import as_on_a_gpu, workspace
from moe.rehearsal.trace import Collective, Peak, StepTrace
from moe.training.optimizer import build_optimizer
from moe.training.step import MicroBatch, TrainingStep


@dataclass(frozen=True)
class Rehearsal:
    """What one rank would do."""

    rank: int
    pipeline_rank: int
    blocks: list[tuple[int, int]]
    """first and last block of each of its stages"""
    peak: Peak
    after: int
    """bytes in use between two steps"""
    collectives: dict[Collective, int]
    """how often each is called in a step"""
    seconds: float
    """how long the rehearsal took"""


def rehearse(config: Config, micro_batch: int, *, processes: int = 1, rank: int = 0) -> Rehearsal:
    """A step of one of ``processes``, of ``training.accumulation`` micro-batches of so many sequences.

    It is not the first, so the optimizer has its states. ``config`` has a vocabulary size and a precision, and says by
    ``parallel`` how the processes work together. Raises ConfigError where their sizes do not multiply to
    ``processes``.
    """
    start = time.perf_counter()
    settings, device = config.training, torch.device("cpu")
    with _group_of(processes, rank), ExitStack() as stack:
        # The mesh is looked at, so it is made of real numbers.
        mesh = build_mesh(config.parallel, processes, device.type) if processes > 1 else None
        for context in (FakeTensorMode(), as_on_a_gpu(), _ready_pipelines()):
            stack.enter_context(context)
        model = Transformer(config.model, settings.seed)
        keep_weights(model, settings.weight_dtype)
        world, pipeline, pipeline_rank, parameters = World.alone(), None, 0, None
        if mesh is not None:
            config = replace(config, parallel=mesh.layout)
            pipeline_rank = mesh.pipeline_rank
            if config.parallel.pipeline > 1:
                cut(model, config, pipeline_rank)
            parallelize(model, config, mesh, device, balanced=True)
            spread = spread_of(model)
            assert spread is not None
            parameters = spread.parameters
            if mesh.data_group is not None:
                world = World(mesh.data_group)
            if config.parallel.pipeline > 1:
                stream = torch.bfloat16 if settings.weight_dtype == "bf16" else torch.float32
                pipeline = Pipeline(model, config, mesh, device, stream)
        model.activation_checkpointing = settings.activation_checkpointing
        optimizer = build_optimizer(model, settings.optimizer, parameters)
        trace = StepTrace(workspace)
        trace.watch(model, optimizer)
        step = TrainingStep(
            model,
            optimizer,
            precision=settings.precision,
            clip=settings.optimizer.clip,
            world=world,
            pipeline=pipeline,
        )
        with trace:
            _make_states(optimizer)
            trace.forget()
            tokens = torch.zeros(micro_batch, config.data.sequence_length, dtype=torch.int64)
            batches = [MicroBatch(tokens, tokens) for _ in range(settings.accumulation)]
            step(batches, settings.optimizer.lr, accumulation=settings.accumulation)
        spans = [(span.first, span.end - 1) for span in spans_here(config, pipeline_rank)]
        seconds = time.perf_counter() - start
        return Rehearsal(rank, pipeline_rank, spans, trace.peak(), trace.in_use, dict(trace.collectives), seconds)


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    """What the first step leaves in the optimizer."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def _group_of(processes: int, rank: int) -> Iterator[None]:
    """A group of which this process is one, and the others do not exist: what they would send is not looked at."""
    if processes == 1:
        yield
        return
    if dist.is_initialized():
        raise UserError("a rehearsal is for one process that has joined no others")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _ready_pipelines() -> Iterator[None]:
    """Take it that the stages of a pipeline agree on what they send, which each of them knows, without a vote."""
    if not hasattr(_PipelineSchedule, "_warmup_p2p"):  # before torch 2.13 they took none
        yield
        return
    from torch.distributed.pipelining._utils import InferenceMode

    def agree(schedule: Any, stages: Any, *_: Any) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    with patch.object(_PipelineSchedule, "_warmup_p2p", agree):
        yield
