"""Speculative decoding: several tokens are guessed, read together, and kept as far as the model would have drawn them.

What is kept has the distribution of the model's own draws, whatever the guesses are (Leviathan et al. 2023, theorem in
appendix A.1): a guess x drawn from q is kept with probability min(1, p(x) / q(x)), and else replaced by a draw from
max(0, p - q), normalised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moe.inference.block_pool import OutOfBlocksError
from moe.inference.paged_cache import PagedCache, Table
from moe.inference.reading import read
from moe.inference.sampling import Sampling, distribution, draw
from moe.model.transformer import Transformer


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow."""

    tokens: Sequence[int] = ()
    probabilities: Float[Tensor, "k V"] | None = None
    """what each was drawn from; None: it was not drawn, and has probability 1"""


@dataclass(frozen=True)
class Wanted:
    """Whose next tokens are to be guessed."""

    key: int
    """stays the same as the sequence grows"""
    text: Sequence[int]
    """all its tokens"""
    n_tokens: int
    """to be guessed at most"""
    sampling: Sampling
    generator: torch.Generator


@runtime_checkable
class Drafter(Protocol):
    """Whatever guesses tokens."""

    n_tokens: int
    """guessed at most for a sequence at a time"""

    def propose(self, wanted: Sequence[Wanted]) -> list[Draft]:
        """What may follow each of these; nothing is a draft too."""

    def forget(self, key: int) -> None:
        """That sequence has ended."""


def accept(target: Float[Tensor, "k_plus_1 V"], draft: Draft, generator: torch.Generator) -> list[int]:
    """The tokens that are kept of a draft of k, and one more: Leviathan et al. 2023, algorithm 1.

    ``target`` is the model's distribution at each of the k places and after them.
    """
    for place, token in enumerate(draft.tokens):
        p = target[place]
        q = torch.zeros_like(p) if draft.probabilities is None else draft.probabilities[place].to(p)
        if draft.probabilities is None:
            q[token] = 1.0
        chance = float(torch.rand(1, dtype=torch.float64, generator=generator))
        if chance * float(q[token]) < float(p[token]):
            continue
        instead = (p - q).clamp(min=0)
        # Where rounding leaves nothing, p and q are equal.
        instead = p if float(instead.sum()) == 0 else instead
        return [*draft.tokens[:place], int(draw(instead[None], [generator]))]
    return [*draft.tokens, int(draw(target[-1:], [generator]))]


class NGrams:
    """Guesses that the text goes on as it did after its last few tokens the last time (Saxena 2023, prompt lookup)."""

    def __init__(self, n_tokens: int, longest: int = 3) -> None:
        self.n_tokens, self._longest = n_tokens, longest
        self._seen: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}
        """of each sequence: how many tokens were looked at, and where what follows an n-gram begins"""

    def propose(self, wanted: Sequence[Wanted]) -> list[Draft]:
        """What followed the longest of the text's last 3, 2 or 1 tokens that stand in it before."""
        return [Draft(self._continuation(one)) for one in wanted]

    def forget(self, key: int) -> None:
        """Drop what is known of a text."""
        self._seen.pop(key, None)

    def _continuation(self, wanted: Wanted) -> Sequence[int]:
        text = wanted.text
        looked_at, place_after = self._seen.get(wanted.key, (0, {}))
        for end in range(looked_at + 1, len(text)):
            for size in range(1, min(self._longest, end) + 1):
                place_after[tuple(text[end - size : end])] = end
        self._seen[wanted.key] = max(looked_at, len(text) - 1), place_after
        for size in range(min(self._longest, len(text)), 0, -1):
            place = place_after.get(tuple(text[len(text) - size :]))
            if place is not None:
                return list(text[place : place + min(wanted.n_tokens, self.n_tokens)])
        return []


class DraftModel:
    """Guesses by a smaller model with the same tokens, from a cache of its own."""

    def __init__(
        self, model: Transformer, n_tokens: int, n_blocks: int, block_size: int = 16, chunk: int = 512
    ) -> None:
        weight = model.embedding.weight
        self.n_tokens, self._model, self._chunk = n_tokens, model, chunk
        self._cache = PagedCache(model.config, n_blocks, block_size, weight.device, weight.dtype)
        self._tables: dict[int, Table] = {}
        self._texts: dict[int, list[int]] = {}
        """what each table holds, guesses included"""

    def propose(self, wanted: Sequence[Wanted]) -> list[Draft]:
        """Drawn from the model one by one, as the sequences themselves are; nothing where its cache is full."""
        drafts = [Draft()] * len(wanted)
        longest = self._model.config.max_seq
        able = [
            row for row, one in enumerate(wanted) if one.n_tokens > 0 and len(one.text) + one.n_tokens - 1 <= longest
        ]
        if not able:
            return drafts
        try:
            for row, draft in zip(able, self._guess([wanted[row] for row in able]), strict=True):
                drafts[row] = draft
        except OutOfBlocksError:
            for key in list(self._tables):
                self.forget(key)
        return drafts

    def forget(self, key: int) -> None:
        """Give back the blocks of a sequence."""
        self._texts.pop(key, None)
        table = self._tables.pop(key, None)
        if table is not None:
            self._cache.close(table)

    def _guess(self, wanted: Sequence[Wanted]) -> list[Draft]:
        for one in wanted:
            if one.key not in self._tables:
                self._tables[one.key] = self._cache.open(one.text)
        tables = [self._tables[one.key] for one in wanted]
        for one, table in zip(wanted, tables, strict=True):
            # Guesses that were not kept are forgotten; the last token is always read, for what follows it.
            held = self._texts.get(one.key, one.text)
            pairs = enumerate(zip(held, one.text, strict=False))
            agreeing = next((place for place, (own, new) in pairs if own != new), len(held))
            self._cache.cut(table, min(table.length, agreeing, len(one.text) - 1))
            while len(one.text) - table.length > self._chunk:
                read(self._model, self._cache, [table], [one.text[table.length : table.length + self._chunk]])
            self._cache.settle(table, one.text)
        texts = [list(one.text) for one in wanted]
        seen: list[list[Tensor]] = [[] for _ in wanted]
        for step in range(min(self.n_tokens, max(one.n_tokens for one in wanted))):
            rows = [row for row, one in enumerate(wanted) if step < one.n_tokens]
            new = [texts[row][tables[row].length :] for row in rows]
            hidden, _ = read(self._model, self._cache, [tables[row] for row in rows], new)
            for row, logits in zip(rows, self._model.head(hidden[:, -1]), strict=True):
                one = wanted[row]
                probabilities = distribution(logits[None], one.sampling, [texts[row]])
                texts[row].append(int(draw(probabilities, [one.generator])))
                seen[row].append(probabilities[0])
        self._texts.update({one.key: text for one, text in zip(wanted, texts, strict=True)})
        return [
            Draft(text[len(one.text) :], torch.stack(own)) for one, text, own in zip(wanted, texts, seen, strict=True)
        ]
