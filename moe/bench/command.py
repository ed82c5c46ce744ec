"""``python -m moe bench layer | step | decode``: flags, the run, and what is printed and written."""

import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch

from moe import config_file
from moe.bench.contestants import Bench, Entry, Settings, entries
from moe.bench.decode import DecodeCell
from moe.bench.layer import LayerCell
from moe.bench.loads import Skew
from moe.bench.rounds import Result, run_rounds
from moe.bench.shapes import LAYERS, MODELS
from moe.bench.step import StepCell
from moe.bench.table import machine, missing_packages, rows, table, write_json
from moe.errors import UserError

USAGE = "python -m moe bench layer | step | decode [--device NAME] [--shape NAMES] [--only NAMES] ..."
DRAW = "python -m moe bench draw bench-NAME.json [--out FOLDER]"
FLAGS = {
    "--device NAME": "cpu or cuda (default: cuda if there is one)",
    "--shape NAMES": "comma-separated (default: those for the device; --list names them)",
    "--precision NAMES": "fp32, bf16, or both with a comma (default: both on a CPU, bf16 on cuda)",
    "--skew NAMES": "layer: balanced, zipf (exponent 1), or both with a comma (default: balanced)",
    "--batch NAMES": "decode: sequences at once (default 1,16); step: sequences (default: the shape's)",
    "--rounds N": "turns of each contestant (default 3)",
    "--only NAMES": "comma-separated names or patterns such as 'ours*' (default: the usual ones; '*': everyone)",
    "--settings NAMES": "of peers' processes on a CPU: users (as they come), ours (train.py's), or both (default)",
    "--out FOLDER": "write the numbers (bench-NAME.json) and a picture (.png, .svg) there",
    "--lock FILE": "hold a lock on FILE while something is timed, for other work that keeps to it",
    "--patience SECONDS": "longest that one contestant may take to prepare or to take a turn (default 600)",
    "--list": "show the shapes and all contestants, the usual ones marked, and stop",
    "--help": "show this",
}
BELONGS: dict[str, tuple[Bench, ...]] = {"--skew": ("layer",), "--batch": ("step", "decode")}
"""flags that act in some benches alone"""
MEANING = """\
Ours, every installed peer and the dense bound, side by side: each in a process of its own, checked against float32
first and then timed in turn. A time is the median over turns of each turn's median; ± is half the range of these.
layer   one layer of experts, the routing given: forward, and forward and backward
step    forward, backward and fused AdamW of a whole model
decode  greedy tokens with a cache of keys and values
draw    the picture again, of a bench-NAME.json from anywhere"""


