"""What a person watching a run sees: a bar or plain lines while it trains, and tables of text when it is done.

A load picture is one character an expert, as high as the expert's share of the assignments: half a character (``▄``)
is the fair share, 1 over the number of experts; a whole one (``█``) is twice that or more; a dot is a dead expert, with
less than a tenth. Where a screen has no such characters, a digit says how many eighths of one there would be.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, SupportsFloat, TextIO

from torch import Tensor
from tqdm import tqdm

from moe.model.routing import LoadSummary

Counts = Tensor | Sequence[Sequence[float]]
"""assignments per mixture layer and expert, [L, E]"""

_BLOCKS = "·▁▂▃▄▅▆▇█"
_DIGITS = "012345678"
_DEAD_BELOW = 0.1  # of the fair share, as in moe.model.routing.LoadSummary
_REDRAW_SECONDS = 0.1
_MEMORY_SECONDS = 10.0
_PICTURE_ROWS = 4
_TABLE_COLUMNS = 100


# ------------------------------------------------------------------------------------------------------------- training


class Console:
    """A bar with a live picture of the load where ``stream`` is a terminal, a line every ``every`` steps elsewhere.

    Call :meth:`start` when training begins, :meth:`update` after each step, :meth:`say` for anything else that is
    worth a line, and put whatever is no training (validation, saving) inside :meth:`pause`, so that it counts neither
    in the tokens per second nor in the time left. ``moe_layers`` are the blocks that the rows of the load belong to.
    """

    def __init__(
        self,
        steps: int,
        *,
        every: int = 10,
        moe_layers: Sequence[int] = (),
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._every, self._moe_layers = steps, every, moe_layers
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._unicode = can_show_blocks(self._stream)
        self._rate = _Rate()
        self._step_began = clock()
        self._last_drawn = -math.inf
        self._bars: list[_Bar] = []
        self._figures_width = 0

    def start(self) -> None:
        """Begin to measure time; without this, it begins where the console was made."""
        self._step_began = self._clock()

    def update(self, step: int, *, loss: SupportsFloat, tokens: int, load: Counts | None = None) -> None:
        """Step number ``step``, from 1, is done: its loss, the tokens it trained on, the assignments to each expert.

        ``loss`` and ``load`` are looked at only when they are shown, so tensors on a GPU cost no synchronisation else.
        """
        now = self._clock()
        self._rate.add(now - self._step_began, tokens)
        self._step_began = now
        if self._live:
            if now - self._last_drawn >= _REDRAW_SECONDS or step == self._steps:
                self._last_drawn = now
                self._draw(step, loss, load)
        elif step % self._every == 0 or step == self._steps:
            parts = [self._position(step), *self._figures(step, loss)]
            if load is not None:
                parts.append(f"load max {_worst(_lists(load)):.2f}x")
            self.say("  ".join(parts))

    def say(self, line: str) -> None:
        """Print ``line``, above the bar if there is one; what the screen cannot show is spelled out."""
        line = showable(line, self._stream)
        if self._bars:
            _Bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream)
        self._stream.flush()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """While inside, the clock of the rate stands still."""
        began = self._clock()
        try:
            yield
        finally:
            self._step_began += self._clock() - began

    def close(self) -> None:
        """Leave the bar as it was last drawn, without the picture, and the cursor below it."""
        for bar in reversed(self._bars):
            bar.close()
        self._bars = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _position(self, step: int) -> str:
        return f"step {step:>{len(str(self._steps))}}/{self._steps}"

    def _figures(self, step: int, loss: SupportsFloat) -> list[str]:
        left = (self._steps - step) * self._rate.seconds_per_step
        return [f"loss {float(loss):.3f}", f"{self._rate.tokens_per_second:,.0f} tokens/s", f"{duration(left)} left"]

    def _draw(self, step: int, loss: SupportsFloat, load: Counts | None) -> None:
        # One column stays free: a terminal that is full to the last one may start a new line.
        columns = _columns(self._stream) - 1
        figures = "  ".join(self._figures(step, loss))
        # They only ever grow wider, so that the bar beside them does not twitch.
        self._figures_width = max(self._figures_width, len(figures))
        lines = [f"{self._position(step)} |{{bar}}| {figures:<{self._figures_width}}"]
        if load is not None:
            lines += load_rows(_lists(load), self._moe_layers, columns, unicode=self._unicode)
        lines += [""] * (len(self._bars) - len(lines))
        for row, line in enumerate(lines):
            if row == len(self._bars):
                fill = not self._unicode and " #"
                # The delay keeps tqdm from drawing a bar of its own as soon as it is made.
                self._bars.append(
                    _Bar(total=self._steps, file=self._stream, position=row, leave=row == 0, ascii=fill, delay=1e-9)
                )
            self._bars[row].show(line, step, columns)


class _Bar(tqdm):  # type: ignore[type-arg]
    """A line at the bottom of the terminal that is redrawn when it is told to, and only then."""

    monitor_interval = 0  # no thread that redraws bars

    def show(self, line: str, step: int, columns: int) -> None:
        """Redraw as ``line``, in which ``{bar}`` stands for the bar at ``step``."""
        self.n, self.ncols = step, columns
        self.bar_format = line or " "  # an empty format would mean tqdm's own
        self.refresh()


class _Rate:
    """Seconds and tokens per step, over about the last ten seconds and at least the last five steps."""

    def __init__(self) -> None:
        self.calls = 0
        self.steps = self.seconds = self.tokens = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        # The first step also compiles and allocates: it is forgotten once there is another.
        remembered = 0.0 if self.calls == 1 else max(0.8, math.exp(-seconds / _MEMORY_SECONDS))
        self.calls += 1
        self.steps = remembered * self.steps + 1
        self.seconds = remembered * self.seconds + seconds
        self.tokens = remembered * self.tokens + tokens

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def duration(seconds: float) -> str:
    """``seconds`` as a person says them: ``2:41``, ``1:02:41``, or ``3 d 4 h``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def printable(text: str) -> str:
    """``text`` with every control character but line breaks and tabs spelled out: a model may write any byte."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else repr(character)[1:-1] for character in text
    )


def showable(text: str, stream: TextIO) -> str:
    """``text`` with the characters that the encoding of ``stream`` lacks as escapes, so that printing cannot fail."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def can_show_blocks(stream: TextIO) -> bool:
    """Whether the encoding of ``stream`` has the characters of a load picture."""
    try:
        (_BLOCKS + "▏▎▍▌▋▊▉").encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _columns(stream: TextIO) -> int:
    """Width of the terminal behind ``stream``; where it does not say, 80."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


# -------------------------------------------------------------------------------------------------------- load pictures


def load_picture(counts: Sequence[float], columns: int = 16, *, unicode: bool = True) -> str:
    """One layer's load as a picture (see the top of this file) of at most ``columns`` characters.

    ``counts`` are the assignments to each expert. Where there are more experts than columns, they are sorted, most
    used first, and shown in equal steps of rank, the first and the last included.
    """
    ratios = _over_fair(counts)
    if len(ratios) > columns:
        ratios.sort(reverse=True)
        ratios = [ratios[round(column * (len(ratios) - 1) / (columns - 1))] for column in range(columns)]
    characters = _BLOCKS if unicode else _DIGITS
    return "".join(characters[_eighths(ratio)] for ratio in ratios)


def load_rows(
    counts: Sequence[Sequence[float]], layers: Sequence[int], columns: int, *, unicode: bool = True
) -> list[str]:
    """The pictures of several layers side by side, in at most four rows of at most ``columns`` characters.

    Each is labelled with its layer; before them stands the largest load of all, over the fair share. Where not all
    fit, the pictures become half as wide, and then as many layers as fit are shown, in equal steps.
    """
    if not counts:
        return []
    headings = [f"load max {_worst(counts):5.2f}x"]
    shown = list(range(len(counts)))
    for width in (16, 8):
        cell = 2 + len(str(max(layers))) + 1 + min(width, len(counts[0]))
        fitting = max(1, (columns - len(headings[0])) // cell)
        if len(shown) <= fitting * _PICTURE_ROWS:
            break
    else:
        shown = _spread(len(counts), fitting * _PICTURE_ROWS)
        headings.append(f"{len(shown)} of {len(counts)} layers")
    rows = -(-len(shown) // fitting)
    per_row = -(-len(shown) // rows)
    cells = [f"{layers[index]} {load_picture(counts[index], width, unicode=unicode)}" for index in shown]
    lines = [
        "".join(text.rjust(cell) for text in cells[start : start + per_row]) for start in range(0, len(cells), per_row)
    ]
    headings += [""] * (len(lines) - len(headings))
    return [f"{heading:<{len(headings[0])}}{line}" for heading, line in zip(headings, lines, strict=True)]


def _spread(total: int, shown: int) -> list[int]:
    """``shown`` of the numbers below ``total`` in equal steps, the first and the last included."""
    return [round(index * (total - 1) / max(1, shown - 1)) for index in range(shown)]


def _over_fair(counts: Sequence[float]) -> list[float]:
    """Each expert's assignments over the fair share; zeros where there are none at all."""
    fair = sum(counts) / len(counts)
    return [count / fair if fair else 0.0 for count in counts]


