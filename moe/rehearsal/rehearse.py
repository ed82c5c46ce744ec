"""One training step on fake tensors: the real model and the real step, and what they would allocate and send."""

import time
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe.config import Config
from moe.model.transformer import Transformer
from moe.model.weight_dtype import keep_weights
from moe.rehearsal.gpu import as_on_a_gpu, workspace
from moe.rehearsal.trace import Collective, Peak, StepTrace
from moe.training.optimizer import build_optimizer
from moe.training.step import MicroBatch, TrainingStep


@dataclass(frozen=True)
class Rehearsal:
    """What one rank would do."""

    peak: Peak
    after: int
    """bytes in use between two steps"""
    collectives: dict[Collective, int]
    """how often each is called in a step"""
    seconds: float
    """how long the rehearsal took"""


def rehearse(config: Config, micro_batch: int) -> Rehearsal:
    """The second step of one process, of ``training.accumulation`` micro-batches of ``micro_batch`` sequences.

    The first step makes the optimizer's states. ``config`` has a vocabulary size and a precision.
    """
    start = time.perf_counter()
    settings = config.training
    with FakeTensorMode(), as_on_a_gpu():
        model = Transformer(config.model, settings.seed)
        keep_weights(model, settings.weight_dtype)
        model.activation_checkpointing = settings.activation_checkpointing
        optimizer = build_optimizer(model, settings.optimizer)
        trace = StepTrace(workspace)
        trace.watch(model, optimizer)
        step = TrainingStep(model, optimizer, precision=settings.precision, clip=settings.optimizer.clip)
        with trace:
            for measured in (False, True):
                if measured:
                    trace.forget()
                tokens = torch.zeros(micro_batch, config.data.sequence_length, dtype=torch.int64)
                batches = [MicroBatch(tokens, tokens) for _ in range(settings.accumulation)]
                step(batches, settings.optimizer.lr, accumulation=settings.accumulation)
        return Rehearsal(trace.peak(), trace.in_use, dict(trace.collectives), time.perf_counter() - start)
