"""The picture of an evaluation on held-out text: bars with intervals for each domain, and three curves."""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe.evaluation.intervals import Estimate
from moe.evaluation.metrics import Summary
from moe.evaluation.table import filled
from moe.study.plots import GRID, INK, LINES, SUBTITLE_COLUMNS, graph_objects

if TYPE_CHECKING:
    import plotly.graph_objects as go

OURS, CHANCE = LINES[0], LINES[1]
WIDTH, BAR, CURVES = 1000, 22, 260
GAP, TOP, BOTTOM = 75, 120, 50
"""pixels: the width of a picture; the heights of a row of bars, of curves, between panels, above and below all"""


def held_out_picture(title: str, subtitle: str, domains: Sequence[Summary], pooled: Summary) -> "go.Figure":
    """Bits per byte, top-1 accuracy and calibration error of each domain; reliability; loss by context, by frequency.

    Whiskers are 95 % intervals over documents, lines across bars what chance gives. Raises UserError where plotly is
    missing.
    """
    go = graph_objects()
    from plotly.subplots import make_subplots

    everything = [*domains, pooled] if len(domains) > 1 else [pooled]
    bars = BAR * len(everything) + 20
    figure = make_subplots(
        rows=3,
        cols=3,
        specs=[[{}, {}, {}], [{"colspan": 2}, None, {}], [{"colspan": 3}, None, None]],
        subplot_titles=[
            "bits per byte",
            "top-1 accuracy",
            "calibration error",
            "loss by tokens of context",
            "is it right as often as it thinks?",
            "loss by how often the token is in the training text",
        ],
        row_heights=[bars, CURVES, CURVES],
        vertical_spacing=GAP / (bars + 2 * CURVES + 2 * GAP),
        horizontal_spacing=0.07,
    )
    names = [summary.name for summary in reversed(everything)]
    panels: list[tuple[list[Estimate], list[float]]] = [
        ([s.bits_per_byte for s in everything], [s.unigram_bits_per_byte for s in everything]),
        ([s.accuracy for s in everything], [s.unigram_accuracy for s in everything]),
        ([s.calibration_error for s in everything], [s.calibrated for s in everything]),
    ]
    for column, (estimates, chances) in enumerate(panels, start=1):
        _bars(figure, names, estimates[::-1], chances[::-1], column)
    figure.update_yaxes(categoryorder="array", categoryarray=names, automargin=True, row=1)
    figure.update_yaxes(showticklabels=False, col=2, row=1)
    figure.update_yaxes(showticklabels=False, col=3, row=1)

    by_context = filled(pooled.by_context)
    figure.add_trace(
        go.Scatter(
            x=[bin.low for bin in by_context],
            y=[bin.cross_entropy.value for bin in by_context],
            error_y=_whiskers([bin.cross_entropy for bin in by_context]),
            customdata=[bin.label for bin in by_context],
            hovertemplate="%{customdata} tokens of context: %{y:.3f} nats<extra></extra>",
            **_line("all text", OURS),
        ),
        row=2,
        col=1,
    )
    ticks = [bin.low for bin in by_context]
    figure.update_xaxes(
        type="log", tickvals=ticks, ticktext=[bin.label for bin in by_context], title_text="", row=2, col=1
    )
    figure.update_yaxes(title_text="nats per token", gridcolor=GRID, row=2, col=1)

    by_frequency = filled(pooled.by_frequency)
    labels = [bin.label for bin in by_frequency]
    figure.add_trace(
        go.Scatter(
            x=labels,
            y=[bin.cross_entropy.value for bin in by_frequency],
            error_y=_whiskers([bin.cross_entropy for bin in by_frequency]),
            customdata=[bin.tokens for bin in by_frequency],
            hovertemplate="%{x}: %{y:.3f} nats, %{customdata:,} tokens<extra></extra>",
            **_line("all text", OURS),
        ),
        row=3,
        col=1,
    )
    figure.add_trace(
        go.Scatter(x=labels, y=[bin.unigram for bin in by_frequency], **_line("chance", CHANCE, dash="dash")),
        row=3,
        col=1,
    )
    figure.update_xaxes(title_text="occurrences in a million training tokens", row=3, col=1)
    figure.update_yaxes(title_text="nats per token", gridcolor=GRID, rangemode="tozero", row=3, col=1)

    reliable = [bin for bin in pooled.reliability if bin.tokens]
    figure.add_trace(
        go.Scatter(x=[0, 1], y=[0, 1], hoverinfo="skip", **_line("calibrated", INK, dash="dot", mode="lines")),
        row=2,
        col=3,
    )
    figure.add_trace(
        go.Scatter(
            x=[bin.confidence for bin in reliable],
            y=[bin.accuracy.value for bin in reliable],
            error_y=_whiskers([bin.accuracy for bin in reliable]),
            customdata=[bin.tokens for bin in reliable],
            hovertemplate="sure to %{x:.2f}, right in %{y:.2f} of %{customdata:,} tokens<extra></extra>",
            **_line("all text", OURS),
        ),
        row=2,
        col=3,
    )
    figure.update_xaxes(title_text="probability of its favourite", range=[0, 1], gridcolor=GRID, row=2, col=3)
    figure.update_yaxes(title_text="share that was right", range=[0, 1], gridcolor=GRID, row=2, col=3)
    figure.update_annotations(font_size=13)
    figure.update_xaxes(title_standoff=4)
    figure.update_layout(**layout(title, subtitle, bars + 2 * CURVES + 2 * GAP + TOP + BOTTOM))
    return figure


