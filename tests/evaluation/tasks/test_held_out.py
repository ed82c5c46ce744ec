"""Cloze of held-out text: pieces by hand, sets that cannot be done without reading, and one task for each language."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moe.data.prepare import HeldOut, PreparedCorpus
from moe.evaluation.tasks.held_out import (
    ANSWER,
    CHOICES,
    MOST_SETS,
    QUESTION,
    SLACK,
    cloze_items,
    names_of,
    pieces_of,
    write_cloze,
)

SENTENCE = "Und der Hund schläft unter dem Haus, in dem die Katze singt. "


def held_out(*documents: str) -> HeldOut:
    texts = tuple(text.encode() for text in documents)
    return HeldOut(tuple(f"{number}.txt" for number in range(len(texts))), texts, np.zeros(0, dtype=np.uint16))


def story(words: int, seed: int = 0) -> str:
    source = np.random.default_rng(seed)
    return " ".join("".join(source.choice(list("abcdefgh"), size=source.integers(2, 9))) for _ in range(words))


# -------------------------------------------------------------------------------------------------------------- pieces


def test_a_piece_is_cut_where_words_end() -> None:
    """Words of four letters and a space: the first end from 60 on is 64, that from 64 + 24 = 88 on is 89."""
    text = "abcd " * 40

    question, answer = next(pieces_of(text))

    assert question == ("abcd " * 13).rstrip()
    assert answer == " abcd" * 5


def test_the_next_question_begins_with_the_last_answer() -> None:
    pieces = list(pieces_of(story(100)))

    assert len(pieces) > 3
    for (question, answer), (following, _) in pairwise(pieces):
        assert following.startswith(answer.lstrip())
        assert question and answer[0] == " "


@given(st.text(alphabet=st.sampled_from("ab  \n'.,é日本กั"), max_size=600))
def test_pieces_are_of_the_text_and_of_their_lengths(text: str) -> None:
    place = 0
    for question, answer in pieces_of(text):
        place = text.index(question + answer, place)
        assert len(question) <= QUESTION + SLACK
        assert ANSWER <= len(answer) <= ANSWER + SLACK
        assert not answer[0].isalnum(), "an answer begins where a word has ended"


def test_an_apostrophe_and_the_vowel_signs_of_a_letter_end_no_word() -> None:
    """Thai writes vowels as marks on letters, and text without a space has no place to be cut."""
    thai = "ภาษาไทยเป็นภาษาที่"
    assert list(pieces_of(thai * 20)) == []

    [(question, answer)] = pieces_of("x" * 61 + "'s it " + "y" * 20 + " end")

    assert question == "x" * 61 + "'s"
    assert answer == " it " + "y" * 20


# ---------------------------------------------------------------------------------------------------------------- items


def test_each_way_to_go_on_is_the_true_one_of_one_of_four() -> None:
    documents = [story(400, seed) for seed in range(3)]

    items = list(cloze_items(held_out(*documents)))

    assert len(items) % CHOICES == 0 and items
    for number in {item["set"] for item in items}:
        of_set = [item for item in items if item["set"] == number]
        [choices] = {tuple(item["choices"]) for item in of_set}
        assert len(set(choices)) == CHOICES
        assert sorted(item["answer"] for item in of_set) == list(range(CHOICES))
    for item in items:
        assert any(item["question"] + item["choices"][item["answer"]] in text for text in documents)


def test_no_answer_is_in_two_sets_and_there_are_no_more_than_a_hundred_items() -> None:
    items = list(cloze_items(held_out(*(story(600, seed) for seed in range(8)))))

    assert len(items) == MOST_SETS * CHOICES
    answers = [item["choices"][item["answer"]] for item in items]
    assert len(set(answers)) == len(answers)


def test_text_that_repeats_has_each_answer_once() -> None:
    items = list(cloze_items(held_out(*([story(60)] * 6))))

    answers = [item["choices"][item["answer"]] for item in items]
    assert len(set(answers)) == len(answers)


def test_they_are_the_same_every_time() -> None:
    text = held_out(story(300))

    assert list(cloze_items(text)) == list(cloze_items(text))


def test_too_little_text_is_no_task(tmp_path: Path) -> None:
    assert write_cloze("german", held_out(SENTENCE * 2), tmp_path / "tasks") is None
    assert not (tmp_path / "tasks").exists()


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_task_is_written_for_each_domain(corpus: PreparedCorpus, tmp_path: Path) -> None:
    for domain in corpus.domains:
        name = write_cloze(domain, corpus.validation[domain], tmp_path)

        assert name == f"cloze_{domain}"
        items = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert items == list(cloze_items(corpus.validation[domain]))
    assert names_of(corpus.domains) == [f"cloze_{domain}" for domain in corpus.domains]


@pytest.mark.parametrize("folder", ["plain", "with 'quotes' and a \"second\" kind", "back\\slash: # ä"])
def test_the_file_names_its_data_wherever_it_is(tmp_path: Path, folder: str) -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))

    name = write_cloze("zh-hans", held_out(story(300)), tmp_path / folder)

    settings = yaml.load((tmp_path / folder / f"{name}.yaml").read_text(encoding="utf-8"), Loader)
    assert settings["task"] == name == "cloze_zh-hans"
    assert settings["dataset_kwargs"] == {"file": str(tmp_path / folder / "cloze_zh-hans.jsonl")}
    assert settings["metadata"]["chance"] == 1 / CHOICES
