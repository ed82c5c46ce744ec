"""A preset is a name for settings: where they come from, what wins over them, and what the name does not allow."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moe.config.presets
from moe.config import Config, ConfigError, ExpertsConfig, ModelConfig, Preset, RouterConfig
from moe.config_file import dump, parse, settings
from moe.errors import UserError
from moe.presets import model_config, presets, table

ROOT = Path(__file__).parents[1]
TOY = (ROOT / "configs" / "toy.yaml").read_text()
NAMES = get_args(Preset)
PRESET = "model.router.preset"


def values_of(config: ModelConfig) -> dict[str, Any]:
    """Every setting of a model by its dotted key."""

    def below(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        found = {}
        for name, value in tree.items():
            found |= below(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    return below(asdict(config), "")


def refusal(text: str, flags: dict[str, str] | None = None) -> list[str]:
    """The lines that answer the file toy.yaml with this text and these flags."""
    with pytest.raises(UserError) as refused:
        parse(text, "toy.yaml", flags or {})
    return str(refused.value).splitlines()


def in_file(preset: str, **router: str) -> str:
    """A file that names ``preset`` on line 3 and sets keys of the router from line 4 on."""
    lines = ["model:", "  router:", f"    preset: {preset}", *(f"    {key}: {value}" for key, value in router.items())]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- presets.yaml


def test_there_is_one_entry_for_every_name() -> None:
    assert list(presets()) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_says_what_it_is_in_words_that_fit_a_table(name: str) -> None:
    entry = presets()[name]
    for text in (entry.source, entry.formula, entry.when, *entry.defining.values()):
        assert text
        assert not set(text) & set("|\n`"), text
    assert entry.when.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_sets_settings_that_exist_and_is_defined_by_one_to_three_of_them(name: str) -> None:
    entry = presets()[name]
    assert all(f"model.{key}" in settings() for key in entry.set)
    assert "router.preset" not in entry.set
    assert 1 <= len(entry.defining) <= 3
    assert entry.defining.keys() <= entry.set.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_leaves_the_size_of_the_model_alone(name: str) -> None:
    sections = {key.partition(".")[0] for key in presets()[name].set}
    assert sections <= {"router", "shared", "special", "balance"}
    assert not {"router.projection_width", "shared.d_ff"} & presets()[name].set.keys()


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_works_on_the_toy_run_and_on_the_defaults(name: str) -> None:
    on_toy = parse(TOY, overrides={PRESET: name}).model
    on_defaults = model_config(name)
    assert (on_toy.d_model, on_defaults.d_model) == (128, 192)
    for config in (on_toy, on_defaults):
        values = values_of(config)
        assert values["router.preset"] == name
        for key, value in presets()[name].set.items():
            assert values[key] == value, key
            assert type(values[key]) is type(value), key  # 0 is no number with a point


def test_every_preset_differs_from_every_other() -> None:
    routers = {name: {**values_of(model_config(name)), "router.preset": None} for name in NAMES}
    same = [(one, other) for one in NAMES for other in NAMES if one < other and routers[one] == routers[other]]
    assert same == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_dumped_loads_as_it_was(name: str) -> None:
    config = parse(TOY, overrides={PRESET: name, "model.router.scale": "0.75"})
    assert config.model.router.preset == name
    assert config.model.router.scale == 0.75
    assert parse(dump(config)) == config


# ------------------------------------------------------------------------------------------------------------ what wins


def test_a_preset_in_the_file_lies_under_the_other_keys_of_the_file() -> None:
    router = parse(in_file("switch", jitter="0.05", logit_norm="1.0")).model.router
    assert (router.jitter, router.logit_norm) == (0.05, 1.0)  # the file's own
    assert (router.top_k, router.normalise, router.capacity.factor) == (1, False, 1.25)  # the preset's
    assert router.scale == 1.0  # the default


def test_where_in_the_file_the_preset_is_named_does_not_matter() -> None:
    first = parse("model: {router: {preset: switch, jitter: 0.05}}")
    last = parse("model.router.jitter: 0.05\nmodel: {router: {preset: switch}}")
    assert first == last


def test_a_preset_named_by_a_flag_replaces_the_files_choice_of_a_router() -> None:
    """Whatever the file had chosen: a leftover of another router would change what the name means, or clash with it."""
    text = (
        "model: {d_model: 64, router: {jitter: 0.05, scale: 3.0, top_k: 4}, special: {copy: 1}, balance: {z_loss: 1.0}}"
    )

    model = parse(text, overrides={PRESET: "switch"}).model

    assert (model.router.jitter, model.router.top_k) == (0.01, 1)  # the preset's
    assert (model.router.scale, model.special.copy, model.balance.z_loss) == (1.0, 0, 0.0)  # the defaults
    assert model.d_model == 64


def test_a_preset_named_by_a_flag_leaves_the_files_number_of_experts_a_token_unless_it_has_its_own() -> None:
    text = "model: {router: {top_k: 4}}"
    assert parse(text, overrides={PRESET: "olmoe"}).model.router.top_k == 4
    assert parse(text, overrides={PRESET: "gshard"}).model.router.top_k == 2


@given(was=st.sampled_from(NAMES), becomes=st.sampled_from(NAMES))
def test_a_resolved_configuration_takes_any_other_preset_by_flag(was: str, becomes: str) -> None:
    """Only what counts experts stays: k."""
    resolved = dump(parse("{}", overrides={PRESET: was}))
    top_k = {"model.router.top_k": "2"} if "router.top_k" not in presets()[becomes].set else {}

    again = parse(resolved, overrides={PRESET: becomes} | top_k)

    assert again == parse("{}", overrides={PRESET: becomes})


@pytest.mark.parametrize("text", ["{}", in_file("switch"), in_file("olmoe", jitter="0.2")])
def test_a_flag_wins_over_a_preset_wherever_that_is_named(text: str) -> None:
    router = parse(text, overrides={PRESET: "switch", "model.router.jitter": "0.05"}).model.router
    assert (router.preset, router.jitter) == ("switch", 0.05)
    assert parse(in_file("switch", jitter="0.2"), overrides={"model.router.jitter": "0.05"}).model.router.jitter == 0.05


@given(in_the_file=st.sampled_from(NAMES), by_flag=st.sampled_from(NAMES))
def test_beside_a_preset_named_by_a_flag_one_in_the_file_has_no_effect(in_the_file: str, by_flag: str) -> None:
    assert parse(in_file(in_the_file), overrides={PRESET: by_flag}) == parse("{}", overrides={PRESET: by_flag})


def test_a_flag_can_drop_the_preset_of_the_file() -> None:
    assert parse(in_file("deepseek_v3"), overrides={PRESET: "null"}) == Config()


@pytest.mark.parametrize(("text", "place"), [(in_file("swich"), "toy.yaml:3: model"), ("{}", "--model")])
def test_a_name_that_is_none_is_answered_with_the_nearest(text: str, place: str) -> None:
    [line] = refusal(text, {} if "swich" in text else {PRESET: "swich"})
    assert line.startswith(f"{place}.router.preset must be shazeer, gshard, ")
    assert line.endswith('not "swich"; did you mean switch?')


# ----------------------------------------------------------------------------------------- what the name does not allow


def contradicting(name: str, key: str) -> str:
    """A value of the right kind that is not the one by which ``name`` is defined, as a flag has it."""
    value, choices = presets()[name].set[key], settings()[f"model.{key}"].choices
    if choices:
        return next(choice for choice in choices if choice != value)
    return str(not value).lower() if isinstance(value, bool) else str(value + 1)


CONTRADICTIONS = [(name, key) for name in NAMES for key in presets()[name].defining]


@pytest.mark.parametrize(("name", "key"), CONTRADICTIONS)
def test_a_flag_that_contradicts_the_preset_is_refused_with_the_reason(name: str, key: str) -> None:
    value, reason = contradicting(name, key), presets()[name].defining[key]
    means = presets()[name].set[key]
    shown = str(means).lower() if isinstance(means, bool) else means
    expected = (
        f"--model.{key} is {float(value) if isinstance(means, float) else value}, but preset {name} means {shown}: "
        f"{reason}; leave it out, or set the preset to null and every axis yourself"
    )
    flag = {f"model.{key}": value}
    assert refusal("{}", {PRESET: name} | flag) == [expected]
    assert refusal(in_file(name), flag) == [expected]


@pytest.mark.parametrize(("name", "key"), CONTRADICTIONS)
def test_a_line_that_contradicts_the_preset_of_its_file_is_refused_and_gives_way_to_one_of_a_flag(
    name: str, key: str
) -> None:
    text = f"{in_file(name)}\nmodel.{key}: {contradicting(name, key)}"
    [line] = refusal(text)
    assert line.startswith(f"toy.yaml:4: model.{key} is ")
    assert f"preset {name} means" in line
    assert presets()[name].defining[key] in line
    # The same line under a flag is what the flag replaces.
    assert parse(text, overrides={PRESET: name}) == parse("{}", overrides={PRESET: name})


def test_the_value_that_the_preset_has_anyway_is_no_contradiction() -> None:
    assert parse(in_file("switch", top_k="1")) == parse(in_file("switch"))


def test_a_conflict_with_a_value_of_the_preset_names_the_preset_and_where_it_was_named() -> None:
    # 8 groups of 12 experts
    reason = "model.router.n_groups (from preset deepseek_v3) is 8, and must divide the 12 experts"
    twelve = {"model.experts.n_experts": "12"}
    assert refusal("{}", {PRESET: "deepseek_v3"} | twelve) == [f"--model.router.preset deepseek_v3: {reason}"]
    assert refusal(in_file("deepseek_v3"), twelve) == [f"toy.yaml:3: {reason}"]


def test_a_conflict_with_a_value_by_which_the_preset_is_defined_says_so() -> None:
    [line] = refusal("{}", {PRESET: "mixtral", "model.router.top_k": "1"})
    assert line.startswith(
        "--model.router.preset mixtral: model.router.normalise (from preset mixtral, by definition) "
        "is true with top_k 1: "
    )


@pytest.mark.parametrize(
    ("preset", "key", "value", "credit"),
    [
        ("base", "model.router.top_k", "2", "(from preset base: selection base)"),
        ("switch", "model.router.n_groups", "4", "(from preset switch: selection top_k)"),
        ("hash", "model.balance.load_balance", "0.01", "(from preset hash: selection hash)"),
        ("remoe", "model.router.normalise", "true", "(from preset remoe: score relu)"),
    ],
)
def test_a_conflict_of_an_override_with_the_preset_says_what_came_from_it(
    preset: str, key: str, value: str, credit: str
) -> None:
    [line] = refusal("{}", {PRESET: preset, key: value})
    assert line.startswith(f"--{key} is ")
    assert line.endswith(credit)


def test_what_a_flag_says_itself_is_not_credited_to_the_preset() -> None:
    [line] = refusal("{}", {PRESET: "olmoe", "model.router.selection": "top_k", "model.router.n_groups": "4"})
    assert line.startswith("--model.router.n_groups is set, but acts only with selection group_limited")
    assert line.endswith("and selection is top_k")


# ------------------------------------------------------------------------------------------------------------ in Python


@pytest.mark.parametrize("name", NAMES)
def test_in_python_a_preset_is_what_it_is_in_a_file(name: str) -> None:
    text = f"model: {{d_model: 64, router: {{preset: {name}, scale: 0.5}}, experts: {{d_ff: 32}}}}"
    assert model_config(name, d_model=64, router={"scale": 0.5}, experts={"d_ff": 32}) == parse(text).model


def test_settings_beside_a_preset_win_over_it_nested_or_dotted() -> None:
    nested = model_config("deepseek_v3", router={"n_groups": 4, "capacity": {"factor": 1.5}})
    assert (nested.router.n_groups, nested.router.top_groups, nested.router.capacity.factor) == (4, 4, 1.5)
    assert nested == model_config("deepseek_v3", **{"router.n_groups": 4, "router.capacity.factor": 1.5})


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("deepseek_v4", {}, r"preset: is deepseek_v4, which is none; did you mean deepseek_v\d\?"),
        ("switch", {"d_modle": 64}, "d_modle: is no setting of a model; did you mean d_model?"),
        ("switch", {"router": {"topk": 1}}, "router.topk: is no setting of a model; did you mean router.top_k?"),
        (
            "switch",
            {"experts": ExpertsConfig(n_experts=8)},
            "experts: is given as ExpertsConfig; give a dictionary of settings",
        ),
        (
            "deepseek_v3",
            {"experts": {"n_experts": 12}},
            "router.n_groups: (from preset deepseek_v3) is 8, and must divide the 12 experts",
        ),
        ("base", {"router": {"top_k": 2}}, "router.top_k: is 2, but selection base assigns each token to one expert "),
        ("gshard", {"router": {"capacity": {"factor": 0.0}}}, "router.capacity.factor: is 0.0; null makes"),
    ],
)
def test_in_python_too_what_cannot_be_used_is_refused_by_name(name: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        model_config(name, **wrong)
    assert str(refused.value).startswith(message) or re.fullmatch(message, str(refused.value))


@pytest.mark.parametrize(("name", "key"), CONTRADICTIONS)
def test_in_python_too_a_contradiction_is_refused(name: str, key: str) -> None:
    wrong = contradicting(name, key)
    value = {"true": True, "false": False}.get(wrong, type(presets()[name].set[key])(wrong))
    with pytest.raises(ConfigError, match=f"but preset {name} means") as refused:
        model_config(name, **{key: value})
    assert refused.value.key == key


def test_a_router_cannot_bear_the_name_of_a_preset_that_it_is_not() -> None:
    with pytest.raises(ConfigError, match="but preset deepseek_v3 means sign") as refused:
        RouterConfig(preset="deepseek_v3")
    assert refused.value.key == "selection_bias"
    with pytest.raises(ConfigError, match="but preset qwen2 means true") as refused:
        ModelConfig(router=RouterConfig(preset="qwen2", normalise=False))  # without its gated shared expert
    assert refused.value.key == "shared.gated"


def test_where_nothing_knows_the_presets_their_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe.config.presets, "_definition", None)  # as before moe.presets is imported
    with pytest.raises(ConfigError, match=r"preset: is switch, but .* use moe\.presets\.model_config"):
        RouterConfig(preset="switch", top_k=1, normalise=False)


# ------------------------------------------------------------------------------------------------- what routers declare

# Tokens compete for places by their rank in the whole batch (expert_choice, base, sinkhorn), or a later token's first
# choice takes the place of an earlier one's second (gshard, st_moe). In evaluation only expert choice still compares.
LEAKS_IN_TRAINING = {"gshard", "st_moe", "base", "sinkhorn", "expert_choice"}
LEAKS_IN_EVALUATION = {"expert_choice"}
# A buffer of the micro-batch (switch) keeps causality, and makes later sequences depend on earlier ones.
SEES_THE_BATCH_IN_TRAINING = LEAKS_IN_TRAINING | {"switch"}
SEES_THE_BATCH_IN_EVALUATION = {"expert_choice"}


@pytest.mark.parametrize("name", NAMES)
def test_what_each_preset_declares(name: str) -> None:
    router = model_config(name).router
    assert router.is_causal(training=True) == (name not in LEAKS_IN_TRAINING)
    assert router.is_causal(training=False) == (name not in LEAKS_IN_EVALUATION)
    assert router.is_batch_independent(training=True) == (name not in SEES_THE_BATCH_IN_TRAINING)
    assert router.is_batch_independent(training=False) == (name not in SEES_THE_BATCH_IN_EVALUATION)


def test_the_table_has_a_row_for_each_preset_and_says_where_it_leaks() -> None:
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table().splitlines()]
    assert head == ["preset", "source", "rule", "causal", "batch-independent", "when to use it"]
    assert rule == ["---"] * 6
    assert [row[0] for row in rows] == [f"`{name}`" for name in NAMES]
    declared = {row[0].strip("`"): (row[3], row[4]) for row in rows}
    assert declared["mixtral"] == ("yes / yes", "yes / yes")
    assert declared["switch"] == ("yes / yes", "**no** / yes")
    assert declared["expert_choice"] == ("**no** / **no**", "**no** / **no**")


def test_the_readme_shows_that_table() -> None:
    shown = re.search(r"<!-- presets -->\n(.*?)\n<!-- /presets -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == table(), "put what `python -m moe presets` prints between the two comments in README.md"


def test_what_an_override_takes_the_ground_from_goes_with_it() -> None:
    """Plain top_k on top of deepseek_v3 has no groups, and is refused nowhere for them."""
    router = model_config("deepseek_v3", router={"selection": "top_k"}).router
    by_flag = parse("{}", overrides={PRESET: "deepseek_v3", "model.router.selection": "top_k"}).model.router

    assert (router.n_groups, router.top_groups, router.selection_bias) == (None, None, "sign")
    assert by_flag == router


def test_credit_goes_to_the_section_that_a_reason_names() -> None:
    """deepseek_moe sets one shared expert, and is not the reason for one expert."""
    with pytest.raises(UserError) as refused:
        parse("{}", overrides={PRESET: "deepseek_moe", "model.experts.n_experts": "1"})

    assert "from preset" not in str(refused.value)
