"""``python -m moe import`` and ``export``: a checkpoint in, a run, a checkpoint out; every mistake one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe import cli
from moe.config import AttentionConfig, ExpertsConfig, ModelConfig
from moe.interop.shards import Shards
from moe.training.run_folder import RunFolder

Make = Callable[..., Any]

QUICK = ["--training.device", "cpu", "--training.precision", "fp32"]


def test_in_and_out(checkpoint_of: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, runs, out = checkpoint_of("mixtral"), tmp_path / "runs", tmp_path / "out"

    assert cli.main(["import", str(folder), "--name", "mine", "--run.folder", str(runs), *QUICK]) == 0
    assert capsys.readouterr().out == f"reading 60 tensors of a mixtral model\nrun folder: {runs}/mine\n"
    assert cli.main(["generate", f"{runs}/mine", "--prompt", "the ship", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the ship")
    assert cli.main(["export", f"{runs}/mine", "--to", "huggingface", str(out)]) == 0
    assert capsys.readouterr().out == f"writing step 0 of {runs}/mine as MixtralForCausalLM\nwritten: {out}\n"

    before, after = (dict(iter(Shards.open(place))) for place in (folder, out))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_experts_of_a_dense_model(checkpoint_of: Make, tmp_path: Path) -> None:
    folder, runs = checkpoint_of("qwen3"), tmp_path / "runs"
    flags = ["--upcycle", "8", "--granularity", "2", "--noise", "0.05", "--model.router.top_k", "6"]

    assert cli.main(["import", str(folder), "--name", "mine", "--run.folder", str(runs), *flags, *QUICK]) == 0

    model = RunFolder.open(runs / "mine").config().model
    assert (model.experts.n_experts, model.experts.d_ff, model.router.top_k) == (8, 16, 6)


def test_a_file_for_llama_cpp(run_of: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    run = run_of(
        ModelConfig(
            n_layers=1,
            d_model=16,
            attention=AttentionConfig(n_heads=2, head_dim=8),
            experts=ExpertsConfig(n_experts=2, d_ff=8),
        )
    )

    assert cli.main(["export", str(run.path), "--to", "gguf", str(tmp_path / "model.gguf"), "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.endswith(f"written: {tmp_path / 'model.gguf'}\n")
    assert (tmp_path / "model.gguf").read_bytes().startswith(b"GGUF")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import"], "one folder is needed, and 0 were given: python -m moe import FOLDER"),
        (["import", "a", "b"], "one folder is needed, and 2 were given"),
        (["import", "nowhere"], "nowhere: is no folder of a transformers model: it has no config.json"),
        (["import", "a", "--upcycle", "many"], "--upcycle is 'many', and must be a whole number"),
        (["import", "a", "--upcycle", "1"], "--upcycle: is 1, and must be at least 2"),
        (["import", "a", "--noise", "0.1"], "--noise goes with --upcycle, which is not given"),
        (["import", "a", "--granularity", "2"], "--granularity goes with --upcycle, which is not given"),
        (["import", "a", "--upcycle", "4", "--noise", "loud"], "--noise is 'loud', and must be a number"),
        (["import", "a", "--name", "x", "--run.name", "y"], "--name and --run.name are one; keep one of them"),
        (["import", "a", "--experts", "4"], "--experts is"),
        (["export", "a", "b"], "--to is missing, and must be huggingface or gguf: python -m moe export RUN"),
        (["export", "a", "b", "--to", "onnx"], "--to is onnx, and must be huggingface or gguf"),
        (["export", "a", "--to", "gguf"], "a run folder and a place to write to are needed"),
        (["export", "a", "b", "--to", "gguf", "--dtype", "int8"], "--dtype is int8, and must be fp32 or bf16"),
        (["export", "a", "b", "--to", "gguf", "--training.steps", "1"], "--training.steps belongs to training"),
        (["export", "nowhere", "b", "--to", "huggingface"], "nowhere: is no run folder: it has no config.yaml"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()

    assert cli.main(arguments) == 2

    written = capsys.readouterr()
    assert written.err.startswith(message)
    assert written.err.count("\n") == 1
    assert not written.out


@pytest.mark.parametrize("command", ["import", "export"])
def test_help_lists_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0

    text = capsys.readouterr().out
    assert text.startswith(f"python -m moe {command}")
    for flag in {"import": ["--name", "--upcycle", "--granularity", "--noise"], "export": ["--to", "--dtype"]}[command]:
        assert f"  {flag} " in text
    assert max(map(len, text.splitlines())) <= 120
