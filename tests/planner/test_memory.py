"""Memory of a device: what stays against published arithmetic, what a step keeps against a rehearsal of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe import config_file
from moe.config import (
    AttentionConfig,
    Checkpointing,
    Config,
    DataConfig,
    ExpertsConfig,
    FeedForwardConfig,
    ModelConfig,
    ParallelConfig,
    SharedExpertsConfig,
    TrainingConfig,
    WeightDtype,
    parse_layout,
)
from moe.planner.layout import Layout, layers_of, layout_in_words, share_of
from moe.planner.memory import memory_of, micro_batches_in_flight, persistent
from moe.planner.step import Step, recipe_of
from moe.rehearsal.rehearse import rehearse

GPT4 = config_file.load(Path("configs/gpt4.yaml")).model
STEP = Step(sequence=8192, micro_batch=1, n_micro_batches=35, recipe="mixed", checkpointing="block")


def test_weights_of_gpt4_on_a_device() -> None:
    """1,821B in 16 bits on 8 x 15 devices are 30.35 GB each (the reported 1,831B would be 30.5)."""
    middle = share_of(GPT4, Layout(tensor=8, pipeline=15), rank=7)
    assert middle.total * 2 == pytest.approx(30.35e9, rel=1e-3)


def test_gpt4_with_zero_1_takes_61_6_gb_without_activations() -> None:
    """2 + 2 bytes for each of 15.17B parameters, and 12 bytes for a 208th of them."""
    layout = Layout(tensor=8, pipeline=15, data=208, zero=1)
    weights, gradients, optimizer = persistent(share_of(GPT4, layout, rank=7), layout, STEP)

    assert weights == gradients == pytest.approx(30.35e9, rel=1e-3)
    assert optimizer == pytest.approx(0.875e9, rel=1e-3)
    assert weights + gradients + optimizer == pytest.approx(61.6e9, rel=1e-3)


def test_experts_spread_over_data_ranks_take_a_sixteenth() -> None:
    layout = Layout(tensor=8, pipeline=15, data=208, expert=16)
    middle = share_of(GPT4, layout, rank=7)
    assert middle.experts == 8 * 16 * 918_552_576 // (8 * 16)
    assert middle.total == pytest.approx(1.40e9, rel=2e-3)


def test_every_parameter_is_on_some_device() -> None:
    """Of four stages; and with two stages on each of two ranks, a rank has the first and the third quarter."""
    whole = sum(share_of(GPT4, Layout(pipeline=4), stage).total for stage in range(4))
    assert whole == GPT4.num_params()
    interleaved = Layout(pipeline=2, stages=2)
    assert layers_of(GPT4, interleaved, 0) == [*range(30), *range(60, 90)]
    assert sum(share_of(GPT4, interleaved, stage).total for stage in range(2)) == GPT4.num_params()
    assert layers_of(GPT4, Layout(pipeline=7), 0) == [*range(17)]
    assert layers_of(GPT4, Layout(pipeline=7), 1) == [*range(17, 35)]
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


# ------------------------------------------------------------------------------------------------ against a rehearsal

SEVEN_BILLION = ModelConfig(
    vocab_size=32_768,
    n_layers=16,
    d_model=2048,
    max_seq=4096,
    tie_embeddings=False,
    attention=AttentionConfig(n_heads=16, head_dim=128),
    experts=ExpertsConfig(n_experts=16, d_ff=4096),
)
"""6.85B parameters of which a token uses 1.21B"""


def published(name: str, **changes: Any) -> ModelConfig:
    return replace(config_file.load(Path("configs") / f"{name}.yaml").model, **changes)


def of_peak(
    model: ModelConfig,
    *,
    micro_batch: int = 1,
    sequence: int = 4096,
    weight_dtype: WeightDtype = "bf16",
    checkpointing: Checkpointing = "none",
    accumulation: int = 1,
    words: str = "dp1",
    pipeline_rank: int = 0,
) -> float:
    """The planned peak over that of the real step, rehearsed on fake tensors."""
    layout = layout_in_words(words, ParallelConfig())
    config = Config(
        model=model,
        data=DataConfig(sequence_length=sequence),
        parallel=parse_layout(words),
        training=TrainingConfig(
            batch_size=micro_batch * accumulation * layout.data,
            accumulation=accumulation,
            precision="bf16",
            weight_dtype=weight_dtype,
            activation_checkpointing=checkpointing,
        ),
    )
    step = Step(
        sequence=sequence,
        micro_batch=micro_batch,
        n_micro_batches=accumulation,
        recipe=recipe_of(weight_dtype),
        checkpointing=checkpointing,
    )
    rank = pipeline_rank * layout.data * layout.tensor
    rehearsed = rehearse(config, micro_batch, processes=layout.devices, rank=rank)
    return memory_of(model, layout, step, pipeline_rank).total / rehearsed.peak.total


@pytest.mark.parametrize("checkpointing", ["none", "attention", "experts", "block"])
@pytest.mark.parametrize("weight_dtype", ["bf16", "fp32"])
def test_seven_billion_parameters_take_what_a_rehearsal_takes(
    weight_dtype: WeightDtype, checkpointing: Checkpointing
) -> None:
    model = replace(SEVEN_BILLION, n_layers=2)
    ratio = of_peak(model, micro_batch=4, weight_dtype=weight_dtype, checkpointing=checkpointing)
    assert ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (published("gpt4-mini", vocab_size=4096), {"micro_batch": 16, "sequence": 256}),
        (published("gpt4-mini", vocab_size=4096), {"micro_batch": 4, "sequence": 256, "accumulation": 2}),
        (published("toy", vocab_size=6144), {"micro_batch": 16, "sequence": 256, "weight_dtype": "fp32"}),
        (published("published/mixtral-8x7b", n_layers=2), {}),
        (published("published/mixtral-8x7b", n_layers=2), {"accumulation": 2, "weight_dtype": "fp32"}),
        (published("published/qwen3-30b-a3b", n_layers=3), {"micro_batch": 2}),
        (published("published/olmoe-1b-7b", n_layers=4), {"micro_batch": 2, "checkpointing": "block"}),
        (published("gpt4", n_layers=2), {"checkpointing": "block"}),
        (published("gpt4", n_layers=2), {"weight_dtype": "fp32"}),
        (replace(SEVEN_BILLION, n_layers=2, vocab_size=131_072, tie_embeddings=True), {}),
        (replace(SEVEN_BILLION, n_layers=2, dense_twin=True), {"micro_batch": 8}),
        (replace(SEVEN_BILLION, n_layers=2, shared=SharedExpertsConfig(n_experts=2)), {"micro_batch": 8}),
        (replace(SEVEN_BILLION, n_layers=2, feed_forward=FeedForwardConfig(bias=True)), {"micro_batch": 4}),
        (
            replace(SEVEN_BILLION, n_layers=2, feed_forward=FeedForwardConfig(activation="swiglu_clamped", bias=True)),
            {"micro_batch": 4},
        ),
    ],
    ids=lambda value: "",
)
def test_other_shapes_take_what_a_rehearsal_takes(model: ModelConfig, settings: dict[str, Any]) -> None:
    """Wide and narrow, accumulating, with a head that is the peak, dense, shared, and with grouped products."""
    assert of_peak(model, **settings) == pytest.approx(1, abs=0.015)


@pytest.mark.parametrize(
    ("model", "words", "settings"),
    [
        (SEVEN_BILLION, "dp4,ep4", {"micro_batch": 4}),
        (SEVEN_BILLION, "dp4,ep4", {"micro_batch": 4, "weight_dtype": "fp32"}),
        (SEVEN_BILLION, "dp4,full", {"micro_batch": 1}),
        (SEVEN_BILLION, "dp4,full", {"micro_batch": 2, "weight_dtype": "fp32"}),
        (SEVEN_BILLION, "dp8,ep4,full", {"micro_batch": 1}),
        (published("published/mixtral-8x7b"), "dp8,ep8", {}),
        (published("published/mixtral-8x7b"), "dp8,full", {}),
        (published("published/qwen3-30b-a3b"), "dp8,ep8", {"weight_dtype": "fp32"}),
        (published("published/qwen3-30b-a3b"), "dp8,full", {"checkpointing": "block"}),
        (published("gpt4"), "tp8,dp16,ep16", {"checkpointing": "block", "sequence": 8192}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_spread_model_takes_what_a_rehearsal_takes(model: ModelConfig, words: str, settings: dict[str, Any]) -> None:
    """Three blocks under each kind of layout, a rank of it; the whole of GPT-4 is in dev/LOG.md."""
    assert of_peak(replace(model, n_layers=3), words=words, **settings) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_pipelines_rank_takes_what_a_rehearsal_takes(rank: int) -> None:
    model = replace(SEVEN_BILLION, n_layers=6)
    assert of_peak(model, words="pp3", accumulation=4, pipeline_rank=rank) == pytest.approx(1, abs=0.03)