def _worst(counts: Sequence[Sequence[float]]) -> float:
    """The largest load of any expert of any layer, over its fair share."""
    return max(max(_over_fair(layer)) for layer in counts)


def _eighths(ratio: float) -> int:
    """Height of the character for a load that is ``ratio`` times the fair share."""
    return 0 if ratio < _DEAD_BELOW else min(8, max(1, math.floor(4 * ratio + 0.5)))


def _lists(counts: Counts) -> Sequence[Sequence[float]]:
    if isinstance(counts, Tensor):
        lists: list[list[float]] = counts.tolist()
        return lists
    return counts


# --------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True, kw_only=True)
class DomainResult:
    """What the validation says about one domain, or about all text together."""

    domain: str
    tokens: int
    n_bytes: int
    cross_entropy: float
    """nats per token"""
    bits_per_byte: float
    gzip: float
    """bits per byte of ``gzip -9`` on the same text"""
    xz: float
    """bits per byte of ``xz -9e`` on the same text"""


def domain_table(domains: Sequence[DomainResult], pooled: DomainResult) -> str:
    """A line a domain and one for all text, beside what two compressors make of it; at most 100 columns."""
    header = ["domain", "tokens", "bytes", "nats/token", "bits/byte", "gzip -9", "xz -9e", "ratio to xz"]
    rows = [
        [
            result.domain,
            f"{result.tokens:,}",
            f"{result.n_bytes:,}",
            *(f"{value:.3f}" for value in (result.cross_entropy, result.bits_per_byte, result.gzip, result.xz)),
            f"{result.bits_per_byte / result.xz:.2f}x",
        ]
        for result in (*domains, pooled)
    ]
    return _table("validation: cross-entropy in nats/token and bits/byte; gzip and xz in bits/byte", header, rows)


