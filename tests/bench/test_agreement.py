import math

import pytest
import torch

from moe.bench import agreement
from moe.bench.agreement import Agreement, pooled_error, relative_error, sample


def test_relative_error_is_the_ratio_of_norms():
    # (3, 4) against (3, 0): off by 4, of 3.
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(4 / 3)


def test_tensors_are_pooled_before_the_ratio():
    # Off by 1 and by 2 of a norm of 5: √5 / 5.
    values = {"a": torch.tensor([4.0]), "b": torch.tensor([6.0]), "not asked for": torch.tensor([9.0])}
    assert pooled_error(values, {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}) == pytest.approx(math.sqrt(5) / 5)


def test_an_error_beyond_the_tolerance_is_named():
    found = Agreement({"output": 1e-4, "gradient of x": 0.3}, tolerance=0.05)
    assert not found.holds
    assert found.failure() == "its gradient of x is off by 0.3 of float32's (at most 0.05)"
    assert Agreement({"output": 1e-4}, tolerance=0.05).holds


def test_a_nan_does_not_agree():
    error = relative_error(torch.tensor([math.nan, 1.0]), torch.ones(2))
    found = Agreement({"output": error, "gradient of x": 0.9}, tolerance=1.0)
    assert not found.holds
    assert "output" in found.failure()


def test_a_sample_is_bounded_and_takes_the_same_places(monkeypatch):
    monkeypatch.setattr(agreement, "SAMPLE", 4)
    assert sample(torch.arange(10.0).view(2, 5)).tolist() == [0.0, 3.0, 6.0, 9.0]
    assert sample(torch.arange(3, dtype=torch.bfloat16)).tolist() == [0.0, 1.0, 2.0]
