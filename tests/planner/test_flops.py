"""Arithmetic of a token against numbers worked out by hand and published ones."""

from dataclasses import replace
from pathlib import Path

import pytest

from moe import config_file
from moe.config import AttentionConfig, ExpertsConfig, ModelConfig, RouterConfig
from moe.planner.flops import count_flops, keys_seen

GPT4 = config_file.load(Path("configs/gpt4.yaml")).model
GPT3 = config_file.load(Path("configs/published/gpt3.yaml")).model

SMALL = ModelConfig(
    vocab_size=10,
    n_layers=2,
    d_model=4,
    max_seq=8,
    attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=2, bias=True, qk_norm="head"),
    experts=ExpertsConfig(n_experts=4, d_ff=3),
    router=RouterConfig(top_k=2, bias=True),
)


def test_a_small_model_by_hand() -> None:
    """Biases, norms and the embedding are no products. In a layer queries 4x4, keys and values 4x2, output 4x4."""
    flops = count_flops(SMALL)

    assert flops.attention == 2 * 2 * (16 + 8 + 8 + 16)
    assert flops.experts == 2 * 2 * (2 * 3 * 4 * 3)  # two experts of three matrices
    assert flops.router == 2 * 2 * (4 * 4)
    assert flops.head == 2 * 40
    assert flops.scores_full == 2 * (2 * 2 * (2 + 2) * 8)  # two products of 2 heads x 2 with 8 keys, in two layers
    assert flops.scores_causal == flops.scores_full / 2
    assert flops.forward("products") == 192 + 288 + 64 + 80
    assert flops.training() == 3 * flops.forward("causal")


def test_gpt4_by_every_counting() -> None:
    """Shape A of the reports: 552.9 GFLOP of products, 36.2 of causal scores at 8,192 tokens, 2.156e25 to train."""
    flops = count_flops(GPT4, 8192)

    assert flops.forward("products") == pytest.approx(552.9e9, rel=1e-4)
    assert flops.scores_causal == 2 * 120 * 18_432 * 8192
    assert flops.scores_full == 4 * 120 * 18_432 * 8192
    assert flops.forward("causal") == pytest.approx(589.1e9, rel=1e-4)
    assert flops.training("products") * 13e12 == pytest.approx(2.156e25, rel=1e-3)
    assert flops.training("causal") * 13e12 == pytest.approx(2.30e25, rel=2e-3)
    assert flops.training("full_square") * 13e12 == pytest.approx(2.44e25, rel=2e-3)


def test_gpt3_took_3_14e23() -> None:
    """Brown et al. 2020, table D.1: 3.14e23 for 300B tokens, which is 6 N D."""
    assert count_flops(GPT3).training("6nd") * 300e9 == pytest.approx(3.143e23, rel=1e-3)


def test_a_window_is_what_a_query_sees_at_most() -> None:
    """Of 8 tokens, a window of 2 is seen as 1, 2, 2, ... keys: 15 / 8; in the limit of many tokens 2 - 2² / 16."""
    assert keys_seen(8, None) == 4
    assert keys_seen(8, 8) == keys_seen(8, 100) == 4
    assert keys_seen(8, 2) == 2 - 4 / 16 == 1.75
    windowed = replace(SMALL, attention=replace(SMALL.attention, window=2, full_every=2))
    per_key = 2 * 2 * (2 + 2)
    assert count_flops(windowed).scores_causal == per_key * (1.75 + 4)
    assert count_flops(windowed).scores_full == per_key * (2 + 8)


def test_what_is_computed_again_is_the_part_that_is_checkpointed() -> None:
    flops = count_flops(SMALL)

    assert flops.recomputed("none") == 0
    assert flops.recomputed("experts") == flops.experts
    assert flops.recomputed("attention") == flops.attention + flops.scores_causal
    assert flops.recomputed("block") == flops.forward() - flops.head
