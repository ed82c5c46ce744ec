"""An engine in a thread of its own, which the coroutines of a server ask for texts.

Only that thread touches the engine. It is told what to do through a queue, and hands each piece of text to the event
loop that waits for it.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from moe.inference.completions import Completions, Piece
from moe.inference.engine import Request


class BusyError(Exception):
    """As many prompts are being answered, or wait for it, as the service takes."""


class FailedError(Exception):
    """The engine could not go on with what it was asked for."""


@dataclass(eq=False)
class _Call:
    """One prompt that somebody waits for."""

    request: Request
    stop: Sequence[str]
    loop: asyncio.AbstractEventLoop
    pieces: "asyncio.Queue[Piece | FailedError]"
    number: int | None = None
    """the engine's, once it has it"""

    def hand_over(self, piece: Piece | FailedError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may have ended, and nobody waits any more
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class Service:
    """Answers up to ``capacity`` prompts at a time, those that wait for a place in the engine included."""

    def __init__(self, completions: Completions, capacity: int) -> None:
        self.completions, self.capacity = completions, capacity
        self._open = 0
        self._told: queue.SimpleQueue[tuple[str, _Call | None]] = queue.SimpleQueue()
        self._calls: dict[int, _Call] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the step that is under way; whoever still waits is told so."""
        self._told.put(("stop", None))
        self._thread.join()

    @property
    def n_open(self) -> int:
        """Prompts that somebody waits for."""
        return self._open

    async def complete(
        self, requests: Sequence[Request], stop: Sequence[str], seconds: float
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all answers with the place of their request, as they come.

        Whatever is left is cancelled when the iterator is closed. Raises ValueError for a request that could never be
        answered, BusyError where there is no place for all of them, FailedError where the engine fails, and
        TimeoutError where it takes more than ``seconds``.
        """
        for request in requests:
            self.completions.engine.require_possible(request)
        if self._open + len(requests) > self.capacity:
            raise BusyError(f"{self._open} prompts are being answered or wait, of at most {self.capacity}")
        self._open += len(requests)
        pieces: asyncio.Queue[Piece | FailedError] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        calls = [_Call(request, stop, loop, pieces) for request in requests]
        end = loop.time() + seconds
        try:
            for call in calls:
                self._told.put(("submit", call))
            left = sum(request.n for request in requests)
            while left:
                piece = await asyncio.wait_for(pieces.get(), end - loop.time())
                if isinstance(piece, FailedError):
                    raise piece
                left -= piece.finish is not None
                place = next(p for p, call in enumerate(calls) if call.number == piece.event.request)
                yield place, piece
        finally:
            self._open -= len(requests)
            for call in calls:
                self._told.put(("cancel", call))

    def _work(self) -> None:
        engine = self.completions.engine
        going = True
        while going:
            # With nothing to do, wait to be told; else hear what there is, and go on.
            news = [self._told.get()] if not engine.busy else []
            news += _drained(self._told)
            for what, call in news:
                going = going and what != "stop"
                if call is not None:
                    self._hear(what, call)
            if not going:
                self._fail("the server is stopping")
            elif engine.busy:
                self._step()

    def _hear(self, what: str, call: _Call) -> None:
        if what == "submit":
            call.number = self.completions.submit(call.request, call.stop)
            self._calls[call.number] = call
        elif call.number is not None:
            self.completions.cancel(call.number)
            self._calls.pop(call.number, None)

    def _step(self) -> None:
        try:
            pieces = self.completions.step()
        except Exception as error:  # whatever it is, those who wait must hear of it
            self._fail(str(error) or type(error).__name__)
            return
        for piece in pieces:
            call = self._calls.get(piece.event.request)
            if call is not None:
                call.hand_over(piece)

    def _fail(self, reason: str) -> None:
        for number, call in self._calls.items():
            self.completions.cancel(number)
            call.hand_over(FailedError(reason))
        self._calls.clear()


def _drained(told: "queue.SimpleQueue[tuple[str, _Call | None]]") -> list[tuple[str, _Call | None]]:
    news = []
    while not told.empty():
        news.append(told.get())
    return news
