"""Rows of a table of settings: what they read, what they write, and that one is the other backwards."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from transformers import AutoConfig

from moe import presets
from moe.config import ConfigError, ModelConfig
from moe.interop.families import FAMILIES
from moe.interop.representation import decisive, obstacles
from moe.interop.settings import FullAttention, HeadWidth, Key, Only, Rotary, SparseSteps, take, typed


def configs(**axes: some.SearchStrategy[Any]) -> some.SearchStrategy[ModelConfig]:
    """Models of every size, each of ``axes`` a choice by its dotted key."""
    sizes = {
        "vocab_size": some.integers(1, 10**6),
        "d_model": some.integers(1, 64).map(lambda half: 16 * half),
        "n_layers": some.integers(1, 12),
        "max_seq": some.integers(1, 10**6),
        "norm_eps": some.floats(1e-12, 1e-2),
        "tie_embeddings": some.booleans(),
        "attention.n_heads": some.sampled_from([4, 8]),
        "attention.n_kv_heads": some.sampled_from([None, 1, 2, 4]),
        "attention.head_dim": some.sampled_from([8, 16, 128]),
        "attention.rope_theta": some.floats(1.0, 1e8),
        "attention.bias": some.booleans(),
        "experts.n_experts": some.integers(2, 256),
        "experts.d_ff": some.integers(1, 4096),
    }
    return some.fixed_dictionaries(sizes | axes).map(lambda values: presets.build(ModelConfig, values))


MODELS = {
    "qwen3_moe": configs(
        **{
            "attention.qk_norm": some.just("head"),
            "experts.first_dense": some.just(0),
            "router.normalise": some.booleans(),
        }
    ),
    "glm4_moe": configs(
        **{
            "attention.qk_norm": some.sampled_from(["none", "head"]),
            "router.score": some.just("sigmoid"),
            "router.scale": some.floats(0.1, 10.0),
            "shared.n_experts": some.integers(0, 3),
        }
    ),
    "llama": configs(**{"dense_twin": some.just(True), "feed_forward.bias": some.booleans()}),
    "qwen3": configs(**{"dense_twin": some.just(True), "attention.qk_norm": some.just("head")}),
}


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25, deadline=None)
@given(data=some.data())
def test_what_is_written_is_read_as_what_it_was(name: str, data: some.DataObject) -> None:
    """Through the JSON that a file holds."""
    config, family = data.draw(MODELS[name]), FAMILIES[name]

    back = family.model_config(json.loads(json.dumps(family.settings_of(config))))

    assert decisive(back) == decisive(config)
    assert back.max_seq == config.max_seq
    assert obstacles(config, family) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_has_the_names(name: str) -> None:
    """Each that is written is an attribute of its configuration there, or one of transformers 4."""
    latent = {"attention.latent.rank": 16, "attention.latent.query_rank": 8} if name == "deepseek_v3" else {}
    shape = {"vocab_size": 320, "attention.head_dim": 48, "attention.n_heads": 4, "router.preset": None}
    config = presets.build(ModelConfig, shape | latent)
    written = FAMILIES[name].settings_of(config)

    theirs = AutoConfig.for_model(name, **written)

    older = {"rope_theta", "partial_rotary_factor", "rope_scaling"}
    for key, value in written.items():
        assert hasattr(theirs, key) or key in older, key
        if key not in older | {"rope_parameters"}:
            assert getattr(theirs, key) == value, key
    assert name == "gpt2" or theirs.rope_parameters["rope_theta"] == 10_000.0


def test_a_setting_goes_by_several_names() -> None:
    row = Key("num_experts", "experts.n_experts", also=("num_local_experts",))

    assert row.read({"num_experts": 4}) == row.read({"num_local_experts": 4}) == {"experts.n_experts": 4}
    assert row.read({"num_experts": None, "num_local_experts": 4}) == {"experts.n_experts": 4}
    with pytest.raises(ConfigError, match="num_local_experts: is 5, but num_experts is 4"):
        row.read({"num_experts": 4, "num_local_experts": 5})
    with pytest.raises(ConfigError, match="num_experts: is not given"):
        row.read({})


def test_absence_means_the_default() -> None:
    assert take({}, "a", 3) == take({"a": None}, "a", 3) == 3
    assert Key("num_key_value_heads", "attention.n_kv_heads", default=None).read({}) == {}
    assert Only("hidden_act", "silu", absent="silu").read({}) == {}
    with pytest.raises(ConfigError, match="clip: is 3, which our model has not"):
        Only("clip", None).read({"clip": 3})


@pytest.mark.parametrize(
    ("value", "kind"), [(1.5, int), (True, int), ("1", int), (1, bool), ("1", float), (None, float)]
)
def test_another_type_is_refused(value: object, kind: type) -> None:
    with pytest.raises(ConfigError, match=r"key: is .*, and must be"):
        typed("key", value, kind)


def test_a_whole_number_is_a_number() -> None:
    assert typed("rope_theta", 10000, float) == 10000.0
    assert isinstance(typed("rope_theta", 10000, float), float)


@pytest.mark.parametrize(
    ("theirs", "theta"),
    [
        ({}, 1e6),
        ({"rope_theta": 500}, 500.0),
        ({"rope_theta": 500, "rope_scaling": None}, 500.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}, 700.0),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 500}, 500.0),
        ({"rope_theta": 500, "rope_parameters": {"rope_type": "default", "rope_theta": 500}}, 500.0),
    ],
)
def test_the_base_of_the_rotation_in_both_spellings(theirs: dict[str, Any], theta: float) -> None:
    assert Rotary(1e6).read(theirs) == {"attention.rope_theta": theta}


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"rope_parameters": "yarn"}, "rope_parameters: is 'yarn', and must be a section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differs between kinds of layers"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.rope_type: is dynamic"),
        ({"rope_theta": "big"}, "rope_theta: is 'big', and must be a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings: is not given"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}},
            "rope_scaling.mscale: is 1.0 and mscale_all_dim null",
        ),
    ],
)
def test_a_rotation_that_our_model_has_not(theirs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rotary(1e6).read(theirs)


def test_the_width_of_a_head_follows_from_the_others() -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4}

    assert HeadWidth().read(shape) == {"attention.head_dim": 16}
    assert HeadWidth().read(shape | {"head_dim": 32}) == {"attention.head_dim": 32}
    assert HeadWidth(default=128).read(shape) == {"attention.head_dim": 128}
    with pytest.raises(ConfigError, match="num_attention_heads: is 5, which does not divide hidden_size = 64"):
        HeadWidth().read(shape | {"num_attention_heads": 5})
    with pytest.raises(ConfigError, match="head_dim: is 32, and must be hidden_size over num_attention_heads, 16"):
        HeadWidth(written=False).read(shape | {"head_dim": 32})


@pytest.mark.parametrize(
    ("theirs", "every", "first"),
    [
        ({}, 1, 0),
        ({"mlp_only_layers": [0, 1]}, 1, 2),
        ({"decoder_sparse_step": 2}, 2, 0),
        # Of layers 1, 3 and 5 the first is taken out.
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, 2, 3),
        # Layer 0 is dense already.
        ({"decoder_sparse_step": 2, "mlp_only_layers": [0]}, 2, 0),
    ],
)
def test_which_layers_are_mixtures(theirs: dict[str, Any], every: int, first: int) -> None:
    read = SparseSteps().read({"num_hidden_layers": 6, "intermediate_size": 5, **theirs})

    assert (read["experts.every"], read["experts.first_dense"]) == (every, first)
    assert ("feed_forward.d_ff" in read) == bool(theirs)


def test_windows_that_have_no_effect_are_no_obstacle() -> None:
    harmless = {"use_sliding_window": False, "sliding_window": 4096, "layer_types": ["full_attention"] * 3}

    assert FullAttention().read(harmless) == {}


REQUIRED = {
    "vocab_size": 320,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 96,
}
GROUPED = {"num_key_value_heads": 2}
NO_LAYERS_AHEAD = {"num_nextn_predict_layers": 0, "partial_rotary_factor": 1.0}
FOR_FAMILY = {
    "mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "qwen2_moe": GROUPED
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "glm4_moe": GROUPED
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
    | NO_LAYERS_AHEAD,
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "rms_norm_eps": 1e-6,
    },
    "gpt_oss": GROUPED
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "llama": {},
    "qwen3": GROUPED,
    "gpt2": {
        "n_embd": REQUIRED["hidden_size"],
        "n_layer": REQUIRED["num_hidden_layers"],
        "n_head": REQUIRED["num_attention_heads"],
        "n_positions": REQUIRED["max_position_embeddings"],
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_makes_of_it(name: str) -> None:
    """Rotation, ties, biases, norms of weights, widths of heads: read from the file as from its configuration there."""
    given = REQUIRED | FOR_FAMILY[name]
    theirs = AutoConfig.for_model(name, **given).to_dict()

    assert decisive(FAMILIES[name].model_config(given)) == decisive(FAMILIES[name].model_config(theirs))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "glm4_moe", "qwen3"])
def test_a_number_that_each_version_of_a_family_makes_up_must_be_given(name: str) -> None:
    """Mixtral would have 8 heads for keys, whatever the model, and Qwen3-MoE 4."""
    given = {key: value for key, value in (REQUIRED | FOR_FAMILY[name]).items() if key != "num_key_value_heads"}

    with pytest.raises(ConfigError, match="num_key_value_heads: is not given"):
        FAMILIES[name].model_config(given)
