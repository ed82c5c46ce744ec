"""A study of a run, of one of its checkpoints and of a record alone; every method is the metric of its name."""

import dataclasses
import inspect
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import moe.study
from moe.errors import UserError
from moe.study.metrics import load as loads
from moe.study.metrics import pairs, similarity, specialisation, stability
from moe.study.recording import record_sample
from moe.study.storage import write_record
from moe.study.study import METRICS, OF_THE_MODEL, Study
from moe.training.command import main as train


def quiet(line):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, herds: Callable[[Path], Path]) -> Path:
    """Four steps over sheep and goats, with checkpoints after 2 and 4 and records at 0, 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    tiny = herds(folder)
    arguments = [str(tiny), "--run.folder", str(folder), "--run.name", "run"]
    assert train(arguments, folder, record_sample) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def study(trained: Path) -> Study:
    return moe.study.load(trained, say=quiet)


# -------------------------------------------------------------------------------------------------------------- loading


def test_the_final_record_is_of_all_held_out_text_under_the_newest_checkpoint(study: Study) -> None:
    assert study.final.step == 4
    assert study.final.domains == ("sheep", "goats")
    scored = sum(int(batch.scored.sum()) for batch in study.held_out())
    assert study.final.n_tokens == scored
    assert study.final.layers[0].scores is not None


def test_the_records_of_training_come_in_the_order_of_steps(study: Study) -> None:
    assert [record.step for record in study.over_training] == [0, 2, 4]
    assert study.saturation().axes[1].labels == ("0", "2", "4")


def test_the_loss_of_the_record_is_that_of_the_model(study: Study) -> None:
    model, batch = study.model(), study.held_out()[0]
    with torch.no_grad():
        logits = model(batch.tokens)[0]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
    expected = losses[batch.scored].numpy()
    np.testing.assert_allclose(study.final.loss[: len(expected)], expected, rtol=1e-4)


def test_a_record_that_is_there_is_read_and_not_made_again(study: Study, trained: Path) -> None:
    said: list[str] = []
    header = trained / "records" / "validation-00000004" / "_record.json"
    before = header.stat().st_mtime_ns
    again = moe.study.load(str(trained), say=said.append)
    assert not said
    assert header.stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.final.token_id, study.final.token_id)


def test_making_the_record_is_said(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("validation-*"))
    said: list[str] = []
    moe.study.load(run, say=said.append)
    assert said == [f"recording all held-out text at step 4 to {run}/records/validation-00000004"]


def test_a_part_of_the_text_has_a_record_of_its_own(study: Study, trained: Path) -> None:
    part = moe.study.load(trained, 32, say=quiet)
    assert 0 < part.final.n_tokens <= 32 < study.final.n_tokens
    assert not part.is_whole
    assert "bits per byte" not in part.facts()
    assert moe.study.load(trained, say=quiet).final.n_tokens == study.final.n_tokens


def test_a_checkpoint_is_studied_as_it_was(study: Study, trained: Path) -> None:
    earlier = moe.study.load(trained / "checkpoints" / "step-00000002", say=quiet)
    assert earlier.final.step == 2
    assert [record.step for record in earlier.over_training] == [0, 2]
    np.testing.assert_array_equal(earlier.final.token_id, study.final.token_id)
    assert not np.array_equal(earlier.final.loss, study.final.loss)
    assert 0 <= earlier.flip_rate(study).values.min() <= earlier.flip_rate(study).values.max() <= 1


def test_a_record_alone_has_metrics_but_no_model(records, tmp_path: Path) -> None:
    record = records.planted(2, 2, 1)
    write_record(tmp_path / "record", record)
    study = moe.study.load(tmp_path / "record")
    np.testing.assert_array_equal(study.load().values, loads.load(record).values)
    assert study.over_training == ()
    for needs_a_run in (study.model, study.corpus, study.ablate, study.weight_similarity):
        with pytest.raises(UserError, match="is a record alone"):
            needs_a_run()
    with pytest.raises(UserError, match="leave out the number of tokens"):
        moe.study.load(tmp_path / "record", 100)


def test_a_run_without_checkpoints_names_a_record_that_is_left(study: Study, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    record = run / "records" / "validation-00000004"
    with pytest.raises(UserError, match=f"no sound checkpoint to study; .* alone: {record}$"):
        moe.study.load(run, say=quiet)
    assert moe.study.load(record).final.n_tokens == study.final.n_tokens
    shutil.rmtree(run / "records")
    with pytest.raises(UserError, match="no checkpoint here"):
        moe.study.load(run, say=quiet)


def test_a_damaged_record_of_training_is_said_and_left_out(study: Study, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "records" / "step-00000002" / "shard-00000.parquet").unlink()
    said: list[str] = []
    assert [record.step for record in moe.study.load(run, say=said.append).over_training] == [0, 4]
    assert [line.split(": ")[:2] for line in said] == [["left out", str(run / "records" / "step-00000002")]]


def test_what_is_no_run_is_refused(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(UserError, match="neither the folder of a run"):
        moe.study.load(tmp_path)
    with pytest.raises(UserError, match="must be 1 or more"):
        moe.study.load(trained, 0)


def test_a_dense_model_has_no_routing(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("records"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("dense_twin: false", "dense_twin: true"))
    with pytest.raises(UserError, match="no routing to study"):
        moe.study.load(run, say=quiet)


# -------------------------------------------------------------------------------------------------------------- metrics


def methods_and_functions() -> list:
    found = []
    for room in (loads, pairs, specialisation, stability, similarity):
        for name, function in inspect.getmembers(room, inspect.isfunction):
            if function.__module__ == room.__name__ and hasattr(Study, name):
                found.append(pytest.param(name, function, id=name))
    return found


@pytest.mark.parametrize(("name", "function"), methods_and_functions())
def test_a_method_takes_what_its_metric_takes(name, function) -> None:
    def options(signature):
        free = ("self", "record", "records", "model", "tokens", "one", "other")
        return {name: option.default for name, option in signature.parameters.items() if name not in free}

    assert options(inspect.signature(getattr(Study, name))) == options(inspect.signature(function))


def test_every_metric_has_a_method() -> None:
    functions = {
        name
        for room in (loads, pairs, specialisation, stability, similarity)
        for name, function in inspect.getmembers(room, inspect.isfunction)
        if function.__module__ == room.__name__
        and str(inspect.signature(function).return_annotation).find("Measurement") >= 0
        and not name.startswith("_")
    }
    assert len(functions) > 20
    assert functions <= set(dir(Study))
    # Transitions are of two layers that one must name.
    assert functions - {"cross_layer_transitions"} <= {name.split(" ")[0] for name in METRICS}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda study: study.max_violation("sequence"), lambda record: loads.max_violation(record, "sequence")),
        (lambda study: study.max_violation("batch", 2), lambda record: loads.max_violation(record, "batch", 2)),
        (lambda study: study.drop_rate("position", 4), lambda record: loads.drop_rate(record, "position", 4)),
        (lambda study: study.dead_experts(0.5), lambda record: loads.dead_experts(record, 0.5)),
        (
            lambda study: study.consecutive_repetition("any", 3, 7),
            lambda record: loads.consecutive_repetition(record, "any", 3, 7),
        ),
        (
            lambda study: study.position_dependence(4, 3, 7),
            lambda record: loads.position_dependence(record, 4, 3, 7),
        ),
        (
            lambda study: study.vocabulary_specialisation("target", 2, 3, 7),
            lambda record: specialisation.vocabulary_specialisation(record, "target", 2, 3, 7),
        ),
        (
            lambda study: study.cross_layer_transitions(1, 0, "any"),
            lambda record: pairs.cross_layer_transitions(record, 1, 0, "any"),
        ),
        (lambda study: study.expert_paths(3), lambda record: pairs.expert_paths(record, 3)),
        (lambda study: study.near_ties(0.1), lambda record: stability.near_ties(record, 0.1)),
    ],
)
def test_a_method_hands_on_its_arguments(study: Study, call, expected) -> None:
    ours, metrics = call(study), expected(study.final)
    np.testing.assert_array_equal(ours.values, metrics.values)
    for part in ("title", "reading"):
        assert getattr(ours, part) == getattr(metrics, part)
    if metrics.null is not None:
        np.testing.assert_array_equal(ours.null, metrics.null)


def test_flips_are_from_each_step_to_the_next(study: Study) -> None:
    flips = study.flip_rate()
    assert flips.axes[1].labels == ("2", "4")
    last = stability.flip_rate(*study.over_training[1:])
    np.testing.assert_array_equal(flips.values[:, 1], last.values)
    np.testing.assert_array_equal(flips.null[:, 1], last.null)


def test_all_measurements_are_taken_at_once(study: Study) -> None:
    measured = study.measurements()
    assert measured.keys() == METRICS.keys()
    np.testing.assert_array_equal(measured["load"].values, study.load().values)
    assert study.measurements(without=[*METRICS][1:]).keys() == {"load"}


def test_what_cannot_be_measured_is_said_and_left_out(records) -> None:
    said: list[str] = []
    study = Study(records.uniform(50, 4, 2, n_layers=2), say=said.append)
    measured = study.measurements()
    missing = {"saturation", "flip_rate", "selection_margin", "near_ties", *OF_THE_MODEL}
    assert METRICS.keys() - measured.keys() == missing
    assert [line.split(":")[1].strip() for line in said] == ["saturation", "flip rate", "selection margin", "near ties"]


def test_knocking_out_experts_sets_what_the_page_shows(study: Study) -> None:
    own = dataclasses.replace(study)
    rise, by_k = own.ablate(64)
    assert own.delta_loss is rise
    assert own.loss_by_k is by_k
    assert rise.values.shape == (2, 4, 2)
    assert by_k.axes[0].labels == ("1", "2", "3", "4")
    assert study.delta_loss is None


def test_the_facts_have_the_loss_in_nats_and_in_bits_per_byte(study: Study) -> None:
    facts = study.facts()
    n_bytes = sum(len(held_out.text) for held_out in study.corpus().validation.values())
    assert facts["loss"] == pytest.approx(study.final.loss.mean(), rel=1e-6)
    assert facts["bits per byte"] == pytest.approx(facts["loss"] * study.final.n_tokens / math.log(2) / n_bytes)
    assert (facts["step"], facts["mixture layers"], facts["experts"]) == (4, 2, "4, 2 a token")


def test_a_notebook_shows_one_line(study: Study) -> None:
    n_tokens = study.final.n_tokens
    assert repr(study) == f"<Study of {study.name}, step 4: {n_tokens} tokens, 2 mixture layers, 3 records of training>"


def test_findings_are_sentences(study: Study) -> None:
    found = study.findings({})
    assert found
    assert all(sentence.endswith(".") for sentence in found)


def test_a_command_that_studies_nothing_does_not_wait_for_parquet() -> None:
    code = "import sys, moe.study.leakage; assert 'pyarrow' not in sys.modules; import moe.study; moe.study.load"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute lode"):
        moe.study.lode  # noqa: B018
