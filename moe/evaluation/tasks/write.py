"""Write the data files of the tasks: ``python -m moe.evaluation.tasks.write``. The same files every time.

Every item is an object: a ``question``; where there are ``choices``, the number of the right one as ``answer``, else
the answer itself; and the number of its ``set``, whose items share their choices.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"

Item = dict[str, Any]

WORDS = (
    *("lamp", "river", "stone", "glass", "wolf", "table", "rope", "moon"),
    *("bread", "chair", "horse", "cloud", "paper", "apple", "knife", "tree"),
    *("boat", "clock", "flag", "drum", "fish", "leaf", "nail", "ring"),
    *("ship", "snow", "star", "wheel", "wood", "field", "king", "door"),
)
THINGS = (
    *("lamp", "rope", "knife", "clock", "flag", "drum", "ring", "wheel"),
    *("chair", "book", "coat", "hat", "key", "cup", "map", "ball"),
    *("box", "shoe", "bell", "card", "pen", "kite", "boat", "letter"),
)
NAMES = ("Anna", "Tom", "Mary", "Peter", "John", "Lisa", "David", "Sarah")

STORIES = (
    # (text, whether the second thing is the answer)
    ("{a} asked {b} for a {x}. {b} had none, so {a} went to the shop and bought a", False),
    ("There was a {x} on the table and a {y} under it. {a} took what was under the table. {a} now had the", True),
    ("{a} drew a {x} first and then a {y}. {b} liked the second drawing more, the one of the", True),
    ("{a} has a {x} and {b} has a {y}. When {a} lost it, {b} helped to look for the", False),
    ('"Have you seen my {x}?" asked {a}. {b} pointed to the garden, and there {a} found the', False),
)
"""short stories that end before a word which they name"""

QUESTIONS: Sequence[tuple[str, Mapping[str, str]]] = (
    # (question about a thing, the answer for each of four things)
    ("The young of a {} is called a", {"dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb"}),
    ("In the wild, a {} lives", {"fish": "in water", "mole": "under ground", "camel": "in deserts", "ape": "in trees"}),
    ("A {} makes a sound: it", {"dog": "barks", "cow": "moos", "lion": "roars", "duck": "quacks"}),
    ("A healthy {} has this many legs:", {"bird": "two", "horse": "four", "fly": "six", "spider": "eight"}),
    ("A {} is covered with", {"hen": "feathers", "trout": "scales", "bear": "fur", "snail": "a shell"}),
    ("The opposite of {} is", {"hot": "cold", "big": "small", "old": "young", "dark": "light"}),
    ("The opposite of {} is", {"open": "closed", "early": "late", "rich": "poor", "full": "empty"}),
    ("The day after {} is", {"Monday": "Tuesday", "Wednesday": "Thursday", "Friday": "Saturday", "Saturday": "Sunday"}),
    ("The month after {} is", {"January": "February", "March": "April", "June": "July", "October": "November"}),
    ("The number after {} is", {"two": "three", "five": "six", "seven": "eight", "nine": "ten"}),
    ("In the alphabet, the letter after {} is", {"A": "B", "C": "D", "K": "L", "Y": "Z"}),
    ("Twice {} is", {"one": "two", "two": "four", "three": "six", "four": "eight"}),
    ("The colour of {} is", {"grass": "green", "snow": "white", "coal": "black", "blood": "red"}),
    ("We {} with our", {"see": "eyes", "hear": "ears", "smell": "noses", "walk": "feet"}),
    ("The capital of {} is", {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}),
    ("The capital of {} is", {"Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna"}),
    ("Most people in {} speak", {"Brazil": "Portuguese", "Mexico": "Spanish", "Germany": "German", "China": "Chinese"}),
    ("{} is a country in", {"Kenya": "Africa", "Peru": "South America", "India": "Asia", "Poland": "Europe"}),
    (
        "Somebody who {} is called",
        {"bakes bread": "a baker", "flies planes": "a pilot", "heals people": "a doctor", "acts in plays": "an actor"},
    ),
    ("A {} works in a", {"teacher": "school", "nurse": "hospital", "judge": "court", "cook": "kitchen"}),
    ("To {} one needs a", {"cut": "knife", "write": "pencil", "dig": "spade", "sew": "needle"}),
    ("When it is {}, people need", {"raining": "umbrellas", "sunny": "hats", "dark": "lamps", "cold": "coats"}),
    ("Put {} into an oven and it becomes", {"dough": "bread", "clay": "a pot", "ice": "water", "wood": "ash"}),
    ("One {}, two", {"mouse": "mice", "foot": "feet", "tooth": "teeth", "goose": "geese"}),
    ("Today they {}; yesterday they", {"go": "went", "see": "saw", "eat": "ate", "run": "ran"}),
    ("The superlative of {} is", {"good": "best", "bad": "worst", "far": "farthest", "late": "latest"}),
    ("The feminine of {} is", {"king": "queen", "uncle": "aunt", "son": "daughter", "actor": "actress"}),
    (
        "In Python, the word that {} is",
        {"makes a function": "def", "begins a condition": "if", "loads a module": "import", "leaves a loop": "break"},
    ),
    ("In Python, the type of {} is", {"3": "int", "3.5": "float", "'three'": "str", "[3]": "list"}),
    ("{} is measured in", {"Length": "metres", "Weight": "kilograms", "Time": "seconds", "Temperature": "degrees"}),
)
"""common knowledge, each line a set of four items"""

BRACKETS = ("()", "[]", "{}", "<>")
DEEPEST = 4


def cloze() -> Iterator[Item]:
    """Stories whose last word is missing; each thing is the answer of as many items."""
    source = random.Random("cloze")
    for number, (story, second) in enumerate(STORIES):
        for thing in THINGS:
            other = source.choice([word for word in THINGS if word != thing])
            a, b = source.sample(NAMES, 2)
            x, y = (other, thing) if second else (thing, other)
            yield {"question": story.format(a=a, b=b, x=x, y=y), "answer": f" {thing}", "set": number}


def multiple_choice() -> Iterator[Item]:
    """Each question with each of its four things; the four answers are in the same random order for all of them."""
    source = random.Random("multiple choice")
    for number, (question, answers) in enumerate(QUESTIONS):
        choices = source.sample(list(answers.values()), len(answers))
        for thing, answer in answers.items():
            text = question.format(thing)
            yield {"question": text, "choices": choices, "answer": choices.index(answer), "set": number}


def induction(sets: int = 40) -> Iterator[Item]:
    """Eight words w₁ ... w₈ and then w₁, w₃, w₅ or w₇ again, after which w₂, w₄, w₆ or w₈ came."""
    source = random.Random("induction")
    for number in range(sets):
        words = source.sample(WORDS, 8)
        choices = source.sample(words[1::2], 4)
        for cue, follower in zip(words[::2], words[1::2], strict=True):
            yield {
                "question": " ".join([*words, cue]),
                "choices": choices,
                "answer": choices.index(follower),
                "set": number,
            }


def copy(items: int = 64) -> Iterator[Item]:
    """One to four words to be written again, after three lines that show how."""
    source = random.Random("copy")
    seen: set[str] = set()
    while len(seen) < items:
        n_words = 1 + len(seen) % 4
        lines = [" ".join(source.sample(WORDS, length)) for length in (2, 3, n_words)]
        if lines[-1] not in seen:
            seen.add(lines[-1])
            shown = "".join(f"{line} = {line}\n" for line in lines[:-1])
            yield {"question": f"{shown}{lines[-1]} =", "answer": lines[-1], "set": n_words}


def arithmetic() -> Iterator[Item]:
    """a + b and a - b for digits a and b wherever the result is a digit: eleven for each digit, in sets of ten."""
    digits = range(10)
    exercises = [
        [f"{a} + {result - a}" for a in digits if a <= result] + [f"{a} - {a - result}" for a in digits if a >= result]
        for result in digits
    ]
    for number in range(11):
        for result in digits:
            question = f"10 + 5 = 15\n18 - 6 = 12\n{exercises[result][number]} ="
            yield {"question": question, "choices": [str(digit) for digit in digits], "answer": result, "set": number}


def brackets(sets: int = 40) -> Iterator[Item]:
    """A balanced line, and one that lacks its next closing bracket; the four items of a set differ by a rotation of the
    kinds, so that each kind is the answer of one."""
    source = random.Random("brackets")
    for number in range(sets):
        whole, _ = _nested(source, 6, closed=True)
        begun, open_kinds = _nested(source, 4 + number % 4, closed=False)
        for turn in range(len(BRACKETS)):
            kinds = [BRACKETS[(kind + turn) % len(BRACKETS)] for kind in range(len(BRACKETS))]
            question = "\n".join(" ".join(kinds[kind][end] for kind, end in line) for line in (whole, begun))
            answer = kinds[open_kinds[-1]][1]
            choices = [pair[1] for pair in BRACKETS]
            yield {"question": question, "choices": choices, "answer": choices.index(answer), "set": number}


def _nested(source: random.Random, length: int, *, closed: bool) -> tuple[list[tuple[int, int]], list[int]]:
    """(brackets as (kind, 0 opening or 1 closing), the kinds left open): ``length`` of them at random.

    ``closed``: nothing is left open, for which more may be added; else something is.
    """
    line: list[tuple[int, int]] = []
    open_kinds: list[int] = []
    while len(line) < length or bool(open_kinds) == closed:
        must_close = len(open_kinds) == DEEPEST or (closed and len(line) >= length)
        if open_kinds and (must_close or source.random() < 0.4):
            line.append((open_kinds.pop(), 1))
        else:
            open_kinds.append(source.randrange(len(BRACKETS)))
            line.append((open_kinds[-1], 0))
    return line, open_kinds


FILES = {
    "cloze": cloze,
    "multiple_choice": multiple_choice,
    "induction": induction,
    "copy": copy,
    "arithmetic": arithmetic,
    "brackets": brackets,
}
"""the tasks that come with the package, and what makes their items"""


def as_lines(items: Sequence[Item]) -> str:
    """JSON Lines, text as it is."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    for name, make in FILES.items():
        (DATA / f"{name}.jsonl").write_text(as_lines(list(make())), encoding="utf-8")
