"""Layouts: what goes together, and the words that name one."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.config import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RouterConfig,
    format_layout,
    parse_layout,
)


def test_the_data_ranks_are_what_the_others_leave() -> None:
    """24 processes: 2 pipeline x 3 tensor leaves 4."""
    assert ParallelConfig(pipeline=2, tensor=3).over(24).data == 4


def test_sizes_that_multiply_to_the_processes() -> None:
    """The layout reported of GPT-4: 8 x 15 x 208 = 24,960, the experts within the 208."""
    layout = parse_layout("tp8,pp15,dp208,ep16")

    assert (layout.tensor, layout.pipeline, layout.data, layout.expert) == (8, 15, 208, 16)
    assert layout.over(24_960) == layout


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({"data": 2, "tensor": 2}, 8, "data: is 2, and pipeline 1 x tensor 2 x data 2 is 4, but there are 8 processes"),
        ({"tensor": 3}, 4, "tensor: is 3: pipeline 1 x tensor 3 is 3, which does not divide the 4 processes"),
        ({"pipeline": 3}, 4, "pipeline: is 3: pipeline 3 x tensor 1 is 3, which does not divide the 4 processes"),
        ({"expert": 4}, 6, "expert: is 4, and must divide the 6 data ranks"),
        ({"shard": "hybrid", "shard_group": 4}, 6, "shard_group: is 4, and must divide the 6 data ranks"),
        ({"shard": "hybrid", "shard_group": 2, "expert": 3}, 6, "shard_group: is 2, and must divide expert = 3"),
    ],
)
def test_sizes_that_do_not(settings: dict[str, object], processes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ParallelConfig(**settings).over(processes)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"shard": "hybrid"}, "shard_group"),
        ({"shard_group": 2}, "shard_group"),
        ({"reshard": False}, "reshard"),
        ({"schedule": "interleaved", "stages": 2}, "schedule"),
        ({"pipeline": 2, "stages": 2}, "stages"),
        ({"tensor": 0}, "tensor"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        ParallelConfig(**settings)
    assert error.value.key == key


def config_of(parallel: ParallelConfig, **model: object) -> Config:
    sizes = ModelConfig(vocab_size=64, n_layers=2, attention=AttentionConfig(n_heads=4, n_kv_heads=4, head_dim=8))
    return Config(model=replace(sizes, **model), data=DataConfig(sequence_length=64), parallel=parallel)


@pytest.mark.parametrize(
    ("parallel", "model", "key"),
    [
        (ParallelConfig(expert=3), {}, "parallel.expert"),
        (ParallelConfig(expert=2), {"dense_twin": True}, "parallel.expert"),
        (ParallelConfig(expert=2), {"router": RouterConfig(gradient="all_experts")}, "model.router.gradient"),
        (ParallelConfig(pipeline=3), {}, "parallel.pipeline"),
        (ParallelConfig(tensor=3), {}, "parallel.tensor"),
        (ParallelConfig(tensor=4), {"attention": AttentionConfig(n_heads=4, n_kv_heads=2)}, "parallel.tensor"),
        (
            ParallelConfig(tensor=2),
            {"attention": AttentionConfig(n_heads=4, qk_norm="full")},
            "model.attention.qk_norm",
        ),
        (ParallelConfig(tensor=2), {"dropout": 0.1}, "model.dropout"),
        (ParallelConfig(tensor=2), {"router": RouterConfig(apply="before", normalise=False)}, "model.router.apply"),
    ],
)
def test_a_model_that_a_layout_cannot_divide(parallel: ParallelConfig, model: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(parallel, **model)
    assert error.value.key == key


def test_one_key_head_serves_every_part() -> None:
    config_of(ParallelConfig(tensor=4), attention=AttentionConfig(n_heads=4, n_kv_heads=1))


def test_words_that_are_none() -> None:
    with pytest.raises(ConfigError, match=r"the layout tp8,pq3 has the word 'pq3'; known are tpN"):
        parse_layout("tp8,pq3")


def test_no_word_changes_nothing() -> None:
    assert parse_layout("", ParallelConfig(tensor=2)) == ParallelConfig(tensor=2)
    assert format_layout(ParallelConfig()) == "dp1"


@given(
    st.builds(
        lambda tensor, pipeline, stages, data, expert, shard, keep: ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            stages=stages if pipeline > 1 else 1,
            schedule="interleaved" if pipeline > 1 and stages > 1 else "1f1b",
            data=data * expert,
            expert=expert,
            shard=shard,
            shard_group=data * expert if shard == "hybrid" else None,
            reshard=not keep or shard == "replicate",
        ),
        *[st.integers(1, 9)] * 5,
        st.sampled_from(["replicate", "full", "hybrid"]),
        st.booleans(),
    )
)
def test_words_and_layouts_are_the_same(layout: ParallelConfig) -> None:
    assert replace(parse_layout(format_layout(layout)), data=layout.data) == layout
