"""The command behind ``train.py``: from flags to a finished run folder, every mistake one line and exit status 2."""

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import torch

from moe import config_file
from moe.config import Config, ConfigError, ModelConfig, RouterConfig
from moe.data.prepare import PreparedCorpus, prepare, resolve_paths
from moe.errors import UserError
from moe.model.experts import Experts
from moe.parallel.pipeline import with_enough_micro_batches
from moe.parallel.world import World, is_first_process, join_world, launches, leave_world, local_rank, restarts
from moe.training import checkpoint
from moe.training.console import Console
from moe.training.loop import Recorder, Training, layout_of
from moe.training.machine import (
    CPU_BACKENDS,
    choose_device,
    choose_precision,
    fastest_backend,
    float32_products,
    keep_freed_memory,
    repeat_exactly,
    set_float32_products,
    use_fastest_float32,
)
from moe.training.report import write_report
from moe.training.run_folder import RunFolder

USAGE = "python train.py [CONFIG] [--section.key value ...]     or     python train.py --resume RUN"
FLAGS = {
    "--resume RUN": "go on with the run in this folder, from its newest sound checkpoint",
    "--help": "show this and every setting",
}

Result = TypeVar("Result")


class OneRankError(UserError):
    """What one rank was refused and the others, or those before it, were not: that rank says it."""


MAY_CHANGE = (
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.record_every",
    "training.log_every",
    "training.tensorboard",
    "training.device",
    "training.activation_checkpointing",
    "training.steps",
    "data.cache",
    *(key for key in config_file.settings() if key.startswith("parallel.")),
)
"""What may be set anew on resuming; anything else would make it another run."""


