"""Parameters counted from the configuration are those of the model, for shapes that are listed and for any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moe import config_file
from moe.config import (
    AttentionConfig,
    BalanceConfig,
    ConfigError,
    ExpertsConfig,
    FeedForwardConfig,
    LatentConfig,
    ModelConfig,
    RouterConfig,
    SharedExpertsConfig,
    SpecialExpertsConfig,
)
from moe.config.parameters import ActiveConvention
from moe.model.transformer import Transformer

CONFIGS = Path("configs")
SHIPPED = sorted(
    path for path in CONFIGS.rglob("*.yaml") if "corpora" not in path.parts and "studies" not in path.parts
)


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def counted(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------- published shapes

PUBLISHED: list[tuple[str, int, int, ActiveConvention]] = [
    # all parameters, used ones, and how those are counted
    ("mixtral-8x7b", 46_702_792_704, 12_879_925_248, "all"),
    ("olmoe-1b-7b", 6_919_161_856, 1_282_017_280, "all"),
    ("qwen3-30b-a3b", 30_532_122_624, 3_353_032_704, "all"),
    ("deepseek-v3", 671_026_404_352, 37_552_282_624, "all"),
    ("gpt-oss-20b", 20_914_757_184, 4_187_440_704, "all"),
    ("gpt-oss-20b", 20_914_757_184, 3_608_307_264, "without_embedding"),
    ("dbrx", 131_596_523_520, 36_469_708_800, "all"),
    ("phi-3.5-moe", 41_873_153_344, 6_640_999_744, "all"),
    ("gpt2-xl", 1_557_611_200, 1_557_611_200, "all"),
]


@pytest.mark.parametrize(("name", "total", "active", "convention"), PUBLISHED)
def test_a_published_model_has_the_parameters_of_its_reference(
    name: str, total: int, active: int, convention: ActiveConvention
) -> None:
    """The references are transformers' classes with the released settings, instantiated and counted."""
    model = config_file.load(CONFIGS / "published" / f"{name}.yaml").model

    assert model.num_params() == total
    assert model.num_active_params(convention) == active


def test_shapes_without_a_file_have_the_parameters_of_their_reference() -> None:
    """DeepSeek-V2-Lite (latent attention without a latent query) and Granite-3.0-1b-a400m (tied)."""
    deepseek = ModelConfig(
        vocab_size=102_400,
        n_layers=27,
        d_model=2048,
        tie_embeddings=False,
        attention=AttentionConfig(n_heads=16, head_dim=128, latent=LatentConfig(rank=512)),
        feed_forward=FeedForwardConfig(d_ff=10_944),
        experts=ExpertsConfig(n_experts=64, d_ff=1408, first_dense=1),
        shared=SharedExpertsConfig(n_experts=2),
        router=RouterConfig(top_k=6),
    )
    granite = ModelConfig(
        vocab_size=49_155,
        n_layers=24,
        d_model=1024,
        attention=AttentionConfig(n_heads=16, n_kv_heads=8, head_dim=64),
        experts=ExpertsConfig(n_experts=32, d_ff=512),
        router=RouterConfig(top_k=8),
    )

    assert (deepseek.num_params(), deepseek.num_active_params()) == (15_706_484_224, 2_661_150_208)
    assert deepseek.num_active_params("without_embedding") == 2_661_150_208 - 102_400 * 2048
    assert (granite.num_params(), granite.num_active_params()) == (1_334_628_352, 428_658_688)


def test_gpt3_has_174_6_billion() -> None:
    """Brown et al. 2020: 12 L d² + 13 L d in the layers, V d once, 2048 positions, and the last norm."""
    model = config_file.load(CONFIGS / "published" / "gpt3.yaml").model
    d = 12_288

    assert model.num_params() == 12 * 96 * d**2 + 13 * 96 * d + 50_257 * d + 2048 * d + 2 * d == 174_604_259_328


def test_the_parts_of_gpt4() -> None:
    """Shape A by hand: attention 2 d q + 2 d c, an expert 2 d f, a router d E, two norms a layer and one at the end."""
    parts = config_file.load(CONFIGS / "gpt4.yaml").model.parameters()
    d, q, c, f = 12_288, 144 * 128, 128, 37_376

    assert parts.attention == 120 * (2 * d * q + 2 * d * c) == 54_735_667_200
    assert parts.per_expert == 2 * d * f == 918_552_576
    assert parts.experts == 120 * 16 * parts.per_expert
    assert 120 * parts.per_expert == 110_226_309_120
    assert (parts.router, parts.norms) == (120 * 16 * d, 241 * d)
    assert parts.embedding == parts.head == 100_352 * d
    assert parts.total == 1_820_849_418_240


def test_the_mini_keeps_the_ratios_of_gpt4() -> None:
    large = config_file.load(CONFIGS / "gpt4.yaml").model
    small = config_file.load(CONFIGS / "gpt4-mini.yaml").model

    for model in (large, small):
        attention = model.attention
        assert (model.experts.n_experts, model.router.top_k, attention.kv_heads) == (16, 2, 1)
        assert attention.n_heads * attention.head_dim / model.d_model == 1.5
        assert model.experts.d_ff / model.d_model == 73 / 24
    assert large.d_model == 64 * small.d_model
    assert large.n_layers == 30 * small.n_layers
    assert (large.feed_forward, large.router, large.tie_embeddings) == (
        small.feed_forward,
        small.router,
        small.tie_embeddings,
    )


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_every_shipped_configuration_has_the_parameters_of_its_model(path: Path) -> None:
    config = config_file.load(path)
    model = config.with_vocab(config.data.vocab_size).model if config.model.vocab_size is None else config.model

    assert model.num_params() == counted(on_meta(model))


