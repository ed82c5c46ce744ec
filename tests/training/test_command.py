"""The command: a whole run from flags to report, and every mistake as a line on the screen."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe.config import BalanceConfig, CapacityConfig, ModelConfig, RouterConfig
from moe.training import checkpoint
from moe.training.command import MAY_CHANGE, leak_warning, main
from moe.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tiny: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process: exit status, output, errors. The default configuration is the tiny one."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments], tiny)
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps with two checkpoints, for tests to copy and break."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ["--run.folder", folder, "--run.name", "run", "--training.steps", "6", "--training.checkpoint_every", "3"]
    assert main([str(tiny), *map(str, flags)], tiny) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only_line(status: int, output: str, errors: str) -> str:
    """The one line of a refusal."""
    assert status == 2
    assert output == ""
    assert errors.count("\n") == 1
    return errors.rstrip("\n")


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_a_folder_with_everything_in_it(command: Command, tmp_path: Path) -> None:
    status, output, errors = command("--run.folder", tmp_path, "--run.name", "first", "--training.steps", 4)

    assert (status, errors) == (0, "")
    folder = tmp_path / "first"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "corpus.json",
        "metrics.jsonl",
        "report.txt",
        "summary.json",
        "tokenizer.json",
    ]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004"]
    assert [(row["kind"], row["step"]) for row in read_metrics(folder / "metrics.jsonl")] == [
        *[("train", step) for step in (1, 2, 3, 4)],
        ("validation", 4),
    ]
    assert output.endswith(f"\nrun folder: {folder}\n")
    assert "step 4/4  loss " in output
    assert (folder / "report.txt").read_bytes().decode() in output + "\n"
    assert json.loads((folder / "summary.json").read_text())["progress"]["step"] == 4


def test_the_configuration_that_is_written_is_the_resolved_one(command: Command, tiny: Path, tmp_path: Path) -> None:
    """So that resuming does not ask the machine, the working directory or the tokenizer again."""
    flags = ("--training.precision", "auto", "--training.steps", 1, "--training.evaluate_every", 100)
    assert command(tiny, "--run.folder", tmp_path, "--run.name", "x", *flags)[0] == 0

    written = (tmp_path / "x" / "config.yaml").read_text()
    assert "vocab_size: 320\n" in written
    assert f"corpus: {tiny.parent / 'corpus.yaml'}\n" in written
    assert "precision: fp32\n" in written or "precision: bf16\n" in written


def test_the_dense_twin_is_one_flag_away(command: Command, tmp_path: Path) -> None:
    status, output, _ = command(
        "--run.folder", tmp_path, "--run.name", "x", "--training.steps", 1, "--model.dense_twin", "true"
    )

    assert status == 0
    assert "load of the experts" not in output


def test_resuming_a_finished_run_for_longer(command: Command, run: Path) -> None:
    status, output, errors = command("--resume", run, "--training.steps", 8)

    assert (status, errors) == (0, "")
    assert f"resuming {run} after step 6\n" in output
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "steps: 8\n" in (run / "config.yaml").read_text()


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_begins_with_the_weights_of_another(command: Command, finished: Path, tmp_path: Path, step: int) -> None:
    """At four times the context, and without a step nothing has changed: of the run itself its newest weights."""
    source = finished if step == 6 else finished / "checkpoints" / "step-00000003"
    flags = ("--run.start_from", source, "--run.folder", tmp_path, "--run.name", "longer")
    longer = ("--model.max_seq", 512, "--data.sequence_length", 64)
    no_rate = ("--training.optimizer.lr", 1e-30, "--training.optimizer.weight_decay", 0, "--training.steps", 1)

    status, output, errors = command(*flags, *longer, *no_rate)

    assert (status, errors) == (0, "")
    assert f"beginning with the weights of {finished} after step {step}" in output
    before = load_file(finished / "checkpoints" / f"step-0000000{step}" / "model.safetensors")
    after = load_file(tmp_path / "longer" / "checkpoints" / "step-00000001" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_that_do_not_fit_are_refused(command: Command, finished: Path, tmp_path: Path) -> None:
    flags = ("--run.start_from", finished, "--run.folder", tmp_path, "--run.name", "other")

    for setting, message in {
        ("--run.start_from", tmp_path): "is no run folder: it has no config.yaml",
        ("--data.vocab_size", "290"): "run.start_from: the tokens of",
        ("--model.d_model", "48"): "model.safetensors: ",
    }.items():
        status, _, errors = command(*(flags[2:] if setting[0] == flags[0] else flags), *setting)
        assert status == 2
        assert message in errors and errors.count("\n") == 1
        assert not (tmp_path / "other").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(command: Command, run: Path) -> None:
    damaged = run / "checkpoints" / "step-00000006" / "model.safetensors"
    flipped = bytearray(damaged.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    damaged.write_bytes(flipped)
    before = [row["lm_loss"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]

    status, output, _ = command("--resume", run)

    assert status == 0
    assert f"{damaged}: damaged" in output
    assert f"resuming {run} after step 3\n" in output
    assert [row["lm_loss"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"] == before
    assert checkpoint.newest(run / "checkpoints", pytest.fail).step == 6


def test_another_number_of_threads_is_said(command: Command, run: Path) -> None:
    torch.set_num_threads(2)
    try:
        _, output, _ = command("--resume", run)
    finally:
        torch.set_num_threads(1)

    assert "numbers may differ in the last digits from an unbroken run: threads 1 then, 2 now\n" in output


# -------------------------------------------------------------------------------------------- routers that look ahead

SINKHORN = ("--model.router.selection", "sinkhorn", "--model.balance.load_balance", 0)
LEAKS = "WARNING: the training loss leaks the future, and is too low: "


def test_a_router_that_looks_ahead_is_warned_of_at_the_start_and_on_resuming(command: Command, tmp_path: Path) -> None:
    flags = ("--run.folder", tmp_path, "--run.name", "x", "--training.steps", 1)

    started = command(*flags, *SINKHORN)[1]
    resumed = command("--resume", tmp_path / "x", "--training.steps", 2)[1]

    warning = (
        f"{LEAKS}with router.selection sinkhorn the tokens of a batch compete for each expert. "
        "The validation loss is right: in evaluation and generation this router does not look ahead.\n"
    )
    for output in (started, resumed):
        assert output.count(warning) == 1
        assert output.index(warning) < output.index("\nstep ")


def test_nothing_is_said_where_nothing_looks_ahead(command: Command, tmp_path: Path) -> None:
    causal = command("--run.folder", tmp_path, "--run.name", "causal", "--training.steps", 1)[1]
    twin = ("--run.name", "twin", "--training.steps", 1, "--model.dense_twin", "true")
    dense = command("--run.folder", tmp_path, *twin, *SINKHORN)[1]

    assert "step 1/1" in causal and "step 1/1" in dense
    assert "WARNING" not in causal + dense


VALIDATION_IS_RIGHT = ". The validation loss is right: "
VALIDATION_LEAKS = ". The validation loss leaks as well, for in evaluation "
SCORE = "with router.capacity.order score a later token with a higher score evicts an earlier one"
CHOICE = "with router.capacity.order choice a later token's first choice evicts an earlier's second"


def by(order: str, *, in_evaluation: bool = False) -> CapacityConfig:
    return CapacityConfig(factor=1.0, order=order, in_evaluation=in_evaluation)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"selection": "base", "top_k": 1}, ["with router.selection base ", VALIDATION_IS_RIGHT]),
        ({"selection": "sinkhorn"}, ["with router.selection sinkhorn ", VALIDATION_IS_RIGHT]),
        (
            {"selection": "expert_choice"},
            ["with router.selection expert_choice ", VALIDATION_LEAKS, "with router.selection expert_choice "],
        ),
        ({"capacity": by("score")}, [SCORE, VALIDATION_IS_RIGHT]),
        ({"capacity": by("score", in_evaluation=True)}, [SCORE, VALIDATION_LEAKS, SCORE]),
        ({"capacity": by("choice")}, [CHOICE, VALIDATION_IS_RIGHT]),
        ({"capacity": by("choice", in_evaluation=True)}, [CHOICE, VALIDATION_LEAKS, CHOICE]),
        (  # in evaluation, Sinkhorn is plain top-k, and the capacity alone looks ahead
            {"selection": "sinkhorn", "capacity": by("score", in_evaluation=True)},
            ["with router.selection sinkhorn ", f" and {SCORE}{VALIDATION_LEAKS}{SCORE}: do not compare"],
        ),
    ],
    ids=str,
)
def test_the_warning_names_what_looks_ahead_and_what_is_still_right(settings: dict, parts: list[str]) -> None:
    router = RouterConfig(**{"normalise": False} | settings)
    balance = BalanceConfig(load_balance=0)

    warning = leak_warning(ModelConfig(router=router, balance=balance))

    assert warning is not None and warning.startswith(LEAKS + parts[0])
    position = 0
    for part in parts:
        position = warning.index(part, position) + len(part)
    assert leak_warning(ModelConfig(router=router, balance=balance, dense_twin=True)) is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"capacity": by("position", in_evaluation=True)},
        {"capacity": by("choice", in_evaluation=True), "top_k": 1, "normalise": False},
    ],
    ids=str,
)
def test_a_router_that_does_not_look_ahead_gets_no_warning(settings: dict) -> None:
    assert leak_warning(ModelConfig(router=RouterConfig(**settings))) is None


# ------------------------------------------------------------------------------------------------------- in a process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_and_says_how_to_go_on_and_that_works(
    command: Command, tiny: Path, tmp_path: Path, number: signal.Signals
) -> None:
    steps = 100_000
    flags = ["--run.folder", tmp_path, "--run.name", "x", "--training.steps", steps, "--training.evaluate_every", steps]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), str(tiny), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("step      3/"):
            break
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)

    assert (process.returncode, errors) == (130, "")
    saved = checkpoint.newest(tmp_path / "x" / "checkpoints", pytest.fail).step
    assert output.endswith(f"saved after step {saved}; go on with: python train.py --resume {tmp_path / 'x'}\n")
    assert saved >= 3
    assert read_metrics(tmp_path / "x" / "metrics.jsonl")[-1]["step"] == saved
    assert command("--resume", tmp_path / "x", "--training.steps", saved + 2)[0] == 0
    assert checkpoint.newest(tmp_path / "x" / "checkpoints", pytest.fail).step == saved + 2


def test_a_mistake_is_one_line_and_status_2_for_the_shell_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--training.stepz", "3"], capture_output=True, text=True, cwd=tmp_path
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "--training.stepz is unknown; did you mean --training.steps?\n"


def test_ctrl_c_before_training_is_no_traceback(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe.training.command.prepare", interrupted)

    status, _, errors = command("--run.folder", tmp_path, "--run.name", "x")

    assert (status, errors) == (130, "\nstopped before the first step\n")
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_setting(command: Command, flag: str) -> None:
    status, output, errors = command(flag)

    assert (status, errors) == (0, "")
    assert "--training.steps=1000" in output
    assert "--resume RUN" in output


MISTAKES = {
    "unknown flag": (["--modle.d_model", "64"], "--modle.d_model is unknown; did you mean --model.d_model"),
    "bad value": (["--training.steps", "many"], '--training.steps must be a whole number, not "many"'),
    "wrong choice": (["--training.device", "gpu"], "--training.device must be auto, cpu or cuda"),
    "out of range": (["--training.steps", "0"], "--training.steps is 0, and must be at least 1"),
    "conflict": (
        ["--training.accumulation", "3"],
        "--training.accumulation is 3, which does not divide batch_size = 8",
    ),
    "no such file": (["none.yaml"], "none.yaml: there is no such file"),
    "two files": (["a.yaml", "b.yaml"], "one configuration at a time, and 2 were given: ['a.yaml', 'b.yaml']"),
    "no such run": (["--resume", "none"], "none: is no run folder: it has no config.yaml"),
    "resume and a file": (
        ["--resume", "x", "a.yaml"],
        "--resume takes its configuration from the run; leave out a.yaml",
    ),
    "resume what": (["--resume"], "--resume needs a value"),
    "no such corpus": (["--data.corpus", "none.yaml"], "data.corpus: there is no file "),
    "small vocabulary": (["--model.vocab_size", "257"], "model.vocab_size: is 257, but the tokenizer has 300 ids"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)

    assert only_line(*command(*arguments)).startswith(message)


def test_a_key_in_the_file_is_refused_with_its_line(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training:\n  steps: 3\n  stepz: 4\n")

    assert only_line(*command(path)) == f"{path}:3: training.stepz is unknown; did you mean training.steps?"


def test_too_little_text_is_said_once_it_is_counted(command: Command, tmp_path: Path) -> None:
    flags = ("--data.sequence_length", 128, "--data.max_bytes", 300)

    status, output, errors = command("--run.folder", tmp_path, *flags)

    assert (status, errors.count("\n")) == (2, 1)
    assert output.splitlines()[-1] == "encoding 2 domains"
    assert errors.startswith("domain prose: ")
    assert "shorten the sequences, or give it more text" in errors


def test_several_mistakes_are_a_line_each(command: Command) -> None:
    status, _, errors = command("--training.steps", "many", "--model.norm", "batch")

    assert status == 2
    assert [line.split()[0] for line in errors.splitlines()] == ["--training.steps", "--model.norm"]


def test_a_gpu_that_is_not_there(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    line = only_line(*command("--training.device", "cuda", "--run.folder", tmp_path))

    assert line == "training.device is cuda, and torch finds no CUDA device here; use cpu or auto"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_exists_is_not_overwritten(command: Command, run: Path) -> None:
    before = contents(run)

    line = only_line(*command("--run.folder", run.parent, "--run.name", run.name))

    assert line == f"{run}: exists; choose another --run.name, or continue it with --resume {run}"
    assert contents(run) == before


# ------------------------------------------------------------------------------------------------- mistakes in resuming


@pytest.mark.parametrize("flag", ["model.d_model", "training.seed", "training.batch_size", "data.corpus", "run.name"])
def test_what_would_make_it_another_run_may_not_change(command: Command, run: Path, flag: str) -> None:
    before = contents(run)

    line = only_line(*command("--resume", run, f"--{flag}", "1"))

    assert line.startswith(f"--{flag} would make it another run; with --resume only these may change: ")
    assert "training.steps" in MAY_CHANGE and "training.steps" in line
    assert contents(run) == before


@pytest.mark.parametrize("content", ["{}", "[]", '{"files": {"tokenizer.json": {"sha256": "0"}}}'])
def test_a_manifest_that_is_none_is_named(command: Command, run: Path, content: str) -> None:
    (run / "corpus.json").write_text(content)

    line = only_line(*command("--resume", run))

    assert line.startswith(f"{run / 'corpus.json'}: is not the manifest of a corpus: ")


def test_a_damaged_tokenizer_is_written_again(command: Command, run: Path) -> None:
    whole = (run / "tokenizer.json").read_bytes()
    (run / "tokenizer.json").write_bytes(whole[:100])

    status, output, _ = command("--resume", run)

    assert status == 0
    assert f"{run / 'tokenizer.json'}: is damaged or missing, and is written again\n" in output
    assert (run / "tokenizer.json").read_bytes() == whole


def test_a_refused_resume_does_not_change_the_settings(command: Command, run: Path) -> None:
    with (run / "metrics.jsonl").open("r+") as file:
        file.write("{{{")
    before = contents(run)

    assert command("--resume", run, "--training.steps", 50)[0] == 2
    assert contents(run) == before


def test_fewer_steps_than_are_done_are_refused(command: Command, run: Path) -> None:
    done = checkpoint.newest(run / "checkpoints", pytest.fail).step
    before = contents(run)

    line = only_line(*command("--resume", run, "--training.steps", done - 1))

    assert line == f"training.steps is {done - 1}, but the run has done {done}"
    assert contents(run) == before


def test_a_run_that_diverged_ends_with_a_report_without_samples(command: Command, tmp_path: Path) -> None:
    flags = ["--run.folder", tmp_path, "--run.name", "x", "--training.steps", 3]

    status, output, _ = command(*flags, "--training.optimizer.lr", 1e30, "--training.schedule.warmup_steps", 0)

    assert status == 0
    assert "skipped" in output
    assert (tmp_path / "x" / "report.txt").is_file()


def test_a_refused_start_leaves_the_name_free(command: Command, tmp_path: Path) -> None:
    """No domain has a block of 100,000 tokens, which is known only once there is a run folder."""
    flags = ["--run.folder", tmp_path, "--run.name", "x", "--model.max_seq", 200_000]

    line = only_line(*command(*flags, "--data.sequence_length", 100_000))

    assert "are less than one block" in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["config.yaml", "corpus.json", "metrics.jsonl"])
def test_a_file_of_the_run_that_is_damaged_is_named_and_nothing_is_lost(command: Command, run: Path, name: str) -> None:
    """Cut in the middle of what it was, with noise after it."""
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2] + b"\0\xff{{[\n" + b'"\n')
    before = contents(run)

    status, _, errors = command("--resume", run)

    assert status == 2
    assert errors.count("\n") == 1
    assert errors.startswith(f"{run / name}:")
    assert contents(run) == before


def test_every_checkpoint_damaged(command: Command, run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")

    status, output, errors = command("--resume", run)

    assert status == 2
    assert errors == f"{run / 'checkpoints'}: every checkpoint here (2) is damaged; start the run from the beginning\n"
    assert output.count("looking for an earlier checkpoint") == 2


def test_no_checkpoint_yet(command: Command, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")

    assert only_line(*command("--resume", run)).endswith(
        "checkpoints: no checkpoint here; start the run from the beginning"
    )
