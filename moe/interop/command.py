"""``python -m moe import`` and ``python -m moe export``: to a run folder, and from one to files for other libraries."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from moe import config_file
from moe.errors import UserError
from moe.interop.exporting import DTYPES, WeightDtype, export_huggingface
from moe.interop.families import FAMILIES
from moe.interop.gguf_file import export_gguf
from moe.interop.importing import import_checkpoint
from moe.interop.upcycle import Upcycling
from moe.training.run_folder import RunFolder

IMPORT_USAGE = "python -m moe import FOLDER [--name NAME] [--upcycle N] [--section.key value ...]"
IMPORT_FLAGS = {
    "--name NAME": "name of the run's folder (default: the name of FOLDER)",
    "--upcycle N": "make N experts of each MLP of a dense model",
    "--granularity G": "with --upcycle: cut each MLP into G parts, each an expert (default 1)",
    "--noise X": "with --upcycle: noise on each expert, in standard deviations of its weights (default 0)",
    "--help": "show this",
}
IMPORT_MEANING = f"""\
Read a transformers checkpoint (config.json, safetensors, tokenizer.json) into a run folder, which generate and export
take. With --data.corpus FILE the text comes along, so that study has something to read, and training can go on with
python train.py --resume; the settings of training are those of the flags.
Families: {", ".join(FAMILIES)}."""

EXPORT_USAGE = "python -m moe export RUN --to huggingface FOLDER | --to gguf FILE [--dtype fp32 | bf16]"
EXPORT_FLAGS = {
    "--to KIND": "huggingface: a folder that transformers 4.57 and 5 read; gguf: a file that llama.cpp runs",
    "--dtype NAME": "fp32, as they are, or bf16, rounded to half the size (default fp32)",
    "--help": "show this",
}
KINDS = {"huggingface": export_huggingface, "gguf": export_gguf}


def import_command(arguments: Sequence[str]) -> int:
    """``python -m moe import FOLDER``: a transformers checkpoint as a run folder."""
    line = config_file.parse_flags(arguments, IMPORT_FLAGS)
    if "--help" in line.options:
        print(f"{IMPORT_USAGE}\n{IMPORT_MEANING}\n", *_listed(IMPORT_FLAGS), sep="\n")
        return 0
    folder = Path(_only(line.positional, "folder", IMPORT_USAGE))
    overrides = dict(line.overrides)
    if "--name" in line.options:
        if "run.name" in overrides:
            raise UserError("--name and --run.name are one; keep one of them")
        overrides["run.name"] = line.options["--name"]
    run = import_checkpoint(
        folder, overrides, upcycling=_upcycling(line.options), with_text="data.corpus" in overrides, say=print
    )
    print(f"run folder: {run.path}")
    return 0


def export_command(arguments: Sequence[str]) -> int:
    """``python -m moe export RUN --to KIND PLACE``: a run as files of another library."""
    line = config_file.parse_flags(arguments, EXPORT_FLAGS)
    if "--help" in line.options:
        print(f"{EXPORT_USAGE}\n", *_listed(EXPORT_FLAGS), sep="\n")
        return 0
    if line.overrides:
        raise UserError(f"--{next(iter(line.overrides))} belongs to training: a run's settings are in its folder")
    kind = line.options.get("--to", "")
    if kind not in KINDS:
        given = f"--to is {kind}" if kind else "--to is missing"
        raise UserError(f"{given}, and must be {' or '.join(KINDS)}: {EXPORT_USAGE}")
    if len(line.positional) != 2:
        raise UserError(f"a run folder and a place to write to are needed: {EXPORT_USAGE}")
    run, target = map(Path, line.positional)
    dtype = _dtype(line.options)
    KINDS[kind](RunFolder.open(run), target, dtype=dtype, say=print)
    print(f"written: {target}")
    return 0


def _upcycling(options: Mapping[str, str]) -> Upcycling | None:
    if "--upcycle" not in options:
        for flag in ("--granularity", "--noise"):
            if flag in options:
                raise UserError(f"{flag} goes with --upcycle, which is not given")
        return None
    return Upcycling(
        n_experts=_whole(options, "--upcycle", ""),
        granularity=_whole(options, "--granularity", "1"),
        noise=_number(options, "--noise", "0"),
    )


def _dtype(options: Mapping[str, str]) -> WeightDtype:
    name = options.get("--dtype", "fp32")
    if name not in DTYPES:
        raise UserError(f"--dtype is {name}, and must be {' or '.join(DTYPES)}")
    return cast(WeightDtype, name)


def _only(positional: Sequence[str], what: str, usage: str) -> str:
    if len(positional) != 1:
        raise UserError(f"one {what} is needed, and {len(positional)} were given: {usage}")
    return positional[0]


def _whole(options: Mapping[str, str], flag: str, default: str) -> int:
    text = options.get(flag, default)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{flag} is {text!r}, and must be a whole number") from None


def _number(options: Mapping[str, str], flag: str, default: str) -> float:
    text = options.get(flag, default)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{flag} is {text!r}, and must be a number") from None


def _listed(flags: Mapping[str, str]) -> list[str]:
    return [f"  {flag:18}{meaning}" for flag, meaning in flags.items()]
