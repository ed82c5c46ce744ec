"""Guessing changes the speed and not the text: token for token when greedy, by its distribution when drawn."""

from collections.abc import Callable, Sequence

import pytest
import torch
from scipy import stats

from moe.inference.engine import Engine, Event, Request
from moe.inference.sampling import Sampling, distribution
from moe.inference.speculative import Draft, Drafter, DraftModel, NGrams, Wanted, accept
from moe.model.transformer import Transformer

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5, 9, 11], [7], [1, 2, 3, 1, 2, 3, 1, 2], [63, 0, 63, 0]]
PlainGreedy = Callable[[Transformer, Sequence[int], int], list[int]]
TOO_RARE = 1e-3
"""a fair test that rejects has at most this probability; the seeds are fixed, so that it does so never or always"""


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    numbers = [engine.submit(request) for request in requests]
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return [[event.token for event in events if event.request == n and event.token is not None] for n in numbers]


def wanted(text: Sequence[int], n_tokens: int = 3, key: int = 0) -> Wanted:
    return Wanted(key, text, n_tokens, GREEDY, torch.Generator().manual_seed(0))


def another(model: Transformer) -> Transformer:
    """A smaller model with the same tokens, which agrees with ``model`` now and then."""
    return Transformer(model.config, seed=1).eval().double()


# ----------------------------------------------------------------------------------------------------------- acceptance


@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "certain"])
def test_what_is_kept_has_the_model_s_distribution(certain: bool) -> None:
    """p = (1/2, 1/4, 1/4, 0), guesses from q = (1/8, 1/2, 1/8, 1/4), or always token 1."""
    p = torch.tensor([0.5, 0.25, 0.25, 0.0])
    q = torch.tensor([0.0, 1.0, 0.0, 0.0]) if certain else torch.tensor([0.125, 0.5, 0.125, 0.25])
    generator = torch.Generator().manual_seed(0)
    guesses = torch.multinomial(q, 4000, replacement=True, generator=generator).tolist()

    kept = [accept(p.expand(2, 4), Draft([guess], None if certain else q[None]), generator) for guess in guesses]

    counts = torch.bincount(torch.tensor([tokens[0] for tokens in kept]), minlength=4).tolist()
    assert counts[3] == 0
    assert stats.chisquare(counts[:3], [2000, 1000, 1000]).pvalue > TOO_RARE
    # Σ min(p, q) = 1/8 + 1/4 + 1/8, or p of the only guess: a quarter. Four standard errors are 0.032.
    accepted = sum(len(tokens) == 2 for tokens in kept) / 4000
    assert accepted == pytest.approx(0.25 if certain else 0.5, abs=0.032)


def test_a_guess_as_likely_as_it_should_be_is_always_kept() -> None:
    p = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)

    assert all(accept(p, Draft([1, 0], p[:2]), generator) == [1, 0, 1] for _ in range(50))


def test_nothing_is_kept_after_the_first_guess_that_is_not() -> None:
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)

    assert accept(p, Draft([1, 1]), generator) == [0]
    assert accept(p, Draft([0, 0]), generator) == [0, 1]
    assert accept(p, Draft([0, 1]), generator) == [0, 1, 1]
    assert accept(p[:1], Draft(), generator) == [0]


# -------------------------------------------------------------------------------------------------------------- n-grams


def test_the_text_is_guessed_to_go_on_as_it_did_after_its_last_three_tokens() -> None:
    """3, 1, 2 stands at the beginning; 1, 2 alone was followed by 9 since then."""
    drafter = NGrams(3)

    assert drafter.propose([wanted([3, 1, 2, 8, 7, 1, 2, 9, 3, 1, 2])]) == [Draft([8, 7, 1])]


def test_fewer_tokens_will_do_and_the_last_time_counts() -> None:
    drafter = NGrams(3)

    assert drafter.propose([wanted([1, 5, 1, 6, 1])]) == [Draft([6, 1])]
    assert drafter.propose([wanted([1, 2, 3], key=1)]) == [Draft([])]
    assert drafter.propose([wanted([1, 5, 1, 6, 1, 6, 1], n_tokens=1)]) == [Draft([6])]


def test_texts_are_looked_up_apart_and_as_they_grow() -> None:
    drafter = NGrams(2)
    drafter.propose([wanted([1, 2, 1], key=0), wanted([1, 3, 1], key=1)])

    assert drafter.propose([wanted([1, 2, 1, 2, 4, 2], key=0)]) == [Draft([4, 2])]
    drafter.forget(1)
    assert drafter.propose([wanted([4, 4], key=1)]) == [Draft([4])]


# ---------------------------------------------------------------------------------------------------------- draft model


def test_a_model_guesses_what_it_would_write(plain: Transformer, plain_greedy: PlainGreedy) -> None:
    """Also after guesses that were not kept, and prompts longer than what it reads at once."""
    drafter = DraftModel(plain, 3, n_blocks=40, block_size=4, chunk=4)

    for text in ([5, 9, 11, 3, 2, 7, 8, 1, 2], [5, 9, 11, 3, 2, 7, 8, 1, 2, 60, 61]):
        [draft] = drafter.propose([wanted(text)])
        assert list(draft.tokens) == plain_greedy(plain, text, 3)
    drafts = drafter.propose([wanted([7], n_tokens=2, key=1), wanted([4, 4], n_tokens=0, key=2)])
    assert [list(draft.tokens) for draft in drafts] == [plain_greedy(plain, [7], 2), []]


