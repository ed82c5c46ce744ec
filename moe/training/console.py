"""What a person watching a run sees: a bar or plain lines while it trains, and tables of text when it is done.

A load picture is one character an expert, as high as the expert's share of the assignments: the fair share, 1 over the
number of experts, is half a character (``▄``), twice the fair share or more a whole one (``█``), and less than a tenth
of it, a dead expert, a dot. Where the screen has no such characters, a digit says how many eighths it would be.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, SupportsFloat, TextIO

from torch import Tensor
from tqdm import tqdm

WIDTH = 100
"""columns of the tables"""

_BLOCKS = "·▁▂▃▄▅▆▇█"
_DIGITS = "012345678"
_REDRAW_SECONDS = 0.1
_MAX_PICTURE_ROWS = 4
_PICTURE_COLUMNS = 16

Load = Tensor | Sequence[Sequence[float]]
"""assignments per MoE layer and expert"""


class LoadSummary(Protocol):
    """How evenly one layer's experts were used, as ``moe.model.routing.summarise_load`` says it."""

    @property
    def max_over_fair(self) -> float: ...
    @property
    def min_over_fair(self) -> float: ...
    @property
    def dead(self) -> int: ...
    @property
    def entropy(self) -> float: ...
    @property
    def dropped(self) -> float: ...
