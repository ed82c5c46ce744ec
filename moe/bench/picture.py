"""The rows of a run as bars: a panel for each cell, fastest first, the dense bound as a dashed line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.bench.table import Row
from moe.errors import UserError
from moe.study.plots import GRID, INK, LINES, graph_objects, save_all

if TYPE_CHECKING:
    import plotly.graph_objects as go

KINDS = {
    "ours": {"color": LINES[0]},
    "dense": {"color": "rgba(0,0,0,0)", "line": {"color": INK, "width": 1.5}},
    "others": {"color": "#a7a7a7"},
    "others, dropping assignments": {
        "color": "#a7a7a7",
        "pattern": {"shape": "/", "fgcolor": "#ffffff", "fillmode": "overlay"},
    },
}
"""how each kind of contestant is drawn, in the order of the legend"""
BAR, HEAD = 22, 62
"""pixels of a bar's row and of what a panel has above and below"""

Cell = tuple[str, Sequence[Row]]
"""name and rows"""


def read_cells(path: Path) -> tuple[str, str, list[Cell]]:
    """Bench, machine and cells of a JSON file that a run wrote. Raises UserError where it is none."""
    try:
        content = json.loads(path.read_text())
        cells: list[Cell] = [(cell["name"], [Row(**row) for row in cell["rows"]]) for cell in content["cells"]]
        return content["bench"], content["machine"]["device"], cells
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as what a bench wrote: {error}") from None


def draw(bench: str, device: str, cells: Sequence[Cell]) -> "go.Figure":
    """A figure with a panel of horizontal bars for each cell: tokens a second, and the share of the bound in words.

    Raises UserError where plotly is missing.
    """
    go = graph_objects()
    from plotly.subplots import make_subplots

    timed = [(name, [row for row in rows if row.tokens_per_second is not None]) for name, rows in cells]
    timed = [(name, rows) for name, rows in timed if rows]
    if not timed:
        raise UserError("nothing was timed: there is no picture to draw")
    heights = [BAR * len(rows) + HEAD for _, rows in timed]
    top = 100
    total = sum(heights) + top
    figure = make_subplots(
        rows=len(timed),
        cols=1,
        subplot_titles=[name for name, _ in timed],
        row_heights=heights,
        vertical_spacing=0 if len(timed) == 1 else min(HEAD / (total - top), 1 / (len(timed) - 1)),
    )
    seen: set[str] = set()
    for panel, (_, rows) in enumerate(timed, start=1):
        for kind, marker in KINDS.items():
            of_kind = [row for row in rows if _kind(row) == kind]
            if not of_kind:
                continue
            figure.add_trace(
                go.Bar(
                    x=[row.tokens_per_second for row in of_kind],
                    y=[row.name for row in of_kind],
                    orientation="h",
                    name=kind,
                    legendgroup=kind,
                    showlegend=kind not in seen,
                    marker=marker,
                    width=0.72,
                    error_x={
                        "type": "data",
                        "symmetric": False,
                        "array": [(row.fastest_turn or 0.0) - (row.tokens_per_second or 0.0) for row in of_kind],
                        "arrayminus": [(row.tokens_per_second or 0.0) - (row.slowest_turn or 0.0) for row in of_kind],
                        "color": INK,
                        "thickness": 1,
                        "width": 3,
                    },
                    hovertemplate="%{y}: %{x:,.0f} tokens/s<extra></extra>",
                ),
                row=panel,
                col=1,
            )
            seen.add(kind)
        # Beside the bars and beyond their ranges, which would cross the text of a bar.
        figure.add_trace(
            go.Scatter(
                x=[row.fastest_turn for row in rows],
                y=[row.name for row in rows],
                mode="text",
                text=[f"  {_label(row)}" for row in rows],
                textposition="middle right",
                cliponaxis=False,
                showlegend=False,
                hoverinfo="skip",
            ),
            row=panel,
            col=1,
        )
        fastest = max(row.fastest_turn or 0.0 for row in rows)
        bounds = [row.tokens_per_second for row in rows if row.bound]
        if bounds:
            figure.add_vline(
                x=max(bound or 0.0 for bound in bounds),
                line={"color": INK, "dash": "dash", "width": 1},
                row=panel,
                col=1,
            )
        order = [row.name for row in reversed(rows)]
        figure.update_yaxes(categoryorder="array", categoryarray=order, automargin=True, row=panel, col=1)
        figure.update_xaxes(range=[0, 1.2 * fastest], gridcolor=GRID, rangemode="tozero", row=panel, col=1)
    shares = any(row.share is not None for _, rows in timed for row in rows)
    unit = "tokens a second, with the range of the turns" + "; beside it the share of the dense bound" * shares
    figure.update_xaxes(title_text=unit, row=len(timed), col=1)
    figure.update_annotations(x=0, xanchor="left", font={"size": 13})
    figure.update_layout(**_layout(f"{TITLES[bench]}, on {device}", total))
    return figure


TITLES = {
    "layer": "One layer of experts, forward and backward",
    "step": "Whole training step",
    "decode": "Greedy decoding",
}


def _layout(title: str, height: int) -> dict[str, Any]:
    return {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK, "family": "system-ui, sans-serif", "size": 12},
        "title": {"text": title, "x": 0, "xref": "container", "pad": {"l": 14}, "font": {"size": 16}},
        "legend": {"orientation": "h", "yanchor": "bottom", "yref": "container", "y": 1 - 72 / height, "x": 0},
        "margin": {"l": 60, "r": 20, "t": 100, "b": 60},
        "height": height + 60,
        "width": 1000,
        "barmode": "overlay",
    }


def _kind(row: Row) -> str:
    if row.bound:
        return "dense"
    if row.ours:
        return "ours"
    return "others, dropping assignments" if row.drops else "others"


def _label(row: Row) -> str:
    share = "" if row.share is None else f" ({row.share:.2f})"
    return f"{row.tokens_per_second:,.0f}{share}"


def save(figure: "go.Figure", stem: Path) -> list[Path]:
    """Write ``figure`` beside ``stem`` as PNG and SVG, and return where. Raises UserError as :mod:`moe.study.plots`."""
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    save_all(dict.fromkeys(paths, figure))
    return paths
