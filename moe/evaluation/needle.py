"""Can a model find a sentence in a long text? A needle of made-up content lies somewhere in held-out text, and the last
words ask for it (Kamradt 2023).

An answer is right where each of its tokens is the model's favourite. For small models, which are seldom right, the gain
says more: by how many nats a token the answer is likelier than in the same text without the needle, which is what
chance gives.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe.config import Precision
from moe.data.prepare import PreparedCorpus
from moe.errors import UserError
from moe.evaluation.pictures import layout
from moe.model.transformer import Transformer
from moe.study.plots import graph_objects
from moe.training.machine import autocast

if TYPE_CHECKING:
    import plotly.graph_objects as go

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""where the needle lies, from the beginning of the text to right before the question"""
SHORTEST = 128
"""tokens of the shortest text; the others are twice as long each"""
TOKENS_A_CELL = 32_768
MOST_TEXTS = 32
NAMES = ("Ada", "Basil", "Clara", "Dimitri", "Esther", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Kira", "Leo")


@dataclass(frozen=True)
class Cell:
    """Needles of one depth in texts of one length."""

    length: int
    depth: float
    texts: int
    gain: float
    """nats a token that the needle makes its content likelier"""
    right: float
    """share of texts whose question was answered right"""
    chance: float
    """the same without a needle"""


@dataclass(frozen=True)
class Question:
    """A needle, the question for it, and the answer, in tokens."""

    needle: list[int]
    question: list[int]
    answer: list[int]


def lengths_up_to(longest: int) -> list[int]:
    """The lengths that are tried: 128, 256, ... and ``longest``."""
    doubled = [SHORTEST << power for power in range(32) if SHORTEST << power < longest]
    return [*doubled, longest]


@torch.no_grad()
def find_needles(
    model: Transformer,
    corpus: PreparedCorpus,
    lengths: Sequence[int],
    precision: Precision = "fp32",
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[Cell]:
    """A cell for each length and depth. Every text is made from the same seed. ``advance`` is told of tokens read.

    Raises UserError where the held-out text is too short to hide anything in.
    """
    haystack = [token for held_out in corpus.validation.values() for token in held_out.stream.tolist()]
    if len(haystack) < SHORTEST:
        raise UserError(f"the held-out text has {len(haystack)} tokens, too few to hide anything in")
    cells = []
    for length in lengths:
        choose, texts = random.Random(length), texts_of(length)
        questions = [_question(choose, corpus) for _ in range(texts)]
        starts = [choose.randrange(len(haystack)) for _ in range(texts)]
        hay = [(haystack * (2 + length // len(haystack)))[start : start + length] for start in starts]

        def score(depth: float | None, questions: list[Question] = questions, hay: list[list[int]] = hay) -> Tensor:
            rows = [
                hide(one, own, depth, corpus.tokenizer.end_of_text) for one, own in zip(questions, hay, strict=True)
            ]
            return _score(model, rows, [one.answer for one in questions], precision, advance)

        without = score(None)
        for depth in DEPTHS:
            found = score(depth)
            gain = (without[:, 0] - found[:, 0]).mean()
            cells.append(
                Cell(length, depth, texts, float(gain), float(found[:, 1].mean()), float(without[:, 1].mean()))
            )
    return cells


def texts_of(length: int) -> int:
    """How many texts of a length are read for each depth."""
    return max(2, min(MOST_TEXTS, TOKENS_A_CELL // length))


def hide(question: Question, hay: Sequence[int], depth: float | None, end_of_text: int) -> list[int]:
    """A text as long as ``hay``: an end of text, hay with the needle at ``depth`` of it, the question, the answer.

    Without a depth there is no needle, and hay in its place.
    """
    needle = [] if depth is None else question.needle
    room = len(hay) - 1 - len(needle) - len(question.question) - len(question.answer)
    before = round(room * (depth or 0.0))
    return [end_of_text, *hay[:before], *needle, *hay[before:room], *question.question, *question.answer]


def _question(choose: random.Random, corpus: PreparedCorpus) -> Question:
    name, number, encode = choose.choice(NAMES), choose.randrange(1000, 10_000), corpus.tokenizer.encode
    asked = f" The secret number of {name} is"
    return Question(encode(f"{asked} {number}."), encode(asked), encode(f" {number}"))


def _score(
    model: Transformer,
    rows: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    precision: Precision,
    advance: Callable[[int], object],
) -> Float[Tensor, "n 2"]:
    """Of each text the cross-entropy a token of its answer, in nats, and whether that is right."""
    device, scores = model.embedding.weight.device, []
    length = len(rows[0])
    at_once = max(1, 8192 // length)
    for first in range(0, len(rows), at_once):
        part = torch.tensor(rows[first : first + at_once], device=device)
        with autocast(device, precision):
            hidden, _ = model.hidden(part)
        advance(part.numel())
        for own, answer in zip(hidden, answers[first : first + at_once], strict=True):
            logits = model.head(own[length - 1 - len(answer) : length - 1]).float()
            wanted = torch.tensor(answer, device=device)
            loss = torch.nn.functional.cross_entropy(logits, wanted)
            right = (logits.argmax(dim=-1) == wanted).all()
            scores.append([float(loss), float(right)])
    return torch.tensor(scores)


def needle_table(cells: Sequence[Cell]) -> str:
    """A row for each length: the gain at each depth, and how many were right, over all depths and by chance."""
    header = "tokens   texts  " + "".join(f"{f'at {depth:.0%}':>9}" for depth in DEPTHS) + "     right    chance"
    lines = [header, "-" * len(header)]
    for length in dict.fromkeys(cell.length for cell in cells):
        own = [cell for cell in cells if cell.length == length]
        right = math.fsum(cell.right for cell in own) / len(own)
        gains = "".join(f"{cell.gain:9.3f}" for cell in own)
        lines.append(f"{length:6,}  {own[0].texts:6}  {gains}  {right:8.1%}  {own[0].chance:8.1%}")
    return "\n".join(lines)


def needle_picture(title: str, subtitle: str, cells: Sequence[Cell]) -> "go.Figure":
    """Two maps of length and depth: the gain, and the share of right answers. Raises UserError without plotly."""
    go = graph_objects()
    from plotly.subplots import make_subplots

    lengths = list(dict.fromkeys(cell.length for cell in cells))
    by_place = {(cell.depth, cell.length): cell for cell in cells}
    largest = max(0.1, *(abs(cell.gain) for cell in cells))
    maps: list[tuple[str, list[list[float]], dict[str, Any], str]] = [
        (
            "gain by the needle, nats a token",
            [[by_place[depth, length].gain for length in lengths] for depth in DEPTHS],
            {"colorscale": "RdBu", "zmid": 0, "zmin": -largest, "zmax": largest},
            ".2f",
        ),
        (
            "answers that are right",
            [[by_place[depth, length].right for length in lengths] for depth in DEPTHS],
            {"colorscale": "Greens", "zmin": 0, "zmax": 1},
            ".0%",
        ),
    ]
    figure = make_subplots(rows=1, cols=2, subplot_titles=[name for name, *_ in maps], horizontal_spacing=0.12)
    for column, (name, values, colours, form) in enumerate(maps, start=1):
        figure.add_trace(
            go.Heatmap(
                x=[f"{length:,}" for length in lengths],
                y=[f"{depth:.0%}" for depth in DEPTHS],
                z=values,
                texttemplate=f"%{{z:{form}}}",
                hovertemplate=f"%{{x}} tokens, needle at %{{y}}: %{{z:{form}}}<extra>{name}</extra>",
                showscale=False,
                **colours,
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(type="category", title_text="tokens of the text", row=1, col=column)
        figure.update_yaxes(type="category", autorange="reversed", title_text="depth of the needle", row=1, col=column)
    figure.update_annotations(font_size=13)
    figure.update_layout(**layout(title, subtitle, 470))
    return figure
