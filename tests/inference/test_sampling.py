"""Drawing the next token, on distributions of four tokens."""

import pytest
import torch
from torch import Tensor

from moe.inference.sampling import Sampling, distribution, draw, keep_likely, penalise_repetition, sample

# Probabilities 1/8, 1/2, 1/8, 1/4.
FOUR = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def kept(logits: Tensor, **settings: object) -> list[list[int]]:
    """Which tokens of each row can still be drawn."""
    result = keep_likely(logits, Sampling(**settings))
    assert torch.equal(result[result.isfinite()], logits[result.isfinite()])
    return [row.isfinite().nonzero().flatten().tolist() for row in result]


def frequencies(n_draws: int, **settings: object) -> list[float]:
    draws = sample(FOUR.expand(n_draws, 4), Sampling(**settings), seeded(*range(n_draws)))
    return (torch.bincount(draws, minlength=4) / n_draws).tolist()


def test_greedy_takes_the_most_likely_and_draws_nothing() -> None:
    generators = seeded(0, 1)
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])

    assert sample(logits, Sampling(temperature=0.0), generators).tolist() == [1, 0]
    assert torch.equal(generators[0].get_state(), torch.Generator().manual_seed(0).get_state())


def test_without_settings_every_token_stays() -> None:
    assert kept(FOUR) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("top_k", "tokens"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k(top_k: int, tokens: list[int]) -> None:
    assert kept(FOUR, top_k=top_k) == [tokens]


def test_top_k_keeps_exactly_k_of_equal_tokens() -> None:
    """Keeping all that reach the k-th logit would keep all six."""
    assert len(kept(torch.zeros(1, 6), top_k=2)[0]) == 2
    # Tokens 0 and 2 tie for the third place.
    assert len(kept(FOUR, top_k=3)[0]) == 3


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [(0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [0, 1, 3]), (0.9, [0, 1, 2, 3])],
)
def test_top_p_is_the_smallest_set_that_reaches_p(top_p: float, tokens: list[int]) -> None:
    """In order 1/2, 3/4, 7/8, 1; of the two equal tokens the first is taken first."""
    assert kept(FOUR, top_p=top_p) == [tokens]


def test_top_p_follows_top_k_and_renormalises() -> None:
    """Of the two that top-k leaves, token 1 has 2/3: more than 0.6, which of all four it has not."""
    assert kept(FOUR, top_p=0.6) == [[1, 3]]
    assert kept(FOUR, top_k=2, top_p=0.6) == [[1]]


def test_rows_are_filtered_each_on_its_own() -> None:
    assert kept(torch.cat([FOUR, FOUR.flip(1)]), top_p=0.6) == [[1, 3], [0, 2]]


@pytest.mark.parametrize(
    ("min_p", "tokens"), [(0.0, [0, 1, 2, 3]), (0.24, [0, 1, 2, 3]), (0.26, [1, 3]), (0.51, [1]), (1.0, [1])]
)
def test_min_p_is_a_share_of_the_most_likely(min_p: float, tokens: list[int]) -> None:
    """The most likely has 1/2; the others have a quarter and a half of that."""
    assert kept(FOUR, min_p=min_p) == [tokens]


def test_repetition_divides_what_is_positive_and_multiplies_what_is_not() -> None:
    """Token 0 twice and token 2 once are held: 4 / 2 and -3 · 2; tokens 1 and 3 are new."""
    logits = torch.tensor([[4.0, 3.0, -3.0, -1.0], [1.0, 1.0, 1.0, 1.0]])

    assert penalise_repetition(logits, 2.0, [[0, 0, 2], []]).tolist() == [[2.0, 3.0, -6.0, -1.0], [1.0] * 4]
    assert penalise_repetition(logits, 1.0, [[0], [1]]) is logits


def test_greedy_minds_repetition_too() -> None:
    logits = torch.tensor([[4.0, 3.0, 0.0, 0.0]])
    penalised = Sampling(temperature=0.0, repetition_penalty=2.0)

    assert sample(logits, penalised, seeded(0), [[0]]).tolist() == [1]
    assert sample(logits, penalised, seeded(0), [[3]]).tolist() == [0]


def test_the_distribution_of_a_greedy_row_is_certain() -> None:
    assert distribution(FOUR, Sampling(temperature=0.0)).tolist() == [[0, 1, 0, 0]]


def test_the_distribution_after_all_filters() -> None:
    """Penalised by 2, log 1/2 becomes log 1/4: then 1, 2, 1, 2 of 6. Of the two likeliest, each has a half."""
    settings = Sampling(repetition_penalty=2.0, top_k=2)

    assert distribution(FOUR, settings, [[1]])[0].tolist() == pytest.approx([0, 0.5, 0, 0.5])


def test_a_draw_is_where_the_running_sum_exceeds_its_number() -> None:
    """Of weights 0, 1, 0, 3: below a quarter token 1, from there on token 3, and never one without weight."""
    number = [float(torch.rand(1, dtype=torch.float64, generator=own)) for own in seeded(*range(50))]

    drawn = draw(torch.tensor([[0.0, 1.0, 0.0, 3.0]]).expand(50, 4), seeded(*range(50)))

    assert drawn.tolist() == [1 if u < 0.25 else 3 for u in number]
    assert {1, 3} == set(drawn.tolist())


def test_the_largest_number_still_draws_a_token_with_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([1 - 2.0**-53], dtype=torch.float64))

    for total in (0.1, 1.0, 3.0):
        assert draw(torch.tensor([[total, 0.0]]), seeded(0)).tolist() == [0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.125, 0.5, 0.125, 0.25]),
        # Temperature 1/2 squares the odds: 1, 16, 1, 4 of 22.
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
        # Temperature 2 takes their root: 1, 2, 1, √2 of 5.414.
        ({"temperature": 2.0}, [0.1847, 0.3694, 0.1847, 0.2612]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.51}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"min_p": 0.3}, [0, 2 / 3, 0, 1 / 3]),
    ],
)
def test_frequencies_over_4000_draws(settings: dict[str, object], expected: list[float]) -> None:
    """Four standard errors of a half, √(1/4 / 4000), are 0.032."""
    assert frequencies(4000, **settings) == pytest.approx(expected, abs=0.032)


def test_temperature_comes_before_top_p() -> None:
    """At temperature 1/2 token 1 has 16/22 = 0.73, enough for p = 0.7; at 1 it has 0.5."""
    assert frequencies(50, temperature=0.5, top_p=0.7) == [0, 1, 0, 0]


def test_one_seed_one_draw() -> None:
    logits = torch.zeros(3, 1000)

    assert torch.equal(sample(logits, Sampling(), seeded(1, 2, 3)), sample(logits, Sampling(), seeded(1, 2, 3)))
    assert not torch.equal(sample(logits, Sampling(), seeded(1, 2, 3)), sample(logits, Sampling(), seeded(4, 5, 6)))


def test_what_a_row_draws_does_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))

    together = sample(logits, Sampling(), seeded(1, 2, 3))
    alone = sample(logits[2:], Sampling(), seeded(3))

    assert together[2] == alone[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, and must be 0"),
        ({"temperature": float("nan")}, "temperature is nan, and must be 0"),
        ({"temperature": 1e-39}, "temperature is 1e-39, and must be 0"),
        ({"top_k": 0}, "top_k is 0, and must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0, and must"),
        ({"top_p": 1.5}, "top_p is 1.5, and must"),
        ({"min_p": -0.1}, "min_p is -0.1, and must"),
        ({"min_p": 1.1}, "min_p is 1.1, and must"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, and must"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf, and must"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
