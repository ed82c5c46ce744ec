"""Batches as a pure function of (seed, step), and validation that scores every text token once.

Training sequence number i, counted over the whole run, is row i mod B of step i // B. Its domain comes from a fixed
periodic schedule, so every domain gets exactly its share of the sequences, and so of the tokens. The n-th sequence of a
domain is a block of that domain's stream: in each epoch the stream, closed to a ring, is cut into blocks from a random
place, and the blocks are dealt in a random order. Nothing is kept from one step to the next, so resuming is arithmetic.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe.data.corpus import whole_shares
from moe.data.prepare import HeldOut, TokenStream
from moe.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Token sequences and what each position should predict, on the CPU, int64."""

    tokens: Int[Tensor, "B S"]
    targets: Int[Tensor, "B S"]
    """the token after each"""
    domain: Int[Tensor, " B"]
    """index of the sequence's domain"""
    scored: Bool[Tensor, "B S"] | None = None
    """which targets count towards the loss; None: all"""


class Batches:
    """The training batches of a run; the same object gives any step, in any order, whole or by rows."""

    def __init__(
        self,
        train: Mapping[str, TokenStream],
        shares: Mapping[str, Fraction],
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
    ) -> None:
        """Sequences of ``sequence_length`` tokens, ``batch_size`` a step, from the streams and shares of a corpus.

        Raises UserError for a domain whose stream is shorter than one block of ``sequence_length + 1`` tokens.
        """
        for domain in shares:
            if len(train[domain]) <= sequence_length:
                raise UserError(
                    f"domain {domain}: {len(train[domain])} training tokens are less than one block of "
                    f"data.sequence_length + 1 = {sequence_length + 1}; shorten the sequences, or give it more text"
                )
        self.domains = tuple(shares)
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self._seed = seed
        self._streams = [train[domain] for domain in self.domains]
        self._schedule = domain_schedule(list(shares.values()))
        self._uses = np.bincount(self._schedule, minlength=len(shares))
        earlier = np.empty_like(self._schedule)
        for index, uses in enumerate(self._uses):
            earlier[self._schedule == index] = np.arange(uses)
        self._earlier = earlier
        # Memory, not state: a batch touches at most two epochs of a domain, and drawing an order takes a sort.
        self._cuts = lru_cache(maxsize=2 * len(shares))(self._draw_cuts)

    def batch(self, step: int) -> Batch:
        """The whole global batch of ``step``, from 0."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` of the batch of ``step``: the part of one rank and micro-batch, and no more work.

        Raises IndexError for rows that the batch does not have, or a negative step.
        """
        if step < 0 or not 0 <= start < stop <= self.batch_size:
            raise IndexError(f"rows {start}:{stop} of step {step}, in batches of {self.batch_size}")
        sequences = range(step * self.batch_size + start, step * self.batch_size + stop)
        domains, blocks = zip(*(self._sequence(index) for index in sequences), strict=True)
        block = torch.from_numpy(np.stack(blocks).astype(np.int64))
        return Batch(block[:, :-1].contiguous(), block[:, 1:].contiguous(), domain=torch.tensor(domains))

    def epochs(self, step: int) -> dict[str, float]:
        """How often each domain's text has been used once ``step`` batches have been, the current pass in part."""
        periods, rest = divmod(step * self.batch_size, len(self._schedule))
        partial = np.bincount(self._schedule[:rest], minlength=len(self.domains))
        return {
            domain: (periods * int(self._uses[index]) + int(partial[index])) / self._blocks(index)
            for index, domain in enumerate(self.domains)
        }

    def _sequence(self, index: int) -> tuple[int, TokenStream]:
        """(domain, ``sequence_length + 1`` tokens) of sequence number ``index`` of the run."""
        periods, place = divmod(index, len(self._schedule))
        domain = int(self._schedule[place])
        use = periods * int(self._uses[domain]) + int(self._earlier[place])
        epoch, position = divmod(use, self._blocks(domain))
        offset, order = self._cuts(domain, epoch)
        stream = self._streams[domain]
        # Blocks overlap by one token, so that each token is a target once; past its end the stream begins again.
        begin = (offset + int(order[position]) * self.sequence_length) % len(stream)
        block = stream[begin : begin + self.sequence_length + 1]
        return domain, np.concatenate([block, stream[: self.sequence_length + 1 - len(block)]])

    def _blocks(self, domain: int) -> int:
        """Blocks in an epoch; the remainder of the stream, at a random place, is passed over."""
        return len(self._streams[domain]) // self.sequence_length

    def _draw_cuts(self, domain: int, epoch: int) -> tuple[int, npt.NDArray[np.intp]]:
        """(where the first block begins, the order of the blocks), from the seed, the domain's name and the epoch.

        Raw Philox words, because numpy promises that they never change; its ``permutation`` comes without the promise.
        """
        key = hashlib.sha256(f"{self._seed}/{self.domains[domain]}/{epoch}".encode()).digest()[:16]
        philox = np.random.Philox(key=int.from_bytes(key, "little"))
        offset = int(philox.random_raw()) % len(self._streams[domain])
        return offset, np.argsort(philox.random_raw(self._blocks(domain)), kind="stable")


def domain_schedule(shares: Sequence[Fraction]) -> npt.NDArray[np.intp]:
    """One period of domain indices in which each occurs exactly its share, as evenly as whole numbers allow.

    With w sequences of a domain in the period, its j-th is due at (j + 1/2) / w of it; they come in the order in which
    they are due. ``shares`` need not sum to 1.
    """
    uses = whole_shares(shares)
    due = np.concatenate([(np.arange(weight) + 0.5) / weight for weight in uses])
    return np.repeat(np.arange(len(uses)), uses)[np.argsort(due, kind="stable")]


def validation_batches(
    held_out: HeldOut, *, domain: int, end_of_text: int, sequence_length: int, stride: int, rows: int
) -> Iterator[Batch]:
    """Batches of at most ``rows`` windows over a domain's held-out stream; each text token is scored exactly once.

    Windows are ``sequence_length`` tokens long (shorter only where the whole stream is) and ``stride`` apart. The first
    is scored whole, the others on their last ``stride`` targets, so that with a stride below ``sequence_length`` every
    token is predicted from at least ``sequence_length - stride`` tokens, the stream's beginning apart. The last window
    is moved back to end with the stream: there is no padding. An end of text is context, never scored, so the scored
    nats are over ``held_out.n_bytes`` bytes. Raises UserError for a stride outside 1 to ``sequence_length``.
    """
    if not 1 <= stride <= sequence_length:
        raise UserError(f"the stride is {stride}, and must be from 1 to the sequence length, {sequence_length}")
    stream = torch.from_numpy(held_out.stream.astype(np.int64))
    n_targets = len(stream) - 1
    length = min(sequence_length, n_targets)
    last = n_targets - length
    begins = [*range(0, last, stride), last]
    scored_until = [0, *(begin + length for begin in begins[:-1])]
    for first in range(0, len(begins), rows):
        positions = torch.tensor(begins[first : first + rows])[:, None] + torch.arange(length)
        targets = stream[positions + 1]
        new = positions >= torch.tensor(scored_until[first : first + rows])[:, None]
        yield Batch(
            tokens=stream[positions],
            targets=targets,
            domain=torch.full((len(positions),), domain),
            scored=new & (targets != end_of_text),
        )
