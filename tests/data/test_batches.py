"""Batches as a pure function of (seed, step), and validation that scores each token once."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.data.batches import Batch, Batches, domain_schedule, validation_batches
from moe.data.prepare import HeldOut
from moe.errors import UserError

EOT = 0


def _stream(length: int, first: int = 1) -> np.ndarray:
    """A stream in which every token is different, so that a block says where it was cut."""
    return np.arange(first, first + length, dtype=np.uint16)


def _batches(**changes: int) -> Batches:
    settings = {"sequence_length": 8, "batch_size": 6, "seed": 3, **changes}
    train = {"long": _stream(1000), "short": _stream(50, first=2001)}
    return Batches(train, {"long": Fraction(3, 4), "short": Fraction(1, 4)}, **settings)


# ---------------------------------------------------------------------------------------------------------- the shares


def test_a_period_holds_each_domain_exactly_its_share_evenly_spread() -> None:
    # Due at (j + 1/2) / w: a at 1/8, 3/8, 5/8, 7/8, b at 1/4, 3/4, c at 1/2.
    assert domain_schedule([Fraction(4, 7), Fraction(2, 7), Fraction(1, 7)]).tolist() == [0, 1, 0, 2, 0, 1, 0]


@settings(deadline=None)
@given(st.lists(st.integers(1, 60).map(lambda weight: Fraction(weight, 7)), min_size=1, max_size=6))
def test_every_prefix_of_the_schedule_is_close_to_the_shares(shares: list[Fraction]) -> None:
    schedule = domain_schedule(shares)
    for domain, share in enumerate(shares):
        part = share / sum(shares)
        assert np.count_nonzero(schedule == domain) == part * len(schedule)
        seen = np.cumsum(schedule == domain)
        ideal = float(part) * np.arange(1, len(schedule) + 1)
        assert np.abs(seen - ideal).max() <= 0.5 + float(part) * len(shares) / 2 + 1e-9


def test_token_shares_are_those_asked_for_whatever_the_documents_lengths() -> None:
    """Mixing by documents gave .73, .26, .006, .004 for .4, .3, .2, .1; blocks give the shares exactly."""
    train = {name: _stream(length) for name, length in zip("abcd", (40_000, 9_000, 700, 90), strict=True)}
    shares = {name: Fraction(weight, 10) for name, weight in zip("abcd", (4, 3, 2, 1), strict=True)}
    batches = Batches(train, shares, sequence_length=16, batch_size=5, seed=0)
    tokens: Counter[int] = Counter()
    for step in range(20):  # 100 sequences: ten periods
        batch = batches.batch(step)
        for domain, row in zip(batch.domain.tolist(), batch.targets, strict=True):
            tokens[domain] += len(row)
    assert tokens == {0: 640, 1: 480, 2: 320, 3: 160}


# ---------------------------------------------------------------------------------------------------------- the batches


def test_a_batch_is_tokens_and_the_tokens_after_them_from_the_right_domain() -> None:
    batch = _batches().batch(0)
    assert batch.tokens.shape == batch.targets.shape == (6, 8)
    assert batch.tokens.dtype == batch.targets.dtype == batch.domain.dtype == torch.int64
    assert batch.scored is None
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert torch.equal(batch.domain, (batch.tokens[:, 0] > 2000).long())
    # Due at 1/6, 3/6, 5/6 and 1/2: at one half the first domain goes first.
    assert batch.domain.tolist() == [0, 0, 1, 0, 0, 0]


def test_batches_depend_on_seed_and_step_alone() -> None:
    forwards, backwards = _batches(), _batches()
    there = [forwards.batch(step) for step in range(30)]
    back = [backwards.batch(step) for step in reversed(range(30))][::-1]
    assert all(_equal(one, other) for one, other in zip(there, back, strict=True))
    assert _equal(_batches().batch(10**30), _batches().batch(10**30))
    assert not _equal(_batches(seed=4).batch(0), there[0])
    assert not _equal(there[1], there[0])


@pytest.mark.parametrize("borders", [[0, 6], [0, 3, 6], [0, 1, 2, 3, 4, 5, 6], [0, 2, 6]])
def test_rows_are_the_same_however_the_batch_is_divided(borders: list[int]) -> None:
    for step in (0, 7, 123):
        whole = _batches().batch(step)
        parts = [_batches().rows(step, start, stop) for start, stop in pairwise(borders)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        assert torch.equal(torch.cat([part.domain for part in parts]), whole.domain)


def test_the_text_does_not_depend_on_the_batch_size() -> None:
    small = [row for step in range(12) for row in _batches(batch_size=2).batch(step).tokens.tolist()]
    large = [row for step in range(2) for row in _batches(batch_size=12).batch(step).tokens.tolist()]
    assert small == large


@pytest.mark.parametrize("length", [40, 41, 47])  # with and without a remainder
def test_an_epoch_holds_every_block_once_and_the_next_is_cut_and_ordered_anew(length: int) -> None:
    batches = Batches({"a": _stream(length)}, {"a": Fraction(1)}, sequence_length=8, batch_size=1, seed=0)
    first, second = ([batches.batch(step).targets[0].tolist() for step in steps] for steps in (range(5), range(5, 10)))
    for epoch in (first, second):
        targets = [token for row in epoch for token in row]
        assert len(set(targets)) == len(targets) == 40  # each at most once, all but the remainder
    assert first != second
    assert sorted(first) != sorted(second)  # other borders, not only another order


def test_blocks_run_on_over_the_end_of_the_stream() -> None:
    stream = _stream(20)
    batches = Batches({"a": stream}, {"a": Fraction(1)}, sequence_length=8, batch_size=1, seed=0)
    following = {token: stream[(place + 1) % 20] for place, token in enumerate(stream.tolist())}
    wrapped = 0
    for step in range(40):
        batch = batches.batch(step)
        assert [following[token] for token in batch.tokens[0].tolist()] == batch.targets[0].tolist()
        wrapped += (batch.tokens == 20).any().item()
    assert wrapped > 0


def test_epochs_count_how_often_a_text_was_read() -> None:
    # 24 sequences: 18 of the 125 long blocks, 6 = one epoch of the short domain's 50 // 8 blocks.
    assert _batches().epochs(4) == {"long": 18 / 125, "short": 1.0}
    assert _batches().epochs(0) == {"long": 0.0, "short": 0.0}
    assert _batches(batch_size=3).epochs(1) == {"long": 2 / 125, "short": 1 / 6}


def test_a_domain_shorter_than_one_block_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"domain short: 50 training tokens are less than one block .* = 51"):
        _batches(sequence_length=50)
    assert _batches(sequence_length=49).batch(0).tokens.shape == (6, 49)


def test_rows_that_a_batch_does_not_have_are_refused() -> None:
    for step, start, stop in ((-1, 0, 1), (0, 3, 3), (0, 0, 7), (0, -1, 2)):
        with pytest.raises(IndexError):
            _batches().rows(step, start, stop)


# ----------------------------------------------------------------------------------------------------------- validation


def _held_out(*lengths: int) -> HeldOut:
    """Documents of distinct tokens, three bytes each."""
    pieces, first = [], 1
    for length in lengths:
        pieces += [np.array([EOT], np.uint16), _stream(length, first)]
        first += length
    texts = tuple(b"abc" * length for length in lengths)
    return HeldOut(names=tuple(map(str, lengths)), documents=texts, stream=np.concatenate(pieces))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.integers(1, 10).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length))),
    st.integers(1, 4),
)
def test_every_token_of_the_text_is_scored_exactly_once(lengths: list[int], window: tuple[int, int], rows: int) -> None:
    held_out, (sequence_length, stride) = _held_out(*lengths), window
    scored: list[int] = []
    for batch in validation_batches(
        held_out, domain=2, end_of_text=EOT, sequence_length=sequence_length, stride=stride, rows=rows
    ):
        assert batch.scored is not None
        assert batch.tokens.shape == batch.targets.shape == batch.scored.shape
        assert len(batch.tokens) <= rows
        assert batch.domain.tolist() == [2] * len(batch.tokens)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        scored += batch.targets[batch.scored].tolist()
    assert scored == list(range(1, sum(lengths) + 1))
    assert held_out.n_bytes == 3 * len(scored)


def test_windows_by_hand() -> None:
    # Stream: 0 1 2 3 4 0 5 6 7 -> targets 1 2 3 4 0 5 6 7, windows of 4 every 3, the last moved back to the end.
    (batch,) = validation_batches(_held_out(4, 3), domain=0, end_of_text=EOT, sequence_length=4, stride=3, rows=8)
    assert batch.scored is not None
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [3, 4, 0, 5], [4, 0, 5, 6]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [4, 0, 5, 6], [0, 5, 6, 7]]
    assert batch.scored.int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]


def test_a_smaller_stride_gives_every_token_its_context() -> None:
    held_out = _held_out(40)
    for batch in validation_batches(held_out, domain=0, end_of_text=EOT, sequence_length=16, stride=4, rows=100):
        assert batch.scored is not None
        assert batch.scored[0].all()
        assert not batch.scored[1:, :12].any()  # each of the others is predicted from 13 tokens or more


def test_a_uniform_model_needs_the_bits_of_its_vocabulary_over_the_bytes_of_a_token() -> None:
    held_out = _held_out(7, 30, 1)
    nats = 0.0
    for batch in validation_batches(held_out, domain=0, end_of_text=EOT, sequence_length=8, stride=8, rows=3):
        logits = torch.zeros(*batch.targets.shape, 64)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        assert batch.scored is not None
        nats += losses[batch.scored.flatten()].sum().item()
    # 64 tokens: 6 bits a token of 3 bytes.
    assert nats / np.log(2) / held_out.n_bytes == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_would_skip_tokens_is_refused(stride: int) -> None:
    with pytest.raises(UserError, match="the stride is"):
        next(validation_batches(_held_out(20), domain=0, end_of_text=EOT, sequence_length=8, stride=stride, rows=1))


def _equal(one: Batch, other: Batch) -> bool:
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.domain, other.domain)
