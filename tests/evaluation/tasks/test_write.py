"""The tasks that come with the package: the files are what is written, and no task can be done without reading."""

import ast
import json
import operator
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe.evaluation.tasks import reader
from moe.evaluation.tasks.write import BRACKETS, DATA, FILES, STORIES, THINGS, as_lines

TASKS = DATA.parent
CHOICES = ("multiple_choice", "induction", "arithmetic", "brackets")


def items_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def settings_of(name: str) -> dict[str, Any]:
    """What the harness reads, the file that is included under it; a ``!function`` is its name."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    settings: dict[str, Any] = yaml.load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"), Loader)
    if "include" in settings:
        shared = yaml.load((TASKS / settings.pop("include")).read_text(encoding="utf-8"), Loader)
        settings = {**shared, **settings}
    return settings


@pytest.fixture(params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ------------------------------------------------------------------------------------------------------------ all tasks


def test_the_data_file_is_what_is_written(name: str) -> None:
    assert (DATA / f"{name}.jsonl").read_text(encoding="utf-8") == as_lines(list(FILES[name]()))


def test_the_task_names_itself_its_data_and_its_metric(name: str) -> None:
    settings = settings_of(name)

    assert settings["task"] == name
    assert settings["dataset_kwargs"] == {"file": f"data/{name}.jsonl"}
    assert settings["custom_dataset"] == "reader.read"
    assert settings["metadata"]["score"] in [metric["metric"] for metric in settings["metric_list"]]
    assert (TASKS / f"{name}.yaml").read_text(encoding="utf-8").startswith("# "), "which --harness list shows"


def test_no_question_is_asked_twice(name: str) -> None:
    questions = [item["question"] for item in items_of(name)]

    assert len(set(questions)) == len(questions)


def test_there_is_a_task_for_every_file_and_a_file_for_every_task() -> None:
    assert {path.stem for path in TASKS.glob("*.yaml")} == set(FILES) == {path.stem for path in DATA.glob("*.jsonl")}


def test_the_reader_gives_the_items_as_they_are(name: str) -> None:
    pytest.importorskip("datasets")

    assert list(reader.read(f"data/{name}.jsonl", split="ignored")["test"]) == items_of(name)


# ----------------------------------------------------------------------------------------------------- tasks of choices


def sets_of(name: str) -> Iterator[list[dict[str, Any]]]:
    items = items_of(name)
    for number in sorted({item["set"] for item in items}):
        yield [item for item in items if item["set"] == number]


@pytest.mark.parametrize("name", CHOICES)
def test_whoever_does_not_read_the_question_scores_chance_in_every_set(name: str) -> None:
    """All items of a set have the same choices in the same order, and each is right once: a fixed order of preference,
    by words or by places, takes exactly one item of each set."""
    chance = settings_of(name)["metadata"]["chance"]

    for items in sets_of(name):
        [choices] = {tuple(item["choices"]) for item in items}
        assert len(set(choices)) == len(choices)
        assert sorted(item["answer"] for item in items) == list(range(len(choices)))
        assert len(items) * chance == pytest.approx(1)


@pytest.mark.parametrize("name", ["multiple_choice", "induction"])
def test_no_place_among_the_choices_follows_from_the_order_of_the_items(name: str) -> None:
    """The first item of a set has its answer at each place about as often."""
    places = Counter(items[0]["answer"] for items in sets_of(name))

    assert len(places) == 4


# ----------------------------------------------------------------------------------------------------- each by its rule


def test_the_word_after_a_word_is_the_one_that_followed_it() -> None:
    for item in items_of("induction"):
        *words, cue = item["question"].split()
        assert len(set(words)) == 8
        assert item["choices"][item["answer"]] == words[words.index(cue) + 1]
        assert words.index(cue) % 2 == 0
        assert set(item["choices"]) == set(words[1::2])


def test_sums_are_right_and_all_of_a_digit_are_there() -> None:
    asked = set()
    for item in items_of("arithmetic"):
        *shown, exercise = item["question"].splitlines()
        left, sign, right = exercise.removesuffix(" =").split()
        asked.add((left, sign, right))
        result = {"+": operator.add, "-": operator.sub}[sign](int(left), int(right))
        assert item["choices"][item["answer"]] == str(result)
        for line in shown:
            tree = ast.parse(line.replace("=", "=="), mode="eval")
            assert eval(compile(tree, "shown", "eval"))
    # 55 sums of two digits up to nine, and as many differences from zero on.
    assert len(asked) == 110


def test_the_bracket_closes_what_is_open() -> None:
    closing = {pair[0]: pair[1] for pair in BRACKETS}
    for item in items_of("brackets"):
        whole, begun = item["question"].splitlines()
        stacks = []
        for line in (whole, begun):
            open_ones: list[str] = []
            for bracket in line.split():
                if bracket in closing:
                    open_ones.append(closing[bracket])
                else:
                    assert open_ones.pop() == bracket
            stacks.append(open_ones)
        assert not stacks[0], "the line that shows how is balanced"
        assert item["choices"][item["answer"]] == stacks[1][-1]


def test_the_last_word_of_a_story_stands_in_it_and_each_is_wanted_as_often() -> None:
    items = items_of("cloze")

    for item in items:
        assert re.search(rf"\b{item['answer'].strip()}\b", item["question"])
    assert Counter(item["answer"] for item in items) == {f" {thing}": len(STORIES) for thing in THINGS}


def test_a_line_is_written_again_after_lines_that_were() -> None:
    lengths = Counter()
    for item in items_of("copy"):
        *shown, last = item["question"].splitlines()
        assert last == f"{item['answer']} ="
        assert all(line.partition(" = ")[0] == line.partition(" = ")[2] for line in shown)
        assert item["answer"] not in {line.partition(" = ")[2] for line in shown}
        lengths[len(item["answer"].split())] += 1
    assert lengths == {1: 16, 2: 16, 3: 16, 4: 16}


def test_four_things_of_a_question_have_four_answers() -> None:
    for items in sets_of("multiple_choice"):
        assert len(items) == 4
        for item in items:
            answer = item["choices"][item["answer"]]
            assert not re.search(rf"\b{re.escape(answer)}\b", item["question"]), "an answer is not to be copied"


def test_they_come_with_the_package() -> None:
    """Whatever is not Python has to be in the folder that is packed, which is ``moe``."""
    assert Path(reader.__file__).parent == TASKS
