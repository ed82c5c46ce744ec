"""Ctrl-C and SIGTERM as a question that the training loop asks, instead of an exception anywhere."""

import signal
from types import FrameType, TracebackType


class StopSignal:
    """While entered, SIGINT and SIGTERM set :attr:`received`; a second one acts as it would have without this."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
