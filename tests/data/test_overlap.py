"""What other documents repeat: runs of 13 words, counted by hand."""

import pytest

from moe.data.overlap import RUN, repeated_shares


def words(start: int, stop: int) -> str:
    """The words w<start> to w<stop - 1>."""
    return " ".join(f"w{number}" for number in range(start, stop))


def test_unrelated_texts_repeat_nothing() -> None:
    assert repeated_shares([words(0, 50), words(100, 150)]) == [0.0, 0.0]


def test_the_share_is_of_a_texts_own_runs() -> None:
    """w0..w99 has 88 runs. w50..w99 with 50 new words has 88 too, of which the 38 within w50..w99 are shared."""
    first, second = words(0, 100), words(50, 100) + " " + words(200, 250)
    assert repeated_shares([first, second]) == pytest.approx([38 / 88, 38 / 88])


def test_a_copy_in_another_layout_and_case_is_a_copy() -> None:
    text = words(0, 40)
    assert repeated_shares([text, text.upper().replace(" ", "\n   ")]) == [1.0, 1.0]


def test_a_text_that_repeats_itself_repeats_no_other() -> None:
    assert repeated_shares([" ".join([words(0, 20)] * 5), words(50, 90)]) == [0.0, 0.0]


def test_fewer_words_than_a_run_count_as_new() -> None:
    short = words(0, RUN - 1)
    assert repeated_shares([short, short]) == [0.0, 0.0]
    assert repeated_shares([words(0, RUN), words(0, RUN), ""]) == [1.0, 1.0, 0.0]
    assert repeated_shares([]) == []
