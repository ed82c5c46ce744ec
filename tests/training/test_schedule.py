"""Learning rates worked out by hand: 100 steps, the first 10 of them warm-up, and a peak of 2."""

import pytest

from moe.config import ScheduleConfig
from moe.training.schedule import learning_rate


def rate(step: int, steps: int = 100, **settings: object) -> float:
    return learning_rate(ScheduleConfig(**({"warmup_steps": 10} | settings)), 2.0, step, steps)


@pytest.mark.parametrize("shape", ["constant", "cosine", "wsd"])
def test_warm_up_is_linear_and_never_zero(shape: str) -> None:
    assert [rate(step, shape=shape) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(10, shape=shape) == pytest.approx(2.0)


@pytest.mark.parametrize("shape", ["constant", "cosine", "wsd"])
def test_no_warm_up_starts_at_the_peak(shape: str) -> None:
    assert rate(0, shape=shape, warmup_steps=0) == pytest.approx(2.0)


def test_constant_stays() -> None:
    assert {rate(step, shape="constant") for step in range(10, 100)} == {2.0}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (10, 2.0),
        (40, 1.5),  # a third of the way: (1 + cos 60°) / 2 = 3/4
        (55, 1.0),  # half way
        (70, 0.5),  # two thirds: (1 + cos 120°) / 2 = 1/4
        (99, 0.000609),  # 89/90 of the way: 2 · (π / 180)² to first order
    ],
)
def test_cosine(step: int, expected: float) -> None:
    assert rate(step, shape="cosine") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("step", "expected"), [(10, 2.0), (55, 1.1), (70, 0.65)])
def test_cosine_down_to_a_tenth(step: int, expected: float) -> None:
    """0.2 + 1.8 · height."""
    assert rate(step, shape="cosine", final_fraction=0.1) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(10, 2.0), (59, 2.0), (60, 2.0), (61, 1.95), (80, 1.0), (99, 0.05)])
def test_wsd_is_flat_then_a_straight_line(step: int, expected: float) -> None:
    """Decay over the last 40 steps: 2 · (100 - step) / 40."""
    assert rate(step, shape="wsd", decay_fraction=0.4) == pytest.approx(expected)


def test_wsd_down_to_a_tenth() -> None:
    """0.2 + 1.8 · 1/2 half way down, 0.2 + 1.8 / 40 in the last step."""
    assert rate(80, shape="wsd", decay_fraction=0.4, final_fraction=0.1) == pytest.approx(1.1)
    assert rate(99, shape="wsd", decay_fraction=0.4, final_fraction=0.1) == pytest.approx(0.245)


def test_wsd_without_decay_is_constant() -> None:
    assert rate(99, shape="wsd", decay_fraction=0.0) == 2.0


def test_wsd_that_decays_from_the_start_warms_up_first() -> None:
    assert [rate(step, shape="wsd", decay_fraction=1.0) for step in (4, 10, 50)] == pytest.approx([1.0, 1.8, 1.0])


@pytest.mark.parametrize("shape", ["constant", "cosine", "wsd"])
def test_a_run_shorter_than_its_warm_up(shape: str) -> None:
    assert [rate(step, steps=3, shape=shape) for step in range(3)] == pytest.approx([0.2, 0.4, 0.6])


def test_a_warm_up_that_meets_the_decay_turns_without_a_jump() -> None:
    """Ten steps of warm-up in a run of 12 that decays over the last 8: up to 2 · 0.6, where (12 - 6) / 8 crosses it."""
    rates = [rate(step, steps=12, shape="wsd", decay_fraction=2 / 3) for step in range(12)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.25, 1.0, 0.75, 0.5, 0.25])
