"""Marks and score cards of scores made by hand."""

import math

import pytest

from moe.evaluation.score_card import Mark, card_picture, card_table, mark_of, pooled_mark


def mark(task: str = "brackets", right: int = 3, items: int = 4, chance: float | None = 0.25) -> Mark:
    return mark_of(task, "acc", right / items, [1.0] * right + [0.0] * (items - right), chance=chance)


def test_right_or_wrong_has_wilsons_interval() -> None:
    """3 of 4 with z² = 3.8415: (0.75 + 0.4802 ± 1.96 sqrt(0.0469 + 0.0600)) / 1.9604."""
    found = mark()

    assert (found.successes, found.items, found.score) == (3, 4, 0.75)
    assert found.is_share
    assert (found.low, found.high) == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))


def test_truth_values_count_as_right_and_wrong() -> None:
    assert mark_of("t", "acc", 0.5, [True, False]).successes == 1


def test_any_other_score_has_the_harness_s_error() -> None:
    found = mark_of("wikitext", "word_perplexity", 20.0, [(-3.0, 4), (-5.0, 6)], error=2.0, higher_is_better=False)

    assert not found.is_share
    assert (found.low, found.high) == (pytest.approx(16.08, abs=0.01), pytest.approx(23.92, abs=0.01))
    assert found.items == 2


def test_without_an_error_there_is_no_interval() -> None:
    found = mark_of("t", "bleu", 12.0, ["a", "b"], chance=0.0)

    assert math.isnan(found.low) and math.isnan(found.high)
    assert found.verdict == "", "and so nothing to say of chance"


@pytest.mark.parametrize(
    ("right", "chance", "verdict"),
    [(25, 0.25, "at chance"), (50, 0.25, "above chance"), (10, 0.25, "below chance"), (50, None, "")],
)
def test_the_verdict_is_where_chance_stands_to_the_interval(right: int, chance: float | None, verdict: str) -> None:
    assert mark(right=right, items=100, chance=chance).verdict == verdict


def test_where_less_is_better_a_score_below_chance_is_better_than_it() -> None:
    found = mark_of("t", "perplexity", 20.0, [], error=1.0, chance=50.0, higher_is_better=False)

    assert found.verdict == "above chance"


@pytest.mark.parametrize("items", [4, 64, 69, 75, 120, 125, 138, 2999])
def test_none_right_is_at_a_chance_of_none(items: int) -> None:
    """Rounding must not lift the lower end above 0: nothing right is no more than chance."""
    found = mark(right=0, items=items, chance=0.0)

    assert found.low == 0
    assert found.verdict == "at chance"
    assert mark(right=items, items=items, chance=1.0).verdict == "at chance"


def test_tasks_of_one_kind_are_pooled_item_by_item() -> None:
    """3 of 4 and 1 of 6 are 4 of 10, not the mean of 0.75 and 0.17."""
    found = pooled_mark("both", [mark(right=3, items=4), mark(right=1, items=6)])

    assert (found.score, found.items, found.successes, found.chance) == (0.4, 10, 4, 0.25)
    assert found == mark("both", right=4, items=10)


def test_the_table_has_a_line_for_each_task() -> None:
    other = mark_of("wikitext", "word_perplexity", 20.5, [(-3.0, 4)], higher_is_better=False)

    lines = card_table([mark(), other]).splitlines()

    assert lines[0].split() == ["task", "score", "chance", "95", "%", "interval", "verdict", "items", "metric"]
    assert lines[2].split() == ["brackets", "0.750", "0.250", "0.301", "to", "0.954", "above", "chance", "4", "acc"]
    assert lines[3].split() == ["wikitext", "20.500", "1", "word_perplexity"]


def test_the_picture_has_a_bar_an_interval_and_chance_for_each_task_and_words_for_all() -> None:
    """The first task is at the top; a perplexity, which no bar from 0 to 1 can show, is in words alone."""
    pytest.importorskip("plotly")
    marks = [
        mark(right=50, items=100),
        mark("copy", right=0, items=64, chance=0.0),
        mark("mystery", right=2, items=4, chance=None),
        mark_of("wikitext", "word_perplexity", 20.5, [(-3.0, 4)], error=1.0, higher_is_better=False),
    ]

    figure = card_picture("score card of runs/a", marks)

    track, bars, chance = figure.data
    assert list(track.x) == [1, 1, 1]
    assert (list(bars.y), list(bars.x)) == (["brackets", "copy", "mystery"], [0.5, 0.0, 0.5])
    assert bars.error_x.array[0] == pytest.approx(marks[0].high - 0.5)
    assert bars.error_x.arrayminus[0] == pytest.approx(0.5 - marks[0].low)
    blue, grey, unknown = bars.marker.color
    assert blue == unknown != grey, "grey is what could be chance"
    assert (list(chance.y), list(chance.x)) == (["brackets", "copy"], [0.25, 0.0])
    words = {note.y: note.text for note in figure.layout.annotations}
    assert words["brackets"] == "<b>0.500</b>  0.404 to 0.596  above chance"
    assert words["wikitext"] == "<b>20.500</b>  18.540 to 22.460  word_perplexity"
    assert figure.layout.yaxis.categoryarray == ("wikitext", "mystery", "copy", "brackets")
    assert figure.layout.title.text == "score card of runs/a"
