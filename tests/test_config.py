"""Every check of moe/config refuses what it should and names the setting; derived numbers are worked out by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from moe.config import (
    AttentionConfig,
    BalanceConfig,
    CapacityConfig,
    Config,
    ConfigError,
    DataConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LatentConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    RouterConfig,
    RunConfig,
    ScheduleConfig,
    SharedExpertsConfig,
    SpecialExpertsConfig,
    TrainingConfig,
)


def model(router: dict[str, Any] | None = None, **sections: Any) -> ModelConfig:
    """A model whose router has these settings, without a load-balancing loss unless ``balance`` says so."""
    return ModelConfig(
        router=RouterConfig(**(router or {})), **{"balance": BalanceConfig(load_balance=0.0), **sections}
    )


def attending(positions: Any = "rotary", **settings: Any) -> ModelConfig:
    """A model whose attention has these settings."""
    return ModelConfig(attention=AttentionConfig(**settings), positions=positions)


GROUPS = {"selection": "group_limited", "n_groups": 4, "top_groups": 2}
YARN = {"scaling": "yarn", "factor": 4.0}
LLAMA3 = {"scaling": "llama3", "factor": 8.0}
HASH = {"selection": "hash", "weights": "equal"}
RELU = {"score": "relu", "normalise": False}

REFUSED: list[tuple[str, str, Callable[[], object]]] = [
    # key that is blamed, part of the reason, what is built
    ("n_heads", "at least 1", lambda: AttentionConfig(n_heads=0)),
    ("n_kv_heads", "at least 1", lambda: AttentionConfig(n_kv_heads=0)),
    ("n_kv_heads", "does not divide n_heads = 6", lambda: AttentionConfig(n_heads=6, n_kv_heads=4)),
    ("n_kv_heads", "does not divide n_heads = 6", lambda: AttentionConfig(n_heads=6, n_kv_heads=12)),
    ("rope_theta", "at least 1", lambda: AttentionConfig(rope_theta=0.5)),
    # ---- attention and positions
    ("clip", "positive", lambda: AttentionConfig(clip=0.0)),
    ("window", "at least 1", lambda: AttentionConfig(window=0)),
    ("full_every", "window is null", lambda: AttentionConfig(full_every=2)),
    ("first_full", "window is null", lambda: AttentionConfig(first_full=1)),
    ("fraction", "positions to none", lambda: RopeConfig(fraction=0.0)),
    ("factor", "scaling is none", lambda: RopeConfig(factor=4.0)),
    ("factor", "does nothing", lambda: RopeConfig(scaling="linear")),
    ("original_max_seq", "only with scaling yarn or llama3", lambda: RopeConfig(original_max_seq=4096)),
    ("truncate", "scaling is linear", lambda: RopeConfig(scaling="linear", factor=2.0, truncate=False)),
    ("mscale", "scaling is llama3", lambda: RopeConfig(scaling="llama3", factor=8.0, mscale=1.0)),
    ("attention_factor", "say it again", lambda: RopeConfig(**YARN, attention_factor=1.2, mscale=1.0)),
    ("beta_fast", "above beta_slow", lambda: RopeConfig(**YARN, beta_fast=1.0)),
    ("high_freq_factor", "above low_freq_factor", lambda: RopeConfig(**LLAMA3, high_freq_factor=1.0)),
    ("query_rank", "nothing latent", lambda: LatentConfig(query_rank=64)),
    ("rotary_dim", "pairs", lambda: LatentConfig(rank=64, rotary_dim=15)),
    *(
        (key, "no such thing", partial(AttentionConfig, latent=LatentConfig(rank=64), **{key: value}))
        for key, value in {"n_kv_heads": 1, "qk_norm": "head", "clip": 8.0, "sinks": True, "window": 16}.items()
    ),
    (
        "rope.fraction",
        "rotary_dim",
        lambda: AttentionConfig(rope=RopeConfig(fraction=0.5), latent=LatentConfig(rank=64)),
    ),
    ("attention.head_dim", "33 dimensions", lambda: attending(head_dim=33)),
    ("attention.rope.fraction", "15 dimensions", lambda: attending(head_dim=30, rope=RopeConfig(fraction=0.5))),
    ("attention.rope", "nothing turns", lambda: attending(rope=RopeConfig(fraction=0.5), positions="learned")),
    ("positions", "dimensions that turn", lambda: attending(latent=LatentConfig(rank=64), positions="none")),
    ("norm_bias", "rmsnorm has none", lambda: ModelConfig(norm_bias=False)),
    ("d_ff", "at least 1", lambda: FeedForwardConfig(d_ff=0)),
    ("n_experts", "at least 1", lambda: ExpertsConfig(n_experts=0)),
    ("every", "at least 1", lambda: ExpertsConfig(every=0)),
    ("first_dense", "at least 0", lambda: ExpertsConfig(first_dense=-1)),
    ("n_experts", "at least 0", lambda: SharedExpertsConfig(n_experts=-1)),
    ("gated", "nothing to gate", lambda: SharedExpertsConfig(gated=True)),
    ("top_k", "at least 1", lambda: RouterConfig(top_k=0)),
    ("scale", "positive", lambda: RouterConfig(scale=0.0)),
    ("normalise", "no gradient", lambda: RouterConfig(top_k=1)),
    # ---- the router's axes, each alone
    ("top_groups", "at least 1", lambda: RouterConfig(**{**GROUPS, "top_groups": 0})),
    ("jitter", "at least 0", lambda: RouterConfig(jitter=-0.1)),
    ("jitter", "below 1", lambda: RouterConfig(jitter=1.0)),
    ("temperature", "positive", lambda: RouterConfig(projection="cosine", temperature=0.0)),
    ("logit_norm", "positive", lambda: RouterConfig(logit_norm=0.0)),
    ("threshold", "positive", lambda: RouterConfig(selection="top_p", threshold=0.0)),
    ("threshold", "at most 1", lambda: RouterConfig(selection="top_p", threshold=1.5)),
    ("sampling_margin", "positive", lambda: RouterConfig(selection="sampled", sampling_margin=-0.01)),
    ("second_choice", "positive", lambda: RouterConfig(second_choice=0.0)),
    ("bias_rate", "positive", lambda: RouterConfig(selection_bias="sign", bias_rate=0.0)),
    # ---- keys that would do nothing
    ("projection_width", "projection is linear", lambda: RouterConfig(projection_width=8)),
    ("temperature", "projection is two_layer", lambda: RouterConfig(projection="two_layer", temperature=0.5)),
    ("n_groups", "selection is top_k", lambda: RouterConfig(n_groups=4)),
    ("top_groups", "selection is top_k", lambda: RouterConfig(top_groups=4)),
    ("group_score", "only with selection group_limited", lambda: RouterConfig(group_score="max")),
    ("threshold", "selection is top_k", lambda: RouterConfig(threshold=0.4)),
    ("sampling_margin", "selection is top_k", lambda: RouterConfig(sampling_margin=0.01)),
    ("bias_rate", "selection_bias is quantile", lambda: RouterConfig(selection_bias="quantile", bias_rate=0.1)),
    ("n_groups", "group_limited needs it", lambda: RouterConfig(selection="group_limited", top_groups=2)),
    ("top_groups", "group_limited needs it", lambda: RouterConfig(selection="group_limited", n_groups=2)),
    ("top_groups", "more than n_groups = 4", lambda: RouterConfig(**{**GROUPS, "top_groups": 5})),
    ("bias", "computes no logits", lambda: RouterConfig(**HASH, bias=True)),
    ("residual", "computes no logits", lambda: RouterConfig(**HASH, residual=True)),
    ("jitter", "computes no logits", lambda: RouterConfig(**HASH, jitter=0.01)),
    ("logit_norm", "computes no logits", lambda: RouterConfig(**HASH, logit_norm=1.0)),
    ("projection", "computes no logits", lambda: RouterConfig(**HASH, projection="cosine")),
    ("score", "computes no logits", lambda: RouterConfig(**HASH, score="sigmoid")),
    ("sparsity_rate", "sparsity is 0", lambda: BalanceConfig(sparsity_rate=1.5)),
    ("n_devices", "at least 2", lambda: BalanceConfig(device=0.1, n_devices=1)),
    ("factor", "dropless", lambda: CapacityConfig(factor=0.0)),
    ("order", "nothing is ever dropped", lambda: CapacityConfig(order="score")),
    ("scope", "nothing is ever dropped", lambda: CapacityConfig(scope="sequence")),
    ("in_evaluation", "nothing is ever dropped", lambda: CapacityConfig(in_evaluation=True)),
    # ---- axes that do not go together
    ("normalise", "no gradient", lambda: RouterConfig(top_k=1, score="sigmoid")),
    ("normalise", "may all be 0", lambda: RouterConfig(score="relu")),
    ("score", "only relu", lambda: RouterConfig(selection="positive")),
    ("score", "probabilities", lambda: RouterConfig(selection="top_p", score="sigmoid")),
    ("score", "probabilities", lambda: RouterConfig(selection="expert_choice", score="sigmoid")),
    ("score", "probabilities", lambda: RouterConfig(selection="sampled", score="sqrt_softplus")),
    ("selection_bias", "selection top_p", lambda: RouterConfig(selection="top_p", selection_bias="sign")),
    ("selection_bias", "plain top_k", lambda: RouterConfig(**GROUPS, selection_bias="quantile")),
    ("noise", "selection sinkhorn", lambda: RouterConfig(selection="sinkhorn", noise="shazeer")),
    ("noise", "without replacement", lambda: RouterConfig(selection="top_p", noise="gumbel")),
    ("noise", "without a selection bias", lambda: RouterConfig(noise="gumbel", selection_bias="sign")),
    ("gradient", "set it to sampled", lambda: RouterConfig(gradient="heun")),
    ("normalise", "one by one", lambda: RouterConfig(selection="sampled", gradient="heun")),
    (
        "apply",
        "linear",
        lambda: RouterConfig(selection="sampled", gradient="heun", normalise=False, apply="before"),
    ),
    ("gradient", "second_choice", lambda: RouterConfig(gradient="all_experts", second_choice=0.5)),
    ("gradient", "no capacity", lambda: RouterConfig(gradient="all_experts", capacity=CapacityConfig(factor=1.0))),
    ("gradient", "apply after", lambda: RouterConfig(gradient="all_experts", apply="before")),
    ("gradient", "top_k or group_limited", lambda: RouterConfig(gradient="all_experts", selection="top_p")),
    ("second_choice", "no second", lambda: RouterConfig(top_k=1, normalise=False, second_choice=0.5)),
    ("second_choice", "no second", lambda: RouterConfig(selection="top_p", second_choice=0.5)),
    *(
        (
            "capacity.factor",
            "exact share",
            partial(RouterConfig, selection=chosen, top_k=k, normalise=False, capacity=CapacityConfig(factor=1.0)),
        )
        for chosen, k in (("expert_choice", 2), ("base", 1), ("all", 2))
    ),
    ("top_k", "one expert", lambda: RouterConfig(selection="base")),
    ("weights", "gradient all_experts", lambda: RouterConfig(weights="equal", gradient="all_experts")),
    ("weights", "nothing would train", lambda: RouterConfig(weights="equal")),
    # ---- the router and the experts
    ("second_choice", "at most 1", lambda: RouterConfig(second_choice=1.5)),
    ("router.n_groups", "must divide the 16", lambda: model({**GROUPS, "n_groups": 3})),
    ("router.top_groups", "leaves 8 experts", lambda: model({**GROUPS, "top_k": 9})),
    ("router.group_score", "one expert", lambda: model({**GROUPS, "n_groups": 16})),
    (
        "special.copy",
        "knows only MLPs",
        lambda: model({"selection": "expert_choice"}, special=SpecialExpertsConfig(copy=1)),
    ),
    ("special.zero", "all_experts", lambda: model({"gradient": "all_experts"}, special=SpecialExpertsConfig(zero=1))),
    ("router.apply", "after they are", lambda: model({"apply": "before"}, special=SpecialExpertsConfig(constant=1))),
    (
        "router.second_choice",
        "zero expert",
        lambda: model({"second_choice": 0.5}, special=SpecialExpertsConfig(zero=1)),
    ),
    ("zero", "at least 0", lambda: SpecialExpertsConfig(zero=-1)),
    # ---- losses that would train nothing
    ("balance.load_balance", "does not choose by", lambda: ModelConfig(router=RouterConfig(selection="sinkhorn"))),
    (
        "balance.importance",
        "does not choose by",
        lambda: model(HASH, balance=BalanceConfig(load_balance=0.0, importance=0.1)),
    ),
    (
        "balance.device",
        "does not choose by",
        lambda: model(HASH, balance=BalanceConfig(load_balance=0.0, device=0.1, n_devices=4)),
    ),
    (
        "balance.z_loss",
        "computes no logits",
        lambda: model(HASH, balance=BalanceConfig(load_balance=0.0, z_loss=0.001)),
    ),
    *(
        (
            f"balance.{loss}",
            "computes no logits",
            partial(model, HASH, balance=BalanceConfig(load_balance=0.0, **{loss: 0.1})),
        )
        for loss in ("entropy", "orthogonality")
    ),
    (
        "balance.importance",
        "zero expert",
        lambda: model(balance=BalanceConfig(importance=0.1), special=SpecialExpertsConfig(zero=1)),
    ),
    ("balance.noisy_load", "noise shazeer", lambda: model(balance=BalanceConfig(noisy_load=0.1))),
    (
        "balance.noisy_load",
        "selection top_k",
        lambda: model({**GROUPS, "noise": "shazeer"}, balance=BalanceConfig(noisy_load=0.1)),
    ),
    ("balance.sparsity", "selection positive", lambda: model(balance=BalanceConfig(sparsity=1e-8))),
    ("balance.entropy", "score sigmoid", lambda: model({"score": "sigmoid"}, balance=BalanceConfig(entropy=0.1))),
    (
        "balance.orthogonality",
        "no single matrix",
        lambda: model({"projection": "cosine"}, balance=BalanceConfig(orthogonality=0.1)),
    ),
    ("balance.special_weight", "no special experts", lambda: model(balance=BalanceConfig(special_weight=0.75))),
    ("balance.n_devices", "does not divide 16", lambda: model(balance=BalanceConfig(device=0.1, n_devices=3))),
    ("n_devices", "go together", lambda: BalanceConfig(device=0.1)),
    ("n_devices", "go together", lambda: BalanceConfig(n_devices=4)),
    ("sparsity_rate", "above 1", lambda: BalanceConfig(sparsity_rate=1.0)),
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
    assert RouterConfig(selection="top_p", threshold=1.0, top_k=1).normalise  # several experts whatever top_k says
    assert RouterConfig(top_k=1, selection="hash", weights="equal").normalise  # one weight of 1 is what is meant
    assert model({**GROUPS, "n_groups": 16, "group_score": "max"}).router.n_groups == 16
    assert model({**GROUPS, "top_k": 8}).router.top_k == 8  # all of two groups of four
    assert model({**HASH, "selection": "random"}).router.has_logits is False
    assert BalanceConfig(special_weight=0.0).special_weight == 0


def test_special_experts_are_routed_to_like_the_others() -> None:
    config = model({"top_k": 18}, special=SpecialExpertsConfig(zero=1, copy=1))
    assert config.routed_experts == 18
    with pytest.raises(ConfigError, match=r"is 19, but experts\.n_experts is 16 and 2 special ones"):
        model({"top_k": 19}, special=SpecialExpertsConfig(zero=1, copy=1))


@pytest.mark.parametrize(
    ("order", "in_evaluation", "top_k", "causal_in_training", "causal_in_evaluation"),
    [
        ("position", False, 2, True, True),  # later tokens find places taken, never the other way round
        ("choice", False, 2, False, True),  # a later token's first choice comes before an earlier one's second
        ("choice", False, 1, True, True),  # there are first choices only
        ("score", False, 1, False, True),  # a later token may score higher
        ("score", True, 2, False, False),
        ("position", True, 2, True, True),
    ],
)
def test_the_order_of_dropping_decides_whether_a_capacity_leaks(
    order: Any, in_evaluation: bool, top_k: int, causal_in_training: bool, causal_in_evaluation: bool
) -> None:
    capacity = CapacityConfig(factor=1.0, order=order, in_evaluation=in_evaluation)
    router = RouterConfig(top_k=top_k, normalise=False, capacity=capacity)
    assert router.is_causal(training=True) == causal_in_training
    assert router.is_causal(training=False) == causal_in_evaluation


@pytest.mark.parametrize(
    ("scope", "in_evaluation", "in_training", "evaluating"),
    [
        ("micro_batch", False, False, True),
        ("micro_batch", True, False, False),
        ("sequence", True, True, True),
    ],
)
def test_a_capacity_that_sequences_share_makes_them_depend_on_each_other(
    scope: Any, in_evaluation: bool, in_training: bool, evaluating: bool
) -> None:
    router = RouterConfig(capacity=CapacityConfig(factor=1.0, scope=scope, in_evaluation=in_evaluation))
    assert router.is_batch_independent(training=True) == in_training
    assert router.is_batch_independent(training=False) == evaluating


def test_key_and_value_heads_default_to_the_query_heads() -> None:
    assert AttentionConfig(n_heads=6).kv_heads == 6
    assert AttentionConfig(n_heads=6, n_kv_heads=1).kv_heads == 1


def test_a_token_sees_its_routed_and_the_shared_experts() -> None:
    experts = ExpertsConfig(d_ff=100)
    assert ModelConfig(experts=experts).active_width == 200  # top 2 x 100
    assert ModelConfig(experts=experts, shared=SharedExpertsConfig(n_experts=3)).active_width == 500  # + 3 x 100
    assert ModelConfig(experts=experts, shared=SharedExpertsConfig(n_experts=3, d_ff=10)).active_width == 230


def test_a_token_sees_no_more_mlps_than_there_are() -> None:
    """Four of two MLPs and six copies: at most 2 x 100."""
    few = model({"top_k": 4}, experts=ExpertsConfig(n_experts=2, d_ff=100), special=SpecialExpertsConfig(copy=6))

    assert few.active_width == 200


def test_what_null_stands_for() -> None:
    plain = RouterConfig()
    assert (plain.initial_temperature, plain.probability_mass, plain.margin, plain.bias_step) == (0.5, 0.4, 0.01, 0.001)
    assert plain.inner_width(4) is None
    assert RouterConfig(projection="cosine").inner_width(4) == 16
    assert RouterConfig(projection="two_layer").inner_width(4) == 32
    assert RouterConfig(projection="two_layer", projection_width=5).inner_width(4) == 5
    assert RouterConfig(projection="cosine", temperature=0.1).initial_temperature == 0.1
    assert RouterConfig(selection="top_p", threshold=0.7).probability_mass == 0.7
    assert RouterConfig(selection="sampled", sampling_margin=0.2).margin == 0.2
    assert RouterConfig(selection_bias="sign", bias_rate=0.01).bias_step == 0.01


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


def test_windows_by_layer() -> None:
    """GPT-OSS: the odd layers of 0, 1, 2, 3 see all. Qwen's way: the first ones do."""
    alternating = AttentionConfig(window=128, full_every=2)
    assert [alternating.window_of(layer) for layer in range(4)] == [128, None, 128, None]
    later = AttentionConfig(window=128, first_full=3)
    assert [later.window_of(layer) for layer in range(4)] == [None, None, None, 128]
    assert [AttentionConfig(window=7).window_of(layer) for layer in range(2)] == [7, 7]
    assert AttentionConfig().window_of(0) is None


def test_widths_of_attention() -> None:
    """DeepSeek-V3: queries of 128 + 64, values of 128, and 512 + 64 numbers a token in the cache."""
    latent = AttentionConfig(n_heads=128, head_dim=128, latent=LatentConfig(rank=512, query_rank=1536, rotary_dim=64))
    assert (latent.query_dim, latent.value_dim, latent.rotated_dim, latent.cached) == (192, 128, 64, (1, 64, 512))
    grouped = AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=128, rope=RopeConfig(fraction=0.5))
    assert (grouped.query_dim, grouped.value_dim, grouped.rotated_dim, grouped.cached) == (128, 128, 64, (8, 128, 128))


def test_the_bias_of_the_output_follows_the_others_unless_it_is_set() -> None:
    assert [AttentionConfig(bias=bias).has_output_bias for bias in (False, True)] == [False, True]
    assert not AttentionConfig(bias=True, output_bias=False).has_output_bias
