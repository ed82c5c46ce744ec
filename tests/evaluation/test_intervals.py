"""Intervals against numbers worked out by hand, and against scipy where it has the same one."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moe.evaluation.intervals import Floats, over_documents, over_items, ratio, t_quantile


def strata(*lengths: int) -> np.ndarray:
    return np.repeat(np.arange(len(lengths)), lengths)


def test_two_documents_by_hand() -> None:
    """2 nats in one token and 4 in one: the mean is 3, without either 4 or 2, so the variance 1/2 (1² + 1²) = 1."""
    found = over_documents(ratio, np.array([[2.0, 1.0], [4.0, 1.0]]), strata(2))
    assert found.value == 3
    assert found.half_width == pytest.approx(12.7062, abs=1e-4)  # t with one degree of freedom


def test_unequal_documents_by_hand() -> None:
    """10 in 4 tokens, 2 in 1, 3 in 1: 15/6 = 2.5; without each 5/2, 13/5 and 12/5, of mean 2.5.

    The variance is 2/3 (0² + 0.1² + 0.1²) = 0.04/3.
    """
    found = over_documents(ratio, np.array([[10.0, 4.0], [2.0, 1.0], [3.0, 1.0]]), strata(3))
    assert found.value == 2.5
    assert found.half_width == pytest.approx(4.30265 * math.sqrt(0.04 / 3), rel=1e-5)


@given(st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=2, max_size=20))
def test_of_documents_of_one_length_it_is_students_interval_of_the_mean(values: list[float]) -> None:
    found = over_documents(ratio, np.stack([values, np.ones(len(values))], axis=1), strata(len(values)))
    error = stats.sem(values)
    expected = 0.0 if error < 1e-12 else stats.t.ppf(0.975, len(values) - 1) * error
    assert found.half_width == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_over_two_domains_it_is_welchs_interval_of_a_difference() -> None:
    """A statistic that takes one domain's mean from the other's: two strata, Satterthwaite's degrees of freedom."""
    left, right = [3.1, 2.4, 4.0, 3.3], [1.0, 2.9, 1.7]
    sums = np.zeros((7, 4))
    sums[:4, 0], sums[:4, 1] = left, 1
    sums[4:, 2], sums[4:, 3] = right, 1

    def difference(sums: Floats) -> Floats:
        return ratio(sums[..., :2]) - ratio(sums[..., 2:])

    found = over_documents(difference, sums, strata(4, 3))
    expected = stats.ttest_ind(left, right, equal_var=False).confidence_interval()
    assert found.value - found.half_width == pytest.approx(expected.low)
    assert found.value + found.half_width == pytest.approx(expected.high)


def test_one_document_has_no_interval_and_none_has_no_value() -> None:
    one = over_documents(ratio, np.array([[6.0, 2.0]]), strata(1))
    assert one.value == 3 and math.isnan(one.half_width)
    assert str(one) == "3.000"
    none = over_documents(ratio, np.zeros((0, 2)), strata(0))
    assert math.isnan(none.value) and math.isnan(none.half_width)


def test_a_domain_of_one_document_is_taken_as_certain() -> None:
    """Two documents of one domain as above, and one of another domain with 6 nats in 2 tokens: 12/4 = 3.

    Without the first 10/3, without the second 8/3: 1/2 (1/3² + 1/3²) = 1/9.
    """
    sums = np.array([[2.0, 1.0], [4.0, 1.0], [6.0, 2.0]])
    found = over_documents(ratio, sums, strata(2, 1))
    assert found.value == 3
    assert found.half_width == pytest.approx(12.7062 / 3, abs=1e-4)


def test_documents_that_do_not_count_are_as_if_they_were_not_there() -> None:
    sums = np.array([[2.0, 1.0], [0.0, 0.0], [4.0, 1.0]])
    assert over_documents(ratio, sums, strata(3), counted=sums[:, 1] > 0) == over_documents(
        ratio, sums[[0, 2]], strata(2)
    )


def test_equal_documents_leave_no_doubt() -> None:
    assert over_documents(ratio, np.array([[2.0, 1.0], [4.0, 2.0]]), strata(2)).half_width == 0


@given(st.integers(1, 500).flatmap(lambda items: st.tuples(st.integers(0, items), st.just(items))))
def test_the_interval_of_a_share_is_wilsons(drawn: tuple[int, int]) -> None:
    successes, items = drawn
    expected = stats.binomtest(successes, items).proportion_ci(0.95, method="wilson")
    assert over_items(successes, items) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_a_share_of_none_by_hand() -> None:
    """0 of 10: from 0 to z² / (n + z²) = 3.8415 / 13.8415."""
    assert over_items(0, 10) == (0, pytest.approx(0.27753, abs=1e-5))


def test_the_quantile_takes_degrees_that_are_no_whole_number() -> None:
    assert t_quantile(1e9) == pytest.approx(1.95996, abs=1e-5)
    assert t_quantile(2) > t_quantile(2.5) > t_quantile(3)
