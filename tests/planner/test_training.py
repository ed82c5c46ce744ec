"""Days, dollars and utilisation against published ones; bubbles and messages by hand."""

from pathlib import Path

import pytest

from moe import config_file
from moe.planner.devices import device
from moe.planner.layout import Layout
from moe.planner.step import Step
from moe.planner.training import (
    bubble,
    cost,
    device_days,
    megatron_days,
    mfu_of,
    step_time,
    traffic_of,
    training_days,
)

GPT4 = config_file.load(Path("configs/gpt4.yaml")).model
A100 = device("a100-80gb")
LAYOUT = Layout(tensor=8, pipeline=15, data=208, expert=16)
STEP = Step(sequence=8192, micro_batch=1, n_micro_batches=35, checkpointing="block")


def test_megatron_trains_gpt3_in_34_days_and_a_trillion_in_84() -> None:
    """Narayanan et al. 2021, section 5.1: 1024 A100s at 140 TFLOP/s, and 3072 at 163."""
    assert megatron_days(175e9, 300e9, 1024, 140e12) == pytest.approx(33.9, abs=0.05)
    assert megatron_days(1e12, 450e9, 3072, 163e12) == pytest.approx(83.2, abs=0.05)


def test_gpt4s_utilisation_is_what_its_days_imply_and_the_other_way() -> None:
    """2.15e25 FLOP on 25,000 A100s: 35.45 % in 90 days, 31.90 % in 100, and 93.8 days at 34 %."""
    assert mfu_of(2.15e25, 25_000, 312e12, 90) == pytest.approx(0.3545, abs=5e-5)
    assert mfu_of(2.15e25, 25_000, 312e12, 100) == pytest.approx(0.3190, abs=5e-5)
    assert training_days(2.15e25, 25_000, 312e12, 0.34) == pytest.approx(93.8, abs=0.05)
    assert device_days(2.15e25, 312e12, 0.34) == pytest.approx(2.346e6, rel=1e-3)
    assert training_days(2.15e25, 25_000, 312e12, mfu_of(2.15e25, 25_000, 312e12, 90)) == pytest.approx(90)


def test_dollars() -> None:
    """8,192 H100s for 55 days at $2 are $21.63M; 16 machines of $43.84 for a month of 730 hours are $512k."""
    assert cost(8192, 55, 2) == pytest.approx(21.63e6, rel=1e-3)
    assert cost(16, 730 / 24, 43.84) == pytest.approx(512e3, rel=1e-3)


def test_a_pipelines_bubble() -> None:
    """15 ranks and 35.2 micro-batches: 14 / 49.2; with two stages a rank half as many micro-batches are waited for."""
    assert bubble(Layout(pipeline=15), 35.2) == pytest.approx(0.284, abs=1e-3)
    assert bubble(Layout(pipeline=15, stages=2), 35) == pytest.approx(7 / 42)
    assert bubble(Layout(), 1) == 0


def test_messages_by_hand() -> None:
    """Of one micro-batch's activations, 8192 x 12288 in bfloat16 (201 MB): 12 collectives in each of 8 blocks, 7/8 of
    it each; two assignments a token, an eighth of the tokens, six times, 15/16 of them elsewhere."""
    width = 8192 * 12_288 * 2
    traffic = traffic_of(GPT4, LAYOUT, STEP, A100)

    assert traffic.tensor == 35 * 8 * 12 * width * 7 / 8
    assert traffic.expert == 35 * 8 * 6 * (2 * width / 8) * 15 / 16
    assert traffic.pipeline == 35 * 2 * width / 8
    assert traffic.tensor_seconds == traffic.tensor / 300e9  # within a node
    assert traffic.expert_seconds == traffic.expert / 25e9  # beyond


def test_a_step_is_the_sum_of_its_parts_and_its_utilisation_is_arithmetic_over_time() -> None:
    time = step_time(GPT4, LAYOUT, STEP, A100, efficiency=0.5)
    alone = step_time(GPT4, Layout(), STEP, A100, efficiency=0.5)

    assert time.recompute == pytest.approx(time.compute / 3, rel=0.01)  # all but the head once more, of three passes
    assert time.bubble / (time.total - time.data) == pytest.approx(14 / 49)
    assert alone.total == alone.compute + alone.recompute
    assert alone.mfu == pytest.approx(0.5 * alone.compute / alone.total)
