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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

from moe.bench.contestants import Bench, Entry

Say = Callable[[str], None]

MEMORY_LEFT = 3 << 29
"""bytes that have to be available for one more process; beyond that the system might kill another's"""


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
        """Median over the turns of each turn's median: a quiet turn, which repeats more often, counts as one."""
        medians = self.medians(phase)
        return median(medians) if medians else None

    def spread(self, phase: str = "all") -> float | None:
        """Largest less smallest of the turns' medians, over their median; None for a single turn."""
        medians, overall = self.medians(phase), self.seconds(phase)
        if overall is None or len(medians) < 2:
            return None
        return (max(medians) - min(medians)) / overall

    def medians(self, phase: str = "all") -> list[float]:
        """Of each turn, in seconds."""
        return [median(turn) for turn in self.turns.get(phase, [])]


class WorkerError(Exception):
    """A contestant's process said that it failed, died or took too long; the message is the reason."""

    def __init__(self, reason: str, unfit: bool = False) -> None:
        super().__init__(reason)
        self.unfit = unfit


class Worker:
    """The process of one contestant."""

    def __init__(self, command: Sequence[str], log: Path, patience: float) -> None:
        """Start ``command``, its standard error to ``log``; ``patience`` is how many seconds one answer may take."""
        self.log, self.patience = log, patience
        with log.open("wb") as errors:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        self.unread, self.is_busy = b"", False

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer. Raises WorkerError."""
        self.finish()
        self._send(request)
        return self._receive()

    def start(self, **request: Any) -> None:
        """Send a request without waiting: :meth:`finish` does, and so does the next :meth:`ask`."""
        self._send(request)
        self.is_busy = True

    def finish(self) -> None:
        """Wait for the end of what :meth:`start` sent; if that failed, so will what is asked next, and say why."""
        if self.is_busy:
            self.is_busy = False
            with suppress(WorkerError):
                self._receive()

    def _send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = json.loads(self._line())
        except EOFError:
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

    def start_worker(entry: Entry) -> Worker:
        left = available_bytes()
        if left is not None and left < MEMORY_LEFT:
            raise WorkerError(
                f"{left / 2**30:.1f} GiB of memory are left beside the others, and {MEMORY_LEFT / 2**30:.1f} may be "
                "needed: name fewer with --only"
            )
        description = {
            "bench": bench,
            "contestant": entry.contestant.name,
            "settings": entry.settings,
            "device": device,
            "folder": str(folder),
        }
        command = [sys.executable, "-m", "moe.bench.worker", json.dumps(description)]
        return Worker(command, folder / f"{entry.name.replace(' ', '_')}.log", patience)

    workers: dict[str, Worker] = {}
    eager = device == "cuda"  # there a process loads on a core of its own while others compute
    try:
        for cell in cells:
            say(cell.name)
            results = [Result(entry, cell) for entry in entries]
            if eager:
                for entry in entries:
                    if entry.name not in workers:
                        workers[entry.name] = start_worker(entry)
                _warm([workers[entry.name] for entry in entries if entry.contestant.warm], cell, say)
            for result in results:
                with _locked(lock, fcntl.LOCK_SH):
                    start = time.monotonic()
                    try:
                        worker = workers.get(result.entry.name)
                        if worker is None or worker.process.poll() is not None:
                            worker = workers[result.entry.name] = start_worker(result.entry)
                        result.facts = worker.ask(do="prepare", cell=asdict(cell))
                    except WorkerError as failed:
                        result.failure, result.unfit = str(failed), failed.unfit
                    took = time.monotonic() - start
                say(f"  {result.entry.name}: {result.failure or 'ready'} ({took:.0f} s)")
            for number in range(rounds):
                with _locked(lock, fcntl.LOCK_EX):
                    _round(results, workers, cell, number)
                say(f"  round {number + 1} of {rounds} done")
            for result in results:
                dropping = workers.get(result.entry.name)
                if dropping is not None and dropping.process.poll() is None:
                    try:
                        dropping.ask(do="drop", cell=asdict(cell))
                    except WorkerError:
                        dropping.process.kill()
            yield results
    except BaseException:  # an interrupt too: nobody is asked to finish
        for worker in workers.values():
            worker.process.kill()
        raise
    finally:
        for worker in workers.values():
            worker.stop()


def available_bytes() -> int | None:
    """Memory that new processes can have without swapping (Linux's MemAvailable; None elsewhere)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _warm(workers: Sequence[Worker], cell: Any, say: Say) -> None:
    """Let ``workers`` compile all at once, each on cores of its own, before anyone tunes by timing in preparing."""
    start = time.monotonic()
    for worker in workers:
        worker.start(do="warm", cell=asdict(cell))
    for worker in workers:
        worker.finish()
    if workers:
        say(f"  compiled ahead ({time.monotonic() - start:.0f} s)")


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
