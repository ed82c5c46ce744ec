"""Memory of a device: what stays against published arithmetic, what a step keeps against a rehearsal of it."""

from pathlib import Path

import pytest

from moe import config_file
from moe.config import ParallelConfig
from moe.planner.layout import Layout, layers_of, layout_in_words, slice_of
from moe.planner.memory import Step, micro_batches_in_flight, persistent

GPT4 = config_file.load(Path("configs/gpt4.yaml")).model
STEP = Step(sequence=8192, micro_batch=1, n_micro_batches=35, recipe="mixed", checkpointing="block")


def test_weights_of_gpt4_on_a_device() -> None:
    """1,821B in 16 bits on 8 x 15 devices are 30.35 GB each (the reported 1,831B would be 30.5)."""
    middle = slice_of(GPT4, Layout(tensor=8, pipeline=15), stage=7)
    assert middle.total * 2 == pytest.approx(30.35e9, rel=1e-3)


def test_gpt4_with_zero_1_takes_61_6_gb_without_activations() -> None:
    """2 + 2 bytes for each of 15.17B parameters, and 12 bytes for a 208th of them."""
    layout = Layout(tensor=8, pipeline=15, data=208, zero=1)
    weights, gradients, optimizer = persistent(slice_of(GPT4, layout, stage=7), layout, STEP)

    assert weights == gradients == pytest.approx(30.35e9, rel=1e-3)
    assert optimizer == pytest.approx(0.875e9, rel=1e-3)
    assert weights + gradients + optimizer == pytest.approx(61.6e9, rel=1e-3)


def test_experts_spread_over_data_ranks_take_a_sixteenth() -> None:
    layout = Layout(tensor=8, pipeline=15, data=208, expert=16)
    middle = slice_of(GPT4, layout, stage=7)
    assert middle.experts == 8 * 16 * 918_552_576 // (8 * 16)
    assert middle.total == pytest.approx(1.40e9, rel=2e-3)


def test_every_parameter_is_on_some_device() -> None:
    """Of four stages; and with two stages on each of two ranks, a rank has the first and the third quarter."""
    whole = sum(slice_of(GPT4, Layout(pipeline=4), stage).total for stage in range(4))
    assert whole == GPT4.num_params()
    interleaved = Layout(pipeline=2, stages=2)
    assert layers_of(GPT4, interleaved, 0) == [*range(30), *range(60, 90)]
    assert sum(slice_of(GPT4, interleaved, stage).total for stage in range(2)) == GPT4.num_params()
    assert layers_of(GPT4, Layout(pipeline=7), 0) == [*range(18)]
    assert layers_of(GPT4, Layout(pipeline=7), 6) == [*range(103, 120)]


def test_micro_batches_in_flight() -> None:
    """1F1B: the first of 15 ranks holds 15, the last one; never more than there are."""
    layout = Layout(pipeline=15)
    assert [micro_batches_in_flight(layout, STEP, stage) for stage in (0, 7, 14)] == [15, 8, 1]
    few = Step(sequence=8, micro_batch=1, n_micro_batches=4)
    assert micro_batches_in_flight(layout, few, 0) == 4


def test_words_of_a_layout() -> None:
    layout = layout_in_words("tp8,pp15,dp208,ep16,zero1", ParallelConfig())
    assert layout == Layout(tensor=8, pipeline=15, data=208, expert=16, zero=1)
    assert layout.words() == "tp8,pp15,dp208,ep16,zero1"
    assert layout.devices == 24_960
    assert layout_in_words("dp8,full", ParallelConfig()).zero == 3
