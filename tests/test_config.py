"""Every check of moe/config.py refuses what it should and names the setting; derived numbers are worked out by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from moe.config import (
    AttentionConfig,
    BalanceConfig,
    Config,
    ConfigError,
    DataConfig,
    ExpertsConfig,
    FeedForwardConfig,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
    RunConfig,
    ScheduleConfig,
    SharedExpertsConfig,
    TrainingConfig,
)

REFUSED: list[tuple[str, str, Callable[[], object]]] = [
    # key that is blamed, part of the reason, what is built
    ("n_heads", "at least 1", lambda: AttentionConfig(n_heads=0)),
    ("n_kv_heads", "at least 1", lambda: AttentionConfig(n_kv_heads=0)),
    ("n_kv_heads", "does not divide n_heads = 6", lambda: AttentionConfig(n_heads=6, n_kv_heads=4)),
    ("n_kv_heads", "does not divide n_heads = 6", lambda: AttentionConfig(n_heads=6, n_kv_heads=12)),
    ("head_dim", "even", lambda: AttentionConfig(head_dim=33)),
    ("rope_theta", "at least 1", lambda: AttentionConfig(rope_theta=0.5)),
    ("d_ff", "at least 1", lambda: FeedForwardConfig(d_ff=0)),
    ("n_experts", "at least 1", lambda: ExpertsConfig(n_experts=0)),
    ("every", "at least 1", lambda: ExpertsConfig(every=0)),
    ("first_dense", "at least 0", lambda: ExpertsConfig(first_dense=-1)),
    ("n_experts", "at least 0", lambda: SharedExpertsConfig(n_experts=-1)),
    ("gated", "nothing to gate", lambda: SharedExpertsConfig(gated=True)),
    ("top_k", "at least 1", lambda: RouterConfig(top_k=0)),
    ("scale", "positive", lambda: RouterConfig(scale=0.0)),
    ("normalise", "no gradient", lambda: RouterConfig(top_k=1)),
    ("load_balance", "at least 0", lambda: BalanceConfig(load_balance=-0.01)),
    ("z_loss", "at least 0", lambda: BalanceConfig(z_loss=float("nan"))),
    ("n_layers", "at least 1", lambda: ModelConfig(n_layers=0)),
    ("dropout", "between 0 and 1", lambda: ModelConfig(dropout=1.5)),
    ("dropout", "nothing would be left", lambda: ModelConfig(dropout=1.0)),
    ("norm_eps", "positive", lambda: ModelConfig(norm_eps=0.0)),
    ("init_std", "one way", lambda: ModelConfig(init_std=0.0)),
    ("router.top_k", "experts.n_experts is 16", lambda: ModelConfig(router=RouterConfig(top_k=17))),
    ("vocab_size", "257", lambda: DataConfig(vocab_size=256)),
    ("max_bytes", "at least 1", lambda: DataConfig(max_bytes=0)),
    ("lr", "positive", lambda: OptimizerConfig(lr=0.0)),
    ("lr", "positive", lambda: OptimizerConfig(lr=float("nan"))),
    ("eps", "positive", lambda: OptimizerConfig(eps=0.0)),
    ("beta1", "[0, 1)", lambda: OptimizerConfig(beta1=1.0)),
    ("beta2", "[0, 1)", lambda: OptimizerConfig(beta2=-0.1)),
    ("clip", "null turns clipping off", lambda: OptimizerConfig(clip=0.0)),
    ("weight_decay", "at least 0", lambda: OptimizerConfig(weight_decay=-0.1)),
    ("warmup_steps", "at least 0", lambda: ScheduleConfig(warmup_steps=-1)),
    ("decay_fraction", "between 0 and 1", lambda: ScheduleConfig(decay_fraction=1.1)),
    ("final_fraction", "between 0 and 1", lambda: ScheduleConfig(final_fraction=-0.1)),
    ("steps", "at least 1", lambda: TrainingConfig(steps=0)),
    ("keep_checkpoints", "at least 1", lambda: TrainingConfig(keep_checkpoints=0)),
    ("seed", "at least 0", lambda: TrainingConfig(seed=-1)),
    ("accumulation", "does not divide batch_size = 16", lambda: TrainingConfig(batch_size=16, accumulation=3)),
    ("name", "one folder", lambda: RunConfig(name="a/b")),
    ("name", "one folder", lambda: RunConfig(name="..")),
    ("name", "one folder", lambda: RunConfig(name="")),
    ("data.sequence_length", "model.max_seq is 1024", lambda: Config(data=DataConfig(sequence_length=1025))),
]


@pytest.mark.parametrize(("key", "reason", "build"), REFUSED)
def test_a_value_that_cannot_be_used_is_refused_by_name(key: str, reason: str, build: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as refused:
        build()
    assert refused.value.key == key
    assert reason in refused.value.reason


def test_the_edges_of_what_is_allowed_are_allowed() -> None:
    assert RouterConfig(top_k=1, normalise=False).top_k == 1
    assert ModelConfig(router=RouterConfig(top_k=16)).router.top_k == 16
    assert Config(data=DataConfig(sequence_length=1024)).data.sequence_length == 1024
    assert OptimizerConfig(clip=None).clip is None
    assert SharedExpertsConfig(n_experts=1, gated=True).gated


def test_key_and_value_heads_default_to_the_query_heads() -> None:
    assert AttentionConfig(n_heads=6).kv_heads == 6
    assert AttentionConfig(n_heads=6, n_kv_heads=1).kv_heads == 1


def test_a_token_sees_its_routed_and_the_shared_experts() -> None:
    experts = ExpertsConfig(d_ff=100)
    assert ModelConfig(experts=experts).active_width == 200  # top 2 x 100
    assert ModelConfig(experts=experts, shared=SharedExpertsConfig(n_experts=3)).active_width == 500  # + 3 x 100
    assert ModelConfig(experts=experts, shared=SharedExpertsConfig(n_experts=3, d_ff=10)).active_width == 230


def test_the_configured_dense_width_is_for_blocks_that_are_no_mixture() -> None:
    experts = ExpertsConfig(d_ff=100, first_dense=1)
    configured = ModelConfig(n_layers=2, experts=experts, feed_forward=FeedForwardConfig(d_ff=77))
    assert [configured.dense_width(layer) for layer in (0, 1)] == [77, 200]  # block 1: the twin of its mixture, 2 x 100

    left_open = ModelConfig(n_layers=2, experts=experts)
    assert [left_open.dense_width(layer) for layer in (0, 1)] == [200, 200]


@pytest.mark.parametrize(
    ("every", "first_dense", "expected"),
    [
        (1, 0, [0, 1, 2, 3, 4, 5]),
        (2, 0, [1, 3, 5]),
        (3, 0, [2, 5]),
        (1, 2, [2, 3, 4, 5]),
        (2, 2, [3, 5]),
    ],
)
def test_which_blocks_are_mixtures(every: int, first_dense: int, expected: list[int]) -> None:
    experts = ExpertsConfig(every=every, first_dense=first_dense)
    assert ModelConfig(n_layers=6, experts=experts).moe_layers == expected


def test_the_dense_twin_routes_nowhere() -> None:
    assert ModelConfig(dense_twin=True).moe_layers == []


def test_the_vocabulary_is_rounded_up_to_a_multiple_of_64() -> None:
    assert Config().with_vocab(4096).model.vocab_size == 4096
    assert Config().with_vocab(4097).model.vocab_size == 4160  # 65 x 64
    assert Config().with_vocab(1).model.vocab_size == 64


def test_a_configured_vocabulary_must_hold_the_tokenizer() -> None:
    config = Config(model=ModelConfig(vocab_size=300))
    assert config.with_vocab(300) is config
    with pytest.raises(ConfigError, match=r"model\.vocab_size: is 300, but the tokenizer has 301 ids"):
        config.with_vocab(301)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"experts": ExpertsConfig(every=8)}, "experts.every"),
        ({"experts": ExpertsConfig(first_dense=4)}, "experts.first_dense"),
        ({"feed_forward": FeedForwardConfig(d_ff=64)}, "feed_forward.d_ff"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(n_layers=4, **settings)
    assert caught.value.key == key
