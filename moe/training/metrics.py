"""The numbers of a run: ``metrics.jsonl``, always, and TensorBoard events where they are asked for.

A line of ``metrics.jsonl`` is one flat JSON object: ``step`` (optimizer steps done), ``kind`` (``train`` or
``validation``), then named numbers. JSON has no number that is not finite; those are the strings ``"NaN"``,
``"Infinity"`` and ``"-Infinity"``, which :func:`read_metrics` turns back, and which Python's ``float`` and
JavaScript's ``Number`` understand.
"""

import json
import math
import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, SupportsFloat

from moe.errors import UserError

Kind = Literal["train", "validation"]

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Appends rows to the ``metrics.jsonl`` at ``path``; a row is in the file when :meth:`write` returns.

    ``resume_step`` is the step of the checkpoint that the run goes on from: rows of later steps, and a last line that
    a kill cut short, are removed, so that no step appears twice. 0 starts the file afresh. TensorBoard's events go to
    the folder ``tensorboard`` beside it.

    Raises UserError where the file cannot be written, where a line before the last is no row, and where TensorBoard
    is asked for but not installed.
    """

    def __init__(self, path: Path, *, resume_step: int = 0, tensorboard: bool = False) -> None:
        writer = _summary_writer() if tensorboard else None
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_back(path, resume_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._events = writer(path.parent / "tensorboard", purge_step=resume_step + 1) if writer else None

    def write(self, step: int, kind: Kind, values: Mapping[str, SupportsFloat]) -> None:
        """Add a row. Integers stay integers; anything else with a ``float`` (numpy, a tensor) becomes one."""
        if reserved := sorted({"step", "kind"} & values.keys()):
            raise ValueError(f"{reserved[0]!r} belongs to the row and cannot name one of its values")
        plain = {name: int(value) if isinstance(value, Integral) else float(value) for name, value in values.items()}
        row = {"step": step, "kind": kind} | {name: _spelled(value) for name, value in plain.items()}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        if self._events is not None:
            for name, value in plain.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Close the file, and the TensorBoard events."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, in order; a last line that a kill cut short is left out.

    Raises UserError where the file cannot be read, or where a line before the last is no row.
    """
    try:
        return [row for _, row in _lines_and_rows(path)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name the folder of a run") from error


def _cut_back(path: Path, resume_step: int) -> None:
    """Leave the rows up to step ``resume_step``. The file is replaced at once: a kill here loses no row."""
    if resume_step == 0 or not path.exists():
        path.write_bytes(b"")
        return
    kept = b"".join(line + b"\n" for line, row in _lines_and_rows(path) if row["step"] <= resume_step)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _lines_and_rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line, without its newline, and the row that it holds."""
    # What follows the last newline is nothing, or a line that was cut short, if only by its newline.
    *lines, last = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is None:
            raise UserError(f"{path}:{number}: is no row of metrics; remove this line")
        found.append((line, row))
    row = _parse(last)
    return found if row is None else [*found, (last, row)]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not isinstance(row.get("kind"), str):
        return None
    return {name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def _spelled(value: float) -> float | str:
    """``value`` as JSON can hold it."""
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror}); make room, or set run.folder to another disk")


def _summary_writer() -> Any:
    """TensorBoard's writer, whose import takes seconds."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "training.tensorboard: TensorBoard is not installed; pip install -e '.[tensorboard]', or set it to false"
        ) from error
    return SummaryWriter
