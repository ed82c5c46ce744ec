"""What decides the function of a model, and what a family makes of it."""

from typing import Any

import pytest

from moe import config_file, presets
from moe.config import ModelConfig
from moe.interop.families import FAMILIES
from moe.interop.representation import ONLY_IN_TRAINING, decisive, obstacles

Settings = dict[str, Any]


def model(settings: Settings | None = None) -> ModelConfig:
    """A mixture of six layers with ``settings`` by dotted key."""
    return presets.build(ModelConfig, {"vocab_size": 320, "n_layers": 6} | (settings or {}))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"attention.n_heads": 4}, {"attention.n_heads": 4, "attention.n_kv_heads": 4}),
        ({"dropout": 0.1, "init_std": 0.5, "max_seq": 9}, {}),
        ({"router.jitter": 0.1, "router.capacity.factor": 1.0}, {}),
        ({"balance.load_balance": 0.5, "experts.backend": "reference"}, {}),
        ({"router.selection_bias": "sign"}, {"router.selection_bias": "proportional"}),
        # Two shared experts of 64 are one of 128.
        ({"shared.n_experts": 2, "shared.d_ff": 64}, {"shared.n_experts": 1, "shared.d_ff": 128}),
        # The dense twin of 2 of 16 experts of 64 is that of 1 of 2 of 128.
        (
            {"dense_twin": True, "experts.d_ff": 64},
            {
                "dense_twin": True,
                "experts.d_ff": 128,
                "experts.n_experts": 2,
                "router.top_k": 1,
                "router.normalise": False,
            },
        ),
    ],
)
def test_these_compute_the_same(one: Settings, other: Settings) -> None:
    assert decisive(model(one)) == decisive(model(other))


@pytest.mark.parametrize(
    "settings",
    [
        {"experts.every": 2},
        {"experts.first_dense": 1, "feed_forward.d_ff": 9},
        {"norm_eps": 1e-5},
        {"attention.qk_norm": "head"},
        {"router.scale": 2.0},
        {"router.capacity.factor": 1.0, "router.capacity.in_evaluation": True},
        {"shared.n_experts": 1},
        {"tie_embeddings": False},
    ],
)
def test_these_do_not(settings: Settings) -> None:
    assert decisive(model(settings)) != decisive(model())


def test_every_setting_of_a_model_decides_or_is_known_not_to() -> None:
    """So a setting that is added later stands in the way of every export until a table carries it."""
    keys = {key.removeprefix("model.") for key in config_file.settings() if key.startswith("model.")}

    left = {key for key in keys - decisive(model()).keys() if not key.startswith(ONLY_IN_TRAINING)}

    # These say, with others that decide, which layers are mixtures, and how wide the shared experts are.
    assert left == {"dense_twin", "experts.first_dense", "shared.n_experts"}


def test_obstacles_name_the_setting_and_what_there_is() -> None:
    found = obstacles(model({"attention.qk_norm": "head", "norm_eps": 1e-5}), FAMILIES["mixtral"])

    assert found == ["model.attention.qk_norm is head, and mixtral has none"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"experts.every": 3}, "the model has mixtures in layers 2, 5, and mixtral mixtures in layers 0 to 5"),
        ({"dense_twin": True}, "the model has no mixtures, and mixtral mixtures in layers 0 to 5"),
    ],
)
def test_layers_are_told_in_spans(settings: Settings, line: str) -> None:
    assert obstacles(model(settings), FAMILIES["mixtral"]) == [line]


def test_what_the_other_side_could_not_even_read_is_an_obstacle() -> None:
    """OLMoE's heads are as wide as the model over their number, which 5 heads in 192 are not."""
    settings = {"attention.n_heads": 5, "attention.n_kv_heads": 5, "attention.qk_norm": "full"}

    [line] = obstacles(model(settings), FAMILIES["olmoe"])

    assert line == "num_attention_heads is 5, which does not divide hidden_size = 192, as olmoe would read it"
