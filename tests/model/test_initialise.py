"""Initial weights: their size by kind of parameter, and that seed and name alone decide them."""

import math

import pytest
import torch
from torch import Tensor

from moe.config import (
    AttentionConfig,
    ConfigError,
    ExpertsConfig,
    FeedForwardConfig,
    ModelConfig,
    RouterConfig,
    SharedExpertsConfig,
)
from moe.model.initialise import initialise
from moe.model.transformer import Transformer

CUT = 0.9866
"""standard deviation of a standard normal that is cut at ±3: √(1 - 6 φ(3) / (2 Φ(3) - 1))"""
N_LAYERS = 2
STD = 0.05
RESIDUAL = STD / math.sqrt(2 * N_LAYERS)


def parameters(seed: int = 0, **changes: object) -> dict[str, Tensor]:
    settings: dict[str, object] = {
        "vocab_size": 128,
        "n_layers": N_LAYERS,
        "d_model": 64,
        "init_std": STD,
        "norm": "layernorm",
        "tie_embeddings": False,
        "attention": AttentionConfig(n_heads=4, head_dim=16, qk_norm="head", bias=True),
        "feed_forward": FeedForwardConfig(bias=True),
        "experts": ExpertsConfig(n_experts=4, d_ff=64, first_dense=1),
        "shared": SharedExpertsConfig(n_experts=2, gated=True),
        "router": RouterConfig(top_k=2),
    }
    model = Transformer(ModelConfig(**(settings | changes)), seed=seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embedding.weight", STD),
        ("head.weight", STD),
        ("blocks.0.attention.query.weight", STD),
        ("blocks.0.attention.output.weight", RESIDUAL),
        ("blocks.0.feed_forward.w_in.weight", STD),
        ("blocks.0.feed_forward.w_out.weight", RESIDUAL),
        ("blocks.1.feed_forward.experts.w_in", STD),
        ("blocks.1.feed_forward.experts.w_out", RESIDUAL),
        ("blocks.1.feed_forward.shared.mlp.w_in.weight", STD),
        ("blocks.1.feed_forward.shared.mlp.w_out.weight", RESIDUAL),
    ],
)
def test_standard_deviations(name: str, std: float) -> None:
    """At least 4096 values each, so the estimate is good to 1.1 % (one standard error)."""
    parameter = parameters()[name]

    assert parameter.std().item() == pytest.approx(CUT * std, rel=0.05)
    assert parameter.mean().item() == pytest.approx(0.0, abs=4 * std / math.sqrt(parameter.numel()))
    assert parameter.abs().max() <= 3 * std


def test_small_matrices_are_drawn_as_well() -> None:
    drawn = parameters()

    for name in ("blocks.1.feed_forward.router.weight", "blocks.1.feed_forward.shared.gate.weight"):
        assert drawn[name].std().item() == pytest.approx(CUT * STD, rel=0.3)


@pytest.mark.parametrize("matrix", ["w_in", "w_out"])
def test_each_expert_is_drawn_like_the_dense_layer(matrix: str) -> None:
    """A fan-in read off the stacked shape would make experts smaller by the root of their rows."""
    drawn = parameters()
    dense = drawn[f"blocks.0.feed_forward.{matrix}.weight"].std().item()

    for expert in drawn[f"blocks.1.feed_forward.experts.{matrix}"]:
        assert expert.std().item() == pytest.approx(dense, rel=0.05)


def test_experts_start_different_from_each_other() -> None:
    w_in = parameters()["blocks.1.feed_forward.experts.w_in"]

    assert all(not torch.equal(w_in[0], other) for other in w_in[1:])


def test_biases_start_at_zero_and_norms_at_one() -> None:
    drawn = parameters()
    biases = {name for name in drawn if name.rsplit(".")[-1] in ("bias", "b_in", "b_out")}
    norms = {name for name in drawn if name.endswith("norm.weight")}

    # Biases: 4 attention projections and 2 LayerNorms a block, the dense layer's 2, the experts' 2, the shared
    # experts' 2, the final norm. Norms: 4 a block (2 of the stream, queries, keys) and the final one.
    assert (len(biases), len(norms)) == (2 * 6 + 2 + 2 + 2 + 1, 2 * 4 + 1)
    assert all(drawn[name].eq(0).all() for name in biases)
    assert all(drawn[name].eq(1).all() for name in norms)
    assert all(drawn[name].std() > 0 for name in drawn.keys() - biases - norms)


def test_one_seed_one_model() -> None:
    first, again, other = parameters(seed=3), parameters(seed=3), parameters(seed=4)

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_the_global_random_state_does_not_enter() -> None:
    torch.manual_seed(1)
    first = parameters()
    torch.manual_seed(2)
    second = parameters()

    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_parameter_keeps_its_value_whatever_else_the_model_holds() -> None:
    """So a mixture, its dense twin and a deeper model of the same scale start from the same attention."""
    mixture = parameters()
    for other in (
        parameters(dense_twin=True),
        parameters(experts=ExpertsConfig(n_experts=8, d_ff=32)),
        parameters(norm="rmsnorm", tie_embeddings=True),
    ):
        shared = {name for name in mixture.keys() & other.keys() if ".attention." in name or name == "embedding.weight"}
        assert len(shared) == 1 + N_LAYERS * 10
        assert all(torch.equal(mixture[name], other[name]) for name in shared)


def test_two_parameters_of_one_shape_differ() -> None:
    drawn = parameters()

    assert not torch.equal(drawn["blocks.0.attention.query.weight"], drawn["blocks.1.attention.query.weight"])
    assert not torch.equal(drawn["blocks.0.attention.query.weight"], drawn["blocks.0.attention.key.weight"])


def test_a_model_without_memory_can_be_built() -> None:
    """On the meta device there is nothing to draw; the planner counts parameters so."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab_size=1000, n_layers=1, d_model=64))

    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_zero_router_is_refused() -> None:
    """All experts would tie, and every token go to the same k of them."""
    with pytest.raises(ConfigError, match="a zero router would send every token one way"):
        ModelConfig(init_std=0.0)


def test_a_model_from_the_meta_device_gets_its_temperature_when_it_is_initialised() -> None:
    """Memory from to_empty holds anything; a temperature is no draw, and was once left as it was found."""
    config = ModelConfig(
        vocab_size=16,
        n_layers=1,
        d_model=8,
        attention=AttentionConfig(n_heads=1, head_dim=8),
        router=RouterConfig(projection="cosine", temperature=0.3),
    )
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)

    initialise(model, config.init_std, config.n_layers, seed=0)

    drawn = dict(model.named_parameters())
    assert all(torch.equal(value, drawn[name]) for name, value in Transformer(config).named_parameters())
    assert drawn["blocks.0.feed_forward.router.temperature"].item() == pytest.approx(0.3)
