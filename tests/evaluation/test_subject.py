"""Which model is evaluated, how it reads, and where the results go."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe import presets
from moe.config import ModelConfig
from moe.errors import UserError
from moe.evaluation.subject import competition, count, open_subject, run_of
from moe.training.run_folder import RunFolder

HTML = {"--device": "cpu"}


def test_of_a_run_it_is_the_newest_checkpoint(run: RunFolder, tmp_path: Path) -> None:
    subject = open_subject(run.path, HTML | {"--out": str(tmp_path / "out")})

    assert (subject.step, subject.sequence_length, subject.batch_size, subject.precision) == (6, 32, 32, "fp32")
    assert subject.title == f"{run.path} at step 6"
    assert not subject.model.training
    expected = run.load_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in subject.model.state_dict().items())


def test_of_a_checkpoint_it_is_that_one(run: RunFolder, tmp_path: Path) -> None:
    path = run.checkpoints_path / "step-00000003"

    subject = open_subject(path, HTML | {"--out": str(tmp_path / "out")})

    assert subject.step == 3
    assert subject.run.path == run.path
    assert not torch.equal(subject.model.embedding.weight, run.load_model().embedding.weight)


def test_results_go_into_the_run_and_those_of_a_checkpoint_beside_them(run: RunFolder) -> None:
    ours, of_step = (open_subject(path, HTML) for path in (run.path, run.checkpoints_path / "step-00000003"))
    try:
        assert ours.out == run.path / "evaluation"
        assert of_step.out == run.path / "evaluation-00000003"
    finally:
        for subject in (ours, of_step):
            subject.out.rmdir()


def test_flags_are_taken(run: RunFolder, tmp_path: Path) -> None:
    flags = {"--sequence-length": "160", "--batch-size": "3", "--precision": "bf16", "--out": str(tmp_path / "out")}

    subject = open_subject(run.path, HTML | flags)

    assert (subject.sequence_length, subject.batch_size, subject.precision) == (160, 3, "bf16")
    assert subject.out == tmp_path / "out"
    assert subject.suffix == ".html"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"--device": "tpu"}, "--device is tpu, and must be auto, cpu or cuda"),
        ({"--precision": "fp16"}, "--precision is fp16, and must be fp32 or bf16"),
        ({"--format": "gif"}, "--format is gif, and must be one of png, svg, pdf, html"),
        ({"--sequence-length": "161"}, "--sequence-length is 161, and the model reads at most model.max_seq = 160"),
        ({"--sequence-length": "0"}, "--sequence-length is 0, and must be 1 or more"),
        ({"--batch-size": "many"}, "--batch-size is 'many', and must be a whole number"),
        ({"--out": "FILE/out"}, "FILE/out: cannot be written (Not a directory)"),
    ],
)
def test_a_mistake_is_told_before_the_model_is_loaded(
    run: RunFolder, tmp_path: Path, flags: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    monkeypatch.setattr("moe.evaluation.subject.Transformer", None)

    with pytest.raises(UserError) as caught:
        open_subject(run.path, HTML | {"--out": str(tmp_path / "out")} | flags)

    assert str(caught.value) == reason


def test_a_picture_that_could_not_be_drawn_is_told_before_the_work(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise UserError("pictures need a browser")

    monkeypatch.setattr("moe.evaluation.subject.require_browser", none)
    flags = HTML | {"--out": str(tmp_path / "out")}

    with pytest.raises(UserError, match="pictures need a browser"):
        open_subject(run.path, flags | {"--format": "svg"})
    assert not (tmp_path / "out").exists()
    open_subject(run.path, flags | {"--format": "html"})


def test_no_cuda_where_there_is_none(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(Exception, match="is cuda, and torch finds no CUDA device here"):
        open_subject(run.path, {"--device": "cuda", "--out": str(tmp_path / "out")})


def test_the_run_of_a_path(run: RunFolder) -> None:
    assert run_of(run.path) == run.path
    assert run_of(run.checkpoints_path / "step-00000003") == run.path
    assert run_of(Path("elsewhere/checkpoints/step-00000003")) == Path("elsewhere/checkpoints/step-00000003")


def test_a_number_of_a_flag() -> None:
    assert count({"--limit": "7"}, "--limit") == 7
    assert count({}, "--limit") is None


def test_numbers_are_written_with_how_they_came_about(run: RunFolder, tmp_path: Path) -> None:
    go = pytest.importorskip("plotly.graph_objects")
    subject = open_subject(run.path, HTML | {"--out": str(tmp_path / "out")})

    subject.write("numbers", {"score": 1.5}, go.Figure())

    written = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert written == {
        "format": 1,
        "run": str(run.path),
        "step": 6,
        "sequence_length": 32,
        "precision": "fp32",
        "device": "cpu",
        "batch_size": 32,
        "score": 1.5,
    }
    assert (tmp_path / "out" / "numbers.html").read_text().startswith("<!doctype html>")
    assert not list((tmp_path / "out").glob(".partial*"))


def test_what_cannot_be_written_is_one_line(run: RunFolder, tmp_path: Path) -> None:
    subject = open_subject(run.path, HTML | {"--out": str(tmp_path / "out")})
    (tmp_path / "out").rmdir()

    with pytest.raises(UserError, match=r"out.*: cannot be written \(No such file or directory\)"):
        subject.write("numbers", {}, None)


def test_a_number_that_is_none_is_never_written_as_one(run: RunFolder, tmp_path: Path) -> None:
    """JSON has no NaN: whoever writes one has forgotten as_json."""
    subject = open_subject(run.path, HTML | {"--out": str(tmp_path / "out")})

    with pytest.raises(ValueError, match="not JSON compliant"):
        subject.write("numbers", {"score": math.nan}, None)


# ------------------------------------------------------------------------------------------- tokens compete for experts


def model(preset: str) -> ModelConfig:
    return presets.model_config(preset)


def test_of_most_routers_there_is_nothing_to_know() -> None:
    for preset in ("mixtral", "deepseek_v3", "switch", "base"):
        assert competition(model(preset)) is None, preset


def test_of_a_router_whose_tokens_compete_it_is_said() -> None:
    says = competition(model("expert_choice"))

    assert says == (
        "tokens compete for this router's experts: a prediction may have seen the token that it predicts, and the "
        "other sequences of a batch have a say, so that numbers change with --batch-size"
    )


def test_of_a_dense_model_s_router_nothing_is_said() -> None:
    assert competition(replace(model("expert_choice"), dense_twin=True)) is None


def test_a_longer_text_than_training_s_is_read_with_the_rotation_of_training(run: RunFolder, tmp_path: Path) -> None:
    """max_seq of 160 is a bound for the rotary model; YaRN's default would take it for what was trained on."""
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    text = (copy / "config.yaml").read_text()
    text = text.replace("scaling: none", "scaling: yarn").replace("factor: 1.0", "factor: 4.0", 1)
    (copy / "config.yaml").write_text(text)

    longer = open_subject(copy, {}, 4096).config.model

    assert (longer.max_seq, longer.attention.rope.original_max_seq) == (4096, 40)
    assert open_subject(copy, {}, 100).config.model.max_seq == 160


def test_learned_positions_end_where_they_end(run: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("positions: rotary", "positions: learned"))

    with pytest.raises(UserError, match="4,096 tokens are more than the 160 positions that the model has learned"):
        open_subject(copy, {}, 4096)
