import json
import sys

import numpy as np
import pytest

from moe.errors import UserError
from moe.study import plots
from moe.study.measurement import Axis, Measurement
from moe.study.plots import (
    colour_axis,
    draw_bars_by_layer,
    flow,
    note_on,
    plot,
    require_browser,
    save,
    save_all,
    shading,
)

pytest.importorskip("plotly")


def axis(name, n):
    return Axis(name, tuple(str(number) for number in range(n)))


def measured(values, axes, chance=None, null=None, null_std=None, unit="share"):
    parts = [None if part is None else np.asarray(part, dtype=float) for part in (chance, null, null_std)]
    return Measurement("a_metric", "A metric", "How to read it.", np.asarray(values, dtype=float), axes, unit, *parts)


def of_type(figure, kind):
    return [trace for trace in figure.data if trace.type == kind]


def test_lines_over_steps_have_the_chance_line():
    figure = plot(measured([[0.2, 0.6], [0.3, 0.9]], (axis("layer", 2), Axis("step", ("10", "200"))), chance=0.125))
    curves = {trace.name: trace for trace in figure.data if trace.x[0] is not None}
    assert sorted(curves) == ["chance", "layer 0", "layer 1"]
    assert list(curves["layer 1"].x) == [10.0, 200.0]
    assert list(curves["layer 1"].y) == [0.3, 0.9]
    assert list(curves["chance"].y) == [0.125, 0.125]
    assert curves["chance"].line.dash == "dash"


def test_each_curve_has_its_chance_line_where_they_differ():
    chance = [[0.5, 0.5], [0.25, 0.25]]
    figure = plot(measured([[0.6, 0.6], [0.9, 0.9]], (axis("choice", 2), axis("step", 2)), chance=chance))
    levels = [trace.y[0] for trace in figure.data if trace.name.startswith("chance of")]
    assert levels == [0.5, 0.25]


def test_three_axes_make_a_panel_for_each_layer():
    values = np.arange(24).reshape(2, 3, 4) / 24
    figure = plot(measured(values, (axis("layer", 2), axis("domain", 3), axis("expert", 4)), chance=0.5))
    assert [trace.z.shape for trace in of_type(figure, "heatmap")] == [(3, 4), (3, 4)]
    assert [note.text for note in figure.layout.annotations] == ["layer 0", "layer 1"]


