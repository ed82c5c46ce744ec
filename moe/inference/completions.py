"""Texts from texts: an engine's tokens with their tokenizer, and stop strings, which only text knows."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe.data.tokenizer import Tokenizer
from moe.inference.engine import Engine, Event, Finish, Request
from moe.inference.text_stream import TextStream


@dataclass(frozen=True)
class Piece:
    """What a token adds to a text."""

    event: Event
    text: str
    """what became certain with it, which need not be its own letters"""
    finish: Finish | None
    """why the text ends here; None: it goes on"""


class Completions:
    """An engine whose answers are text."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self._stop: dict[int, tuple[str, ...]] = {}
        self._open: dict[int, int] = {}
        """continuations of each request that have not ended"""
        self._streams: dict[tuple[int, int], TextStream] = {}

    def submit(self, request: Request, stop: Sequence[str] = ()) -> int:
        """:meth:`Engine.submit`, with strings that end a continuation and are no part of it."""
        number = self.engine.submit(request)
        self._stop[number], self._open[number] = tuple(stop), request.n
        return number

    def cancel(self, request: int) -> None:
        """Forget a request; no more pieces come of it."""
        self.engine.cancel(request)
        self._forget(request)

    def step(self) -> list[Piece]:
        """One step of the engine, and what it adds to the texts."""
        pieces = []
        for event in self.engine.step():
            if event.request in self._open and (piece := self._read(event)) is not None:
                pieces.append(piece)
        return pieces

    def _read(self, event: Event) -> Piece | None:
        key = (event.request, event.sample)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = TextStream(self.tokenizer.decode, self._stop[event.request])
        if stream.stopped:
            return None  # a token of the same step, after the end
        text = "" if event.token is None else stream.push(event.token)
        finish = event.finish
        if finish is not None and not stream.stopped:
            text += stream.finish()
        if stream.stopped:
            self.engine.cancel(event.request, event.sample)
            finish = "stop"
        if finish is not None:
            self._open[event.request] -= 1
            if not self._open[event.request]:
                self._forget(event.request)
        return Piece(event, text, finish)

    def _forget(self, request: int) -> None:
        self._stop.pop(request, None)
        self._open.pop(request, None)
        for key in [key for key in self._streams if key[0] == request]:
            del self._streams[key]
