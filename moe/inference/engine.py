"""Many requests at once, which join and leave between steps (continuous batching; Yu et al. 2022, section 4.1).

A step reads one part of the prompts that are waiting to be read, then one token more of every sequence that is being
written (or several, guessed by a drafter). Blocks bound what runs together: a request is admitted when its prompt has
room, and where writing needs a block and none is free, the sequence that was admitted last gives up its own and is read
again later. What a request is answered depends on itself alone.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moe.inference.paged_cache import PagedCache, Table
from moe.inference.reading import read
from moe.inference.sampling import Sampling, distribution, require_finite, sample
from moe.inference.speculative import Draft, Drafter, Wanted, accept
from moe.model.routing import Routing
from moe.model.transformer import Transformer

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    n: int = 1
    """continuations, which draw differently and read the prompt once"""
    stop: int | None = None
    """the token that ends a continuation, and is no part of it"""
    alternatives: int = 0
    """how many of the likeliest tokens are told of at each place"""
    with_experts: bool = False
    """whether each token comes with the experts that wrote it"""


@dataclass(frozen=True)
class Event:
    """A token of a continuation, or its end, or both."""

    request: int
    sample: int
    """which of its n continuations"""
    token: int | None
    """None: only the end"""
    log_probability: float = 0.0
    """of the token under the model itself, before temperature and filters"""
    alternatives: tuple[tuple[int, float], ...] = ()
    """the likeliest tokens and their log-probabilities, likeliest first"""
    experts: tuple[tuple[int, ...], ...] = ()
    """of each mixture layer, the experts that the token before was sent to, from which this one was predicted"""
    finish: Finish | None = None
    """why the continuation ends here; None: it goes on"""


@dataclass
class Statistics:
    """What an engine has done so far."""

    steps: int = 0
    prompt_tokens: int = 0
    """read, repeated reading after a preemption included"""
    shared_tokens: int = 0
    """not read, since another sequence had"""
    new_tokens: int = 0
    guessed: int = 0
    accepted: int = 0
    """of the guessed tokens"""
    preemptions: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the guessed tokens that were kept; 0 where none was guessed."""
        return self.accepted / self.guessed if self.guessed else 0.0


@dataclass(eq=False)
class _Sequence:
    key: int
    request_id: int
    sample: int
    request: Request
    text: list[int]
    generator: torch.Generator
    table: Table | None = None
    n_forks: int = 0
    """continuations that begin where this one's prompt ends"""

    @property
    def unread(self) -> int:
        return len(self.text) - (0 if self.table is None else self.table.length)

    @property
    def left(self) -> int:
        """New tokens that it may still get."""
        return len(self.request.prompt) + self.request.max_new_tokens - len(self.text)