def test_the_neutral_colour_of_a_heat_map_is_chance():
    # Twice chance is one doubling up, half of it one down, chance itself 0: the middle of the colours.
    measurement = measured([[0.25, 0.125, 0.0625]], (axis("layer", 1), axis("expert", 3)), chance=0.125)
    (heat,) = of_type(plot(measurement), "heatmap")
    assert heat.z.tolist() == [[1.0, 0.0, -1.0]]
    colours = colour_axis(measurement)
    assert colours["cmin"] == -colours["cmax"]
    assert colours["colorscale"][2] == [0.5, plots.DIVERGING[2][1]]
    assert colours["colorbar"]["ticktext"][len(colours["colorbar"]["ticktext"]) // 2] == "chance"


def test_an_expert_that_gets_nothing_is_cold_and_one_that_does_not_exist_is_blank():
    measurement = measured([[0.0, 0.5, np.nan]], (axis("layer", 1), axis("expert", 3)), chance=0.5)
    (heat,) = of_type(plot(measurement), "heatmap")
    assert heat.z[0, 0] == -plots.LARGEST_RATIO
    assert np.isnan(heat.z[0, 2])


@pytest.mark.parametrize(
    ("values", "references", "kind", "reference"),
    [
        ([0.1, 0.2], {"chance": 0.125}, "times", "chance"),
        # Information: chance is 0, but the estimate is not.
        ([0.1, 0.2], {"chance": 0.0, "null": 0.05}, "times", "null"),
        # A change of the loss, where no effect is 0, even if all changes have one sign.
        ([0.1, 0.2], {"chance": 0.0, "null": 0.0}, "apart", ""),
        ([-0.1, 0.2], {}, "apart", ""),
        ([0.1, 0.2], {}, "amount", ""),
    ],
)
def test_what_colours_stand_for(values, references, kind, reference):
    shade = shading(measured([values], (axis("layer", 1), axis("expert", 2)), **references))
    assert (shade.kind, shade.reference) == (kind, reference)


def test_noise_around_chance_does_not_get_the_full_colours():
    # Ratios of 0.98 and 1.02: the colours still end at half and twice.
    assert shading(measured([[0.98, 1.02]], (axis("layer", 1), axis("expert", 2)), chance=1.0)).limit == 1.0


def test_dots_mark_what_is_not_sure():
    measurement = measured([[0.30, 0.60]], (axis("layer", 1), axis("expert", 2)), chance=0.25, null=0.25, null_std=0.03)
    # 0.30 is 1.7 deviations from 0.25, 0.60 more than 11.
    assert of_type(plot(measurement), "heatmap")[0].text == (["•", ""],)
    assert "2 standard deviations" in note_on(measurement)
    assert not note_on(measured([0.3], (axis("layer", 1),), null=0.25, null_std=0.03))


def test_grouped_bars_have_the_null_over_each_bar():
    axes = (axis("layer", 2), Axis("measure", ("nmi", "conditional")))
    null = [[0.01, 0.02], [0.03, 0.04]]
    figure = plot(measured([[0.1, 0.2], [0.3, 0.4]], axes, chance=0.0, null=null, null_std=0.001))
    bars = of_type(figure, "bar")
    assert [bar.name for bar in bars] == ["nmi", "conditional"]
    assert bars[1].y.tolist() == [0.2, 0.4]
    (line,) = [trace for trace in of_type(figure, "scatter") if trace.name == "null" and trace.text]
    # Three points a segment, the third none; the segment lies over its bar.
    assert list(line.y[::3]) == [0.01, 0.02, 0.03, 0.04]
    assert line.x[0] < bars[0].x[0] < line.x[1]
    assert line.text[0] == "null 1 % ± 0.1 %"


def test_a_vanishing_chance_does_not_set_the_scale():
    # 64 experts and many tokens: none is dead, nor would one be by chance.
    figure = plot(measured([0.0, 0.0], [axis("layer", 2)], chance=[6e-222, 6e-222], unit="experts"))
    assert tuple(figure.layout.yaxis.range) == (0, 1)
    figure = plot(measured([0.0, 3.0], [axis("layer", 2)], chance=[6e-222, 6e-222], unit="experts"))
    assert figure.layout.yaxis.range is None


def test_long_labels_stand_beside_bars():
    paths = Axis("path", ("3 → 4 → 12 → 0", "1 → 1 → 1 → 1"))
    (bar,) = of_type(plot(measured([0.2, 0.1], (paths,), chance=[0.01, 0.02])), "bar")
    assert bar.orientation == "h"
    assert bar.x.tolist() == [0.2, 0.1]


def test_a_single_number_is_a_bar():
    (bar,) = of_type(plot(measured(0.4, (), chance=0.1)), "bar")
    assert bar.y.tolist() == [0.4]


def test_the_title_says_how_to_read_it():
    title = plot(measured([0.4], (axis("layer", 1),))).layout.title
    assert (title.text, title.subtitle.text) == ("A metric", "How to read it.")


def test_four_axes_are_refused():
    values = np.zeros((1, 1, 1, 1))
    with pytest.raises(UserError, match=r"a_metric: no picture of 4 axes \(layer, from, to, step\)"):
        plot(measured(values, tuple(axis(name, 1) for name in ("layer", "from", "to", "step"))))


def test_bars_by_layer():
    figure = draw_bars_by_layer(measured([[0.25, 0.75], [0.5, 0.5]], (axis("layer", 2), axis("expert", 2)), chance=0.5))
    assert [bar.y.tolist() for bar in of_type(figure, "bar")] == [[0.25, 0.75], [0.5, 0.5]]


def test_the_largest_flows_are_drawn():
    # Experts of equal load; 0 goes to 1 in 0.4 of cases, where chance is 0.25.
    values, chance = [[0.1, 0.4], [0.4, 0.1]], np.full((2, 2), 0.25)
    pair = measured(values, (axis("from", 2), axis("to", 2)), chance=chance)
    figure = flow([pair, pair], ("0", "1", "2"), top=2)
    sankey = figure.data[0]
    assert list(sankey.link.value) == [0.4] * 4
    ends = {
        (sankey.node.label[a], sankey.node.label[b])
        for a, b in zip(sankey.link.source, sankey.link.target, strict=True)
    }
    assert ends == {("0", "1"), ("1", "0")}
    assert sankey.link.customdata[0] == ["25 %", "1.60"]
    assert sorted(set(sankey.node.x)) == [0.001, 0.5, 0.999]


def test_pictures_of_all_formats(tmp_path):
    figure = plot(measured([[0.2, 0.6]], (axis("layer", 1), axis("expert", 2)), chance=0.5))
    paths = [tmp_path / f"papers/a{suffix}" for suffix in (".png", ".svg", ".html")]
    try:
        save_all(dict.fromkeys(paths, figure))
    except UserError as error:
        pytest.skip(str(error))
    png, svg, html = (path.read_bytes() for path in paths)
    assert png.startswith(b"\x89PNG")
    assert b"How to read it." in svg
    # Ink on white.
    assert b"rgb(255, 255, 255)" in svg
    assert b"Plotly.newPlot" in html
    assert b'src="http' not in html


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"figure\.bmp: a picture ends in one of \.png, \.svg, \.pdf, \.html"):
        save(plot(measured([0.4], (axis("layer", 1),))), tmp_path / "figure.bmp")


def test_a_missing_browser_is_one_line(tmp_path, monkeypatch):
    import plotly.io

    def fail(*_args, **_settings):
        raise RuntimeError("\nno Chrome here\nmany lines follow")

    monkeypatch.setattr(plotly.io, "write_images", fail)
    with pytest.raises(UserError, match="kaleido") as caught:
        save(plot(measured([0.4], (axis("layer", 1),))), tmp_path / "figure.png")
    assert str(caught.value).endswith("no Chrome here")
    assert "\n" not in str(caught.value)


def test_a_missing_browser_is_told_before_the_work(tmp_path, monkeypatch):
    """BROWSER_PATH wins over whatever is installed; what it names need not be there."""
    monkeypatch.setattr("choreographer.browsers.chromium.get_chrome_download_path", lambda **_: None)
    monkeypatch.setattr("choreographer.browsers.chromium.get_old_chrome_download_path", lambda: None)
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "chrome"))
    with pytest.raises(UserError, match=r"pictures need kaleido .* and Chrome .*chrome is no program"):
        require_browser()
    (tmp_path / "chrome").touch(mode=0o755)
    require_browser()


def test_without_plotly_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(UserError, match=r"pip install 'moe-lab\[study\]'"):
        plot(measured([0.4], (axis("layer", 1),)))


def test_figures_are_json():
    figure = plot(measured([[0.2, np.nan]], (axis("layer", 1), axis("expert", 2)), chance=0.5))
    assert json.loads(figure.to_json())["layout"]["title"]["text"] == "A metric"
