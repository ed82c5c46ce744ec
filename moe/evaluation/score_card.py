"""The score card: task, score, chance, interval, as a table and as a picture in the manner of exam results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe.evaluation.intervals import over_items
from moe.evaluation.pictures import CHANCE, OURS, layout
from moe.evaluation.table import columns
from moe.study.plots import GRID, INK, graph_objects

if TYPE_CHECKING:
    import plotly.graph_objects as go

NORMAL = 1.959964
"""the 97.5 % point of the normal distribution"""
ROW, TOP, BOTTOM, LEFT, RIGHT = 30, 120, 30, 190, 270
"""pixels: of a task's row, and around all rows"""
NEUTRAL, TRACK = "#a7a7a7", "rgba(128,128,128,0.12)"


@dataclass(frozen=True)
class Mark:
    """The score of a model on one task."""

    task: str
    metric: str
    score: float
    chance: float | None
    """what a model scores that answers without reading the question; None where the task does not say"""
    low: float
    """the 95 % interval over items: NaN where the harness gives no standard error"""
    high: float
    items: int
    successes: int | None
    """of the items; None where an item is not simply right or wrong"""
    higher_is_better: bool = True

    @property
    def is_share(self) -> bool:
        """Whether the score is a share of the items, which a bar from 0 to 1 can show."""
        return self.successes is not None

    @property
    def verdict(self) -> str:
        """Where chance stands to the interval; empty where it is not known."""
        if self.chance is None or math.isnan(self.low):
            return ""
        if self.low <= self.chance <= self.high:
            return "at chance"
        return "above chance" if (self.low > self.chance) == self.higher_is_better else "below chance"


def mark_of(
    task: str,
    metric: str,
    score: float,
    values: Sequence[object],
    *,
    error: float | None = None,
    chance: float | None = None,
    higher_is_better: bool = True,
) -> Mark:
    """The mark for the ``values`` of a task's items, of which ``score`` is what the harness made.

    Where each is right or wrong, the interval is Wilson's; else it is normal with the harness's standard ``error``.
    """
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if numbers and len(numbers) == len(values) and all(value in (0.0, 1.0) for value in numbers):
        successes = round(sum(numbers))
        low, high = over_items(successes, len(numbers))
        return Mark(task, metric, score, chance, low, high, len(numbers), successes, higher_is_better)
    half = math.nan if error is None else NORMAL * error
    return Mark(task, metric, score, chance, score - half, score + half, len(values), None, higher_is_better)


def pooled_mark(name: str, marks: Sequence[Mark]) -> Mark:
    """All items of ``marks``, which have the same metric and chance, as those of one task."""
    items, successes = sum(mark.items for mark in marks), sum(mark.successes or 0 for mark in marks)
    low, high = over_items(successes, items)
    return Mark(name, marks[0].metric, successes / items, marks[0].chance, low, high, items, successes)


def card_table(marks: Sequence[Mark]) -> str:
    """A line a task: score, chance, interval, items."""
    rows = [
        [
            mark.task,
            f"{mark.score:.3f}",
            "" if mark.chance is None else f"{mark.chance:.3f}",
            _interval(mark),
            mark.verdict,
            f"{mark.items:,}",
            mark.metric,
        ]
        for mark in marks
    ]
    table = columns(["task", "score", "chance", "95 % interval", "verdict", "items", "metric"], rows)
    return (
        f"{table}\n\nChance is the score of a model that answers without reading the question. The interval is over "
        "items; a verdict\nof more or less than chance is wrong for about one task in twenty that is at chance."
    )


def card_picture(title: str, marks: Sequence[Mark]) -> "go.Figure":
    """A bar a task from 0 to 1, with its interval and a mark where chance is, the score beside it.

    Blue is a score whose interval leaves out chance, grey one that could be chance. Tasks with another kind of score
    (a perplexity, say) are in words alone. Raises UserError where plotly is missing.
    """
    go = graph_objects()
    names = [mark.task for mark in marks]
    shares = [mark for mark in marks if mark.is_share]
    figure = go.Figure()
    figure.add_trace(
        go.Bar(
            x=[1] * len(shares),
            y=[m.task for m in shares],
            orientation="h",
            width=0.7,
            marker_color=TRACK,
            hoverinfo="skip",
        )
    )
    figure.add_trace(
        go.Bar(
            x=[mark.score for mark in shares],
            y=[mark.task for mark in shares],
            orientation="h",
            width=0.7,
            marker_color=[NEUTRAL if mark.verdict == "at chance" else OURS for mark in shares],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [mark.high - mark.score for mark in shares],
                "arrayminus": [mark.score - mark.low for mark in shares],
                "color": INK,
                "thickness": 1.4,
                "width": 4,
            },
            customdata=[[mark.items, mark.metric, _interval(mark)] for mark in shares],
            hovertemplate="%{y}: %{x:.3f} (%{customdata[2]}), %{customdata[1]} of %{customdata[0]:,} items"
            "<extra></extra>",
        )
    )
    with_chance = [mark for mark in shares if mark.chance is not None]
    figure.add_trace(
        go.Scatter(
            x=[mark.chance for mark in with_chance],
            y=[mark.task for mark in with_chance],
            mode="markers",
            marker={"symbol": "line-ns", "size": 20, "line": {"width": 3, "color": CHANCE}},
            hovertemplate="%{y}, chance: %{x:.3f}<extra></extra>",
        )
    )
    for mark in marks:
        shown = f"<b>{mark.score:.3f}</b>  {_interval(mark)}"
        figure.add_annotation(
            x=1,
            xref="paper",
            xanchor="left",
            xshift=16,
            y=mark.task,
            text=f"{shown}  {mark.verdict}" if mark.is_share else f"{shown}  {mark.metric}",
            showarrow=False,
            align="left",
        )
    figure.update_xaxes(range=[0, 1], dtick=0.25, gridcolor=GRID, zeroline=False, tickformat=".2f", side="top")
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], range=[len(names) - 0.5, -0.5][::-1])
    subtitle = (
        "bar: share of the items that were right, grey where that could be chance; whisker: 95 % interval over items; "
        "orange: chance, the score of answers given without reading the question"
    )
    height = ROW * len(marks) + TOP + BOTTOM
    figure.update_layout(**layout(title, subtitle, height))
    figure.update_layout(showlegend=False, margin={"l": LEFT, "r": RIGHT, "t": TOP, "b": BOTTOM})
    return figure


def _interval(mark: Mark) -> str:
    return "" if math.isnan(mark.low) else f"{mark.low:.3f} to {mark.high:.3f}"