# ------------------------------------------------------------------------------------------------------- any shape


@st.composite
def attentions(draw: st.DrawFn, positions: str) -> AttentionConfig:
    """Attention of either kind with everything that has a parameter."""
    n_heads = draw(st.sampled_from([1, 2, 4]))
    plain: dict[str, Any] = {"n_heads": n_heads, "head_dim": draw(st.sampled_from([4, 6]))}
    biases = {"bias": draw(st.booleans()), "output_bias": draw(st.none() | st.booleans())}
    if positions == "rotary" and draw(st.booleans()):
        latent = LatentConfig(
            rank=draw(st.integers(1, 9)),
            query_rank=draw(st.none() | st.integers(1, 9)),
            rotary_dim=draw(st.sampled_from([2, 4])),
            value_dim=draw(st.none() | st.integers(1, 9)),
        )
        return AttentionConfig(**plain, **biases, latent=latent)
    return AttentionConfig(
        **plain,
        **biases,
        n_kv_heads=draw(st.sampled_from([None, 1, n_heads])),
        qk_norm=draw(st.sampled_from(["none", "head", "full"])),
        sinks=draw(st.booleans()),
    )


@st.composite
def routers(draw: st.DrawFn, n_experts: int) -> RouterConfig:
    """Routers with every projection, and those without one."""
    if draw(st.integers(0, 4)) == 0:
        return RouterConfig(selection="hash", weights="equal", top_k=1)
    projection = draw(st.sampled_from(["linear", "cosine", "two_layer"]))
    return RouterConfig(
        top_k=draw(st.integers(1, n_experts)),
        normalise=False,
        projection=projection,
        projection_width=None if projection == "linear" else draw(st.none() | st.integers(1, 9)),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        noise=draw(st.sampled_from(["none", "shazeer"])),
        selection_bias=draw(st.sampled_from(["none", "sign"])),
        selection=draw(st.sampled_from(["top_k", "all"])),
    )


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Shapes over all options that decide which parameters there are."""
    n_experts = draw(st.integers(1, 5))
    positions = draw(st.sampled_from(["rotary", "learned", "none"]))
    n_layers = draw(st.integers(1, 4))
    norm = draw(st.sampled_from(["rmsnorm", "layernorm"]))
    shared = draw(st.integers(0, 2))
    special = SpecialExpertsConfig(**{kind: draw(st.integers(0, 2)) for kind in ("zero", "copy", "constant")})
    try:
        return ModelConfig(
            vocab_size=draw(st.integers(1, 40)),
            n_layers=n_layers,
            d_model=draw(st.integers(1, 12)),
            max_seq=draw(st.integers(1, 16)),
            positions=positions,
            norm=norm,
            norm_bias=norm == "rmsnorm" or draw(st.booleans()),
            tie_embeddings=draw(st.booleans()),
            head_bias=draw(st.booleans()),
            dense_twin=draw(st.booleans()),
            attention=draw(attentions(positions)),
            feed_forward=FeedForwardConfig(
                activation=draw(st.sampled_from(["swiglu", "swiglu_clamped", "gelu", "gelu_tanh", "relu"])),
                bias=draw(st.booleans()),
                d_ff=draw(st.none() | st.integers(1, 9)),
            ),
            experts=ExpertsConfig(
                n_experts=n_experts,
                d_ff=draw(st.integers(1, 9)),
                every=draw(st.integers(1, 2)),
                first_dense=draw(st.integers(0, n_layers - 1)),
            ),
            shared=SharedExpertsConfig(
                n_experts=shared,
                d_ff=draw(st.none() | st.integers(1, 9)) if shared else None,
                gated=bool(shared) and draw(st.booleans()),
            ),
            special=special,
            router=draw(routers(n_experts)),
            balance=BalanceConfig(load_balance=0.0),
        )
    except ConfigError:
        assume(False)
        raise


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(config=models())
def test_any_shape_has_the_parameters_of_its_model(config: ModelConfig) -> None:
    model = on_meta(config)
    parts = config.parameters()
    named = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def of(*words: str) -> int:
        return sum(count for name, count in named.items() if any(word in name for word in words))

    assert config.num_params() == parts.total == counted(model) == model.num_params()
    assert parts.experts == of(".experts.")
    assert parts.shared == of(".shared.")
    assert parts.special == of(".special.")
    assert parts.router == of(".router.")
    assert parts.attention == of(".attention.")
    assert config.num_active_params() == model.num_active_params()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(config=models())
def test_the_three_ways_of_counting_differ_by_what_is_left_out(config: ModelConfig) -> None:
    parts = config.parameters()
    everything, products, rest = (
        config.num_active_params(way) for way in ("all", "without_embedding", "without_embedding_and_head")
    )
    looked_up = parts.positions + (0 if config.tie_embeddings else parts.embedding)

    assert everything <= parts.total
    assert everything - products == looked_up
    assert products - rest == parts.head + (parts.embedding if config.tie_embeddings else 0)
    assert rest >= 0


def test_without_a_vocabulary_there_is_nothing_to_count() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        ModelConfig().num_params()
