"""Pictures of measurements: the axes decide what is drawn, and what chance would give is always drawn beside it.

Heat maps are coloured by how many times chance a cell is, neutral where it is just chance, on a scale from blue to
orange that colour-blind people can read. Lines and bars have a dashed line for chance and a dotted one for the null.
Ink is a grey that reads on white and on black, and backgrounds are transparent; :func:`save` puts pictures for papers
on white. plotly comes with the extra ``study`` and is imported when something is drawn.
"""

import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe.errors import UserError
from moe.study.measurement import Array, Axis, Measurement

if TYPE_CHECKING:
    import plotly.graph_objects as go

ORDERED_AXES = ("step", "position", "k")
"""axes along which a line is drawn"""
EXPERT_AXES = ("expert", "from", "to", "other")
"""axes of experts: with one of them two axes make a heat map, without one they make bars"""

DIVERGING = ((0.0, "#0b4f9e"), (0.25, "#7fb0de"), (0.5, "#f1f1f1"), (0.75, "#f0a860"), (1.0, "#a84300"))
DIVERGING_DARK = ((0.0, "#7cc0ff"), (0.25, "#2c6aa8"), (0.5, "#2b2e34"), (0.75, "#b0611a"), (1.0, "#ffb266"))
"""the same around a dark neutral colour, for a dark page"""
SEQUENTIAL = "Cividis"

