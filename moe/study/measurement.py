"""What a metric returns: numbers with named axes, their chance value beside them, and a sentence that says how to read
them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Axis:
    """One dimension of a measurement."""

    name: str
    """layer, expert, domain, step, position, ..."""
    labels: tuple[str, ...]
    """one for each index"""


@dataclass(frozen=True, repr=False)
class Measurement:
    """A metric of a record.

    A value without its chance value says nothing, and an estimate without its bias misleads: ``chance`` is what routing
    that knows nothing would give, ``null`` what this estimate gave on shuffled data, where it has a bias.
    """

    name: str
    """that of the function, in words with underscores"""
    title: str
    """what a heading says"""
    reading: str
    """one sentence that says how to read it"""
    values: Array
    """float64, or whole numbers where they are counts; NaN where there is nothing to measure"""
    axes: tuple[Axis, ...]
    """one for each dimension of ``values``; none for a single number"""
    unit: str = ""
    """share, nats, tokens, ...; empty for a ratio"""
    chance: Array | None = None
    """the value under routing that knows nothing, of a shape that broadcasts to ``values``; None: there is no such"""
    null: Array | None = None
    """mean of the estimate over permutations that keep the margins, of a shape that broadcasts to ``values``"""
    null_std: Array | None = None
    """its standard deviation over those permutations"""

    def __repr__(self) -> str:
        """Name and axes, and the range of the values: a notebook prints this."""
        axes = ", ".join(f"{axis.name} {len(axis.labels)}" for axis in self.axes) or "a number"
        finite = self.values[np.isfinite(self.values)]
        seen = f"{finite.min():.4g} to {finite.max():.4g}" if finite.size else "nothing measured"
        return f"<Measurement {self.name} [{axes}]: {seen}>"

    def __post_init__(self) -> None:
        shape = tuple(len(axis.labels) for axis in self.axes)
        if self.values.shape != shape:
            raise ValueError(f"{self.name}: values of shape {self.values.shape} on axes of lengths {shape}")
        for part in (self.chance, self.null, self.null_std):
            if part is not None:
                np.broadcast_shapes(part.shape, shape)

    @property
    def over_chance(self) -> Array:
        """Values over their chance value; raises ValueError where there is none."""
        if self.chance is None:
            raise ValueError(f"{self.name} has no chance value")
        ratio: Array = self.values / self.chance
        return ratio

    def frame(self) -> "pd.DataFrame":
        """One row a value, of a single number the only one: a column for each axis, then value, chance and null."""
        import pandas as pd

        columns = {"value": self.values, "chance": self.chance, "null": self.null, "null_std": self.null_std}
        shape = self.values.shape
        values = {name: np.broadcast_to(part, shape).ravel() for name, part in columns.items() if part is not None}
        if not self.axes:
            return pd.DataFrame(values)
        index = pd.MultiIndex.from_product([axis.labels for axis in self.axes], names=[axis.name for axis in self.axes])
        return pd.DataFrame(values, index).reset_index()

    def plot(self) -> Any:
        """A plotly figure with the chance line; needs the extra ``study``."""
        from moe.study.plots import plot

        return plot(self)
