"""``python -m moe``: text from the folder of a run, what routers declare, and one line for every mistake."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from moe.cli import main
from moe.config import ModelConfig, Preset, RouterConfig
from moe.presets import table
from moe.study.leakage import Finding
from moe.training.command import main as train

Command = Callable[..., tuple[int, str, str]]

CONFIGURATION = """\
model:
  n_layers: 2
  d_model: 32
  max_seq: 64
  attention: {n_heads: 2, head_dim: 16}
  experts: {n_experts: 4, d_ff: 16}
data: {corpus: corpus.yaml, cache: CACHE, vocab_size: 300, sequence_length: 16, validation_bytes: 100}
training: {steps: 20, batch_size: 4, device: cpu, precision: fp32, checkpoint_every: 10, optimizer: {lr: 0.01}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twenty steps over counted sheep, with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "sheep").mkdir()
    for flock in range(30):
        text = " ".join(f"sheep {number} jumps" for number in range(flock, flock + 12))
        (folder / "sheep" / f"{flock}.txt").write_text(text)
    (folder / "corpus.yaml").write_text("- {domain: sheep, kind: files, include: sheep/*.txt}\n")
    (folder / "tiny.yaml").write_text(CONFIGURATION.replace("CACHE", str(folder / "cache")))
    assert train([str(folder / "tiny.yaml"), "--run.folder", str(folder), "--run.name", "run"], folder) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be broken."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process: exit status, output, errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


def generate(command: Command, run: Path, *arguments: object) -> str:
    """What the model writes, greedily unless told otherwise."""
    status, output, errors = command("generate", run, "--temperature", 0, "--tokens", 12, *arguments)
    assert (status, errors) == (0, "")
    return output


# ------------------------------------------------------------------------------------------------------------- generate


def test_greedy_text_begins_with_the_prompt_and_repeats_itself(command: Command, trained: Path) -> None:
    written = generate(command, trained, "--prompt", "sheep 3")

    assert written.startswith("sheep 3")
    assert len(written) > len("sheep 3\n")
    assert generate(command, trained, "--prompt", "sheep 3") == written
    assert generate(command, trained, "--prompt", "sheep 3", "--seed", 5) == written


def test_prompts_of_different_length_are_continued_as_each_alone(
    command: Command, trained: Path, tmp_path: Path
) -> None:
    prompts = ["sheep 3", "sheep 10 jumps sheep 11 jumps", "s"]

    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    together = generate(command, trained, "--prompts", tmp_path / "prompts.txt")

    alone = [generate(command, trained, "--prompt", prompt) for prompt in prompts]
    assert together == f"{'-' * 40}\n".join(alone)


def test_an_empty_prompt_begins_a_text(command: Command, trained: Path) -> None:
    assert len(generate(command, trained, "--prompt", "")) > 1


def test_draws_follow_the_seed(command: Command, trained: Path) -> None:
    def draw(seed: int) -> str:
        flags = ("--tokens", 20, "--temperature", 5, "--top-p", 1, "--seed", seed)
        return command("generate", trained, "--prompt", "sheep", *flags)[1]

    assert draw(1).startswith("sheep")
    assert draw(1) == draw(1) != draw(2)


def test_one_candidate_is_greedy(command: Command, trained: Path) -> None:
    arguments = ("generate", trained, "--prompt", "sheep", "--tokens", 12, "--temperature", 2, "--top-k", 1)

    assert command(*arguments)[1] == generate(command, trained, "--prompt", "sheep")


def test_no_new_tokens_are_none(command: Command, trained: Path) -> None:
    assert command("generate", trained, "--prompt", "sheep", "--tokens", 0) == (0, "sheep\n", "")


def test_each_token_with_its_probability_and_experts(command: Command, trained: Path) -> None:
    """Two layers of two experts among four; greedy tokens are the likeliest, so none is below 1/300."""
    told = generate(command, trained, "--prompt", "sheep 3", "--probabilities", "--experts")

    text = generate(command, trained, "--prompt", "sheep 3").removeprefix("sheep 3").removesuffix("\n")
    prompt, *lines = told.splitlines()
    assert (prompt, len(lines)) == ("sheep 3", 12)
    for line in lines:
        probability, experts = line[25:].split(maxsplit=1)
        assert 1 / 300 < float(probability) <= 1
        layers = [[int(expert) for expert in layer.split()] for layer in experts.split("|")]
        assert [len(set(layer)) for layer in layers] == [2, 2]
        assert all(0 <= expert < 4 for layer in layers for expert in layer)
    assert "".join(ast.literal_eval(line[:24].strip()) for line in lines) == text


