"""One HTML file of a run's routing that needs no network: pictures, plain words and a text viewer."""

import base64
import gzip
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from moe.errors import UserError
from moe.study.measurement import Array, Axis, Measurement
from moe.study.metrics.load import load
from moe.study.metrics.pairs import cross_layer_transitions
from moe.study.metrics.specialisation import typical_tokens
from moe.study.page.findings import findings
from moe.study.page.viewer import packed_tokens
from moe.study.plots import (
    DIVERGING,
    DIVERGING_DARK,
    EXPERTS,
    HALO,
    INK,
    LINES,
    colour_axis,
    draw,
    draw_bars_by_layer,
    flow,
    graph_objects,
    note_on,
    shading,
)
from moe.study.record import Record

if TYPE_CHECKING:
    import plotly.graph_objects as go

BRIGHTER = {LINES[0]: "#4aa3df", LINES[4]: "#c9ebff", LINES[-1]: "#b49ae0"}
"""of the colours of lines and bars those that are dim on a dark page, and what a brighter one comes too near to"""
MOST_CELLS = 30_000
"""of the heat maps of one figure; of more layers, some are drawn, evenly spread"""
TYPICAL_TOKENS = 8
MINIMUM_COUNT = 30
"""occurrences from which a token can be typical of an expert, where the record is long enough"""
FACTS_AS_FIGURES = ("loss", "bits per byte")
"""facts that are shown large"""