def _bars(figure: "go.Figure", names: list[str], estimates: list[Estimate], chances: list[float], column: int) -> None:
    """A panel of horizontal bars with whiskers, and a mark across each where chance is."""
    go = graph_objects()
    figure.add_trace(
        go.Bar(
            x=[estimate.value for estimate in estimates],
            y=names,
            orientation="h",
            marker_color=OURS,
            width=0.7,
            showlegend=False,
            error_x=_whiskers(estimates),
            hovertext=[str(estimate) for estimate in estimates],
            hovertemplate="%{y}: %{hovertext}<extra></extra>",
        ),
        row=1,
        col=column,
    )
    figure.add_trace(
        go.Scatter(
            x=chances,
            y=names,
            mode="markers",
            marker={"symbol": "line-ns", "size": 15, "line": {"width": 3, "color": CHANCE}},
            name="chance",
            showlegend=False,
            hovertemplate="%{y}, chance: %{x:.3f}<extra></extra>",
        ),
        row=1,
        col=column,
    )
    reach = [estimate.value + (0 if math.isnan(estimate.half_width) else estimate.half_width) for estimate in estimates]
    # A wide interval of one domain should not make the bars of the others short.
    longest = max([*(estimate.value for estimate in estimates), *chances])
    figure.update_xaxes(range=[0, 1.08 * min(max([*reach, longest]), 1.5 * longest)], gridcolor=GRID, row=1, col=column)


def _whiskers(estimates: Sequence[Estimate]) -> dict[str, Any]:
    return {
        "type": "data",
        "array": [0 if math.isnan(estimate.half_width) else estimate.half_width for estimate in estimates],
        "color": INK,
        "thickness": 1.2,
        "width": 3,
    }


def _line(name: str, colour: str, dash: str = "solid", mode: str = "lines+markers") -> dict[str, Any]:
    return {
        "name": name,
        "mode": mode,
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"size": 6},
        "showlegend": False,
    }


def layout(title: str, subtitle: str, height: int) -> dict[str, Any]:
    """What the pictures of an evaluation share: a title, a line or two below it, and grey ink."""
    return {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK, "family": "system-ui, sans-serif", "size": 12},
        "title": {
            "text": title,
            "subtitle": {"text": "<br>".join(textwrap.wrap(subtitle, SUBTITLE_COLUMNS)), "font": {"size": 12}},
            "x": 0,
            "xref": "container",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 14, "t": 20},
            "font": {"size": 16},
        },
        "margin": {"l": 70, "r": 24, "t": TOP, "b": BOTTOM},
        "width": WIDTH,
        "height": height,
        "barmode": "overlay",
        "hoverlabel": {"align": "left"},
    }