def test_text_ends_before_a_stop_string(command: Command, trained: Path) -> None:
    free = generate(command, trained, "--prompt", "sheep 3").removeprefix("sheep 3")
    stop = free[3:5]

    written = generate(command, trained, "--prompt", "sheep 3", "--stop", json.dumps(["never there", stop]))

    assert written == "sheep 3" + free[: free.index(stop)] + "\n"
    assert written == generate(command, trained, "--prompt", "sheep 3", "--stop", stop)


def test_samples_follow_each_other_and_differ(command: Command, trained: Path) -> None:
    flags = ("--prompt", "sheep", "--tokens", 12, "--temperature", 3)
    three = command("generate", trained, *flags, "--samples", 3)[1].split(f"{'-' * 40}\n")

    assert len(set(three)) == 3
    assert three[0] == command("generate", trained, *flags)[1]


def test_a_file_of_objects_becomes_a_file_of_answers(command: Command, trained: Path, tmp_path: Path) -> None:
    """In their order, although more are asked for than are written at once; what else a line said is handed on."""
    prompts = ["sheep 3", "s", "sheep 10 jumps", ""]
    lines = [json.dumps(prompts[0]), *(json.dumps({"id": n, "prompt": prompts[n]}) for n in (1, 2, 3))]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"

    said = generate(command, trained, "--prompts", tmp_path / "in.jsonl", "--out", out, "--batch-size", 2, "--experts")

    assert said == f"4 prompts continued: {out}\n"
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(answer["prompt"], answer.get("id")) for answer in answers] == list(
        zip(prompts, [None, 1, 2, 3], strict=True)
    )
    for answer in answers:
        [completion] = answer["completions"]
        assert answer["prompt"] + completion["text"] + "\n" == generate(command, trained, "--prompt", answer["prompt"])
        assert completion["finish"] == "length"
        assert len(completion["tokens"]) == 12
        assert all(token["log_probability"] <= 0 and len(token["experts"]) == 2 for token in completion["tokens"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("draft", ["ngrams", "RUN"])
def test_guesses_change_no_text_and_are_counted(command: Command, trained: Path, draft: str) -> None:
    """A run that guesses for itself is always right."""
    flags = ("generate", trained, "--prompt", "sheep 1 jumps sheep 2", "--temperature", 0, "--tokens", 20)
    plain = command(*flags)

    status, output, errors = command(*flags, "--draft", trained if draft == "RUN" else draft, "--guesses", 3)

    assert (status, output) == plain[:2]
    share, guessed = re.match(r"([\d.]+)% of (\d+) guessed tokens were kept; 20 tokens in ", errors).groups()
    assert int(guessed) > 0
    assert draft == "ngrams" or float(share) == 100


def test_another_run_s_tokens_are_no_guesses(command: Command, trained: Path, run: Path) -> None:
    (run / "tokenizer.json").write_text((run / "tokenizer.json").read_text() + "\n")

    status, output, errors = command("generate", trained, "--prompt", "sheep", "--draft", run)

    assert (status, output) == (2, "")
    assert errors == f"--draft {run}: its tokens are not those of {trained}; both need the same tokenizer.json\n"


def test_a_file_that_is_there_stays(command: Command, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious")

    status, _, errors = command("generate", trained, "--prompt", "sheep", "--out", tmp_path / "out.jsonl")

    assert (status, errors) == (2, f"{tmp_path / 'out.jsonl'}: exists; choose another --out\n")
    assert (tmp_path / "out.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"a"\n{', ":2: is no JSON ("),
        ("3", ':1: must be a string, or an object with a text as its "prompt"'),
        ('{"prompt": 3}', ":1: must be a string, or an object"),
        ("\n", ": holds no prompt; write one a line"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(
    command: Command, trained: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "in.jsonl").write_text(text)

    status, output, errors = command("generate", trained, "--prompts", tmp_path / "in.jsonl")

    assert (status, output) == (2, "")
    assert errors.startswith(f"{tmp_path / 'in.jsonl'}{message}")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(command: Command, run: Path) -> None:
    damaged = run / "checkpoints" / "step-00000020" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])

    output = generate(command, run, "--prompt", "sheep")

    assert f"{damaged}: 100 bytes, and should be" in output
    assert "\nsheep" in output


def test_it_is_a_module(trained: Path, tmp_path: Path) -> None:
    """From any working directory, with nothing but the folder."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    arguments = ["generate", str(trained), "--prompt", "sheep 3", "--temperature", "0", "--tokens", "3"]

    done = subprocess.run(
        [sys.executable, "-m", "moe", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("sheep 3")


# --------------------------------------------------------------------------------------------------------- check-router


def cells(line: str) -> list[str]:
    """The columns of a table, which two spaces part."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_preset_is_checked_in_both_modes(command: Command) -> None:
    status, output, errors = command("check-router", "expert_choice", "--edits", 3)

    assert (status, errors) == (0, "")
    name, _, header, *lines = output.splitlines()
    assert name == "expert_choice"
    assert cells(header)[:4] == ["mode", "edited", "compared", "edits that changed a logit"]
    assert [cells(line)[0] for line in lines] == ["training"] * 3 + ["evaluation"] * 3
    assert all(cells(line)[5:] == ["leaks", "holds"] for line in lines)
    assert all(cells(line)[3].endswith(" of 3") and cells(line)[3] != "0 of 3" for line in lines)


def test_settings_are_laid_over_a_preset_or_a_file(command: Command, tmp_path: Path) -> None:
    """A capacity in the order of scores leaks, in training alone unless evaluation drops too."""
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  router: {capacity: {factor: 1.0, order: score}}\n")
    dropping = ("--model.router.capacity.factor", 1, "--model.router.capacity.order", "score")

    preset = command("check-router", "mixtral", "--edits", 2, *dropping)
    file = command("check-router", path, "--edits", 2)
    both = command("check-router", path, "--edits", 2, "--model.router.capacity.in_evaluation", "true")

    declared = [[cells(line)[5] for line in output.splitlines()[3:]] for _, output, _ in (preset, file, both)]
    assert declared == [["leaks"] * 3 + ["clean"] * 3] * 2 + [["leaks"] * 6]
    assert [status for status, _, _ in (preset, file, both)] == [0, 0, 0]


def test_a_false_declaration_is_status_1(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RouterConfig, "is_causal", lambda self, *, training: True)

    status, output, errors = command("check-router", "base", "--edits", 2)

    assert (status, errors) == (1, "")
    assert output.count("LEAKS, and declared clean") == 1  # the batch-mates, and so every future, are still declared


def test_without_a_name_every_preset_is_a_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ModelConfig] = []

    def check_router(config: ModelConfig, *, edits: int, seed: int, advance: Callable[[], object]) -> list[Finding]:
        asked.append(config)
        changed = 5 if config.router.preset == "olmoe" else 0
        clean = Finding(training=True, edit="future", edits=edits, changed=changed, largest=0.0, declared_clean=True)
        return [replace(clean, training=training) for training in (True, False) for _ in range(3)]

    monkeypatch.setattr("moe.cli.check_router", check_router)

    status, output, errors = command("check-router", "--edits", 7, "--model.experts.n_experts", 24)

    assert (status, errors) == (1, "")
    lines = {cells(line)[0]: cells(line)[1:] for line in output.splitlines()[2:]}
    assert list(lines) == list(get_args(Preset)) == [config.router.preset for config in asked]
    assert {config.experts.n_experts for config in asked} == {24}
    assert lines["olmoe"] == ["5 of 7"] * 6 + ["LEAKS, and declared clean"]
    assert lines["qwen2"] == ["0 of 7"] * 6 + ["hold"]


def test_the_seed_draws_other_edits(command: Command) -> None:
    def largest(seed: int) -> str:
        return command("check-router", "sinkhorn", "--edits", 1, "--seed", seed)[1]

    assert largest(1) == largest(1) != largest(2)


# -------------------------------------------------------------------------------------------------------------- presets


def test_presets_are_listed(command: Command) -> None:
    assert command("presets") == (0, table() + "\n", "")


# ------------------------------------------------------------------------------------------------------ help, mistakes


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
def test_help_names_the_commands(command: Command, arguments: list[str]) -> None:
    status, output, errors = command(*arguments)

    assert (status, errors) == (0, "")
    title, blank, *lines = output.splitlines()
    assert (title, blank) == ("python -m moe COMMAND [--help]", "")
    commands = [
        "generate",
        "serve",
        "check-router",
        "presets",
        "study",
        "nondeterminism",
        "import",
        "export",
        "evaluate",
        "plan",
        "rehearse",
        "bench",
    ]
    assert [line.split()[0] for line in lines] == commands
    assert all(len(line.split()) > 3 for line in lines)


def test_help_of_generate_lists_its_flags(command: Command) -> None:
    status, output, errors = command("generate", "--help")

    assert (status, errors) == (0, "")
    assert all(flag in output for flag in ("--prompt", "--tokens", "--temperature", "--top-k", "--top-p", "--seed"))


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_the_questions_about_routers(command: Command, flag: str) -> None:
    status, output, errors = command("check-router", flag)
    assert (status, errors) == (0, "")
    assert output.startswith("python -m moe check-router [PRESET | CONFIG.yaml | RUN] ")
    assert all(part in output for part in ("--edits N", "--seed N", "--model.KEY VALUE", "Exit status: 0"))

    status, output, errors = command("presets", flag)
    assert (status, errors) == (0, "")
    assert output.startswith("python -m moe presets\n")


def test_a_terminal_gets_presets_that_it_can_show(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)

    status, output, errors = command("presets")

    assert (status, errors) == (0, "")
    blocks = {block.partition(":")[0]: block for block in output.split("\n\n")}
    assert set(blocks) == set(get_args(Preset))
    assert max(map(len, output.splitlines())) <= 100
    leaking = {name for name, block in blocks.items() if "Looks at later tokens" in block}
    assert leaking == {"gshard", "st_moe", "base", "sinkhorn", "expert_choice"}
    assert "in training and evaluation." in blocks["expert_choice"]
    assert "Looks at later tokens in training." in blocks["base"]


P = ["--prompt", "sheep"]
MISTAKES = {
    "no such command": (["genrate"], "genrate is no command; there are: generate"),
    "no run": (["generate", *P], "one run folder is needed, and 0 were given"),
    "two runs": (["generate", "RUN", "RUN", *P], "one run folder is needed, and 2 were given"),
    "no such run": (["generate", "nowhere", *P], "nowhere: is no run folder: it has no config.yaml"),
    "no prompt": (["generate", "RUN"], "--prompt or --prompts is needed, and not both"),
    "both": (["generate", "RUN", *P, "--prompts", "x"], "--prompt or --prompts is needed, and not both"),
    "no file": (["generate", "RUN", "--prompts", "x"], "x: cannot be read as prompts"),
    "less than nothing": (["generate", "RUN", *P, "--tokens", "-5"], "--tokens is -5, and must be 0 or more"),
    "no seed": (["generate", "RUN", *P, "--seed", "99999999999999"], "--seed is 99999999999999, and must be from 0"),
    "a setting": (["generate", "RUN", *P, "--training.steps", "3"], "--training.steps belongs to training"),
    "unknown flag": (["generate", "RUN", *P, "--tokns", "3"], "--tokns is unknown; did you mean --tokens?"),
    "no number": (["generate", "RUN", *P, "--tokens", "many"], "--tokens is 'many', and must be a whole number"),
    "no whole number": (["generate", "RUN", *P, "--top-k", "1.5"], "--top-k is '1.5', and must be a whole number"),
    "cold": (["generate", "RUN", *P, "--temperature", "-1"], "temperature is -1.0, and must be 0 (greedy) or "),
    "no candidate": (["generate", "RUN", *P, "--top-k", "0"], "top_k is 0, and must be at least 1"),
    "no nucleus": (["generate", "RUN", *P, "--top-p", "1.5"], "top_p is 1.5, and must lie in (0, 1]"),
    "no share": (["generate", "RUN", *P, "--min-p", "2"], "min_p is 2.0, and must lie in [0, 1]"),
    "no samples": (["generate", "RUN", *P, "--samples", "0"], "--samples is 0, and must be 1 or more"),
    "guesses of nobody": (["generate", "RUN", *P, "--guesses", "2"], "--guesses is of tokens that a --draft guesses"),
    "no draft": (["generate", "RUN", *P, "--draft", "nowhere"], "nowhere: is no run folder: it has no config.yaml"),
    "an empty stop": (["generate", "RUN", *P, "--stop", ""], "--stop is '', and must be a text, or texts in a JSON "),
    "no list": (["generate", "RUN", *P, "--stop", "[x"], "--stop begins with [ and is no list in JSON ("),
    "device": (["generate", "RUN", *P, "--device", "tpu"], "--device is tpu, and must be auto, cpu or cuda"),
    "too long": (["generate", "RUN", "--prompt", "sheep " * 99], "a prompt of "),
    "too many": (["generate", "RUN", *P, "--tokens", "64"], "a prompt of "),
    "no run to serve": (["serve"], "one run folder is needed, and 0 were given"),
    "no port": (["serve", "RUN", "--port", "70000"], "--port is 70000, and must be from 0 to 65535"),
    "no address": (["serve", "RUN", "--host", "256.1.1.1"], "256.1.1.1:8000 cannot be listened on ("),
    "no texts": (["serve", "RUN", "--batch-size", "0"], "--batch-size is 0, and must be 1 or more"),
    "no preset": (
        ["check-router", "deepseek_v4"],
        "deepseek_v4 is neither a preset nor a configuration file nor a run; did you mean deepseek_v",
    ),
    "nothing like it": (
        ["check-router", "zzz"],
        "zzz is neither a preset nor a configuration file nor a run; python -m moe presets lists them",
    ),
    "no such file": (["check-router", "none.yaml"], "none.yaml: there is no such file"),
    "two routers": (["check-router", "base", "hash"], "one preset or file at a time, and 2 were given"),
    "no edits": (["check-router", "base", "--edits", "0"], "--edits is 0, and must be 1 or more"),
    "half an edit": (["check-router", "base", "--edits", "0.5"], "--edits is '0.5', and must be a whole number"),
    "seed of edits": (["check-router", "base", "--seed", "-1"], "--seed is -1, and must be from 0"),
    "not the model": (["check-router", "base", "--data.cache", "x"], "--data.cache is no setting of the model"),
    "a wrong value": (["check-router", "base", "--model.d_model", "x"], "--model.d_model must be a whole number"),
    "no router": (["check-router", "mixtral", "--model.dense_twin", "true"], "model.dense_twin: is true: there is no"),
    "two presets": (
        ["check-router", "base", "--model.router.preset", "hash"],
        "--model.router.preset is given beside the preset base; keep one of them",
    ),
    "what presets": (["presets", "base"], "base is too much: python -m moe presets"),
}


def test_a_preset_by_flag_is_checked_alone(command: Command) -> None:
    """Also where no name stands before it."""
    by_flag = command("check-router", "--edits", 1, "--model.router.preset", "hash")

    assert by_flag == command("check-router", "hash", "--edits", 1)


def test_the_router_of_a_run_is_checked(command: Command, trained: Path) -> None:
    status, output, errors = command("check-router", trained, "--edits", 1)

    assert (status, errors) == (0, "")
    assert (
        output.partition("\n\n")[2]
        == command("check-router", trained / "config.yaml", "--edits", 1)[1].partition("\n\n")[2]
    )


def test_a_leak_that_is_not_seen_is_said_to_be_rare(command: Command) -> None:
    """With room for every token at every expert nothing is ever dropped, whatever is declared."""
    status, output, _ = command("check-router", "gshard", "--edits", 2, "--model.router.capacity.factor", 100)

    assert status == 1
    assert output.count("declared leaking, not seen") == 3
    assert output.splitlines()[-1].startswith(
        "A declared leak that is not seen may only be rare: try more edits than 2"
    )
    assert "may only be rare" not in command("check-router", "mixtral", "--edits", 2)[1]


def test_text_that_depends_on_other_prompts_comes_with_a_note(command: Command, run: Path) -> None:
    written = (run / "config.yaml").read_text()
    assert command("generate", run, "--prompt", "sheep", "--tokens", 1)[2] == ""

    competing = written.replace("selection: top_k", "selection: expert_choice").replace(
        "load_balance: 0.01", "load_balance: 0.0"
    )
    (run / "config.yaml").write_text(competing)
    status, output, errors = command("generate", run, "--prompt", "sheep", "--tokens", 1)
    assert (status, output != "") == (0, True)
    assert errors == (
        "note: tokens compete for this router's experts: the other prompts have a say in how each goes on, "
        "and validation saw later tokens, which are not there while text is written\n"
    )

    (run / "config.yaml").write_text(competing.replace("dense_twin: false", "dense_twin: true"))
    assert "note" not in command("generate", run, "--prompt", "sheep", "--tokens", 1)[2]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(
    command: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)

    status, output, errors = command(*[str(trained) if argument == "RUN" else argument for argument in arguments])

    assert (status, output) == (2, "")
    assert errors.startswith(message)
    assert errors.count("\n") == 1


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json"])
@pytest.mark.parametrize("text", ["", "{", "\0[["])
def test_a_damaged_file_is_named(command: Command, run: Path, name: str, text: str) -> None:
    (run / name).write_text(text)

    status, output, errors = command("generate", run, "--prompt", "sheep")

    assert (status, output) == (2, "")
    assert errors.startswith(f"{run / name}:")
    assert errors.count("\n") == 1


def test_a_missing_tokenizer_is_named(command: Command, run: Path) -> None:
    (run / "tokenizer.json").unlink()

    status, _, errors = command("generate", run, "--prompt", "sheep")

    assert (status, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"{run / 'tokenizer.json'}:")


def test_a_run_without_a_sound_checkpoint(command: Command, run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        (path / "manifest.json").unlink()

    status, output, errors = command("generate", run, "--prompt", "sheep")

    assert (status, output.count("manifest.json: missing")) == (2, 2)
    assert errors == f"{run / 'checkpoints'}: every checkpoint here (2) is damaged; start the run from the beginning\n"
