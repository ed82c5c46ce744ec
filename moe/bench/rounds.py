"""Interleaved rounds: every contestant in a process of its own, prepared and checked one by one, then timed in turn."""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

from moe.bench.contestants import Bench, Entry

Say = Callable[[str], None]


@dataclass
class Result:
    """One contestant in one cell."""

    entry: Entry
    cell: Any
    turns: dict[str, list[list[float]]] = field(default_factory=dict)
    """phase (all, or forward and all) -> turn -> seconds of each repetition"""
    facts: dict[str, Any] = field(default_factory=dict)
    """what preparing it found: error, note, kept_bytes, peak_bytes, parameters"""
    failure: str | None = None
    """why there is no time"""
    unfit: bool = False
    """whether that is because it is not made for this cell"""

    def seconds(self, phase: str = "all") -> float | None:
        """Median of all repetitions of all turns."""
        every = [second for turn in self.turns.get(phase, []) for second in turn]
        return median(every) if every else None

    def spread(self, phase: str = "all") -> float | None:
        """Largest less smallest of the turns' medians, over the median of all; None for a single turn."""
        medians = [median(turn) for turn in self.turns.get(phase, [])]
        overall = self.seconds(phase)
        if overall is None or len(medians) < 2:
            return None
        return (max(medians) - min(medians)) / overall


class WorkerError(Exception):
    """A contestant's process said that it failed, died or took too long; the message is the reason."""

    def __init__(self, reason: str, unfit: bool = False) -> None:
        super().__init__(reason)
        self.unfit = unfit


class Worker:
    """The process of one contestant."""

    def __init__(self, bench: Bench, entry: Entry, device: str, folder: Path, patience: float) -> None:
        """``folder`` is shared by all; ``patience`` is how many seconds one answer may take."""
        self.patience = patience
        self.log = folder / f"{entry.name.replace('/', '-').replace(' ', '_')}.log"
        description = {
            "bench": bench,
            "contestant": entry.contestant.name,
            "settings": entry.settings,
            "device": device,
            "folder": str(folder),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moe.bench.worker", json.dumps(description)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.unread = b""

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer. Raises WorkerError."""
        stdin = self.process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            reply: dict[str, Any] = json.loads(self._line())
        except (BrokenPipeError, EOFError):
            raise WorkerError(self._how_it_died()) from None
        if "failed" in reply:
            raise WorkerError(reply["failed"], reply["unfit"])
        return reply

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.close()
            self.process.wait(timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        end = time.monotonic() + self.patience
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self.unread:
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                self.process.kill()
                raise WorkerError(f"no answer within {self.patience:.0f} seconds")
            read = os.read(descriptor, 1 << 16)
            if not read:
                raise EOFError
            self.unread += read
        line, _, self.unread = self.unread.partition(b"\n")
        return line

    def _how_it_died(self) -> str:
        status = self.process.wait()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"its process was {how}" if status < 0 or not lines else f"its process {how}: {lines[-1].strip()}"


def run_rounds(
    bench: Bench,
    entries: Sequence[Entry],
    cells: Sequence[Any],
    *,
    device: str,
    rounds: int,
    folder: Path,
    patience: float,
    lock: Path | None,
    say: Say,
) -> Iterator[list[Result]]:
    """Yield the results of each cell, in the order of ``entries``.

    A contestant that fails in one cell is out of that cell; one whose process is gone gets a new one in the next. The
    order of turns moves on by one each round. ``lock`` is a file that is locked while something is timed, and shared
    while something is prepared, for other work on the machine that keeps to it.
    """
    workers: dict[str, Worker] = {}
    eager = device == "cuda"  # there a process loads on a core of its own while others compute
    try:
        for cell in cells:
            say(cell.name)
            results = [Result(entry, cell) for entry in entries]
            if eager:
                for entry in entries:
                    workers.setdefault(entry.name, Worker(bench, entry, device, folder, patience))
            for result in results:
                with _locked(lock, fcntl.LOCK_SH):
                    start = time.monotonic()
                    worker = workers.get(result.entry.name)
                    if worker is None or worker.process.poll() is not None:
                        worker = workers[result.entry.name] = Worker(bench, result.entry, device, folder, patience)
                    try:
                        result.facts = worker.ask(do="prepare", cell=asdict(cell))
                    except WorkerError as failed:
                        result.failure, result.unfit = str(failed), failed.unfit
                    took = time.monotonic() - start
                say(f"  {result.entry.name}: {result.failure or 'agrees'} ({took:.0f} s)")
            for number in range(rounds):
                with _locked(lock, fcntl.LOCK_EX):
                    _round(results, workers, cell, number)
                say(f"  round {number + 1} of {rounds} done")
            for result in results:
                worker = workers[result.entry.name]
                if worker.process.poll() is None:
                    try:
                        worker.ask(do="drop", cell=asdict(cell))
                    except WorkerError:
                        worker.process.kill()
            yield results
    finally:
        for worker in workers.values():
            worker.stop()


def _round(results: Sequence[Result], workers: dict[str, Worker], cell: Any, number: int) -> None:
    going = [result for result in results if result.failure is None]
    first = number % max(1, len(going))
    for result in going[first:] + going[:first]:
        try:
            seconds = workers[result.entry.name].ask(do="turn", cell=asdict(cell), round=number)["seconds"]
        except WorkerError as failed:
            result.failure = str(failed)
            continue
        for phase, taken in (seconds if isinstance(seconds, dict) else {"all": seconds}).items():
            result.turns.setdefault(phase, []).append(taken)


@contextmanager
def _locked(path: Path | None, kind: int) -> Iterator[None]:
    if path is None:
        yield
        return
    file: IO[str]
    with path.open("a") as file:
        fcntl.flock(file, kind)
        yield
