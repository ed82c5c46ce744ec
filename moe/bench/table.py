"""What a run of the bench found, as a table for the terminal and as JSON."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe.bench.contestants import Bench, Entry, Package
from moe.bench.rounds import Result

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One contestant in one cell, in numbers that are independent of how they were timed; None: not measured."""

    name: str
    failure: str | None
    unfit: bool
    """whether it failed because it is not made for this cell"""
    tokens_per_second: float | None
    spread: float | None
    """range of the turns' medians over their median"""
    slowest_turn: float | None
    """tokens per second"""
    fastest_turn: float | None
    forward_ms: float | None
    ms: float | None
    tflops: float | None
    share: float | None
    """the bound's time over this one's"""
    kept_bytes: int | None
    peak_bytes: int | None
    first_seconds: float | None
    """of the first forward and backward pass, which compiles and tunes"""
    error: float | None
    drops: bool
    low_precision: bool
    bound: bool
    ours: bool
    note: str


def rows(results: Sequence[Result]) -> list[Row]:
    """The results of one cell, fastest first, failures last."""
    bounds = [
        seconds for result in results if result.entry.contestant.bound and (seconds := result.seconds()) is not None
    ]
    made = [_row(result, min(bounds, default=None)) for result in results]
    return sorted(made, key=lambda row: -(row.tokens_per_second or 0.0))


def _row(result: Result, bound: float | None) -> Row:
    contestant, work = result.entry.contestant, result.cell.work
    seconds, forward = (None, None) if result.failure else (result.seconds(), result.seconds("forward"))
    return Row(
        name=result.entry.name,
        failure=result.failure,
        unfit=result.unfit,
        tokens_per_second=None if seconds is None else work.tokens / seconds,
        spread=None if seconds is None else result.spread(),
        slowest_turn=None if seconds is None else work.tokens / max(result.medians()),
        fastest_turn=None if seconds is None else work.tokens / min(result.medians()),
        forward_ms=None if forward is None else 1000 * forward,
        ms=None if seconds is None else 1000 * seconds,
        tflops=None if seconds is None or work.flops is None else work.flops / seconds / 1e12,
        share=None if seconds is None or bound is None else bound / seconds,
        kept_bytes=result.facts.get("kept_bytes"),
        peak_bytes=result.facts.get("peak_bytes"),
        first_seconds=result.facts.get("first_seconds"),
        error=result.facts.get("error"),
        drops=contestant.drops,
        low_precision=contestant.low_precision and result.cell.precision == "fp32",
        bound=contestant.bound,
        ours=contestant.ours,
        note=result.facts.get("note", ""),
    )


COLUMNS = ("tok/s", "± %", "forward ms", "ms", "TFLOP/s", "share", "kept GiB", "peak GiB", "first s", "error")


def table(title: str, made: Sequence[Row]) -> str:
    """One cell as a table; columns that nobody has a number in are left out, notes and failures follow."""
    cells = [_cells(row) for row in made if row.failure is None]
    shown = [column for column in COLUMNS if any(line[column] for line in cells)]
    names = [row.name + " †" * row.drops + " ‡" * row.low_precision for row in made if row.failure is None]
    width = max([len(name) for name in names], default=0)
    lines = [title, ""]
    if cells:
        widths = {column: max(len(column), *(len(line[column]) for line in cells)) for column in shown}
        lines.append(" " * width + "".join(f"  {column:>{widths[column]}}" for column in shown))
        lines += [
            f"{name:{width}}" + "".join(f"  {line[column]:>{widths[column]}}" for column in shown)
            for name, line in zip(names, cells, strict=True)
        ]
    notes = [f"{row.name}: {row.note}" for row in made if row.note and row.failure is None]
    if any(row.drops and row.failure is None for row in made):
        notes.append("† drops assignments beyond a capacity, and so does less work")
    if any(row.low_precision and row.failure is None for row in made):
        notes.append("‡ computes in bf16 whatever it is given")
    failures = [
        f"{row.name}: {'does not run here' if row.unfit else 'failed'}: {row.failure}"
        for row in made
        if row.failure is not None
    ]
    return "\n".join([*lines, *([""] if notes or failures else []), *notes, *failures])


def _cells(row: Row) -> dict[str, str]:
    return {
        "tok/s": _number(row.tokens_per_second, "{:,.0f}"),
        "± %": _number(None if row.spread is None else 50 * row.spread, "{:.1f}"),
        "forward ms": _number(row.forward_ms, "{:.2f}"),
        "ms": _number(row.ms, "{:.2f}"),
        "TFLOP/s": _number(row.tflops, "{:.3g}"),
        "share": _number(row.share, "{:.2f}"),
        "kept GiB": _number(None if row.kept_bytes is None else row.kept_bytes / GIB, "{:.3g}"),
        "peak GiB": _number(None if row.peak_bytes is None else row.peak_bytes / GIB, "{:.3g}"),
        "first s": _number(row.first_seconds, "{:.1f}"),
        "error": _number(row.error, "{:.1e}"),
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def missing_packages(entries: Sequence[Entry]) -> str:
    """Who could not take part, and how to get what they need; empty where nothing is missing."""
    missing: dict[Package, list[str]] = {}
    for entry in entries:
        if entry.contestant.package is not None:
            missing.setdefault(entry.contestant.package, []).append(entry.contestant.name)
    return "\n".join(
        f"{', '.join(dict.fromkeys(names))}: not installed ({package.install})" for package, names in missing.items()
    )


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    about: dict[str, Any] = {
        "device": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cpu":
        about["threads"] = torch.get_num_threads()
        about["capability"] = torch.backends.cpu.get_cpu_capability()
    else:
        about["cuda"] = torch.version.cuda
    return about


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(
    path: Path, bench: Bench, about: Mapping[str, Any], versions: Mapping[str, str], results: Sequence[Sequence[Result]]
) -> None:
    """Everything, each repetition included."""
    cells = [
        {
            "cell": asdict(of_cell[0].cell),
            "name": of_cell[0].cell.name,
            "rows": [asdict(row) for row in rows(of_cell)],
            "seconds": {result.entry.name: result.turns for result in of_cell},
        }
        for of_cell in results
    ]
    content = {"bench": bench, "machine": dict(about), "versions": dict(versions), "cells": cells}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
