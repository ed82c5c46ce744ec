"""Text out of tokens as they come, each character once it is certain, up to a stop string."""

from collections.abc import Callable, Sequence

UNFINISHED = "�"
"""what a decoder writes for bytes that are no UTF-8, or not yet"""


class TextStream:
    """The text of a growing list of tokens.

    ``decode`` turns ids into text. A token may hold part of a character, and a stop string may begin in one token and
    end in another: what could still become either is held back. The text ends before the stop string that is complete
    first.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise ValueError("a stop string is empty")
        self.stopped = False
        """whether a stop string was found; nothing follows then"""
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        # Some decoders drop a space before the first token, so what was read last is decoded again with what is new.
        self._context = self._read = 0
        self._held = ""

    def push(self, token: int) -> str:
        """Read one token more, and return the text that became certain."""
        if self.stopped:
            return ""
        self._ids.append(token)
        new = self._new_text()
        if new.endswith(UNFINISHED):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._release(new, last=False)

    def finish(self) -> str:
        """The rest of the text, when no token will follow."""
        if self.stopped:
            return ""
        new = self._new_text()
        self._context = self._read = len(self._ids)
        return self._release(new, last=True)

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._context : self._read])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _release(self, new: str, *, last: bool) -> str:
        """Of what is held and ``new``, the part that no stop string can take away any more."""
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
