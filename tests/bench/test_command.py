import json
import os
import signal

import pytest
import torch

from moe.cli import main
from moe.training import machine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "one of layer, step and decode is needed"),
        (["bench", "all"], "one of layer, step and decode is needed"),
        (["bench", "layer", "--shape", "huge"], "--shape 'huge' is none of toy, gpt4s"),
        (["bench", "step", "--shape", "toy"], "--shape 'toy' is none of tiny, small"),
        (["bench", "layer", "--precision", "fp8"], "--precision 'fp8' is none of fp32, bf16"),
        (["bench", "layer", "--skew", "uneven"], "--skew 'uneven' is none of balanced, zipf"),
        (["bench", "layer", "--rounds", "0"], "--rounds is '0', and must be a whole number from 1"),
        (["bench", "decode", "--batch", "1,many"], "--batch is 'many', and must be a whole number from 1"),
        (["bench", "layer", "--only", "nobody*"], "--only 'nobody*' fits no contestant here"),
        (["bench", "layer", "--settings", "mine"], "--settings 'mine' is none of users, ours"),
        (["bench", "layer", "--device", "tpu"], "--device is tpu, and must be cpu or cuda"),
        (["bench", "layer", "--model.d_model", "64"], "--model.d_model belongs to training"),
        (["bench", "step", "--skew", "zipf"], "--skew belongs to bench layer, not to step"),
        (["bench", "layer", "--batch", "2"], "--batch belongs to bench step and decode, not to layer"),
        (["bench", "layer", "--out", "/proc/no"], "--out /proc/no: cannot be written"),
        (["bench", "layer", "--lock", "/no/such/lock"], "--lock /no/such/lock: cannot be written"),
        (["bench", "draw"], "one file that a bench wrote is needed"),
        (["bench", "draw", "nowhere.json"], "nowhere.json: cannot be read"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, message, capsys):
    assert main([*arguments, "--device", "cpu"] if "--device" not in arguments else arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said(capsys):
    assert main(["bench", "layer", "--device", "cuda"]) == 2
    assert "torch finds no CUDA device here; use cpu" in capsys.readouterr().err


def test_the_list_marks_the_usual_contestants(capsys):
    assert main(["bench", "layer", "--device", "cpu", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  * ours segments" in lines
    assert "    transformers batched_mm" in lines


def test_a_whole_run_in_processes_of_their_own(tmp_path, capsys, monkeypatch):
    """Ours and the plain loop on the smallest layer, and all that is printed and written."""
    pytest.importorskip("plotly")
    monkeypatch.setattr("moe.bench.picture.save_all", lambda figures: None)
    command = ["bench", "layer", "--device", "cpu", "--shape", "mini", "--precision", "fp32", "--settings", "users"]
    chosen = ["--only", "ours segments,plain loop", "--rounds", "2", "--lock", str(tmp_path / "lock")]
    assert main([*command, *chosen, "--out", str(tmp_path)]) == 0
    out, progress = capsys.readouterr()
    assert "layer: mini (T 512, d 32, F 64, E 4, k 2), fp32, balanced load" in out
    assert "round 2 of 2 done" in progress
    content = json.loads((tmp_path / "bench-layer.json").read_text())
    assert set(content["machine"]) == {"device", "torch", "python", "threads", "capability"}
    [cell] = content["cells"]
    assert cell["cell"] == {"shape": "mini", "precision": "fp32", "skew": "balanced"}
    for row in cell["rows"]:
        assert row["failure"] is None
        assert row["error"] < 1e-5
        assert row["forward_ms"] < row["ms"]
        assert len(cell["seconds"][row["name"]]["all"]) == 2
    assert {row["name"] for row in cell["rows"]} == {"ours segments", "plain loop"}


def test_a_terminated_run_leaves_nothing_behind(monkeypatch):
    seen = []

    def run_rounds(*arguments, folder, **options):
        seen.append(folder)
        os.kill(os.getpid(), signal.SIGTERM)
        yield

    monkeypatch.setattr("moe.bench.command.run_rounds", run_rounds)
    assert main(["bench", "layer", "--device", "cpu", "--only", "plain loop"]) == 130
    [folder] = seen
    assert not folder.exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_settings_of_a_process_are_never_made_by_importing(monkeypatch):
    """The bench's parent process times nothing, and leaves the C library as it is."""
    called = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: called.append(True))
    assert main(["bench", "step", "--device", "cpu", "--list"]) == 0
    assert not called
