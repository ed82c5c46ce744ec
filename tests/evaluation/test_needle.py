"""Needles, hidden by hand and looked for by a model that copies."""

import pytest
import torch
from torch import Tensor, nn

from moe.data.prepare import PreparedCorpus
from moe.evaluation.needle import DEPTHS, Question, find_needles, hide, lengths_up_to, needle_table

QUESTION = Question(needle=[1, 2, 3], question=[1, 2], answer=[3])


class Copier(nn.Module):
    """Says of every token that it is followed by what followed it and the one before last time, if that is near."""

    def __init__(self, size: int, reach: int) -> None:
        super().__init__()
        self.embedding, self.head, self.size, self.reach = nn.Embedding(1, 1), nn.Identity(), size, reach

    def hidden(self, tokens: Tensor) -> tuple[Tensor, list]:
        logits = torch.zeros(*tokens.shape, self.size)
        for own, said in zip(tokens.tolist(), logits, strict=True):
            last: dict[tuple[int, int, int], int] = {}
            for place in range(2, len(own) - 1):
                key = (own[place - 2], own[place - 1], own[place])
                before = last.get(key)
                if before is not None and place - before <= self.reach:
                    said[place, own[before + 1]] = 20.0
                last[key] = place
        return logits, []


def test_lengths_double() -> None:
    assert lengths_up_to(128) == [128]
    assert lengths_up_to(1000) == [128, 256, 512, 1000]
    assert lengths_up_to(1024) == [128, 256, 512, 1024]


@pytest.mark.parametrize(
    ("depth", "text"),
    [
        (0.0, [0, 1, 2, 3, 10, 11, 12, 13, 1, 2, 3]),
        (0.5, [0, 10, 11, 1, 2, 3, 12, 13, 1, 2, 3]),
        (1.0, [0, 10, 11, 12, 13, 1, 2, 3, 1, 2, 3]),
        (None, [0, 10, 11, 12, 13, 14, 15, 16, 1, 2, 3]),
    ],
)
def test_a_text_is_as_long_as_its_hay(depth: float | None, text: list[int]) -> None:
    assert hide(QUESTION, list(range(10, 21)), depth, 0) == text


def test_a_model_that_copies_finds_every_needle(corpus: PreparedCorpus) -> None:
    cells = find_needles(Copier(corpus.tokenizer.size, 10_000), corpus, [128, 256])

    assert [(cell.length, cell.depth) for cell in cells] == [(length, d) for length in (128, 256) for d in DEPTHS]
    assert all(cell.right == 1 and cell.chance == 0 and cell.texts == 32 for cell in cells)
    assert all(cell.gain > 1 for cell in cells)


def test_one_that_looks_a_hundred_tokens_back_finds_those_that_lie_there(corpus: PreparedCorpus) -> None:
    """In 256 tokens, some 200 of them hay, the needle at three quarters is some 70 tokens back, that at half 120."""
    cells = find_needles(Copier(corpus.tokenizer.size, 100), corpus, [256])

    assert [cell.right for cell in cells] == [0, 0, 0, 1, 1]
    assert cells[0].gain == pytest.approx(0, abs=0.5)
    assert "100.0%" not in needle_table(cells) and " 40.0%" in needle_table(cells)
