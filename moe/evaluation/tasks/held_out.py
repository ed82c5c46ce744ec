"""Cloze of a run's own held-out text, a task for each domain: for a corpus of languages, one for each language.

A piece of text, and four ways to go on, each of which is the true one for one of four pieces of the same domain. The
files are written into the run, in the harness's own format, so that its export can be given the same items.

What decides is how much likelier an answer is after the question than after nothing (the harness's acc_mutual_info):
by likelihood alone a model takes whatever answer is common words. The toy run was right on 0.54 to 0.84 of the items of
its six domains by the one, on 0.35 to 0.49 by the other.
"""

import json
import random
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe.data.prepare import HeldOut
from moe.evaluation.tasks.write import Item, as_lines

PREFIX = "cloze_"
"""before the name of the domain, in the name of its task"""
CHOICES = 4
QUESTION, ANSWER, SLACK = 60, 24, 40
"""characters of the two parts of a piece, and by how many each may be longer so as to end with a word"""
MOST_SETS = 25
"""of a domain: 100 items"""

TASK = """\
# Four pieces of held-out text ({domain}) share four ways to go on, one of which is right for each.
task: {name}
output_type: multiple_choice
custom_dataset: !function moe.evaluation.tasks.reader.read
dataset_kwargs: {{file: {data}}}
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_mutual_info, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1, chance: 0.25, score: acc_mutual_info}}
"""


def write_cloze(domain: str, held_out: HeldOut, folder: Path) -> str | None:
    """Write the task of a domain to ``folder`` and return its name; None where there is too little text for a set."""
    items = list(cloze_items(held_out))
    if not items:
        return None
    name = f"{PREFIX}{domain}"
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.resolve() / f"{name}.jsonl"
    data.write_text(as_lines(items), encoding="utf-8")
    # A string of JSON is one of YAML, whatever is in it.
    task = TASK.format(domain=domain, name=json.dumps(name), data=json.dumps(str(data)))
    (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    return name


def cloze_items(held_out: HeldOut) -> Iterator[Item]:
    """Items of sets of four, the same every time: sets are spread over the text, their pieces far apart."""
    source = random.Random("cloze of held-out text")
    pieces = [piece for text in held_out.documents for piece in pieces_of(text.decode("utf-8"))]
    # An answer that stood twice in a set would be right for two of its questions.
    pieces = list({answer: (question, answer) for question, answer in reversed(pieces)}.values())[::-1]
    n_sets = len(pieces) // CHOICES
    places = sorted({index * n_sets // min(n_sets, MOST_SETS) for index in range(min(n_sets, MOST_SETS))})
    for number, place in enumerate(places):
        chosen = pieces[place::n_sets][:CHOICES]
        choices = source.sample([answer for _, answer in chosen], CHOICES)
        for question, answer in chosen:
            yield {"question": question, "choices": choices, "answer": choices.index(answer), "set": number}


def pieces_of(text: str) -> Iterator[tuple[str, str]]:
    """(question, answer) after (question, answer), each cut where a word ends: an answer begins with a space or a mark.

    Tokenizers part text there, so that neither part's tokens depend on the other. The next question begins where the
    last one ended, with its answer: of little text as many pieces are made as there can be.
    """
    begin = 0
    while True:
        middle = _word_end(text, begin + QUESTION)
        end = None if middle is None else _word_end(text, middle + ANSWER)
        if middle is None or end is None:
            return
        question, answer = text[begin:middle].lstrip(), text[middle:end]
        if middle - begin <= QUESTION + SLACK and end - middle <= ANSWER + SLACK and question:
            yield question, answer
        begin = middle


def _word_end(text: str, start: int) -> int | None:
    """The first place from ``start`` on where a word has come to its end; None if there is none."""
    for place in range(max(start, 1), len(text)):
        if _is_of_word(text[place - 1]) and not _is_of_word(text[place]) and text[place] != "'":
            return place
    return None


def _is_of_word(character: str) -> bool:
    """A letter, a digit, or a mark on one, such as the vowel signs of Thai and Hindi."""
    return character.isalnum() or unicodedata.category(character).startswith("M")


def names_of(domains: Sequence[str]) -> list[str]:
    """The names of the tasks of ``domains``."""
    return [f"{PREFIX}{domain}" for domain in domains]
