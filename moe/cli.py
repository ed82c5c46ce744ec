"""``python -m moe COMMAND``: what can be done with the folder of a run, and what can be asked of routers."""

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from moe import config_file, presets
from moe.config import ConfigError, ModelConfig, Preset
from moe.errors import UserError
from moe.inference.command import number, seed_of
from moe.study.leakage import DEFAULT_EDITS, ROUNDING, check_router, findings_table, overview_table
from moe.training.console import showable
from moe.training.run_folder import RunFolder

CHECK_FLAGS = {
    "--edits N": f"edits of each kind in each mode (default {DEFAULT_EDITS})",
    "--seed N": "seed of the weights, tokens and edits (default 0)",
    "--model.KEY VALUE": "replace a setting, as in training (python train.py --help lists them)",
    "--help": "show this",
}
CHECK_MEANING = f"""\
Does a router see what it must not? A tiny model with this router and random weights reads random tokens. Then the
later tokens of a sequence are replaced, or the other sequences of the batch, or the later tokens of all sequences, and
logits that must not know of it are compared: in training mode, with the same noise, and in evaluation mode. What a
router declares (is_causal and is_batch_independent in moe/config.py) holds if no logit changed by more than
{ROUNDING:.0e} where it declares that nothing leaks, and one did where it declares that something does.
Without a name all presets are checked.
Exit status: 0 where every declaration holds, 1 where one does not, 2 for a mistake."""

PRESET_KEY = "model.router.preset"
PRESETS_FLAGS = {"--help": "show this"}


def generate_command(arguments: Sequence[str]) -> int:
    """``python -m moe generate RUN --prompt TEXT`` (:mod:`moe.inference.command`)."""
    from moe.inference.command import generate_command as generate

    return generate(arguments)


def serve_command(arguments: Sequence[str]) -> int:
    """``python -m moe serve RUN`` (:mod:`moe.inference.server.command`)."""
    from moe.inference.server.command import serve_command as serve

    return serve(arguments)


def check_router_command(arguments: Sequence[str]) -> int:
    """``python -m moe check-router [PRESET | CONFIG.yaml | RUN]``: does what a router declares hold?"""
    usage = "python -m moe check-router [PRESET | CONFIG.yaml | RUN] [--edits N] [--seed N] [--model.KEY VALUE ...]"
    line = config_file.parse_flags(arguments, CHECK_FLAGS)
    if "--help" in line.options:
        print(usage, "", CHECK_MEANING, "", *(f"  {flag:20}{text}" for flag, text in CHECK_FLAGS.items()), sep="\n")
        return 0
    for key in line.overrides:
        if not key.startswith("model."):
            raise UserError(f"--{key} is no setting of the model, which is all that is checked")
    if len(line.positional) > 1:
        raise UserError(f"one preset or file at a time, and {len(line.positional)} were given: {usage}")
    edits, seed = number(line.options, "--edits", int, DEFAULT_EDITS), seed_of(line.options)
    if edits < 1:
        raise UserError(f"--edits is {edits}, and must be 1 or more")

    overrides = dict(line.overrides)
    names = line.positional
    if not names and PRESET_KEY in overrides:
        names = [overrides.pop(PRESET_KEY)]
    models = {name: _model_of(name, overrides) for name in names or get_args(Preset)}
    findings = {}
    # Only a terminal sees it, and only where it takes more than a second.
    with tqdm(total=2 * edits * len(models), unit="round", delay=1, leave=False, disable=None) as progress:
        for name, model in models.items():
            progress.set_description(name, refresh=False)
            findings[name] = check_router(model, edits=edits, seed=seed, advance=progress.update)
    if names:
        [(name, only)] = findings.items()
        print(showable(findings_table(name, only), sys.stdout))
    else:
        print(overview_table(findings))
    false = [finding for found in findings.values() for finding in found if not finding.holds]
    if any(not finding.declared_clean for finding in false):
        print(
            f"\nA declared leak that is not seen may only be rare: try more edits than {edits}, or a tighter capacity."
        )
    return 1 if false else 0


def study_command(arguments: Sequence[str]) -> int:
    """``python -m moe study RUN [RUN ...]`` (:mod:`moe.study.command`)."""
    from moe.study.command import study_command as study  # pyarrow and the metrics, which other commands need not load

    return study(arguments)


def nondeterminism_command(arguments: Sequence[str]) -> int:
    """``python -m moe nondeterminism RUN`` (:mod:`moe.study.nondeterminism_command`)."""
    from moe.study.nondeterminism_command import nondeterminism_command as nondeterminism

    return nondeterminism(arguments)


def presets_command(arguments: Sequence[str]) -> int:
    """``python -m moe presets``: every preset, where it comes from and what it does."""
    line = config_file.parse_flags(arguments, PRESETS_FLAGS)
    usage = "python -m moe presets"
    if "--help" in line.options:
        print(f"{usage}\nList the routers that --model.router.preset takes.\n\n  --help  show this")
        return 0
    if line.positional or line.overrides:
        raise UserError(f"{(line.positional or list(line.overrides))[0]} is too much: {usage}")
    print(showable(_preset_listing() if sys.stdout.isatty() else presets.table(), sys.stdout))
    return 0


