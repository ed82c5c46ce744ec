"""What was reported of GPT-4 is beside what the shape implies, and every contradiction has its numbers."""

from dataclasses import replace
from pathlib import Path

import pytest

from moe import config_file
from moe.planner import reported

GPT4 = config_file.load(Path("configs/gpt4.yaml")).model


def test_no_number_of_the_shape_is_further_than_1_3_percent_from_its_report() -> None:
    residuals = {claim.key: claim.residual for claim in reported.claims(GPT4)}

    assert residuals["total"] == pytest.approx(0.0116, abs=1e-4)
    assert residuals["per_expert"] == pytest.approx(-0.0070, abs=1e-4)
    assert residuals["attention"] == pytest.approx(-0.0048, abs=1e-4)
    assert residuals["active"] == pytest.approx(-0.0083, abs=1e-4)
    assert residuals["forward"] == pytest.approx(-0.0127, abs=1e-4)
    assert residuals["training"] == pytest.approx(0.0029, abs=1e-4)
    assert residuals["dense_forward"] == pytest.approx(-0.016, abs=1e-3)
    assert residuals["tokens_per_expert"] == 0


def test_reports_that_arithmetic_contradicts_are_far_off() -> None:
    claims = {claim.key: claim for claim in reported.claims(GPT4)}

    assert claims["cost"].computed == 57e6
    assert claims["cost"].residual < -0.09
    assert claims["state"].residual > 1.5
    assert claims["node"].residual < -0.06
    assert claims["aws"].computed == 478_529.6


def test_every_contradiction_is_named() -> None:
    notes = " ".join(reported.contradictions(GPT4))
    for words in (
        "are GFLOP",
        "$63M at $1 an hour is 105 days",
        "$54M to $60M",
        "44.3% to 39.9%",
        "55.8%",
        "32.5 GB a GPU",
        "30.5 GB a GPU",
        "28.6 GB",
        "10.8 TB",
        "6 bytes a parameter",
        "7,256 tokens/s",
        "10 times as many as it allows",
        "59 sequences at once",
        "$43.84",
    ):
        assert words in notes


def test_other_models_are_not_spoken_of() -> None:
    assert reported.speaks_of(GPT4)
    assert reported.speaks_of(replace(GPT4, d_model=14_848))
    assert not reported.speaks_of(replace(GPT4, n_layers=96))