def main(arguments: Sequence[str], default_config: Path, recorder: Recorder | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 a mistake of the user's, 130 stopped by a signal.

    ``recorder`` is what writes routing records.
    """
    before = float32_products()
    try:
        line = config_file.parse_flags(arguments, FLAGS)
        if "--help" in line.options:
            print(config_file.help_text(USAGE, FLAGS))
            return 0
        if len(line.positional) > 1:
            raise UserError(f"one configuration at a time, and {len(line.positional)} were given: {line.positional}")
        if "--resume" in line.options and line.positional:
            raise UserError(f"--resume takes its configuration from the run; leave out {line.positional[0]}")
        keep_freed_memory()
        if "--resume" in line.options:
            return _resume(Path(line.options["--resume"]), line.overrides, recorder)
        path = Path(line.positional[0]) if line.positional else default_config
        config = config_file.load(path, line.overrides)
        if launches() and (begun := _begun(config)) is not None:
            return _resume(begun, {}, recorder)
        return _start(config, path, recorder)
    except OneRankError as error:
        print(error, file=sys.stderr)
        return 2
    except (UserError, ConfigError) as error:
        # Every rank reads the same files and flags, and would say the same.
        if is_first_process():
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before the first step", file=sys.stderr)
        return 130
    finally:
        set_float32_products(before)
        leave_world()


def _start(config: Config, path: Path, recorder: Recorder | None) -> int:
    """Prepare the corpus, make the run folder and train from the first step."""
    device, world = _join(config)
    given = config.training.accumulation
    config = with_enough_micro_batches(config, world.size)
    layout_of(config, world)
    _all_or_none(world, lambda: RunFolder.require_free(config))
    start = None if config.run.start_from is None else Path(config.run.start_from).expanduser()
    if start is not None:
        RunFolder.of_weights(start)
    with _console(config, world) as console:
        if (needed := config.training.accumulation) > given:
            console.say(f"training.accumulation: {needed} micro-batches, which the pipeline needs, in place of {given}")
        corpus = _in_turn(world, lambda: prepare(config.data, path.parent, console.say))
        weights = None if start is None else _weights(start, corpus, console)
        config = config.with_vocab(corpus.tokenizer.size)
        # The first rank's answer is everyone's: two ranks that measure may not agree.
        wanted = "bf16" if config.training.weight_dtype == "bf16" else config.training.precision
        fastest = choose_precision(wanted, device, config.model.d_model)
        takes_bf16 = world.sum(torch.tensor(int(world.is_first and fastest == "bf16"), device=device))
        config = replace(
            config,
            data=resolve_paths(config.data, path.parent),
            training=replace(config.training, precision="bf16" if takes_bf16 else "fp32"),
        )
        run_folder = _all_or_none(world, lambda: RunFolder.create(config, path.stem, corpus, world))
        training = None
        try:
            training = Training(config, corpus, run_folder, device, world, console, recorder=recorder, weights=weights)
            return _train(training, console)
        finally:
            if world.is_first and (training is None or training.progress.step == 0):
                run_folder.discard()


def _weights(path: Path, corpus: PreparedCorpus, console: Console) -> checkpoint.Checkpoint:
    """What ``run.start_from`` names: the newest sound checkpoint of a run, or a checkpoint."""
    run = RunFolder.of_weights(path)
    run.require_tokens_of(corpus.tokenizer, "run.start_from")
    if run.path != path:
        saved = checkpoint.open_checkpoint(path)
    else:
        saved = checkpoint.newest(run.checkpoints_path, console.say)
    console.say(f"beginning with the weights of {run.path} after step {saved.step}")
    return saved


def _begun(config: Config) -> Path | None:
    """The run that a launch of ours before this one began and saved; None where it had not come so far.

    ``torchrun --max-restarts`` starts all processes again, with the same flags, when one was lost. What had begun and
    saved nothing begins anew. Raises UserError for a run without a name, which could not be found again.
    """
    if config.run.name is None:
        raise UserError(
            "run.name: is null, and torchrun --max-restarts goes on with a run by its name; give --run.name"
        )
    if restarts() == 0:
        return None
    path = Path(config.run.folder).expanduser() / config.run.name
    if not path.exists():
        return None
    run = RunFolder(path)
    if checkpoint.any_below(run.checkpoints_path):
        return path
    if is_first_process():
        run.discard()
    return None


def _resume(path: Path, overrides: Mapping[str, str], recorder: Recorder | None) -> int:
    """Go on with a run from its newest sound checkpoint."""
    for key in overrides:
        if key not in MAY_CHANGE:
            raise UserError(
                f"--{key} would make it another run; with --resume only these may change: {', '.join(MAY_CHANGE)}"
            )
    run_folder = RunFolder.open(path)
    config = run_folder.config(overrides)
    device, world = _join(config)
    with _console(config, world) as console:
        corpus = _in_turn(world, lambda: run_folder.corpus(config.data, console.say))
        newest = checkpoint.newest(run_folder.checkpoints_path, console.say)
        if config.training.steps < newest.step:
            raise UserError(f"training.steps is {config.training.steps}, but the run has done {newest.step}")
        for difference in newest.environment_differences():
            console.say(f"numbers may differ in the last digits from an unbroken run: {difference}")
        console.say(f"resuming {path} after step {newest.step}")
        if "training.steps" in overrides and config.training.schedule.shape != "constant":
            console.say("the learning rate goes on as in a run of the new length, so it may jump here")
        return _train(Training(config, corpus, run_folder, device, world, console, newest, recorder), console)


def _train(training: Training, console: Console) -> int:
    """Run to the end and report, or say how to go on."""
    run_folder = training.run_folder
    console.say(f"training in {training.precision} on {training.device.type}")
    warning = leak_warning(training.config.model)
    if warning is not None:
        console.say(warning)
    _take_fastest_experts(training)
    try:
        finished = training.run()
    except KeyboardInterrupt:  # a second one, which does not wait for the step to end
        finished = False
    if not finished:
        if training.saved_step > 0:
            console.say(f"saved after step {training.saved_step}; go on with: {resume_command(run_folder)}")
        else:
            console.say("stopped before anything was saved")
        return 130
    model = training.whole_model()
    if training.world.is_first and model is not None:
        training.model = model
        console.say("")
        console.say(write_report(training))
        console.say(f"\nrun folder: {run_folder.path}")
    return 0


def _take_fastest_experts(training: Training) -> None:
    """Tell the experts what ``auto`` is to take on this CPU: the first rank's answer is everyone's.

    Compiled blocks keep to segments, of which alone torch.compile makes one operator.
    """
    experts = [module for module in training.model.modules() if isinstance(module, Experts)]
    asked = any(module.backend == "auto" for module in experts)
    if training.device.type != "cpu" or not asked or training.config.training.compile:
        return
    found = CPU_BACKENDS.index(fastest_backend(training.precision)) if training.world.is_first else 0
    backend = CPU_BACKENDS[int(training.world.sum(torch.tensor(found)))]
    for module in experts:
        module.on_cpu = backend


def leak_warning(model: ModelConfig) -> str | None:
    """What to know before training ``model``, if its router looks at later tokens; None if it does not."""
    router = model.router
    if not model.moe_layers or router.is_causal(training=True):
        return None
    causes = " and ".join(_looks_ahead(router, training=True))
    warning = f"WARNING: the training loss leaks the future, and is too low: {causes}."
    if router.is_causal(training=False):
        return f"{warning} The validation loss is right: in evaluation and generation this router does not look ahead."
    causes = " and ".join(_looks_ahead(router, training=False))
    return (
        f"{warning} The validation loss leaks as well, for in evaluation {causes}: do not compare it with that of a "
        "causal router, and expect worse of generation, where there are no later tokens to look at."
    )


def _looks_ahead(router: RouterConfig, *, training: bool) -> list[str]:
    """By which axes ``router`` looks at later tokens, and how; empty where ``RouterConfig.is_causal``."""
    causes = []
    if router.selection == "expert_choice" or (training and router.selection in ("sinkhorn", "base")):
        causes.append(f"with router.selection {router.selection} the tokens of a batch compete for each expert")
    if router.capacity.factor is not None and (training or router.capacity.in_evaluation):
        several = router.top_k > 1 or router.selection in ("top_p", "positive")
        if router.capacity.order == "choice" and several:
            causes.append("with router.capacity.order choice a later token's first choice evicts an earlier's second")
        if router.capacity.order == "score":
            causes.append("with router.capacity.order score a later token with a higher score evicts an earlier one")
    return causes


def resume_command(run_folder: RunFolder) -> str:
    """What to type to go on with a run."""
    return f"python train.py --resume {shlex.quote(str(run_folder.path))}"


def _all_or_none(world: World, work: Callable[[], Result]) -> Result:
    """What ``work`` returns, if it is refused on no rank; else its UserError here, or a quiet end."""
    result = refusal = None
    try:
        result = work()
    except UserError as error:
        refusal = error
    refused = torch.zeros(world.size, dtype=torch.int64, device=world.device)
    refused[world.rank] = refusal is not None
    refused = world.sum(refused)
    if refusal is not None and not refused[: world.rank].any():
        raise OneRankError(str(refusal)) from refusal
    if refused.any():
        raise SystemExit(2)
    return cast(Result, result)


def _console(config: Config, world: World) -> Console:
    """The screen of the first rank; the others write to nowhere."""
    stream = None if world.is_first else Path(os.devnull).open("w")  # noqa: SIM115
    return Console(
        config.training.steps, every=config.training.log_every, moe_layers=config.model.moe_layers, stream=stream
    )


def _join(config: Config) -> tuple[torch.device, World]:
    device = choose_device(config.training.device, local_rank())
    if config.model.deterministic:
        repeat_exactly()
    world = join_world(device)
    if device.type == "cpu" and not config.model.deterministic:  # time must not choose what decides bits
        if world.is_first:  # the others find what it measured
            use_fastest_float32()
        world.wait()
        use_fastest_float32()
    return device, world


def _in_turn(world: World, work: Callable[[], PreparedCorpus]) -> PreparedCorpus:
    """What ``work`` returns, done first by the first rank, so that the others find the cache filled."""
    result = _all_or_none(world, lambda: work() if world.is_first else None)
    return _all_or_none(world, lambda: work() if result is None else result)