INK = "#767676"
"""contrast 4.5 with white and 4.6 with black"""
HALO = "rgba(255,255,255,0.8)"
"""below ink that crosses bars"""
GRID = "rgba(128,128,128,0.25)"
LINES = ("#0072b2", "#e08e0b", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c6bb1")
"""after Okabe and Ito's palette for all kinds of sight (jfly.uni-koeln.de/color), less black and yellow, of which one
vanishes on black and one on white"""
DASHES = ("solid", "dash", "dot", "dashdot")
EXPERTS = (
    *("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6"),
    *("#bfef45", "#fabed4", "#469990", "#dcbeff", "#9a6324", "#800000", "#aaffc3", "#a9a9a9"),
)
"""16 colours that are told apart most easily (Trubetskoy, sashamaps.net/docs/resources/20-colors)"""

PANEL_COLUMNS = 2
LONG_LABEL = 12
"""characters from which a bar's label stands to its left, not below it"""
SUBTITLE_COLUMNS = 105
FLOW_HEIGHT, FLOW_GAP = 480, 6
"""pixels"""
VANISHING = 1e-9
"""what is smaller is drawn as nothing"""
WITHIN = 2
LARGEST_RATIO = 4
"""log2 of the ratio to chance at which the colours of a heat map end: 16 times"""
FORMATS = (".png", ".svg", ".pdf", ".html")


def plot(measurement: Measurement) -> "go.Figure":
    """A plotly figure of ``measurement``, its reading sentence as subtitle.

    What is drawn is :func:`draw`'s. Raises UserError for more than three axes, and where plotly is missing.
    """
    figure = draw(measurement)
    _write_title(figure, measurement.title, f"{measurement.reading} {note_on(measurement)}".strip())
    return figure


def note_on(measurement: Measurement) -> str:
    """What has to be said of its picture besides how to read the measurement; empty if nothing."""
    shown = [axis.name for axis in measurement.axes if axis.name != "layer" or len(measurement.axes) < 3]
    is_map = len(shown) == 2 and not set(shown) & set(ORDERED_AXES) and bool(set(shown) & set(EXPERT_AXES))
    if not is_map or measurement.null_std is None:
        return ""
    return f"A dot marks a cell within {WITHIN} standard deviations of what shuffled data or no effect would give."


def draw(measurement: Measurement, shade: "Shading | None" = None) -> "go.Figure":
    """:func:`plot` without title and subtitle, for a page that has its own.

    A line over steps, positions or k; a heat map where two axes are left and one is of experts; else bars. A third axis
    makes a panel for each of its labels: that of the layers, or the first. ``shade`` is how to colour a heat map that
    is a part of something larger.
    """
    graph_objects()
    panels = _panels(measurement)
    first = panels[0]
    if any(axis.name in ORDERED_AXES for axis in first.axes):
        figure = _figure_of(panels, _draw_lines, height=330)
    elif len(first.axes) == 2 and any(axis.name in EXPERT_AXES for axis in first.axes):
        rows, columns = _matrix(first).values.shape
        paint = partial(_draw_heat_map, shade=shade or shading(measurement))
        figure = _figure_of(panels, paint, height=max(150, min(18 * rows, 340)) + 90, columns=columns)
        figure.update_layout(coloraxis=colour_axis(measurement))
    else:
        lies = _has_long_labels(first)
        figure = _figure_of(panels, _draw_bars, height=90 + 22 * first.values.shape[0] if lies else 330)
    return figure


def draw_bars_by_layer(measurement: Measurement) -> "go.Figure":
    """Bars in place of a heat map for [layer, expert]: a panel for each layer, each with its chance line."""
    graph_objects()
    layers, experts = measurement.axes
    whole = _panels(measurement)[0]
    panels = [
        Panel(
            f"{layers.name} {label}",
            (experts,),
            whole.values[index],
            None if whole.chance is None else whole.chance[index],
            None if whole.null is None else whole.null[index],
            None if whole.null_std is None else whole.null_std[index],
            measurement.unit,
        )
        for index, label in enumerate(layers.labels)
    ]
    return _figure_of(panels, _draw_bars, height=200)


def flow(transitions: Sequence[Measurement], layers: Sequence[str], top: int = 20) -> "go.Figure":
    """A Sankey diagram of the ``top`` largest flows between each two neighbours of ``layers``.

    Each measurement is of one pair of layers, [from, to], shares of all tokens with their chance; link colours say how
    many times chance a flow is. Raises UserError where plotly is missing.
    """
    go = graph_objects()
    n_layers = len(layers)
    labels: list[str] = []
    place: dict[tuple[int, int], int] = {}
    links: list[tuple[int, int, float, float]] = []
    for step, pair in enumerate(transitions):
        chance = np.broadcast_to(pair.chance if pair.chance is not None else np.nan, pair.values.shape)
        order = np.argsort(np.nan_to_num(pair.values, nan=-1.0), axis=None)[::-1][:top]
        for start, end in zip(*np.unravel_index(order, pair.values.shape), strict=True):
            share = float(pair.values[start, end])
            if not share > 0:
                continue
            ends = []
            for layer, expert, axis in ((step, start, pair.axes[0]), (step + 1, end, pair.axes[1])):
                if (layer, int(expert)) not in place:
                    place[layer, int(expert)] = len(labels)
                    labels.append(axis.labels[expert])
                ends.append(place[layer, int(expert)])
            links.append((ends[0], ends[1], share, float(chance[start, end])))
    ratios = [share / expected if expected > 0 else math.nan for _, _, share, expected in links]
    figure = go.Figure(
        go.Sankey(
            arrangement="snap",
            valueformat=".2%",
            node={
                "label": labels,
                "x": [min(0.999, max(0.001, layer / max(n_layers - 1, 1))) for layer, _ in place],
                "y": _heights(place, links),
                "color": [EXPERTS[expert % len(EXPERTS)] for _, expert in place],
                "pad": FLOW_GAP,
                "thickness": 14,
                "line": {"width": 0},
                "hovertemplate": "expert %{label}<br>%{value} of the tokens in these flows<extra></extra>",
            },
            link={
                "source": [start for start, _, _, _ in links],
                "target": [end for _, end, _, _ in links],
                "value": [round(share, 6) for _, _, share, _ in links],
                "color": [_link_colour(ratio) for ratio in ratios],
                "customdata": [
                    [_percent(expected), f"{ratio:.2f}"]
                    for (_, _, _, expected), ratio in zip(links, ratios, strict=True)
                ],
                "hovertemplate": "expert %{source.label} to expert %{target.label}: %{value} of the tokens<br>"
                "chance %{customdata[0]}, %{customdata[1]} times chance<extra></extra>",
            },
        )
    )
    for layer, name in enumerate(layers):
        figure.add_annotation(
            x=layer / max(n_layers - 1, 1),
            y=1.02,
            yanchor="bottom",
            text=f"layer {name}",
            showarrow=False,
            xref="paper",
        )
    figure.update_layout(_base_layout(), height=FLOW_HEIGHT + 90, margin={"l": 20, "r": 20, "t": 70, "b": 20})
    return figure


def save(figure: "go.Figure", path: Path | str) -> None:
    """Write ``figure`` to a .png, .svg or .pdf file (ink on white) or a .html file that needs no network.

    Raises UserError for another suffix, and where what draws pictures (kaleido, Chrome) is missing.
    """
    save_all({Path(path): figure})


def save_all(figures: Mapping[Path, "go.Figure"]) -> None:
    """:func:`save` for several figures, for which the browser that draws them starts once."""
    for path in figures:
        if path.suffix not in FORMATS:
            raise UserError(f"{path}: a picture ends in one of {', '.join(FORMATS)}")
    pictures = {path: figure for path, figure in figures.items() if path.suffix != ".html"}
    for path, figure in figures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path not in pictures:
            figure.write_html(path, include_plotlyjs=True)
    if pictures:
        _draw_pictures(pictures)


def _draw_pictures(pictures: Mapping[Path, "go.Figure"]) -> None:
    graph_objects()
    import plotly.io

    papers = [_on_white(figure) for figure in pictures.values()]
    try:
        plotly.io.write_images(
            papers,
            [str(path) for path in pictures],
            scale=2,
            width=[paper.layout.width for paper in papers],
            height=[paper.layout.height for paper in papers],
        )
    except (ImportError, ValueError, RuntimeError) as error:
        raise _cannot_draw(str(error).strip().partition("\n")[0] or type(error).__name__) from error


def require_browser() -> None:
    """Raise UserError where what draws pictures (kaleido, Chrome) is missing, before work is done that ends in one."""
    try:
        import kaleido  # noqa: F401
        from choreographer.browsers.chromium import Chromium
    except ImportError as error:
        raise _cannot_draw(str(error)) from error
    path = Chromium.find_browser(skip_local=False)
    if path is None or shutil.which(path) is None:
        raise _cannot_draw("there is none" if path is None else f"{path} is no program")


def _cannot_draw(reason: str) -> UserError:
    return UserError(
        "pictures need kaleido (pip install 'moe-lab[study]') and Chrome or Chromium "
        f"(its path in BROWSER_PATH if it is not found): {reason}"
    )


def _on_white(figure: "go.Figure") -> "go.Figure":
    copy = graph_objects().Figure(figure)
    copy.update_layout(paper_bgcolor="#ffffff", plot_bgcolor="#ffffff", font_color="#222222")
    copy.update_layout(width=copy.layout.width or 1000)
    return copy


def graph_objects() -> Any:
    """The module ``plotly.graph_objects``; raises UserError where plotly is missing."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise UserError("pictures need plotly: pip install 'moe-lab[study]'") from error
    return go


# --------------------------------------------------------------------------------------------------------------- panels


@dataclass(frozen=True)
class Panel:
    """A part of a measurement with one or two axes, its references broadcast to its values."""

    title: str
    axes: tuple[Axis, ...]
    values: Array
    chance: Array | None
    null: Array | None
    null_std: Array | None
    unit: str


def _panels(measurement: Measurement) -> list[Panel]:
    """One for each label of the layer axis, or of the first, where there are three axes; else one of everything."""
    axes = measurement.axes or (Axis("", (measurement.name.replace("_", " "),)),)
    if len(axes) > 3:
        listed = ", ".join(axis.name for axis in axes)
        raise UserError(f"{measurement.name}: no picture of {len(axes)} axes ({listed}); take a part of it")
    shape = tuple(len(axis.labels) for axis in axes)
    parts = [
        None if part is None else np.broadcast_to(np.asarray(part, dtype=np.float64), shape)
        for part in (
            measurement.values.reshape(shape),
            measurement.chance,
            measurement.null,
            measurement.null_std,
        )
    ]
    if len(axes) < 3:
        values, chance, null, null_std = parts
        assert values is not None
        return [Panel("", axes, values, chance, null, null_std, measurement.unit)]
    names = [axis.name for axis in axes]
    # An axis along which a line is drawn cannot be the one that is cut.
    cut = names.index("layer") if "layer" in names else int(names[0] in ORDERED_AXES)
    rest = (*axes[:cut], *axes[cut + 1 :])
    panels = []
    for index, label in enumerate(axes[cut].labels):
        values, chance, null, null_std = (None if part is None else np.take(part, index, axis=cut) for part in parts)
        assert values is not None
        panels.append(Panel(f"{names[cut]} {label}", rest, values, chance, null, null_std, measurement.unit))
    return panels


def _figure_of(panels: Sequence[Panel], draw: Any, height: int, columns: int = 0) -> "go.Figure":
    from plotly.subplots import make_subplots

    per_row = 1 if len(panels) == 1 or columns > 40 else PANEL_COLUMNS
    n_rows = math.ceil(len(panels) / per_row)
    total = height * n_rows
    figure = make_subplots(
        rows=n_rows,
        cols=per_row,
        subplot_titles=[panel.title for panel in panels] if len(panels) > 1 else None,
        # Room for tick labels and titles, in shares of the whole.
        vertical_spacing=min(0.3, 75 / total) if n_rows > 1 else 0,
        horizontal_spacing=0.06 if per_row > 1 else 0,
    )
    figure.update_annotations(font_size=13)
    for index, panel in enumerate(panels):
        row, column = divmod(index, per_row)
        draw(figure, panel, row=row + 1, col=column + 1, first=index == 0)
        if index + per_row < len(panels):
            # All panels have the same axes: the lowest of a column names them.
            figure.update_xaxes(title_text="", row=row + 1, col=column + 1)
    figure.update_xaxes(title_standoff=4)
    figure.update_layout(_base_layout(), height=total + 40)
    return figure


def _base_layout() -> dict[str, Any]:
    return {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK, "family": "system-ui, sans-serif", "size": 12},
        "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.03, "x": 0},
        "hoverlabel": {"align": "left"},
        "bargap": 0.1,
    }


def _write_title(figure: "go.Figure", title: str, reading: str) -> None:
    lines = textwrap.wrap(reading, SUBTITLE_COLUMNS)
    has_legend = any(getattr(trace, "showlegend", False) for trace in figure.data)
    above = 60 + 16 * len(lines) + 30 * has_legend
    figure.update_layout(
        title={
            "text": title,
            "subtitle": {"text": "<br>".join(lines), "font": {"size": 12, "color": INK}},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 14, "l": 14},
        },
        margin_t=above,
        height=figure.layout.height + above,
    )


# ---------------------------------------------------------------------------------------------------------------- lines


def _draw_lines(figure: "go.Figure", panel: Panel, *, row: int, col: int, first: bool) -> None:
    go = graph_objects()
    over = next(index for index, axis in enumerate(panel.axes) if axis.name in ORDERED_AXES)
    x = _numbers(panel.axes[over].labels)
    others = panel.axes[1 - over] if len(panel.axes) == 2 else Axis("", ("",))

    def rows(part: Array) -> Array:
        return np.moveaxis(part, over, -1).reshape(len(others.labels), -1)

    for index, (label, values) in enumerate(zip(others.labels, rows(panel.values), strict=True)):
        name = f"{others.name} {label}".strip()
        figure.add_trace(
            go.Scatter(
                x=x,
                y=values,
                name=name,
                legendgroup=name,
                showlegend=first and bool(name),
                mode="lines+markers",
                marker={"size": 5},
                line={
                    "color": LINES[index % len(LINES)],
                    "dash": DASHES[index // len(LINES) % len(DASHES)],
                    "width": 2,
                },
                hovertemplate=f"{name} at %{{x}}: %{{y:{_format(panel.unit)}}}<extra></extra>",
            ),
            row=row,
            col=col,
        )
    for kind, part, dash in (("chance", panel.chance, "dash"), ("null", panel.null, "dot")):
        if part is None:
            continue
        curves = rows(part)
        same = bool(np.allclose(curves, curves[:1], equal_nan=True))
        if first:
            # Its own entry in the legend, since the curves may have the colours of what they are held against.
            figure.add_trace(
                go.Scatter(
                    x=[None], y=[None], name=kind, legendgroup=kind, mode="lines", line={"color": INK, "dash": dash}
                ),
                row=row,
                col=col,
            )
            figure.data[-1].showlegend = True
        for index, values in enumerate(curves[:1] if same else curves):
            name = kind if same else f"{kind} of {others.name} {others.labels[index]}"
            figure.add_trace(
                go.Scatter(
                    x=x,
                    y=values,
                    name=name,
                    legendgroup=kind,
                    showlegend=False,
                    mode="lines",
                    line={
                        "color": INK if same else LINES[index % len(LINES)],
                        "dash": dash,
                        "width": 2 if same else 1.5,
                    },
                    hovertemplate=f"{name} %{{y:{_format(panel.unit)}}}<extra></extra>",
                ),
                row=row,
                col=col,
            )
    figure.update_xaxes(title_text=panel.axes[over].name, row=row, col=col, gridcolor=GRID, zeroline=False)
    _dress_values(figure.update_yaxes, panel.unit, row, col)
    if panel.unit != "share":
        # Losses differ by little, and nothing says how far they are from zero.
        figure.update_yaxes(rangemode="normal", row=row, col=col)


def _numbers(labels: Sequence[str]) -> list[float] | list[str]:
    try:
        return [float(label) for label in labels]
    except ValueError:
        return list(labels)


# ----------------------------------------------------------------------------------------------------------------- bars


def _has_long_labels(panel: Panel) -> bool:
    return any(len(label) > LONG_LABEL for label in panel.axes[0].labels)


def _draw_bars(figure: "go.Figure", panel: Panel, *, row: int, col: int, first: bool) -> None:
    """A group of bars for each label of the first axis, a colour for each of the second."""
    go = graph_objects()
    groups = panel.axes[0]
    colours = panel.axes[1] if len(panel.axes) == 2 else Axis("", ("",))
    shape = (len(groups.labels), len(colours.labels))
    lies = _has_long_labels(panel)
    width = 0.8 / shape[1]
    centres = np.arange(shape[0])[:, None] + (np.arange(shape[1]) - (shape[1] - 1) / 2) * width
    values = panel.values.reshape(shape)
    number = _format(panel.unit)
    along, across = ("x", "y") if lies else ("y", "x")
    for index, label in enumerate(colours.labels):
        name = f"{colours.name} {label}".strip() if label.isdigit() else label
        figure.add_trace(
            go.Bar(
                **{across: centres[:, index], along: values[:, index]},
                orientation="h" if lies else "v",
                width=width * 0.9,
                name=name,
                legendgroup=name,
                showlegend=first and bool(name),
                marker={"color": LINES[index % len(LINES)], "line": {"width": 0}},
                customdata=[[group, name] for group in groups.labels],
                hovertemplate=f"{groups.name} %{{customdata[0]}} %{{customdata[1]}}: "
                f"%{{{along}:{number}}}<extra></extra>",
            ),
            row=row,
            col=col,
        )
    std = None if panel.null_std is None else panel.null_std.reshape(shape)
    for kind, part, dash in (("chance", panel.chance, "dash"), ("null", panel.null, "dot")):
        if part is None:
            continue
        levels = part.reshape(shape)
        spread = std if kind == "null" else None
        where, level, text = _segments(centres, levels, width, spread, kind, number, shape)
        line = {across: where, along: level, "mode": "lines", "name": kind, "legendgroup": kind}
        # A pale line below the dark one, since it crosses bars of any colour.
        halo = go.Scatter(**line, showlegend=False, hoverinfo="skip", line={"color": HALO, "width": 4})
        ink = go.Scatter(
            **line,
            showlegend=first,
            line={"color": INK, "dash": dash, "width": 2},
            text=text,
            hovertemplate="%{text}<extra></extra>",
        )
        figure.add_traces([halo, ink], rows=row, cols=col)
    place = figure.update_yaxes if lies else figure.update_xaxes
    place(
        title_text="" if lies else groups.name,
        tickmode="array",
        tickvals=list(range(shape[0])),
        ticktext=list(groups.labels),
        range=[shape[0] - 0.5, -0.5] if lies else [-0.5, shape[0] - 0.5],
        automargin=True,
        zeroline=False,
        showgrid=False,
        row=row,
        col=col,
    )
    _dress_values(figure.update_xaxes if lies else figure.update_yaxes, panel.unit, row, col)
    drawn = [part for part in (panel.values, panel.chance, panel.null) if part is not None]
    if all(not np.any(np.abs(part[np.isfinite(part)]) > VANISHING) for part in drawn):
        # Else the axis ends at the largest of them, and a chance of 1e-220 stands at the top of an empty picture.
        (figure.update_xaxes if lies else figure.update_yaxes)(range=[0, 1], row=row, col=col)


def _segments(
    centres: Array, levels: Array, width: float, spread: Array | None, kind: str, number: str, shape: tuple[int, int]
) -> tuple[list[float | None], list[float | None], list[str]]:
    """A short line over each bar, or one over all where they are level."""
    if np.allclose(levels, levels.flat[0], equal_nan=True) and spread is None:
        text = f"{kind} {_spelled(float(levels.flat[0]), number)}"
        return [-0.5, shape[0] - 0.5], [float(levels.flat[0])] * 2, [text] * 2
    where: list[float | None] = []
    level: list[float | None] = []
    texts: list[str] = []
    for index in np.ndindex(*shape):
        text = f"{kind} {_spelled(float(levels[index]), number)}"
        if spread is not None:
            text += f" ± {_spelled(float(spread[index]), number)}"
        where += [float(centres[index] - width / 2), float(centres[index] + width / 2), None]
        level += [float(levels[index]), float(levels[index]), None]
        texts += [text, text, ""]
    return where, level, texts


def _dress_values(update: Any, unit: str, row: int, col: int) -> None:
    update(
        title_text="" if unit == "share" else unit,
        tickformat="~%" if unit == "share" else "",
        rangemode="tozero",
        gridcolor=GRID,
        zerolinecolor=INK,
        row=row,
        col=col,
    )


def _format(unit: str) -> str:
    return ".3~p" if unit == "share" else ".4~g"


def _spelled(value: float, number: str) -> str:
    return _percent(value) if number.endswith("p") else f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


# ------------------------------------------------------------------------------------------------------------ heat maps


@dataclass(frozen=True)
class Shading:
    """What the colours of a heat map stand for."""

    kind: str
    """times: log2 of the ratio to the reference; apart: difference from zero; amount: the value"""
    reference: str
    """chance or null; empty where there is none"""
    limit: float
    """where the colours end, on both sides of the middle, or above zero"""


def shading(measurement: Measurement) -> Shading:
    """How to colour ``measurement``.

    Around chance where that is above zero; around the null where chance is zero or not known, but the estimate has a
    bias; around zero where values have both signs; else from zero up.
    """
    values = measurement.values[np.isfinite(measurement.values)]
    lowest, largest = (float(values.min()), float(np.abs(values).max())) if values.size else (0.0, 0.0)
    references = [part for part in (measurement.chance, measurement.null) if part is not None]
    if lowest < 0 or (references and not any(np.nanmax(part) > 0 for part in references)):
        return Shading("apart", "", largest or 1.0)
    for name, reference in (("chance", measurement.chance), ("null", measurement.null)):
        if reference is not None and np.nanmin(reference) >= 0 and np.nanmax(reference) > 0:
            ratios = _log_ratio(np.asarray(measurement.values, dtype=np.float64), reference)
            ratios = np.abs(ratios[np.isfinite(ratios)])
            # At least from half to twice, lest noise look like a finding.
            limit = min(max(math.ceil(float(ratios.max(initial=0.0))), 1), LARGEST_RATIO)
            return Shading("times", name, float(limit))
    return Shading("amount", "", largest or 1.0)


def _log_ratio(values: Array, reference: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = np.log2(values / reference)
    return ratio


def _matrix(panel: Panel) -> Panel:
    """The same with experts along the rows' length, which have most labels."""
    if panel.axes[1].name in EXPERT_AXES:
        return panel

    def turned(part: Array | None) -> Array | None:
        return None if part is None else part.T

    return Panel(
        panel.title,
        panel.axes[::-1],
        panel.values.T,
        turned(panel.chance),
        turned(panel.null),
        turned(panel.null_std),
        panel.unit,
    )


def _draw_heat_map(figure: "go.Figure", panel: Panel, *, row: int, col: int, first: bool, shade: Shading) -> None:
    go = graph_objects()
    panel = _matrix(panel)
    rows, columns = panel.axes
    chosen = {"chance": panel.chance, "null": panel.null, "": None}[shade.reference]
    number = _format(panel.unit)
    hover = f"{rows.name} %{{y}}, {columns.name} %{{x}}<br>"
    colour = panel.values
    if chosen is None:
        hover += f"%{{z:{number}}} {'' if panel.unit == 'share' else panel.unit}"
        parts = [] if panel.null_std is None else [panel.null_std]
        hover += "" if panel.null_std is None else f" ± %{{customdata[0]:{number}}}"
    else:
        # Nothing at all is at the cold end, not missing.
        colour = np.clip(_log_ratio(panel.values, chosen), -LARGEST_RATIO, LARGEST_RATIO)
        parts = [panel.values, chosen, panel.values / np.where(chosen > 0, chosen, np.nan)]
        hover += f"%{{customdata[0]:{number}}}, {shade.reference} %{{customdata[1]:{number}}}"
        hover += f"<br>%{{customdata[2]:.2f}} times {shade.reference}"
        if shade.reference == "chance" and panel.null is not None:
            hover += f", null %{{customdata[3]:{number}}}"
            parts.append(panel.null)
            if panel.null_std is not None:
                hover += f" ± %{{customdata[4]:{number}}}"
                parts.append(panel.null_std)
    data = np.stack(parts, axis=-1).astype(np.float32) if parts else None
    figure.add_trace(
        go.Heatmap(
            z=colour.astype(np.float32),
            x=list(columns.labels),
            y=list(rows.labels),
            customdata=data,
            coloraxis="coloraxis",
            text=_dots(panel),
            texttemplate="%{text}",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate=hover + "<extra></extra>",
        ),
        row=row,
        col=col,
    )
    every = max(1, len(columns.labels) // 16)
    figure.update_xaxes(
        title_text=_axis_title(columns.name),
        tickfont_size=11,
        type="category",
        tickmode="array",
        tickvals=list(columns.labels[::every]),
        tickangle=0,
        ticks="",
        showgrid=False,
        zeroline=False,
        row=row,
        col=col,
    )
    figure.update_yaxes(
        title_text=_axis_title(rows.name) if col == 1 and rows.name != "domain" else "",
        type="category",
        autorange="reversed",
        automargin=True,
        tickmode="array",
        tickvals=list(rows.labels[:: max(1, len(rows.labels) // 16)]),
        # The rows of all panels are the same.
        showticklabels=col == 1,
        ticks="",
        showgrid=False,
        zeroline=False,
        row=row,
        col=col,
    )


def _dots(panel: Panel) -> list[list[str]] | None:
    """A dot in every cell that is not sure to differ from its null."""
    if panel.null is None or panel.null_std is None:
        return None
    near = np.abs(panel.values - panel.null) <= WITHIN * panel.null_std
    return [["•" if cell else "" for cell in line] for line in near]


def _axis_title(name: str) -> str:
    return {"from": "from expert", "to": "to expert", "other": "other expert"}.get(name, name)


def colour_axis(measurement: Measurement) -> dict[str, Any]:
    """The colours of heat maps of ``measurement`` or of parts of it: the layout's coloraxis."""
    shade = shading(measurement)
    bar: dict[str, Any] = {
        "thickness": 12,
        "outlinewidth": 0,
        "title": {"text": measurement.unit, "side": "right"},
        "lenmode": "pixels",
        "len": 240,
        "y": 1,
        "yanchor": "top",
    }
    if shade.kind == "amount":
        if measurement.unit == "share":
            bar |= {"tickformat": "~%"}
        return {"colorscale": SEQUENTIAL, "cmin": 0.0, "cmax": shade.limit, "colorbar": bar}
    if shade.kind == "times":
        powers = range(-int(shade.limit), int(shade.limit) + 1)
        bar |= {
            "title": {"text": f"against {shade.reference}", "side": "right"},
            "tickvals": list(powers),
            "ticktext": [
                shade.reference if power == 0 else f"{2**power} times" if power > 0 else f"1/{2**-power}"
                for power in powers
            ],
        }
    colours = [list(stop) for stop in DIVERGING]
    return {"colorscale": colours, "cmin": -shade.limit, "cmax": shade.limit, "colorbar": bar}


# ---------------------------------------------------------------------------------------------------------------- flows


def _heights(place: Mapping[tuple[int, int], int], links: Sequence[tuple[int, int, float, float]]) -> list[float]:
    """Where the middle of each node stands in its column, from the top: experts in their order, evenly spaced."""
    through = np.zeros((len(place), 2))
    for start, end, share, _ in links:
        through[start, 1] += share
        through[end, 0] += share
    size = through.max(axis=1)
    columns = [
        [place[node] for node in sorted(place) if node[0] == layer] for layer in sorted({layer for layer, _ in place})
    ]
    # As the diagram does: the fullest column with its gaps fills the height, and all have its scale.
    scale = min(
        ((1 - (len(column) - 1) * FLOW_GAP / FLOW_HEIGHT) / size[column].sum() for column in columns), default=1.0
    )
    heights = [0.0] * len(place)
    for column in columns:
        tall = size[column] * scale
        gap = (1 - tall.sum()) / max(len(column) - 1, 1)
        tops = np.concatenate([[0.0], np.cumsum(tall + gap)[:-1]])
        for node, middle in zip(column, tops + tall / 2, strict=True):
            heights[node] = float(min(0.999, max(0.001, middle)))
    return heights


def _link_colour(ratio: float) -> str:
    """Grey at chance, towards orange above, towards blue below; half transparent, since flows cross."""
    if not math.isfinite(ratio):
        return "rgba(128,128,128,0.35)"
    share = max(-1.0, min(1.0, math.log2(ratio) / 3)) if ratio > 0 else -1.0
    grey, end = (150, 150, 150), (216, 106, 16) if share > 0 else (30, 110, 190)
    mixed = [round(low + abs(share) * (high - low)) for low, high in zip(grey, end, strict=True)]
    return f"rgba({mixed[0]},{mixed[1]},{mixed[2]},{0.35 + 0.35 * abs(share):.2f})"