def test_its_probabilities_are_those_it_draws_with(plain: Transformer) -> None:
    drafter, settings = DraftModel(plain, 2, n_blocks=40), Sampling(temperature=2.0, top_k=4)
    [draft] = drafter.propose([Wanted(0, [5, 9], 2, settings, torch.Generator().manual_seed(0))])

    with torch.no_grad():
        logits, _ = plain(torch.tensor([[5, 9, *draft.tokens]]))

    torch.testing.assert_close(draft.probabilities, distribution(logits[0, 1:3], settings))


def test_a_full_cache_guesses_nothing_and_goes_on_once_there_is_room(plain: Transformer) -> None:
    drafter = DraftModel(plain, 3, n_blocks=2, block_size=4)

    assert drafter.propose([wanted([1] * 7), wanted([2] * 7, key=1)]) == [Draft(), Draft()]
    assert len(drafter.propose([wanted([1] * 5)])[0].tokens) == 3


# ----------------------------------------------------------------------------------------------------- in an engine


def drafters(model: Transformer, kind: str) -> Drafter:
    match kind:
        case "n-grams":
            return NGrams(4)
        case "itself":
            return DraftModel(model, 3, n_blocks=200, block_size=4)
        case _:
            return DraftModel(another(model), 3, n_blocks=200, block_size=4)


KINDS = ["n-grams", "itself", "another model"]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same_token_for_token(attending: Transformer, plain_greedy: PlainGreedy, kind: str) -> None:
    engine = Engine(attending, max_sequences=3, block_size=4, chunk=5, drafter=drafters(attending, kind))

    written = answers(engine, [Request(prompt, 14, GREEDY) for prompt in PROMPTS])

    assert written == [plain_greedy(attending, prompt, 14) for prompt in PROMPTS]
    assert engine.cache.groups[0].pool.n_free == engine.cache.groups[0].pool.n_blocks
    if kind == "itself":
        # 13 tokens after the first, in steps of 3 guesses and one more, of which the last guesses none.
        assert engine.statistics.acceptance == 1.0


def test_where_blocks_are_short_nobody_gives_way_to_a_guess(plain: Transformer, plain_greedy: PlainGreedy) -> None:
    engine = Engine(plain, n_tokens=32, max_sequences=4, block_size=4, drafter=drafters(plain, "itself"))

    written = answers(engine, [Request([5, 9, row], 20, GREEDY) for row in range(4)])

    assert written == [plain_greedy(plain, [5, 9, row], 20) for row in range(4)]
    assert engine.cache.groups[0].pool.n_free == 8


def test_a_text_ends_at_its_stop_token_inside_a_guess(plain: Transformer, plain_greedy: PlainGreedy) -> None:
    free = plain_greedy(plain, [5, 9, 11], 14)
    stop = next(token for token in free[3:] if token not in free[:3])
    engine = Engine(plain, drafter=drafters(plain, "itself"))

    assert answers(engine, [Request([5, 9, 11], 14, GREEDY, stop=stop)]) == [free[: free.index(stop)]]


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_text_has_the_same_distribution(plain: Transformer, kind: str) -> None:
    """The third and fourth token after a prompt that repeats itself, over 1500 draws, against their exact
    probabilities: of the four likeliest tokens each time, all paths are added up."""
    settings, n_draws, prompt = Sampling(temperature=1.5, top_k=4), 1500, [1, 2, 1, 2, 1]
    paths: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(4):
        longer: dict[tuple[int, ...], float] = {}
        with torch.no_grad():
            logits = plain(torch.tensor([[*prompt, *path] for path in paths]))[0][:, -1]
        for (path, chance), row in zip(paths.items(), distribution(logits, settings), strict=True):
            longer |= {(*path, token): chance * float(row[token]) for token in row.nonzero().flatten().tolist()}
        paths = longer
    expected: dict[tuple[int, ...], float] = {}
    for path, chance in paths.items():
        expected[path[2:]] = expected.get(path[2:], 0.0) + chance

    engine = Engine(plain, max_sequences=200, drafter=drafters(plain, kind))
    drawn = answers(engine, [Request(prompt, 4, settings, seed=seed) for seed in range(n_draws)])

    assert engine.statistics.guessed > 500
    assert 0 < engine.statistics.acceptance <= 1
    counts = dict.fromkeys(expected, 0)
    for tokens in drawn:
        counts[tuple(tokens[2:])] += 1
    frequent = [pair for pair, chance in expected.items() if chance * n_draws >= 5]
    observed = [counts[pair] for pair in frequent]
    wished = [expected[pair] * n_draws for pair in frequent]
    observed.append(n_draws - sum(observed))
    wished.append(n_draws - sum(wished))
    assert len(frequent) > 10
    assert stats.chisquare(observed, wished).pvalue > TOO_RARE
