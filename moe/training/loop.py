"""The training of one run, from top to bottom: step, log, evaluate, save, until it is done or told to stop."""

import hashlib
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from moe.config import Config, ConfigError, ParallelConfig, Precision, TrainingConfig
from moe.data.batches import Batches
from moe.data.prepare import PreparedCorpus
from moe.errors import UserError
from moe.model.balance import adapted_coefficient
from moe.model.initialise import initial_values
from moe.model.routing import LoadSummary
from moe.model.transformer import Transformer
from moe.model.weight_dtype import keep_weights
from moe.parallel.mesh import Mesh, build_mesh
from moe.parallel.parallelize import parallelize
from moe.parallel.pipeline import Pipeline, cut
from moe.parallel.spread import spread_of
from moe.parallel.world import World
from moe.training import checkpoint
from moe.training.checkpoint import Checkpoint
from moe.training.compiled import compile_blocks
from moe.training.console import Console
from moe.training.evaluate import Validation, validate
from moe.training.gpu import triton_is_installed
from moe.training.interrupt import StopSignal
from moe.training.metrics import MetricsLog
from moe.training.optimizer import build_optimizer
from moe.training.run_folder import RunFolder
from moe.training.schedule import learning_rate
from moe.training.step import MicroBatch, Step, StepInFlight, TrainingStep

BAD_STEPS_IN_A_ROW = 10
"""So many losses or gradients in a row that are not finite end the run."""


class Recorder(Protocol):
    """Writes a routing record of a small sample without leaving a trace (:func:`moe.study.recording.record_sample`).

    The study stands above training and imports from it, so training is handed one.
    """

    def __call__(
        self,
        model: Transformer,
        corpus: PreparedCorpus,
        records: Path,
        step: int,
        *,
        sequence_length: int,
        precision: Precision,
    ) -> object:
        """Write the record of ``step`` below ``records``."""


@dataclass
class Progress:
    """What a run counts; with the step it is all that resuming needs beside weights, optimizer and random state."""

    step: int = 0
    """optimizer steps done, skipped ones included"""
    tokens: int = 0
    """tokens trained on"""
    skipped: int = 0
    """steps without an update, because the loss or the gradient was not finite"""
    skipped_in_a_row: int = 0
    """of those, the latest without a good one in between"""
    validated_step: int = -1
    """the step after which the latest validation was done"""
    seconds: float = 0.0
    """time spent in training steps, over all sittings"""
    sparsity_coefficient: float = 0.0
    """what the coefficient of the sparsity loss has become (ReMoE); 0 without that loss"""