class Engine:
    """Continues requests with ``model``, which must be in evaluation mode.

    ``n_tokens`` bounds the tokens in the cache, by default as many as ``max_sequences`` of them can get;
    ``max_sequences`` how many are written at once; ``chunk`` the tokens of prompts that a step reads. Prompts that
    begin alike are read once where ``share_prefixes``, which a router whose tokens compete would make visible.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        n_tokens: int | None = None,
        max_sequences: int = 16,
        block_size: int = 16,
        chunk: int = 512,
        drafter: Drafter | None = None,
        share_prefixes: bool | None = None,
    ) -> None:
        weight, config = model.embedding.weight, model.config
        self.model, self.drafter = model, drafter
        self.max_sequences, self.chunk = max_sequences, chunk
        self.statistics = Statistics()
        self.at_once = max(chunk, 1 if drafter is None else 1 + drafter.n_tokens)
        """tokens of a sequence that a step reads at most"""
        n_blocks = -(-(n_tokens or max_sequences * config.max_seq) // block_size)
        window = config.attention.window
        n_window_blocks = None
        if window is not None:
            n_window_blocks = min(n_blocks, max_sequences * (-(-(window - 1 + self.at_once) // block_size) + 1))
        self.cache = PagedCache(config, n_blocks, block_size, weight.device, weight.dtype, n_window_blocks)
        independent = config.router.is_batch_independent(training=False) or not config.moe_layers
        self._share = independent if share_prefixes is None else share_prefixes
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._keys, self._request_ids = itertools.count(), itertools.count()
        self._events: list[Event] = []

    # -------------------------------------------------------------------------------------------------------- requests

    def submit(self, request: Request) -> int:
        """Take a request, and return the number that its events will carry.

        Raises ValueError for what could never be answered.
        """
        self.require_possible(request)
        request_id = next(self._request_ids)
        if request.max_new_tokens == 0:
            self._events += [Event(request_id, sample, None, finish="length") for sample in range(request.n)]
        else:
            first = self._sequence(request_id, request, 0, list(request.prompt))
            first.n_forks = request.n - 1
            self._waiting.append(first)
        return request_id

    def require_possible(self, request: Request) -> None:
        """Raise ValueError for a request that could never be answered."""
        n_prompt, vocabulary, longest = len(request.prompt), self.model.config.vocab_size, self.model.config.max_seq
        assert vocabulary is not None
        if n_prompt == 0:
            raise ValueError("every prompt needs at least one token")
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise ValueError(f"a prompt has a token outside 0 to {vocabulary - 1}")
        if request.max_new_tokens < 0 or not 1 <= request.n <= min(self.max_sequences, 1024):
            raise ValueError(
                f"{request.n} continuations of {request.max_new_tokens} tokens were asked for, and must be from 1 to "
                f"{min(self.max_sequences, 1024)}, of 0 or more"
            )
        if n_prompt + request.max_new_tokens > longest:
            raise ValueError(
                f"a prompt of {n_prompt} tokens and {request.max_new_tokens} new ones do not fit max_seq = {longest}"
            )
        needs = self.cache.most_blocks(n_prompt + request.max_new_tokens, self.at_once)
        if any(need > group.pool.n_blocks for need, group in zip(needs, self.cache.groups, strict=True)):
            raise ValueError(
                f"a prompt of {n_prompt} tokens and {request.max_new_tokens} new ones do not fit the cache, which "
                f"holds {self.cache.groups[0].pool.n_blocks * self.cache.block_size}"
            )

    def cancel(self, request: int, sample: int | None = None) -> None:
        """Forget a request, or one of its continuations that has begun; no more events come of it.

        What is not there, or not any more, is ignored.
        """
        for queue in (self._running, self._waiting):
            for sequence in [one for one in queue if one.request_id == request]:
                if sample is None or (sample == sequence.sample and not sequence.n_forks):
                    queue.remove(sequence)
                    self._leave(sequence)
        self._events = [one for one in self._events if one.request != request or sample not in (None, one.sample)]

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._waiting or self._running or self._events)

    @property
    def n_running(self) -> int:
        """Sequences with room in the cache."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Sequences without."""
        return len(self._waiting)

    # ----------------------------------------------------------------------------------------------------------- steps

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Go on by one step, and return what came of it, for each sequence in order."""
        events, self._events = self._events, []
        self.statistics.steps += 1
        with torch.compiler.set_stance("force_eager"):
            self._admit()
            events += self._read_prompts()
            events += self._write()
        return events

    def _admit(self) -> None:
        """Let requests in, in order, while what is unread of them and a block more have room beside all that is."""
        while self._waiting:
            sequence = self._waiting[0]
            places = sum(1 + running.n_forks for running in self._running)
            if places + 1 + sequence.n_forks > self.max_sequences:
                return
            table = self.cache.open(sequence.text, share=self._share)
            unread = [self._room_to_read(one.table, len(one.text)) for one in self._running if one.table is not None]
            unread.append(self._room_to_read(table, len(sequence.text)))
            needs = [sum(of_group) + 1 for of_group in zip(*unread, strict=True)]
            if self._running and not self.cache.has_room(needs):
                self.cache.close(table)
                return
            self.statistics.shared_tokens += table.length
            sequence.table = table
            self._running.append(self._waiting.popleft())

    def _read_prompts(self) -> list[Event]:
        """Read at most ``chunk`` tokens of texts of which several are unread; those that are read whole go on."""
        chosen: list[_Sequence] = []
        counts: list[int] = []
        for sequence in [one for one in self._running if one.unread > 1 or one.n_forks]:
            count = min(sequence.unread, self.chunk)
            if chosen and max(*counts, count) * (len(chosen) + 1) > self.chunk:
                break
            if self._make_room(sequence, count):
                chosen.append(sequence)
                counts.append(count)
        with_room = [(one, count) for one, count in zip(chosen, counts, strict=True) if one.table is not None]
        if not with_room:
            return []
        chosen = [one for one, _ in with_room]
        new = [one.text[_table(one).length :][:count] for one, count in with_room]
        hidden, routings = read(self.model, self.cache, [_table(one) for one in chosen], new)
        self.statistics.prompt_tokens += sum(map(len, new))
        for sequence in chosen:
            self.cache.settle(_table(sequence), sequence.text)
        # A prompt's last token stands at the right, and serves all continuations.
        whole = [row for row, sequence in enumerate(chosen) if sequence.unread == 0]
        going_on = [(one, row) for row in whole for one in (chosen[row], *self._fork(chosen[row]))]
        if not going_on:
            return []
        rows = [row for _, row in going_on]
        last = [(row + 1) * hidden.shape[1] - 1 for row in rows]
        return self._draw_one_each([one for one, _ in going_on], self.model.head(hidden[rows, -1]), routings, last)

    def _write(self) -> list[Event]:
        """Read the one unread token of each sequence, and what is guessed to follow it."""
        ready = [one for one in self._running if one.unread == 1 and not one.n_forks]
        drafts = self._drafts(ready)
        for place, (sequence, draft) in enumerate(zip(ready, drafts, strict=True)):
            if sequence.table is None:
                continue  # it gave way to one before it
            if draft.tokens and not self.cache.has_room(self.cache.blocks_for(sequence.table, 1 + len(draft.tokens))):
                drafts[place] = draft = Draft()  # nobody gives way to a guess
            self._make_room(sequence, 1 + len(draft.tokens))
        rows = [(one, draft) for one, draft in zip(ready, drafts, strict=True) if one.table is not None]
        if not rows:
            return []
        sequences = [one for one, _ in rows]
        new = [[one.text[-1], *draft.tokens] for one, draft in rows]
        hidden, routings = read(self.model, self.cache, [_table(one) for one in sequences], new)
        columns = hidden.shape[1]
        if columns == 1:
            return self._draw_one_each(sequences, self.model.head(hidden[:, 0]), routings, list(range(len(rows))))
        events = []
        for row, (sequence, draft) in enumerate(rows):
            first = columns - 1 - len(draft.tokens)
            places = [row * columns + column for column in range(first, columns)]
            events += self._keep_of(draft, sequence, self.model.head(hidden[row, first:]), routings, places)
        return events

    def _drafts(self, ready: list[_Sequence]) -> list[Draft]:
        if self.drafter is None or not ready:
            return [Draft()] * len(ready)
        return self.drafter.propose(
            [
                Wanted(one.key, one.text, min(self.drafter.n_tokens, one.left - 1), one.request.sampling, one.generator)
                for one in ready
            ]
        )

    def _draw_one_each(
        self, sequences: list[_Sequence], logits: Float[Tensor, "B V"], routings: list[Routing], places: list[int]
    ) -> list[Event]:
        """One token more of each, drawn together for those whose settings agree."""
        by_settings: dict[Sampling, list[int]] = {}
        for row, sequence in enumerate(sequences):
            by_settings.setdefault(sequence.request.sampling, []).append(row)
        tokens = [0] * len(sequences)
        for settings, rows in by_settings.items():
            texts = [sequences[row].text for row in rows]
            drawn = sample(logits[rows], settings, [sequences[row].generator for row in rows], texts)
            for row, token in zip(rows, drawn.tolist(), strict=True):
                tokens[row] = token
        told = _told(logits, tokens, max(one.request.alternatives for one in sequences))
        events = []
        for sequence, token, of_it, place in zip(sequences, tokens, told, places, strict=True):
            events += self._append(sequence, [token], [of_it], routings, [place])
        return events

    def _keep_of(
        self,
        draft: Draft,
        sequence: _Sequence,
        logits: Float[Tensor, "k_plus_1 V"],
        routings: list[Routing],
        places: list[int],
    ) -> list[Event]:
        """What is kept of a draft, and one token more."""
        require_finite(logits)
        texts = [[*sequence.text, *draft.tokens[:count]] for count in range(len(draft.tokens) + 1)]
        tokens = accept(distribution(logits, sequence.request.sampling, texts), draft, sequence.generator)
        self.statistics.guessed += len(draft.tokens)
        self.statistics.accepted += len(tokens) - 1
        told = _told(logits[: len(tokens)], tokens, sequence.request.alternatives)
        return self._append(sequence, tokens, told, routings, places[: len(tokens)])

    def _append(
        self,
        sequence: _Sequence,
        tokens: list[int],
        told: "list[tuple[float, Alternatives]]",
        routings: list[Routing],
        places: list[int],
    ) -> list[Event]:
        """Put the tokens to the text, up to its end, and tell of each; ``places`` are theirs in the routings."""
        request, events = sequence.request, []
        finish: Finish | None = None
        for token, (log_probability, alternatives), place in zip(tokens, told, places, strict=True):
            if token == request.stop:
                finish = "stop"
                events.append(Event(sequence.request_id, sequence.sample, None, finish=finish))
                break
            sequence.text.append(token)
            self.statistics.new_tokens += 1
            finish = "length" if sequence.left == 0 else None
            experts = _experts(routings, place) if request.with_experts else ()
            alternatives = alternatives[: request.alternatives]
            events.append(
                Event(sequence.request_id, sequence.sample, token, log_probability, alternatives, experts, finish)
            )
            if finish:
                break
        if finish:
            self._running.remove(sequence)
            self._leave(sequence)
        else:
            table = _table(sequence)
            self.cache.cut(table, len(sequence.text) - 1)
            self.cache.settle(table, sequence.text)
        return events

    # ------------------------------------------------------------------------------------------------------------ room

    def _room_to_read(self, table: Table, n_tokens: int) -> list[int]:
        """Blocks of each group that reading a text of ``n_tokens`` to its end takes."""
        needs = self.cache.blocks_for(table, n_tokens - table.length)
        return [min(both) for both in zip(needs, self.cache.most_blocks(n_tokens, self.at_once), strict=True)]

    def _make_room(self, sequence: _Sequence, count: int) -> bool:
        """Make room for ``count`` more tokens of a sequence; those that were admitted last give way.

        False where the sequence itself had to.
        """
        while sequence.table is not None:
            if self.cache.has_room(self.cache.blocks_for(sequence.table, count)):
                self.cache.make_room(sequence.table, count)
                return True
            self._preempt(self._running[-1])
        return False

    def _preempt(self, sequence: _Sequence) -> None:
        self._running.remove(sequence)
        self.cache.close(_table(sequence))
        sequence.table = None
        self._waiting.appendleft(sequence)
        self.statistics.preemptions += 1

    def _leave(self, sequence: _Sequence) -> None:
        if sequence.table is not None:
            self.cache.close(sequence.table)
            sequence.table = None
        if self.drafter is not None:
            self.drafter.forget(sequence.key)

    # ------------------------------------------------------------------------------------------------------- sequences

    def _sequence(self, request_id: int, request: Request, sample: int, text: list[int]) -> _Sequence:
        generator = torch.Generator().manual_seed((request.seed << 10) + sample)
        return _Sequence(next(self._keys), request_id, sample, request, text, generator)

    def _fork(self, first: _Sequence) -> list[_Sequence]:
        """The other continuations of a prompt that has been read."""
        others = []
        for number in range(1, 1 + first.n_forks):
            other = self._sequence(first.request_id, first.request, number, list(first.text))
            other.table = self.cache.fork(_table(first))
            others.append(other)
        first.n_forks = 0
        self._running += others
        return others


Alternatives = tuple[tuple[int, float], ...]


def _table(sequence: _Sequence) -> Table:
    assert sequence.table is not None
    return sequence.table


def _told(logits: Float[Tensor, "B V"], tokens: list[int], alternatives: int) -> list[tuple[float, Alternatives]]:
    """Of each row the log-probability of its token, and so many of the likeliest tokens with theirs."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    own = log_probabilities.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    if not alternatives:
        return [(value, ()) for value in own]
    best = log_probabilities.topk(min(alternatives, logits.shape[1]), dim=-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(value, tuple(zip(*pair, strict=True))) for value, pair in zip(own, pairs, strict=True)]


def _experts(routings: list[Routing], place: int) -> tuple[tuple[int, ...], ...]:
    """The experts that one of the tokens was sent to in each mixture layer, best first."""
    chosen = []
    for routing in routings:
        selected, carried_out = routing.selected[place], routing.carried_out
        chosen.append(tuple((selected if carried_out is None else selected[carried_out[place]]).tolist()))
    return tuple(chosen)