def write_page(
    path: Path | str,
    *,
    final: Record,
    over_training: Sequence[Record] = (),
    measurements: Mapping[str, Measurement] | None = None,
    delta_loss: Measurement | None = None,
    loss_by_k: Measurement | None = None,
    facts: Mapping[str, str | int | float] | None = None,
) -> Path:
    """Write the page of one run to ``path`` and return it; missing parts are said to be missing.

    ``measurements`` holds metrics of ``final`` by the names of their functions, and ``saturation`` of
    ``over_training``, records of the same tokens at increasing steps. ``facts`` are shown on top in their order: run,
    configuration, loss (nats), bits per byte or any others; the loss is that of ``final`` if it is not among them.
    Raises UserError where plotly is missing.
    """
    graph_objects()
    parts = measurements or {}
    page = _Page()
    flows = [cross_layer_transitions(final, one.block, other.block) for one, other in pairwise(final.layers)]
    sentences = findings(final, parts, flows, delta_loss, loss_by_k)
    sections = [
        _summary(final, facts or {}, sentences),
        page.section("load", "Load per layer over training", _load(page, final, over_training)),
        page.section("saturation", "Saturation over training", _one(page, parts.get("saturation"), "saturation")),
        page.section("domains", "Domains and experts", _domains(page, parts)),
        page.section(
            "co-activation", "Experts that work together", _one(page, parts.get("co_activation"), "co_activation")
        ),
        page.section("paths", "Paths through the layers", _paths(page, parts, flows, final)),
        page.section("knockout", "Which expert matters for what", _interventions(page, final, delta_loss, loss_by_k)),
        page.section("tokens", "Typical tokens of each expert", _typical(final)),
        page.section("text", "Text, coloured by expert", _viewer(final)),
    ]
    room = files("moe.study.page")
    data = {
        "figures": page.figures,
        "loads": page.loads,
        "tokens": packed_tokens(final),
        "experts": EXPERTS,
        "ink": INK,
        "halo": HALO,
        "diverging": [list(DIVERGING), list(DIVERGING_DARK)],
        "brighter": BRIGHTER,
    }
    run = str((facts or {}).get("run", final.source or "a run"))
    text = Template((room / "template.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"Routing study of {run}"),
        style=(room / "page.css").read_text(encoding="utf-8"),
        script=(room / "page.js").read_text(encoding="utf-8"),
        contents="".join(f'<a href="#{name}">{html.escape(title)}</a>' for name, title in page.contents),
        sections="\n".join(sections),
        data=_json_in_html(data),
        plotly=_packed_plotly(),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _json_in_html(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, default=list).replace("<", "\\u003c")


def _packed_plotly() -> str:
    """plotly.js, gzipped and in base64: 2 MB in place of 4.8, and the browser unpacks it in no time."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode("utf-8"), 9, mtime=0)).decode("ascii")


# --------------------------------------------------------------------------------------------------------- measurements


def load_over(records: Sequence[Record]) -> Measurement:
    """The load of records of the same layers, [step, layer, expert]."""
    loads = [load(record) for record in records]
    steps = tuple("end" if record.step is None else str(record.step) for record in records)
    return replace(
        loads[-1],
        values=np.stack([measured.values for measured in loads]),
        axes=(Axis("step", steps), *loads[-1].axes),
        chance=None if loads[-1].chance is None else loads[-1].chance[None],
    )


def _part(measurement: Measurement, axis: str, indices: Sequence[int]) -> Measurement:
    """Some labels of one axis; references keep the shape that broadcasts."""
    place = [found.name for found in measurement.axes].index(axis)

    def cut(part: Array | None) -> Array | None:
        return None if part is None else np.take(np.broadcast_to(part, measurement.values.shape), indices, axis=place)

    chosen = Axis(axis, tuple(measurement.axes[place].labels[index] for index in indices))
    return replace(
        measurement,
        values=np.take(measurement.values, indices, axis=place),
        axes=(*measurement.axes[:place], chosen, *measurement.axes[place + 1 :]),
        chance=cut(measurement.chance),
        null=cut(measurement.null),
        null_std=cut(measurement.null_std),
    )


def _without(measurement: Measurement, axis: str) -> Measurement:
    """The same without an axis that has one label."""
    place = [found.name for found in measurement.axes].index(axis)

    def squeezed(part: Array | None) -> Array | None:
        return None if part is None else np.broadcast_to(part, measurement.values.shape).squeeze(place)

    return replace(
        measurement,
        values=measurement.values.squeeze(place),
        axes=(*measurement.axes[:place], *measurement.axes[place + 1 :]),
        chance=squeezed(measurement.chance),
        null=squeezed(measurement.null),
        null_std=squeezed(measurement.null_std),
    )


# --------------------------------------------------------------------------------------------------------------- pieces


@dataclass
class _Page:
    """What the sections put into the page besides their HTML."""

    figures: dict[str, Any] = field(default_factory=dict)
    loads: dict[str, Any] | None = None
    contents: list[tuple[str, str]] = field(default_factory=lambda: [("summary", "Summary")])

    def section(self, name: str, title: str, body: str) -> str:
        self.contents.append((name, title))
        return f'<section id="{name}"><h2>{html.escape(title)}</h2>\n{body}\n</section>'

    def picture(self, name: str, figure: "go.Figure") -> str:
        if figure.data[0].type != "sankey":
            has_legend = any(trace.showlegend for trace in figure.data)
            figure.update_layout(margin_t=70 if has_legend else 36)
        self.figures[name] = json.loads(figure.to_json())
        height = int(figure.layout.height or 400)
        return f'<div class="figure" data-figure="{name}" style="height:{height}px"></div>'

    def drawn(self, name: str, measurement: Measurement, title: bool = True) -> str:
        heading = f"<h3>{html.escape(measurement.title)}</h3>" if title else ""
        reading = _reading(measurement)
        if not measurement.values.size or not np.isfinite(measurement.values).any():
            return heading + missing("nothing could be measured", measurement.title)
        shown, note = _drawable(measurement)
        try:
            return heading + reading + note + self.picture(name, draw(shown))
        except UserError as error:
            return heading + missing(str(error), measurement.title)

    def chosen_by_layer(self, name: str, measurement: Measurement) -> str:
        """One picture for each layer, with a box that chooses, all on the same colours."""
        layers = next(axis for axis in measurement.axes if axis.name == "layer").labels
        colours = colour_axis(measurement)
        options = []
        for index, label in enumerate(layers):
            figure = draw(_without(_part(measurement, "layer", [index]), "layer"), shading(measurement))
            if figure.layout.coloraxis.cmax is not None:
                figure.update_layout(coloraxis=colours)
            picture = self.picture(f"{name}/{index}", figure)
            options.append(f'<option value="{name}/{index}">layer {html.escape(label)}</option>')
        first = picture.replace(f"{name}/{len(layers) - 1}", f"{name}/0")
        return (
            f"<h3>{html.escape(measurement.title)}</h3>"
            f"{_reading(measurement)}"
            f'<p class="controls"><label>Layer <select data-chooses="{name}">{"".join(options)}</select></label></p>'
            + first.replace("<div ", f'<div data-chosen="{name}" ', 1)
        )


def _reading(measurement: Measurement) -> str:
    sentences = f"{measurement.reading} {note_on(measurement)}".strip()
    return f'<p class="reading">{html.escape(sentences)}</p>'


def missing(reason: str, what: str) -> str:
    """The line in place of a picture."""
    return f'<p class="missing">{html.escape(what)}: {html.escape(reason)}.</p>'


def _drawable(measurement: Measurement) -> tuple[Measurement, str]:
    """Fewer layers where all would make a heavy figure, and a line that says which."""
    names = [axis.name for axis in measurement.axes]
    if len(names) < 3 or "layer" not in names or measurement.values.size <= MOST_CELLS:
        return measurement, ""
    labels = measurement.axes[names.index("layer")].labels
    fitting = max(1, MOST_CELLS * len(labels) // measurement.values.size)
    indices = sorted({round(index) for index in np.linspace(0, len(labels) - 1, fitting)})
    shown = ", ".join(labels[index] for index in indices)
    return _part(measurement, "layer", indices), f'<p class="note">Shown: layers {shown} of {len(labels)}.</p>'


def _one(page: _Page, measurement: Measurement | None, name: str) -> str:
    if measurement is None:
        needs = "it needs records of several steps" if name == "saturation" else "it was not measured"
        return missing(needs, name.replace("_", " ").capitalize())
    return page.drawn(name, measurement)


# ------------------------------------------------------------------------------------------------------------- sections


def _summary(final: Record, facts: Mapping[str, str | int | float], sentences: Sequence[str]) -> str:
    shown = dict(facts)
    if "loss" not in shown and final.n_tokens and math.isfinite(float(final.loss.mean())):
        shown["loss"] = float(final.loss.mean(dtype=np.float64))
    figures = "".join(
        f'<div class="tile"><b>{_spelled(shown.pop(name))}</b><span>{html.escape(name)}</span></div>'
        for name in FACTS_AS_FIGURES
        if name in shown
    )
    counts: list[tuple[str, int]] = [
        ("tokens", final.n_tokens),
        ("layers", len(final.layers)),
        ("domains", len(final.domains)),
    ]
    figures += "".join(
        f'<div class="tile"><b>{number:,}</b><span>{name}</span></div>' for name, number in counts if name not in shown
    )
    run = shown.pop("run", final.source or "a run")
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{_spelled(value)}</dd>" for name, value in shown.items() if value != ""
    )
    found = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    step = "" if final.step is None else f" at step {final.step:,}"
    return (
        f'<section id="summary"><h1>Where tokens go in {html.escape(str(run))}{step}</h1>'
        f'<div class="tiles">{figures}</div><dl class="facts">{rows}</dl>'
        f"<h2>Findings</h2>"
        f'<p class="reading">Computed from the measurements below, each with what would be without any effect: chance '
        f'is worked out, and null is what shuffled data gave; "no more than chance" means that it was not above that.'
        f'</p><ul class="findings">{found}</ul></section>'
    )


def _spelled(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else html.escape(value)


def _load(page: _Page, final: Record, over_training: Sequence[Record]) -> str:
    if not final.layers:
        return missing("the record has no mixture layer", "Load")
    same = [
        record
        for record in over_training
        if [(layer.block, layer.n_experts) for layer in record.layers]
        == [(layer.block, layer.n_experts) for layer in final.layers]
    ]
    records = same or [final]
    measurement = load_over(records)
    if not np.isfinite(measurement.values).any():
        return missing("the record has no routed tokens", "Load")
    figure = draw_bars_by_layer(load(records[-1]))
    top = float(np.nanmax(measurement.values))
    figure.update_yaxes(range=[0, 1.05 * top])
    picture = page.picture("load", figure)
    steps = measurement.axes[0].labels
    page.loads = {"steps": steps, "values": np.round(np.nan_to_num(measurement.values), 5).tolist()}
    slider = (
        f'<p class="controls"><label>Step <input type="range" id="step" min="0" max="{len(steps) - 1}" '
        f'value="{len(steps) - 1}"></label> <output id="step-shown" for="step">{html.escape(steps[-1])}</output></p>'
        if len(steps) > 1
        else missing("only one step is recorded, so there is no slider", "Load over training")
    )
    # The last bars are not those of the findings, and whoever compares them should know why.
    note = (
        f'<p class="note">These are the {records[-1].n_tokens:,} held-out tokens that are recorded during training, as '
        f"many of each domain; all else on this page but saturation is of {final.n_tokens:,} tokens, whose domains can "
        "have other shares, and so can their experts.</p>"
        if same and records[-1].n_tokens != final.n_tokens
        else ""
    )
    return f'<p class="reading">{html.escape(measurement.reading)}</p>{note}{slider}{picture}'


def _domains(page: _Page, parts: Mapping[str, Measurement]) -> str:
    return _one(page, parts.get("domain_specialisation"), "domain_specialisation") + _one(
        page, parts.get("domain_information"), "domain_information"
    )


def _paths(page: _Page, parts: Mapping[str, Measurement], flows: Sequence[Measurement], final: Record) -> str:
    if flows:
        drawn = (
            "<h3>Flows between neighbouring layers</h3>"
            '<p class="reading">A band is the share of tokens whose first choices are these two experts; grey is what '
            "layers that know nothing of each other would give, orange is more than that chance, blue is less, and "
            "only the largest flows are drawn.</p>" + page.picture("flow", flow(flows, final.blocks))
        )
    else:
        drawn = missing("there is only one mixture layer", "Flows between layers")
    return drawn + _one(page, parts.get("expert_paths"), "expert_paths")


def _interventions(page: _Page, final: Record, delta_loss: Measurement | None, loss_by_k: Measurement | None) -> str:
    if delta_loss is None:
        knocked = missing("no expert was knocked out", "Loss without an expert")
    elif not np.isfinite(delta_loss.values).any():
        knocked = missing("nothing could be measured", delta_loss.title)
    elif "layer" in [axis.name for axis in delta_loss.axes]:
        knocked = page.chosen_by_layer("delta_loss", delta_loss)
    else:
        knocked = page.drawn("delta_loss", delta_loss)
    if loss_by_k is None:
        return knocked + missing("k was not changed", "Loss by k")
    by_k = page.drawn("loss_by_k", loss_by_k)
    trained = {layer.top_k for layer in final.layers}
    # Where the number varies from token to token, the places of a record are the most, and no k of the model.
    fixed = all(bool(layer.assigned.all()) for layer in final.layers)
    if fixed and len(trained) == 1 and "loss_by_k" in page.figures:
        layout = page.figures["loss_by_k"]["layout"]
        k = trained.pop()
        line = {"type": "line", "x0": k, "x1": k, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": INK, "width": 1}}
        label = {"x": k, "y": 1, "yref": "paper", "yanchor": "top", "xanchor": "left", "showarrow": False}
        layout["shapes"] = [line]
        layout["annotations"] = [{**label, "text": "recorded k"}]
    return knocked + by_k


def _typical(final: Record) -> str:
    tables = []
    options = []
    minimum = max(2, min(MINIMUM_COUNT, final.n_tokens // 200))
    for index, layer in enumerate(final.layers):
        rows = []
        counts = np.bincount(layer.selected[layer.assigned], minlength=layer.n_experts)
        found = typical_tokens(final, layer.block, top=TYPICAL_TOKENS, minimum_count=minimum)
        for expert, tokens in enumerate(found):
            cells = " ".join(
                f'<span class="typical" title="{token.count:,} times">{_visible(token.text)}'
                f"<small>{100 * token.share:.0f} %</small></span>"
                for token in tokens
            )
            share = counts[expert] / max(final.n_tokens, 1)
            rows.append(
                f'<tr><th scope="row"><i class="chip" data-expert="{expert}"></i>{expert}</th>'
                f"<td>{100 * share:.1f} %</td><td>{cells or 'none'}</td></tr>"
            )
        hidden = "" if index == 0 else " hidden"
        tables.append(
            f'<table class="typicals" data-table="typical" data-index="{index}"{hidden}><thead><tr><th>expert</th>'
            f"<th>share of all tokens</th><th>typical tokens</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )
        options.append(f'<option value="{index}">layer {layer.block}</option>')
    if not tables:
        return missing("the record has no mixture layer", "Typical tokens")
    return (
        '<p class="reading">The tokens of which the largest share goes to an expert, with that share; the share of all '
        f"tokens that it gets is what chance would give.{_all_places(final)} Tokens that occur at least {minimum} "
        "times.</p>"
        f'<p class="controls"><label>Layer <select data-shows="typical">{"".join(options)}</select></label></p>'
        + "".join(tables)
    )


def _all_places(final: Record) -> str:
    """Why one token can be typical of two experts, where it can."""
    most = max(layer.top_k for layer in final.layers)
    return f" A token has up to {most} experts, and counts for each of them." if most > 1 else ""


def _visible(text: str) -> str:
    shown = text.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    return f"<code>{html.escape(shown)}</code>"


def _viewer(final: Record) -> str:
    if not final.layers or not final.n_tokens:
        return missing("the record has no routed tokens", "Text viewer")
    domains = "".join(
        f'<option value="{index}">{html.escape(name)}</option>' for index, name in enumerate(final.domains)
    )
    layers = "".join(
        f'<option value="{index}">layer {layer.block}</option>' for index, layer in enumerate(final.layers)
    )
    ranks = "".join(
        f'<option value="{rank}">choice {rank + 1}</option>'
        for rank in range(max(layer.top_k for layer in final.layers))
    )
    note = (
        " Colours repeat after 16 experts; lines below the text tell apart those of one colour."
        if any(layer.n_experts > len(EXPERTS) for layer in final.layers)
        else ""
    )
    return (
        '<p class="reading">Each token has the colour of its expert in the chosen layer; routing that knows nothing '
        "would be confetti, in which neighbours share an expert as often as the load makes them. Point at a token for "
        "its weight and loss (the loss is that of the token after it), click it, or move with the arrow keys and press "
        f"Enter, for all layers.{note}</p>"
        f'<p class="controls"><label>Domain <select id="viewer-domain">{domains}</select></label>'
        f'<label>Layer <select id="viewer-layer">{layers}</select></label>'
        f'<label>Choice <select id="viewer-rank">{ranks}</select></label>'
        '<label><input type="checkbox" id="viewer-numbers"> expert numbers</label></p>'
        '<div id="legend" role="group" aria-label="experts"></div>'
        '<div class="viewer"><div id="text-pane" role="listbox" aria-label="tokens"></div>'
        '<aside id="detail" aria-live="polite"><p>Click a token.</p></aside></div><div id="tip" role="tooltip" hidden>'
        "</div>"
    )
