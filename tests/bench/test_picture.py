import pytest

from moe.bench.picture import draw, save
from moe.bench.table import Row
from moe.errors import UserError
from moe.study import plots

pytest.importorskip("plotly")


def row(name, tokens_per_second, **changed):
    numbers = dict.fromkeys(
        ["failure", "forward_ms", "ms", "tflops", "share", "kept_bytes", "peak_bytes", "first_seconds", "error"]
    )
    kinds = {"unfit": False, "drops": False, "low_precision": False, "bound": False, "ours": False}
    turns = {"slowest_turn": None, "fastest_turn": None}
    if tokens_per_second is not None:
        turns = {"slowest_turn": 0.8 * tokens_per_second, "fastest_turn": 1.1 * tokens_per_second}
    return Row(
        name=name, tokens_per_second=tokens_per_second, spread=0.3, note="", **(numbers | kinds | turns | changed)
    )


ROWS = [
    row("dense", 400.0, bound=True, share=1.0),
    row("ours fused", 300.0, ours=True, share=0.75),
    row("a peer", 200.0, share=0.5),
    row("a dropper", 100.0, drops=True, share=0.25),
    row("broken", None, failure="its output is off"),
]


def test_every_time_is_a_bar_and_a_failure_is_none():
    figure = draw("layer", "a GPU", [("one", ROWS)])
    bars = [trace for trace in figure.data if trace.type == "bar"]
    lengths = {name: speed for trace in bars for name, speed in zip(trace.y, trace.x, strict=True)}
    assert lengths == {"dense": 400.0, "ours fused": 300.0, "a peer": 200.0, "a dropper": 100.0}
    # The fixture's turns were at 0.8 and 1.1 times the median: so far the ranges go, and there the numbers stand.
    [dense] = [trace for trace in bars if trace.name == "dense"]
    assert dense.error_x.array == pytest.approx([40.0])
    assert dense.error_x.arrayminus == pytest.approx([80.0])
    [texts] = [trace for trace in figure.data if trace.type == "scatter"]
    labels = dict(zip(texts.y, texts.text, strict=True))
    assert labels["ours fused"].strip() == "300 (0.75)"
    assert dict(zip(texts.y, texts.x, strict=True))["ours fused"] == pytest.approx(330.0)
    # Drawn from below, so that the fastest is on top.
    assert list(figure.layout.yaxis.categoryarray)[-2:] == ["ours fused", "dense"]


def test_the_bound_is_a_line_in_each_panel_and_the_legend_names_each_kind_once():
    figure = draw("layer", "a GPU", [("one", ROWS), ("two", ROWS[:3])])
    assert [line.x0 for line in figure.layout.shapes] == [400.0, 400.0]
    shown = [trace.name for trace in figure.data if trace.type == "bar" and trace.showlegend]
    assert sorted(shown) == ["dense", "others", "others, dropping assignments", "ours"]
    assert [note.text for note in figure.layout.annotations[:2]] == ["one", "two"]


def test_without_a_bound_there_is_no_line_and_no_share():
    figure = draw("decode", "a CPU", [("one", [row("ours segments", 9.0, ours=True), row("a peer", 3.0)])])
    assert figure.layout.xaxis.range[0] == 0, "bars of half the speed are half as long"
    assert "share" not in figure.layout.xaxis.title.text
    assert not figure.layout.shapes


def test_nothing_timed_is_no_picture():
    with pytest.raises(UserError, match="nothing was timed"):
        draw("step", "a CPU", [("one", ROWS[-1:])])


def test_a_picture_is_saved_twice(monkeypatch, tmp_path):
    saved = {}
    monkeypatch.setattr("moe.bench.picture.save_all", saved.update)
    figure = draw("layer", "a GPU", [("one", ROWS)])
    assert save(figure, tmp_path / "bench-layer") == [tmp_path / "bench-layer.png", tmp_path / "bench-layer.svg"]
    assert set(saved) == {tmp_path / "bench-layer.png", tmp_path / "bench-layer.svg"}
    assert all(path.suffix in plots.FORMATS for path in saved)
