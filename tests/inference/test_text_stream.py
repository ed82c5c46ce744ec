"""Text out of tokens: characters that two tokens share, and stop strings that begin in one and end in another."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.data.tokenizer import train_bpe
from moe.inference.text_stream import TextStream

BYTES = train_bpe([], 257)
"""every byte a token, so that a character of two bytes is two"""


def letters(ids: Sequence[int]) -> str:
    """Tokens that are characters."""
    return "".join(map(chr, ids))


def read(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    """What each token adds, and what is left at the end."""
    return [*(stream.push(token) for token in tokens), stream.finish()]


def test_without_stop_strings_each_token_is_given_out_at_once() -> None:
    assert read(TextStream(letters), [97, 98, 99]) == ["a", "b", "c", ""]


def test_part_of_a_character_waits_for_its_rest() -> None:
    """ä is two bytes and € is three."""
    assert read(TextStream(BYTES.decode), BYTES.encode("aä€")) == ["a", "", "ä", "", "", "€", ""]


def test_a_character_that_stays_unfinished_is_shown_as_that() -> None:
    assert read(TextStream(BYTES.decode), BYTES.encode("aä")[:-1]) == ["a", "", "�"]


def test_what_could_become_a_stop_string_waits() -> None:
    """Of a, b, a, b, c with the stop string abc: ab is held, and given out once the next a shows that it is none."""
    stream = TextStream(letters, ["abc"])

    assert read(stream, [ord(c) for c in "xababcd"]) == ["x", "", "", "ab", "", "", "", ""]
    assert stream.stopped


def test_what_waits_comes_out_at_the_end() -> None:
    stream = TextStream(letters, ["abc"])

    assert read(stream, [ord(c) for c in "xab"]) == ["x", "", "", "ab"]
    assert not stream.stopped


def test_the_earliest_of_several_stop_strings_counts() -> None:
    """One token that holds both: the text ends before the first place, not the first in the list."""
    stream = TextStream(lambda ids: "one two three" * len(ids), ["three", "two"])

    assert stream.push(0) == "one "
    assert stream.stopped


def test_a_decoder_that_drops_the_first_space_drops_no_other() -> None:
    words = [" the", " sea", " is", " calm"]

    assert read(TextStream(lambda ids: "".join(words[i] for i in ids).lstrip()), range(4)) == [
        "the",
        " sea",
        " is",
        " calm",
        "",
    ]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(letters, [""])


@given(st.text("abä€", max_size=20), st.lists(st.text("abä", min_size=1, max_size=4), max_size=3))
def test_the_parts_are_the_text_before_the_stop_string_that_is_complete_first(text: str, stop: list[str]) -> None:
    """Of several that end with the same character, the longest."""
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]

    parts = read(TextStream(BYTES.decode, stop), BYTES.encode(text))

    assert "".join(parts) == (text[: min(ends)[1]] if ends else text)
