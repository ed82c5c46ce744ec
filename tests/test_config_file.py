"""What a user can write in a configuration file and on the command line, and what is answered to what cannot be."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.config import (
    AttentionConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
    RunConfig,
    TrainingConfig,
)
from moe.config_file import dump, help_text, load, parse, parse_flags, sections, settings
from moe.errors import UserError

ROOT = Path(__file__).parents[1]


def lines_of(act: Callable[[], object]) -> list[str]:
    """The lines of the error that ``act`` raises."""
    with pytest.raises(UserError) as refused:
        act()
    return str(refused.value).splitlines()


def problems(text: str, **flags: str) -> list[str]:
    """What is answered to the file toy.yaml with this text; ``a__b="c"`` is the flag ``--a.b c``."""
    return lines_of(lambda: parse(text, "toy.yaml", {key.replace("__", "."): value for key, value in flags.items()}))


# ----------------------------------------------------------------------------------------------------- what is accepted


def test_a_file_changes_what_it_names_and_leaves_the_rest_at_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("model:\n  n_layers: 2\n  router: {top_k: 4}\ntraining:\n  optimizer:\n    lr: 3e-4\n")

    assert load(path) == Config(
        model=ModelConfig(n_layers=2, router=RouterConfig(top_k=4)),
        training=TrainingConfig(optimizer=OptimizerConfig(lr=0.0003)),
    )


def test_an_override_wins_over_the_file() -> None:
    config = parse("model: {router: {top_k: 4, scale: 2.5}}", overrides={"model.router.top_k": "8"})
    assert config.model.router == RouterConfig(top_k=8, scale=2.5)


def test_everything_is_checked_after_the_overrides() -> None:
    # On its own the file is wrong thrice: 32 > 16 experts, a number that is none, and a list.
    text = "model: {router: {top_k: 32}, d_model: wide, n_layers: [2]}"
    overrides = {"model.experts.n_experts": "64", "model.d_model": "128", "model.n_layers": "2"}
    assert parse(text, overrides=overrides).model.router.top_k == 32


@pytest.mark.parametrize("text", ["{}", "model:\n", "model:\n  # n_layers: 3\ntraining: ~\n", "model: {router: null}"])
def test_a_section_without_keys_keeps_its_defaults(text: str) -> None:
    assert parse(text) == Config()


@pytest.mark.parametrize(
    ("written", "read"),
    [("3e-4", 0.0003), ("3E-4", 0.0003), ("1.e-3", 0.001), (".5", 0.5), ("+0.25", 0.25), ("1", 1.0), ("2_000", 2000.0)],
)
def test_numbers(written: str, read: float) -> None:
    from_file = parse(f"training: {{optimizer: {{lr: {written}}}}}").training.optimizer.lr
    from_flag = parse("{}", overrides={"training.optimizer.lr": written}).training.optimizer.lr
    assert from_file == from_flag == read
    assert isinstance(from_file, float)


def test_a_whole_number_may_group_its_digits() -> None:
    assert parse("data: {validation_bytes: 98_304}").data.validation_bytes == 98304


def test_null_and_booleans() -> None:
    config = parse("training: {compile: true, optimizer: {clip: null}}", overrides={"model.tie_embeddings": "false"})
    assert config.training.compile is True
    assert config.training.optimizer.clip is None
    assert config.model.tie_embeddings is False
    assert parse("run: {name: given}", overrides={"run.name": "null"}).run.name is None


@pytest.mark.parametrize("name", ["3", "1e3", "true", "yes", "2024-01-01", "名前", "a b", "x: y"])
def test_text_is_taken_as_it_is_written(name: str) -> None:
    assert parse("{}", overrides={"run.name": name}).run.name == name
    assert parse(f"run:\n  name: '{name}'").run.name == name


def test_plain_text_in_a_file_is_text_too() -> None:
    assert parse("run: {name: 3}").run.name == "3"
    assert parse("run: {name: 'null'}").run.name == "null"


def test_a_dotted_key_is_short_for_nested_sections() -> None:
    assert parse("model.router.top_k: 4\nmodel: {n_layers: 3}") == parse("model: {n_layers: 3, router: {top_k: 4}}")


def test_an_alias_repeats_a_value() -> None:
    config = parse("model: {d_model: &width 64, experts: {d_ff: *width}}")
    assert (config.model.d_model, config.model.experts.d_ff) == (64, 64)


def test_a_byte_order_mark_and_windows_line_ends_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel:\r\n  n_layers: 2\r\n")
    assert load(path).model.n_layers == 2


CONFIGURATIONS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "corpora"]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_every_configuration_of_this_repository_loads(path: Path) -> None:
    load(path)


# ----------------------------------------------------------------------------------------------- files that are not one


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text("{}")
    path = tmp_path / "toyy.yaml"
    assert lines_of(lambda: load(path)) == [f"{path}: there is no such file; did you mean {tmp_path / 'toy.yaml'}?"]


def test_the_name_of_a_preset_is_no_file() -> None:
    [line] = lines_of(lambda: load(Path("deepseek_v3")))
    assert line == "deepseek_v3: there is no such file; did you mean --model.router.preset deepseek_v3?"


@pytest.mark.parametrize(
    ("preset", "override", "inert", "default"),
    [
        ("gshard", {"capacity.factor": "null"}, "capacity.order", "position"),
    ],
)
def test_what_a_preset_sets_and_an_override_leaves_without_effect_comes_with_the_way_out(
    preset: str, override: dict[str, str], inert: str, default: str
) -> None:
    flags = {f"model.router.{key}": value for key, value in ({"preset": preset} | override).items()}

    [line] = lines_of(lambda: parse("{}", "file", flags))

    assert line.startswith(f"--model.router.preset {preset}: model.router.{inert} (from preset {preset}) is set, but ")
    assert line.endswith(f"; set it to {default} as well")


def test_the_way_out_of_a_preset_is_one() -> None:
    ungrouped = {"selection": "top_k", "n_groups": "null", "top_groups": "null"}
    flags = {f"model.router.{key}": value for key, value in ({"preset": "deepseek_v3"} | ungrouped).items()}

    router = parse("{}", "file", flags).model.router

    assert (router.preset, router.selection, router.n_groups, router.selection_bias) == (
        "deepseek_v3",
        "top_k",
        None,
        "sign",
    )


def test_a_missing_file_in_a_missing_folder(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "toy.yaml"
    assert lines_of(lambda: load(path)) == [f"{path}: there is no such file"]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert lines_of(lambda: load(tmp_path)) == [f"{tmp_path}: is a folder, and must be a YAML file"]


def test_a_path_through_a_file_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "toy.yaml"
    assert lines_of(lambda: load(path)) == [f"{path}: cannot be read (Not a directory)"]


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("model: {}\nrun:\n  name: café\n".encode("latin-1"))
    assert lines_of(lambda: load(path)) == [f"{path}:3: is not UTF-8 text (byte 0xe9); save it as UTF-8"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "toy.yaml: is empty; write {} to take every default"),
        ("# only a comment\n", "toy.yaml: is empty; write {} to take every default"),
        ("3", "toy.yaml:1: must hold sections (model, data, training, parallel, run), not 3"),
        ("\n- model", "toy.yaml:2: must hold sections (model, data, training, parallel, run), not a list"),
        ("model:\n\tn_layers: 3", "toy.yaml:2: a tab stands where YAML wants spaces"),
        ("model: 3\n\x07", "toy.yaml:2: is not valid YAML (the character 0x7)"),
    ],
)
def test_what_is_no_mapping_of_sections(text: str, answer: str) -> None:
    assert problems(text) == [answer]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model: {n_layers: 3", "toy.yaml:1: is not valid YAML ("),
        ("model:\n  n_layers: 3\n d_model: 64", "toy.yaml:3: is not valid YAML ("),
        ("model: {}\nrun: a: b", "toy.yaml:2: is not valid YAML ("),
        ("model: {}\n---\nmodel: {}", "toy.yaml:2: is not valid YAML ("),
        ("model: *unknown", "toy.yaml:1: is not valid YAML ("),
    ],
)
def test_what_is_no_yaml(text: str, place: str) -> None:
    [line] = problems(text)
    assert line.startswith(place)


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("modle: {}", "toy.yaml:1: modle is unknown; did you mean model?"),
        (
            "model:\n  router:\n    topk: 3",
            "toy.yaml:3: model.router.topk is unknown; did you mean model.router.top_k?",
        ),
        ("model: {N-Layers: 3}", "toy.yaml:1: model.N-Layers is unknown; did you mean model.n_layers?"),
        ("model: {top_k: 3}", "toy.yaml:1: model.top_k is unknown; top_k belongs to model.router"),
        ("router: {top_k: 3}", "toy.yaml:1: router is unknown; router belongs to model"),
        ("model: {training: {}}", "toy.yaml:1: model.training is unknown; training belongs to the top level"),
        (
            "model: {d_ff: 3}",
            "toy.yaml:1: model.d_ff is unknown; d_ff belongs to model.feed_forward, model.experts or model.shared",
        ),
        ("training: {n_layer: 3}", "toy.yaml:1: training.n_layer is unknown; did you mean model.n_layers?"),
        ("run: {gumbel: 3}", "toy.yaml:1: run.gumbel is unknown; run has name, folder, start_from"),
        ("3: 4", "toy.yaml:1: 3 is unknown; the top level has model, data, training, parallel, run"),
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_may_be_meant(text: str, answer: str) -> None:
    # A namesake in another section is certain, so it comes before a mere likeness.
    assert problems(text) == [answer]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("? [a]\n: 3", "toy.yaml:1: the file has a list where a key belongs"),
        ("model: {? {a: b} : 3}", "toy.yaml:1: model has a section where a key belongs"),
        ("'': 3", 'toy.yaml:1: the file has "" where a key belongs'),
        ('"a\\nb": 3', 'toy.yaml:1: the file has "a\\nb" where a key belongs'),
    ],
)
def test_a_key_is_a_word(text: str, answer: str) -> None:
    assert problems(text) == [answer]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("model: {}\ndata: {}\nmodel: {}", "toy.yaml:3: model is set twice (first on line 1); keep one of them"),
        (
            "model:\n  router:\n    top_k: 3\n    scale: 2.0\n    top_k: 4",
            "toy.yaml:5: model.router.top_k is set twice (first on line 3); keep one of them",
        ),
        (
            "model.router.top_k: 3\nmodel:\n  router: {top_k: 4}",
            "toy.yaml:3: model.router.top_k is set twice (first on line 1); keep one of them",
        ),
    ],
)
def test_a_key_that_comes_twice_is_refused(text: str, answer: str) -> None:
    assert problems(text) == [answer]


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("model: {n_layers: four}", 'model.n_layers must be a whole number, not "four"'),
        (f"model: {{n_layers: {'x' * 99}}}", f'model.n_layers must be a whole number, not "{"x" * 55}...'),
        ("model: {n_layers: '4'}", 'model.n_layers must be a whole number, not "4"'),
        ("model: {n_layers: 4.0}", "model.n_layers must be a whole number, not 4.0"),
        ("model: {n_layers: true}", "model.n_layers must be a whole number, not true"),
        ("model: {n_layers: null}", "model.n_layers must be a whole number, not null"),
        ("model: {n_layers: }", "model.n_layers must be a whole number, not null"),
        ("model: {n_layers: [4]}", "model.n_layers must be a whole number, not a list"),
        ("model: {n_layers: {a: 4}}", "model.n_layers must be a whole number, not a section"),
        ("model: {n_layers: 1_0}", 'model.n_layers must be a whole number, not "1_0"'),
        ("model: {n_layers: 100000000000000000000}", "model.n_layers must be a whole number, not 1e+20"),
        ("model: {vocab_size: many}", 'model.vocab_size must be a whole number or null, not "many"'),
        ("model: {dropout: true}", "model.dropout must be a number, not true"),
        ("model: {dropout: '0.1'}", 'model.dropout must be a number, not "0.1"'),
        ("model: {dropout: .nan}", 'model.dropout must be a number, not ".nan"'),
        ("model: {dropout: 1e999}", 'model.dropout must be a number, not "1e999"'),
        ("model: {tie_embeddings: yes}", 'model.tie_embeddings must be true or false, not "yes"'),
        ("model: {tie_embeddings: 1}", "model.tie_embeddings must be true or false, not 1"),
        (
            "model: {norm: layernrom}",
            'model.norm must be rmsnorm or layernorm, not "layernrom"; did you mean layernorm?',
        ),
        ("model: {norm: batch}", 'model.norm must be rmsnorm or layernorm, not "batch"'),
        ("model: {norm: 3}", 'model.norm must be rmsnorm or layernorm, not "3"'),
        ("model: {norm: null}", "model.norm must be rmsnorm or layernorm, not null"),
        ("data: {corpus: null}", "data.corpus must be text, not null"),
        ("data: {corpus: [a, b]}", "data.corpus must be text, not a list"),
        ('data: {corpus: "a\\nb"}', 'data.corpus is "a\\nb", which holds a character that cannot be printed'),
        ('data: {corpus: "\\ud800"}', 'data.corpus is "\\ud800", which holds a character that cannot be printed'),
        ("model: 3", "model is a section, and must hold keys (such as `n_layers: 4`), not 3"),
        ("model: many", 'model is a section, and must hold keys (such as `n_layers: 4`), not "many"'),
        ("model: [n_layers]", "model is a section, and must hold keys (such as `n_layers: 4`), not a list"),
        (
            "model: {router: [top_k, 3]}",
            "model.router is a section, and must hold keys (such as `top_k: 2`), not a list",
        ),
    ],
)
def test_a_value_of_the_wrong_kind(text: str, answer: str) -> None:
    assert problems(text) == [f"toy.yaml:1: {answer}"]


def test_a_conflict_points_to_the_line_of_the_setting_to_blame() -> None:
    text = "model:\n  experts:\n    n_experts: 4\n  router:\n    top_k: 5\n"
    assert problems(text) == ["toy.yaml:5: model.router.top_k is 5, but experts.n_experts is 4"]


def test_a_conflict_with_a_default_points_to_the_section_and_says_so() -> None:
    [line] = problems("model:\n  router:\n    top_k: 1\n")
    assert line.startswith("toy.yaml:2: model.router.normalise (left at its default) is true with top_k 1:")
    assert line.endswith("set normalise to false")


def test_a_value_of_the_wrong_kind_is_one_problem_and_no_conflict_of_its_default() -> None:
    # top_k is 2 by default, more than one expert; but the user has written something else.
    text = "model:\n  router: {top_k: [1]}\n  experts: {n_experts: 1}"
    assert problems(text) == ["toy.yaml:2: model.router.top_k must be a whole number, not a list"]


def test_a_conflict_in_a_section_that_the_file_does_not_have() -> None:
    [line] = problems("{}", model__experts__n_experts="1")
    assert line == "toy.yaml: model.router.top_k (left at its default) is 2, but experts.n_experts is 1"


def test_a_conflict_between_two_sections() -> None:
    text = "model: {max_seq: 128}\ndata:\n  sequence_length: 256"
    assert problems(text) == ["toy.yaml:3: data.sequence_length is 256, but model.max_seq is 128"]


def test_every_problem_is_reported_in_the_order_of_the_file_and_flags_last() -> None:
    text = "training:\n  optimizer: {lr: 0}\ndata: 3\nmodel:\n  d_modle: 64\n  n_layers: 2.5\n"
    assert problems(text, run__name="a/b", training__steps="x") == [
        "toy.yaml:2: training.optimizer.lr is 0.0, and must be positive",
        'toy.yaml:3: data is a section, and must hold keys (such as `corpus: "corpora/default.yaml"`), not 3',
        "toy.yaml:5: model.d_modle is unknown; did you mean model.d_model?",
        "toy.yaml:6: model.n_layers must be a whole number, not 2.5",
        "--run.name is 'a/b', and must be the name of one folder",
        '--training.steps must be a whole number, not "x"',
    ]


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ({"model__n_layers": "many"}, '--model.n_layers must be a whole number, not "many"'),
        ({"model__n_layers": ""}, '--model.n_layers must be a whole number, not ""'),
        ({"model__attention__n_kv_heads": ""}, '--model.attention.n_kv_heads must be a whole number or null, not ""'),
        ({"model__n_layers": "null"}, "--model.n_layers must be a whole number, not null"),
        ({"training__compile": "1"}, "--training.compile must be true or false, not 1"),
        ({"model__router__top_k": "17"}, "--model.router.top_k is 17, but experts.n_experts is 16"),
        ({"model__router__topk": "3"}, "--model.router.topk is unknown; did you mean --model.router.top_k?"),
        (
            {"run": "3"},
            "--run is a section, not a setting; its settings are --run.name, --run.folder, --run.start_from",
        ),
    ],
)
def test_an_override_is_answered_by_its_flag(flags: dict[str, str], answer: str) -> None:
    assert problems("model: {n_layers: 2}", **flags) == [answer]


@given(st.text(alphabet="model:{}[]router top_k_ 3\n\t-'\"#&*!|>%@`,?0.e~é", max_size=60))
def test_whatever_the_file_holds_the_answer_is_a_configuration_or_lines_that_name_it(text: str) -> None:
    try:
        assert isinstance(parse(text, "toy.yaml"), Config)
    except UserError as refused:
        assert all(line.startswith("toy.yaml:") for line in str(refused).splitlines())


# ---------------------------------------------------------------------------------------------------------------- dump


def test_a_dumped_configuration_names_every_setting() -> None:
    written = dump(Config())
    assert written.startswith("model:\n  vocab_size: null\n  n_layers: 4\n")
    assert all(f"{key.rpartition('.')[2]}:" in written for key in settings())


@given(
    lr=st.floats(min_value=1e-300, max_value=1e300),
    clip=st.none() | st.floats(min_value=1e-300, max_value=1e300),
    name=st.none() | st.sampled_from(["null", "~", "3", "1e3", "true", "yes", "a: b", "# x", "名前", " x ", "-", "'"]),
    corpus=st.text(min_size=1).filter(str.isprintable),
    kv_heads=st.sampled_from([None, 1, 2, 3, 6]),
    tie=st.booleans(),
    top_k=st.integers(2, 16),
)
def test_what_is_dumped_loads_as_it_was(
    lr: float, clip: float | None, name: str | None, corpus: str, kv_heads: int | None, tie: bool, top_k: int
) -> None:
    model = ModelConfig(
        tie_embeddings=tie, attention=AttentionConfig(n_kv_heads=kv_heads), router=RouterConfig(top_k=top_k)
    )
    training = TrainingConfig(optimizer=OptimizerConfig(lr=lr, clip=clip))
    config = Config(model=model, training=training, data=DataConfig(corpus=corpus), run=RunConfig(name=name))

    assert parse(dump(config)) == config


# ------------------------------------------------------------------------------------------------ settings, flags, help


def test_every_setting_has_a_default_a_meaning_and_a_kind() -> None:
    for section in sections().values():
        assert section.__doc__
        for entry in fields(section):
            assert entry.default is not MISSING or entry.default_factory is not MISSING, entry.name
    for setting in settings().values():
        assert setting.meaning, f"{setting.key} has no string under it"


def test_a_setting_says_what_it_accepts() -> None:
    heads = settings()["model.attention.n_kv_heads"]
    assert (heads.kind, heads.default, heads.section) == ("a whole number or null", None, "model.attention")
    assert heads.meaning == "key and value heads; null: as many as query heads, 1: multi-query"
    norm = settings()["model.norm"]
    assert (norm.kind, norm.choices, norm.default) == ("rmsnorm or layernorm", ("rmsnorm", "layernorm"), "rmsnorm")
    assert settings()["run.name"].kind == "text or null"


def test_a_default_written_out_as_text_is_the_default() -> None:
    # The help shows --key=default; typing all of it changes nothing.
    typed = {s.key: "null" if s.default is None else str(s.default) for s in settings().values()}
    typed |= {key: value.lower() for key, value in typed.items() if value in ("True", "False")}
    assert parse("{}", overrides=typed) == Config()


OWN = {"--resume": "continue a run", "--out FOLDER": "where to write", "--help": "this text"}


def test_flags_are_sorted_into_settings_options_and_the_rest() -> None:
    line = parse_flags(
        ["toy.yaml", "--model.router.top_k", "4", "--resume", "--training.seed=-1", "--out", "here", "more"], OWN
    )
    assert line.positional == ["toy.yaml", "more"]
    assert line.overrides == {"model.router.top_k": "4", "training.seed": "-1"}
    assert line.options == {"--resume": "", "--out": "here"}


def test_a_value_may_be_negative_hold_an_equals_sign_or_be_empty() -> None:
    line = parse_flags(["--training.seed", "-1", "--run.name=a=b", "--data.corpus="])
    assert line.overrides == {"training.seed": "-1", "run.name": "a=b", "data.corpus": ""}


def test_h_is_help() -> None:
    assert parse_flags(["-h"], OWN).options == {"--help": ""}


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--model.router.topk", "3"], "--model.router.topk is unknown; did you mean --model.router.top_k?"),
        (["--modle.router.topk=3"], "--modle.router.topk is unknown; did you mean --model.router.top_k?"),
        (["--lr", "3"], "--lr is unknown; did you mean --training.optimizer.lr?"),
        (["-model.n_layers", "3"], "-model.n_layers is unknown; did you mean --model.n_layers?"),
        (["--resum"], "--resum is unknown; did you mean --resume?"),
        (["--wandb"], "--wandb is unknown; --help lists every setting"),
        (["--"], "-- is unknown; --help lists every setting"),
        (["--training.compile"], "--training.compile needs a value: true or false"),
        (["--training.steps", "--resume"], "--training.steps needs a value: a whole number"),
        (["--out"], "--out needs a value"),
        (["--resume=now"], "--resume takes no value, and is given 'now'"),
        (["--run.name", "a", "--run.name=b"], "--run.name is given twice; keep one of them"),
        (
            ["--run", "3"],
            "--run is a section, not a setting; its settings are --run.name, --run.folder, --run.start_from",
        ),
    ],
)
def test_a_flag_that_cannot_be_used(arguments: list[str], answer: str) -> None:
    assert lines_of(lambda: parse_flags(arguments, OWN)) == [answer]


def test_help_shows_every_setting_with_its_default_within_100_columns() -> None:
    shown = help_text("usage: python train.py [CONFIG.yaml]", OWN)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "usage: python train.py [CONFIG.yaml]"
    assert "  --out FOLDER" in shown
    assert all(f"  --{key}=" in shown for key in settings())
    [row] = [line for line in lines if "--model.attention.n_heads=" in line]
    assert row.split() == ["--model.attention.n_heads=6", "query", "heads", "[whole", "number]"]
    choices = "[auto, reference, grouped, segments or fused]"
    assert any(line.strip().endswith(choices) for line in lines)  # in one piece
    assert "[shazeer, gshard, switch, " in shown  # too long for one piece, and wrapped like any text


@pytest.mark.parametrize(("older", "newer"), [("false", "none"), ("true", "block"), ("experts", "experts")])
def test_what_earlier_runs_say_of_checkpointing_is_understood(older: str, newer: str) -> None:
    key = "training.activation_checkpointing"
    assert parse(f"training: {{activation_checkpointing: {older}}}").training.activation_checkpointing == newer
    assert parse("{}", overrides={key: older}).training.activation_checkpointing == newer