def _preset_listing(width: int = 100) -> str:
    """What a terminal shows of the presets, whose table is several times as wide: name and source, rule, use, leaks."""
    wrapper = textwrap.TextWrapper(width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    blocks = []
    for name, entry in presets.presets().items():
        router = presets.model_config(name).router
        modes = [mode for mode in ("training", "evaluation") if not router.is_causal(training=mode == "training")]
        leak = [f"Looks at later tokens in {' and '.join(modes)}."] if modes else []
        lines = [wrapper.fill(text) for text in (entry.formula, entry.when, *leak)]
        blocks.append("\n".join([f"{name}: {entry.source}", *lines]))
    return "\n\n".join(blocks)


def evaluate_command(arguments: Sequence[str]) -> int:
    """``python -m moe evaluate RUN [--harness TASKS]`` (:mod:`moe.evaluation.command`)."""
    from moe.evaluation.command import evaluate_command as evaluate

    return evaluate(arguments)


def bench_command(arguments: Sequence[str]) -> int:
    """``python -m moe bench layer | step | decode`` (:mod:`moe.bench.command`)."""
    from moe.bench.command import bench_command as bench

    return bench(arguments)


def import_command(arguments: Sequence[str]) -> int:
    """``python -m moe import FOLDER`` (:mod:`moe.interop.command`)."""
    from moe.interop.command import import_command as import_checkpoint

    return import_checkpoint(arguments)


def export_command(arguments: Sequence[str]) -> int:
    """``python -m moe export RUN --to KIND PLACE`` (:mod:`moe.interop.command`)."""
    from moe.interop.command import export_command as export

    return export(arguments)


def plan_command(arguments: Sequence[str]) -> int:
    """``python -m moe plan CONFIG`` (:mod:`moe.planner.command`)."""
    from moe.planner.command import plan_command as plan

    return plan(arguments)


def rehearse_command(arguments: Sequence[str]) -> int:
    """``python -m moe rehearse CONFIG`` (:mod:`moe.rehearsal.command`)."""
    from moe.rehearsal.command import rehearse_command as rehearse

    return rehearse(arguments)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "generate": (generate_command, "continue a text with the model of a run"),
    "serve": (serve_command, "answer HTTP requests as OpenAI's completions do, for experiments"),
    "check-router": (check_router_command, "does a router see later tokens, or other sequences?"),
    "presets": (presets_command, "the published routers that a name stands for"),
    "study": (study_command, "where do tokens go, and why? a page, numbers and findings"),
    "nondeterminism": (nondeterminism_command, "do strangers in the batch change an answer at temperature 0?"),
    "import": (import_command, "a checkpoint of transformers as a run folder, its MLPs made into experts if you like"),
    "export": (export_command, "a run as a folder for transformers, or as a file for llama.cpp"),
    "evaluate": (evaluate_command, "how good is it? held-out text with intervals; a score card of tasks"),
    "plan": (plan_command, "what would it cost? parameters, memory, days, dollars, layouts; to train and to serve"),
    "rehearse": (rehearse_command, "one step on fake tensors: the memory it would take, and what it would send"),
    "bench": (bench_command, "how fast, beside other implementations? a table, numbers and a picture"),
}


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status: 0, 1 where a check fails, or 2 for a mistake of the user's."""
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print("python -m moe COMMAND [--help]\n")
            print(*(f"  {name:16}{meaning}" for name, (_, meaning) in COMMANDS.items()), sep="\n")
            return 0
        if arguments[0] not in COMMANDS:
            raise UserError(f"{arguments[0]} is no command; there are: {', '.join(COMMANDS)}")
        run, _ = COMMANDS[arguments[0]]
        return run(arguments[1:])
    except (UserError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _model_of(name: str, overrides: Mapping[str, str]) -> ModelConfig:
    """The model of a preset, of a configuration file or of a run, with ``overrides`` over it."""
    known = get_args(Preset)
    if name in known:
        if PRESET_KEY in overrides:
            raise UserError(f"--{PRESET_KEY} is given beside the preset {name}; keep one of them")
        return config_file.parse("{}", name, {PRESET_KEY: name, **overrides}).model
    if (Path(name) / "config.yaml").is_file():
        return RunFolder.open(Path(name)).config(overrides).model
    if name.endswith((".yaml", ".yml")) or Path(name).exists():
        return config_file.load(Path(name), overrides).model
    guesses = get_close_matches(name, known, n=1)
    hint = f"did you mean {guesses[0]}?" if guesses else "python -m moe presets lists them"
    raise UserError(f"{name} is neither a preset nor a configuration file nor a run; {hint}")