def load_table(
    layers: Sequence[int],
    summaries: Sequence[LoadSummary],
    counts: Counts,
    mlps_per_token: Sequence[float],
    *,
    n_special: int = 0,
    unicode: bool = True,
) -> str:
    """A line a mixture layer, with a picture, and one for perfect balance; at most 100 columns.

    ``layers`` are the numbers of the blocks; ``summaries``, ``counts`` and ``mlps_per_token`` say how each was used.
    The last ``n_special`` experts have no MLP.
    """
    lists = _lists(counts)
    picture = f"{'load':<{min(32, len(lists[0]))}}"
    header = ["layer", "max/fair", "min/fair", "dead", "entropy", "dropped", "MLPs/token", picture]
    balanced = LoadSummary(max_over_fair=1.0, min_over_fair=1.0, dead=0, entropy=1.0, dropped=0.0)
    balanced_row = ("balanced", balanced, "", [1.0] * len(lists[0]))
    named = [
        (str(layer), summary, f"{mlps:.2f}", row)
        for layer, summary, mlps, row in zip(layers, summaries, mlps_per_token, lists, strict=True)
    ]
    rows = [
        [
            name,
            f"{summary.max_over_fair:.2f}x",
            f"{summary.min_over_fair:.2f}x",
            str(summary.dead),
            f"{summary.entropy:.3f}",
            f"{summary.dropped:.2%}",
            mlps,
            load_picture(row, 32, unicode=unicode),
        ]
        for name, summary, mlps, row in (*named, balanced_row)
    ]
    order = "in order" if len(lists[0]) <= 32 else f"sorted, 32 of {len(lists[0])}"
    if n_special:
        order += f", {'the last ' if len(lists[0]) <= 32 else ''}{n_special} without an MLP"
    scale = "half a character is the fair share" if unicode else "in eighths, 4 is the fair share"
    return _table(f"load of the experts ({order}; {scale})", header, rows)


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned to the right, the first to the left and cut to fit; the last row set apart."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    widths[0] = min(widths[0], _TABLE_COLUMNS - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = []
    for first, *others in (header, *rows):
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first[: widths[0]]:<{widths[0]}}", *cells]).rstrip())
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([title, "", lines[0], rule, *lines[1:-1], rule, lines[-1]])
