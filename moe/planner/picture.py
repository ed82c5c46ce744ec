"""A plan as two rows of stacked bars: memory by part against what the device has, and a step's time by part."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moe.planner.memory import Memory
from moe.planner.training import StepTime
from moe.study.plots import GRID, INK, LINES, graph_objects, save_all

if TYPE_CHECKING:
    import plotly.graph_objects as go

MEMORY_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer's state",
    "activations": "activations",
    "buffers": "buffers",
}
TIME_PARTS = {
    "compute": "arithmetic",
    "recompute": "arithmetic again",
    "bubble": "pipeline bubble",
    "tensor": "tensor parallel",
    "expert": "expert parallel",
    "pipeline": "pipeline sends",
    "data": "data parallel",
}
BAR, GAP, TOP, BOTTOM = 40, 110, 90, 80
"""pixels: of a bar's row, between the panels, above and below both"""


def draw(title: str, device: str, room: float, memories: Mapping[str, Memory], time: StepTime) -> "go.Figure":
    """A figure of the ``memories`` (by name) of devices that have ``room`` bytes, and of the ``time`` of a step.

    Raises UserError where plotly is missing.
    """
    go = graph_objects()
    from plotly.subplots import make_subplots

    heights = [BAR * len(memories), BAR]
    inside = sum(heights) + GAP
    figure = make_subplots(
        rows=2,
        cols=1,
        row_heights=heights,
        vertical_spacing=GAP / inside,
        subplot_titles=[f"memory of a device at the peak of a step, GB (dashed: {device})", "time of a step, seconds"],
    )
    names = list(memories)
    for number, (part, label) in enumerate(MEMORY_PARTS.items()):
        figure.add_trace(
            go.Bar(
                x=[getattr(memory, part) / 1e9 for memory in memories.values()],
                y=names,
                orientation="h",
                name=label,
                marker={"color": LINES[number]},
                hovertemplate=f"{label}: %{{x:.2f}} GB<extra></extra>",
                legend="legend",
            ),
            row=1,
            col=1,
        )
    shown = {part: label for part, label in TIME_PARTS.items() if getattr(time, part) > 0}
    for number, (part, label) in enumerate(shown.items()):
        figure.add_trace(
            go.Bar(
                x=[getattr(time, part)],
                y=["a step"],
                orientation="h",
                name=label,
                marker={"color": LINES[number]},
                hovertemplate=f"{label}: %{{x:.3g}} s<extra></extra>",
                legend="legend2",
            ),
            row=2,
            col=1,
        )
    most = max(memory.total for memory in memories.values())
    figure.add_vline(x=room / 1e9, line={"color": INK, "dash": "dash", "width": 1.5}, row=1, col=1)
    figure.update_xaxes(range=[0, 1.05 * max(most, room) / 1e9], gridcolor=GRID, row=1, col=1)
    figure.update_xaxes(range=[0, 1.05 * time.total], gridcolor=GRID, row=2, col=1)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_annotations(x=0, xanchor="left", font={"size": 13})
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "yanchor": "top", "traceorder": "normal"}
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": INK, "family": "system-ui, sans-serif", "size": 12},
        title={"text": title, "x": 0, "xref": "container", "pad": {"l": 14}, "font": {"size": 16}},
        legend=legend | {"y": 1 - (heights[0] + 28) / inside},
        legend2=legend | {"y": -28 / inside},
        margin={"l": 60, "r": 20, "t": TOP, "b": BOTTOM},
        barmode="stack",
        height=inside + TOP + BOTTOM,
        width=1000,
    )
    return figure


def save(figure: "go.Figure", stem: Path) -> list[Path]:
    """Write ``figure`` beside ``stem`` as PNG and SVG, and return where. Raises UserError as :mod:`moe.study.plots`."""
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    save_all(dict.fromkeys(paths, figure))
    return paths