class Training:
    """One run in one process: ``Training(...).run()``. All ranks construct it alike; the first writes and speaks."""

    def __init__(
        self,
        config: Config,
        corpus: PreparedCorpus,
        run_folder: RunFolder,
        device: torch.device,
        world: World,
        console: Console,
        resume: Checkpoint | None = None,
        recorder: "Recorder | None" = None,
        weights: Checkpoint | None = None,
    ) -> None:
        """``config`` is resolved: a vocabulary size, and a precision other than auto. ``weights`` are those to begin
        with, of another run.

        ``recorder`` writes the routing records that ``training.record_every`` asks for; without one there are none.

        Raises UserError where the batch cannot be divided among the ranks, or ``resume`` or ``weights`` do not fit the
        model.
        """
        settings = config.training
        self.config, self.corpus, self.run_folder = config, corpus, run_folder
        self.device, self.world, self.console = device, world, console
        self.precision = settings.precision
        mesh = mesh_of(config, world, device)
        self.sharing = sharing_of(mesh, world)
        """those who share each batch"""
        self.micro_batch = require_divisible(settings, self.sharing.size)
        if device.type == "cuda" and triton_is_installed():
            from moe.model.experts.fused.tiles import remember_in

            remember_in(run_folder.tiles_path, write=world.is_first)
        self.model = build_model(config, mesh, device)
        self.pipeline: Pipeline | None = None
        """those who have the other blocks"""
        if mesh is not None and mesh.pipeline_group is not None:
            stream = torch.bfloat16 if settings.weight_dtype == "bf16" else torch.float32
            self.pipeline = Pipeline(self.model, config, mesh, device, stream)
        self.spread = spread_of(self.model)
        if weights is not None:
            weights.load_model(self.model)
        self.model.activation_checkpointing = settings.activation_checkpointing
        parameters = None if self.spread is None else self.spread.parameters
        self.optimizer = build_optimizer(self.model, settings.optimizer, parameters)
        self.step_on = TrainingStep(
            self.model,
            self.optimizer,
            precision=self.precision,
            clip=settings.optimizer.clip,
            world=self.sharing,
            pipeline=self.pipeline,
        )
        if settings.compile:
            compile_blocks(self.model, console.say)
        self.batches = Batches(
            corpus.train,
            corpus.shares,
            sequence_length=config.data.sequence_length,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        self.progress = Progress(sparsity_coefficient=config.model.balance.sparsity)
        if resume is not None:
            resume.load_model(self.model)
            resume.load_optimizer(self.optimizer, self.model)
            resume.restore_random_state()
            self.progress = Progress(**resume.progress)
            # Where the loss is new to a resumed run, it starts as in a fresh one.
            self.progress.sparsity_coefficient = self.progress.sparsity_coefficient or config.model.balance.sparsity
        # On a GPU the host reads a step's numbers while the next is computed, unless that one depends on them.
        self._steps_ahead = 1 if device.type == "cuda" and not config.model.balance.sparsity else 0
        self._in_flight: deque[StepInFlight] = deque()
        self._seen = 0.0
        """when the latest step was seen to be done, or the first in flight was begun"""
        self.recorder = recorder
        self.resumed = resume is not None
        self.saved_step = self.progress.step if self.resumed else -1
        self.validation: Validation | None = None

    def run(self) -> bool:
        """Train to the last step and validate there: True. False if a signal stopped the run; it is saved either way.

        Raises UserError after ten steps in a row that were not finite; the last good checkpoint is kept.
        """
        settings = self.config.training
        log = None
        if self.world.is_first:
            path, reached = self.run_folder.metrics_path, self.progress.step
            log = MetricsLog(path, resume_step=reached, tensorboard=settings.tensorboard)
            # Only now that nothing can be refused any more: a resumed run may have new settings.
            self.run_folder.write_config(self.config)
        try:
            with StopSignal() as signal:
                if settings.schedule.warmup_steps >= settings.steps:
                    self.console.say(
                        f"the warm-up of {settings.schedule.warmup_steps} steps is as long as the run or longer: "
                        "the learning rate does not reach its peak"
                    )
                self.console.start()
                while True:
                    stop = self._on_any_rank(signal.received is not None)
                    if stop or self._is_due():
                        self._catch_up(log)
                        with self.console.pause():
                            if self._validation_is_due():
                                self._validate(log, signal)
                            self._record_if_due()
                            stop = stop or self._on_any_rank(signal.received is not None)
                            finished = self.progress.step >= settings.steps
                            # Weights that give no finite loss are kept from replacing a checkpoint that may be better.
                            bad = self.progress.skipped_in_a_row > 0
                            if stop or finished or (self.progress.step % settings.checkpoint_every == 0 and not bad):
                                self.save()
                        if finished:
                            return not self._validation_is_due()
                        if stop:
                            return False
                    self._launch_step()
                    self._catch_up(log, leave=self._steps_ahead)
        finally:
            if log is not None:
                log.close()

    def take_step(self) -> Step:
        """One optimizer step on the batch of ``progress.step``: forward and backward per micro-batch, clip, update.

        A loss or gradient that is not finite on any rank leaves the weights and the optimizer of all ranks as they
        were, the selection biases and the coefficient of the sparsity loss too.

        Dropout and noise draw from a generator seeded by (seed, step, first row of the micro-batch). So there is no
        state to carry over, and R ranks draw what one process draws that takes as many times the micro-batches.
        """
        return self._finish(self._begin_step())

    def _begin_step(self) -> StepInFlight:
        settings, step = self.config.training, self.progress.step + len(self._in_flight)
        rows = [
            (micro * self.sharing.size + self.sharing.rank) * self.micro_batch for micro in range(settings.accumulation)
        ]
        micro_batches = (self._micro_batch(step, row, _seed_of(settings.seed, step, row)) for row in rows)
        return self.step_on(
            micro_batches,
            learning_rate(settings.schedule, settings.optimizer.lr, step, settings.steps),
            accumulation=settings.accumulation,
            sparsity_coefficient=self.progress.sparsity_coefficient,
        )

    def _micro_batch(self, step: int, first_row: int, seed: int) -> MicroBatch:
        batch = self.batches.rows(step, first_row, first_row + self.micro_batch)
        return MicroBatch(batch.tokens, batch.targets, seed)

    def _finish(self, in_flight: StepInFlight) -> Step:
        """What the step saw, once it is done, with the sparsity loss's coefficient steered by it."""
        step = in_flight.read()
        return replace(step, losses=step.losses | self._adapt_sparsity(step)) if "sparsity" in step.losses else step

    def _launch_step(self) -> None:
        """Give the device its next step, without waiting for it."""
        if not self._in_flight:
            self._seen = time.perf_counter()
        self._in_flight.append(self._begin_step())

    def _catch_up(self, log: MetricsLog | None, leave: int = 0) -> None:
        """Read, count and log all steps in flight but the ``leave`` newest."""
        while len(self._in_flight) > leave:
            step = self._finish(self._in_flight.popleft())
            now = time.perf_counter()
            self._count_and_log(step, now - self._seen, log)
            self._seen = now

    def save(self) -> None:
        """Write the checkpoint of this step, unless it is there; before the first step there is nothing to save."""
        if self.progress.step in (0, self.saved_step):
            return
        if self.world.is_first or (self.spread is not None and self.spread.is_cut):
            checkpoint.save(
                self.run_folder.checkpoints_path,
                self.progress.step,
                self.model,
                self.optimizer,
                asdict(self.progress),
                self.config.training.keep_checkpoints,
                self.world,
            )
        self.saved_step = self.progress.step
        self.world.wait()

    def whole_model(self) -> Transformer | None:
        """The model as one process has it, on the first rank, for what that does alone; None elsewhere.

        All ranks must ask. Where the model is not cut it is the one that is trained.
        """
        if self.spread is None or not self.spread.is_cut:
            return self.model
        whole = None
        if self.world.is_first:
            whole = Transformer(self.config.model, self.config.training.seed)
            keep_weights(whole, self.config.training.weight_dtype)
            whole.to(self.device)
        with torch.no_grad():
            found = {name: self.spread.whole(name) for name in self.spread.parameters}
            found |= dict(self.model.named_buffers())
            if self.pipeline is not None:
                found = self.pipeline.to_first(found)
            if whole is not None:
                for name, place in [*whole.named_parameters(), *whole.named_buffers()]:
                    place.copy_(found[name])
        return None if whole is None else whole.train(self.model.training)

    def _adapt_sparsity(self, step: Step) -> dict[str, float]:
        """Steer the sparsity loss's coefficient by the gates of the whole step; return what this step had."""
        assert step.counts is not None
        per_expert = step.tokens * step.counts.shape[0]
        coefficient, gates_on = self.progress.sparsity_coefficient, int(step.counts.sum())
        if not step.skipped:
            adapted = adapted_coefficient(
                coefficient,
                self.config.model.balance.sparsity_rate,
                gates_on,
                target=self.config.model.router.top_k * per_expert,
            )
            # From 0 it could never grow again.
            self.progress.sparsity_coefficient = max(adapted, sys.float_info.min)
        return {
            "sparsity/coefficient": coefficient,
            "sparsity/off": 1 - gates_on / max(1, per_expert * step.counts.shape[1]),
        }

    def _is_due(self) -> bool:
        """Whether, after the steps so far, there is more to do than the next."""
        settings, step = self.config.training, self.progress.step + len(self._in_flight)
        every = (settings.evaluate_every, settings.checkpoint_every, settings.record_every)
        return step >= settings.steps or any(step % steps == 0 for steps in every if steps is not None)

    def _validation_is_due(self) -> bool:
        step, settings = self.progress.step, self.config.training
        if step >= settings.steps:
            # Also where a finished run is resumed: it has its numbers in the log, and not here.
            return self.validation is None or self.progress.validated_step < step
        return step > 0 and step % settings.evaluate_every == 0 and self.progress.validated_step < step

    def _validate(self, log: MetricsLog | None, signal: StopSignal) -> None:
        """Validate unless a signal comes; several ranks, whose signals differ in time, go through to the end."""
        self.console.say(f"validating after step {self.progress.step}")
        alone = self.world.size == 1
        validation = validate(
            self.model,
            self.corpus,
            self.config.data.sequence_length,
            self.config.data.stride,
            self.precision,
            should_stop=lambda: alone and signal.received is not None,
            pipeline=self.pipeline,
        )
        if self.spread is not None:
            self.spread.reshard()
        if validation is None:
            return
        already_logged = self.progress.validated_step == self.progress.step
        self.validation, self.progress.validated_step = validation, self.progress.step
        pooled = validation.pooled
        if log is not None and not already_logged:
            log.write(
                self.progress.step,
                "validation",
                {"cross_entropy": pooled.cross_entropy, "bits_per_byte": pooled.bits_per_byte}
                | {f"bits_per_byte/{domain}": score.bits_per_byte for domain, score in validation.domains.items()}
                | load_values(self.config.model.moe_layers, validation.load, validation.mlps_per_token),
            )
        self.console.say(f"validation: {pooled.bits_per_byte:.4f} bits per byte")

    def _record_if_due(self) -> None:
        """Record the sample every so many steps, the first and the last among them; the first rank does."""
        every, step = self.config.training.record_every, self.progress.step
        due = every is not None and (step % every == 0 or step >= self.config.training.steps)
        if self.recorder is None or not due or not self.config.model.moe_layers:
            return
        model = self.whole_model()
        if self.world.is_first and model is not None:
            self.recorder(
                model,
                self.corpus,
                self.run_folder.records_path,
                step,
                sequence_length=self.config.data.sequence_length,
                precision=self.precision,
            )

    def _count_and_log(self, step: Step, seconds: float, log: MetricsLog | None) -> None:
        progress, settings = self.progress, self.config.training
        tokens = settings.batch_size * self.config.data.sequence_length
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        progress.skipped += step.skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if step.skipped else 0
        if log is not None:
            log.write(
                progress.step,
                "train",
                step.losses
                | {
                    "gradient_norm": step.gradient_norm,
                    "learning_rate": step.learning_rate,
                    "tokens_per_second": tokens / seconds,
                    "tokens": progress.tokens,
                    "skipped": progress.skipped,
                }
                | load_values(self.config.model.moe_layers, step.load, step.mlps_per_token),
            )
        self.console.update(progress.step, loss=step.losses["lm_loss"], tokens=tokens, load=step.counts)
        if step.skipped:
            self.console.say(f"step {progress.step} skipped: its loss or gradient is not finite")
        if progress.skipped_in_a_row >= BAD_STEPS_IN_A_ROW:
            last = (
                f"the checkpoint of step {self.saved_step} is kept" if self.saved_step > 0 else "there is no checkpoint"
            )
            raise UserError(
                f"{BAD_STEPS_IN_A_ROW} steps in a row had a loss or gradient that is not finite; {last}: "
                "lower training.optimizer.lr, or set training.precision to fp32"
            )

    def _on_any_rank(self, flag: bool) -> bool:
        return flag if self.world.size == 1 else bool(self.world.sum(torch.tensor(int(flag), device=self.device)))


def build_model(config: Config, mesh: Mesh | None, device: torch.device) -> Transformer:
    """The model with its initial weights, or what ``mesh`` leaves of it here: then no process ever holds all of it."""
    settings, model_config = config.training, config.model
    if mesh is None:
        model = Transformer(model_config, settings.seed)
        keep_weights(model, settings.weight_dtype)
        return model.to(device)
    with torch.device("meta"):
        model = Transformer(model_config)
    keep_weights(model, settings.weight_dtype)
    draw = initial_values(model, model_config.init_std, model_config.n_layers, settings.seed)
    if mesh.pipeline_group is not None:
        cut(model, config, mesh.pipeline_rank)
    spread = spread_of(parallelize(model, config, mesh, device))
    assert spread is not None
    spread.fill(draw, device)
    return model


def mesh_of(config: Config, world: World, device: torch.device) -> Mesh | None:
    """The groups that ``parallel`` makes of the processes; None where each has the whole model."""
    layout = layout_of(config, world)
    if world.size == 1 or layout.is_single:
        return None
    return build_mesh(layout, world.size, device.type)


def layout_of(config: Config, world: World) -> ParallelConfig:
    """The layout with every size known; raises ConfigError or UserError where it does not fit processes or settings."""
    try:
        layout = config.parallel.over(world.size)
    except ConfigError as error:
        raise ConfigError(f"parallel.{error.key}", error.reason) from None
    if layout.pipeline > config.training.accumulation:
        raise UserError(
            f"training.accumulation: is {config.training.accumulation}, and a pipeline of {layout.pipeline} ranks "
            "needs as many micro-batches"
        )
    assert layout.data is not None
    require_divisible(config.training, layout.data)
    if config.training.optimizer.name == "muon" and (layout.tensor > 1 or layout.shard != "replicate"):
        raise UserError(
            "training.optimizer.name: muon needs whole matrices; with it let parallel.shard be replicate and "
            "parallel.tensor 1, or take adamw"
        )
    return layout


def sharing_of(mesh: Mesh | None, world: World) -> World:
    """Those who share each batch: all of ``world``, or this process's data ranks."""
    if mesh is None:
        return world
    return World.alone() if mesh.data_group is None else World(mesh.data_group)


def require_divisible(settings: TrainingConfig, n_ranks: int) -> int:
    """Sequences in a micro-batch of one rank; raises UserError where the batch cannot be divided so."""
    micro_batch, rest = divmod(settings.batch_size, settings.accumulation * n_ranks)
    if rest:
        raise UserError(
            f"training.batch_size: {settings.batch_size} sequences cannot be divided among {n_ranks} ranks "
            f"with training.accumulation {settings.accumulation}"
        )
    return micro_batch


def load_values(layers: list[int], load: list[LoadSummary], mlps_per_token: list[float]) -> dict[str, float]:
    """A bounded set of numbers for each of the mixture's ``layers`` for the log, never one an expert."""
    return {
        f"load/{layer}/{name}": value
        for layer, summary, mlps in zip(layers, load, mlps_per_token, strict=True)
        for name, value in (asdict(summary) | {"mlps_per_token": mlps}).items()
    }


def _seed_of(seed: int, step: int, first_row: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{first_row}".encode()).digest()[:7], "big")