def bench_command(arguments: Sequence[str]) -> int:
    """Run one bench; 0, or 1 where one of ours failed."""
    line = config_file.parse_flags(arguments, FLAGS)
    options = line.options
    if "--help" in options:
        print(USAGE, DRAW, "", MEANING, "", *(f"  {flag:20}{text}" for flag, text in FLAGS.items()), sep="\n")
        return 0
    if line.overrides:
        raise UserError(f"--{next(iter(line.overrides))} belongs to training; the bench has shapes: {USAGE}")
    if line.positional[:1] == ["draw"]:
        return _draw_again(line.positional[1:], options)
    if len(line.positional) != 1 or line.positional[0] not in get_args(Bench):
        raise UserError(f"one of layer, step and decode is needed: {USAGE}")
    bench: Bench = line.positional[0]  # type: ignore[assignment]
    for flag, benches in BELONGS.items():
        if flag in options and bench not in benches:
            raise UserError(f"{flag} belongs to bench {' and '.join(benches)}, not to {bench}")
    device = _device(options)
    everyone = entries(bench, device, _several(options, "--settings", get_args(Settings), "users,ours"))
    if "--list" in options:
        print("shapes:", ", ".join(LAYERS if bench == "layer" else MODELS))
        print("contestants (* the usual ones):")
        print(*(f"  {'*' if device in entry.contestant.usual else ' '} {entry.name}" for entry in everyone), sep="\n")
        return 0
    taking_part = _chosen(everyone, device, options)
    cells = _cells(bench, device, options)
    rounds = _positive(options, "--rounds", 3)
    patience = _positive(options, "--patience", 600)
    out, lock = _writable(options, "--out"), _writable(options, "--lock")
    lacking = [entry for entry in taking_part if not _installed(entry)]
    present = [entry for entry in taking_part if _installed(entry)]

    about = machine(device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if missing := missing_packages(lacking):
        print(missing)
    start = time.monotonic()
    results: list[list[Result]] = []
    with _terminated_as_interrupted(), tempfile.TemporaryDirectory(prefix="moe-bench-") as folder:
        for of_cell in run_rounds(
            bench,
            present,
            cells,
            device=device,
            rounds=rounds,
            folder=Path(folder),
            patience=patience,
            lock=lock,
            say=lambda text: print(f"[{time.monotonic() - start:4.0f} s] {text}", file=sys.stderr, flush=True),
        ):
            results.append(of_cell)
            if out is not None:  # after each cell, so that a run that is cut short leaves what it has
                write_json(out / f"bench-{bench}.json", bench, about, _versions(present), results)
            print("", table(f"{bench}: {of_cell[0].cell.name}", rows(of_cell)), sep="\n", flush=True)
    if out is not None:
        path = out / f"bench-{bench}.json"
        print(f"\nwrote {path}")
        try:
            _draw(path, out)
        except UserError as error:  # the numbers are there, and a picture can be drawn of them elsewhere
            print(f"no picture: {error}")
    failed = (
        result.failure is not None and not result.unfit and result.entry.contestant.ours
        for of_cell in results
        for result in of_cell
    )
    return int(any(failed))


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does: the contestants' processes and the temporary folder go with it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _draw_again(files: Sequence[str], options: dict[str, str]) -> int:
    if len(files) != 1:
        raise UserError(f"one file that a bench wrote is needed: {DRAW}")
    path = Path(files[0])
    _draw(path, Path(options["--out"]) if "--out" in options else path.parent)
    return 0


def _draw(path: Path, folder: Path) -> None:
    """Draw what the JSON file ``path`` holds into ``folder``, under the same name."""
    from moe.bench.picture import draw, read_cells, save

    for written in save(draw(*read_cells(path)), folder / path.stem):
        print(f"wrote {written}")


def _cells(bench: Bench, device: str, options: dict[str, str]) -> list[Any]:
    """What is run, shape by shape."""
    precisions = _several(options, "--precision", ("fp32", "bf16"), "fp32,bf16" if device == "cpu" else "bf16")
    if bench == "layer":
        usual = "tiny,small,wide" if device == "cpu" else "toy,gpt4s,mixtral,olmoe,qwen3"
        shapes = _several(options, "--shape", tuple(LAYERS), usual)
        skews = _several(options, "--skew", get_args(Skew), "balanced")
        return [LayerCell(shape, precision, skew) for shape in shapes for precision in precisions for skew in skews]
    shapes = _several(options, "--shape", tuple(MODELS), "tiny,small" if device == "cpu" or bench == "decode" else "1b")
    if bench == "step":
        batch = _positive(options, "--batch", 0) or None
        return [StepCell(shape, precision, batch) for shape in shapes for precision in precisions]
    batches = [_whole("--batch", text) for text in options.get("--batch", "1,16").split(",")]
    return [DecodeCell(shape, batch, precision) for shape in shapes for precision in precisions for batch in batches]


def _device(options: dict[str, str]) -> str:
    available = torch.cuda.is_available()
    device = options.get("--device", "cuda" if available else "cpu")
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device is {device}, and must be cpu or cuda")
    if device == "cuda" and not available:
        raise UserError("--device is cuda, and torch finds no CUDA device here; use cpu")
    return device


def _writable(options: dict[str, str], flag: str) -> Path | None:
    """The folder of ``--out``, made if need be, or the file of ``--lock``; better refused now than after an hour."""
    if flag not in options:
        return None
    path = Path(options[flag])
    try:
        if flag == "--out":
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.open("a").close()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error.strerror}") from None
    return path


def _chosen(everyone: list[Entry], device: str, options: dict[str, str]) -> list[Entry]:
    if "--only" not in options:
        return [entry for entry in everyone if device in entry.contestant.usual]
    patterns = [pattern.strip() for pattern in options["--only"].split(",")]
    chosen = [entry for entry in everyone if any(fnmatch(entry.name, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(fnmatch(entry.name, pattern) for entry in everyone):
            raise UserError(f"--only {pattern!r} fits no contestant here; --list names them")
    return chosen


def _several(options: dict[str, str], flag: str, known: Sequence[str], default: str) -> Any:
    names = [name.strip() for name in options.get(flag, default).split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name!r} is none of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _positive(options: dict[str, str], flag: str, default: int) -> int:
    return _whole(flag, options[flag]) if flag in options else default


def _whole(flag: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"{flag} is {text!r}, and must be a whole number from 1")
    return int(text)


def _installed(entry: Entry) -> bool:
    return entry.contestant.package is None or entry.contestant.package.installed


def _versions(present: Sequence[Entry]) -> dict[str, str]:
    packages = dict.fromkeys(entry.contestant.package for entry in present if entry.contestant.package is not None)
    found = {package.distribution: package.version for package in packages}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found
