"""``study``: a page, numbers and findings of one run; two side by side; seeds with their interval; mistakes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe.errors import UserError
from moe.study.command import Row as Line
from moe.study.command import _idle_cores, as_json, study_command, table_text
from moe.study.compare import match_experts
from moe.study.measurement import Axis, Measurement
from moe.study.recording import record_sample
from moe.study.storage import read_record, write_record
from moe.training.command import main as train

Command = Callable[..., tuple[str, str]]

RUNS = {
    "zero": (),
    "one": ("--training.seed", "1"),
    "two": ("--training.seed", "2"),
    "slow-zero": ("--training.optimizer.lr", "0.0001"),
    "slow-one": ("--training.optimizer.lr", "0.0001", "--training.seed", "1"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, herds: Callable[[Path], Path]) -> Path:
    """A folder of five runs of four steps: three seeds, and two of them with another learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = herds(folder)
    for name, flags in RUNS.items():
        arguments = [str(tiny), "--run.folder", str(folder), "--run.name", name, *flags]
        assert train(arguments, folder, record_sample) == 0
    return folder


@pytest.fixture
def study(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process: output, errors; it must end well."""

    def call(*arguments: object) -> tuple[str, str]:
        capsys.readouterr()
        assert study_command([str(argument) for argument in arguments]) == 0
        written = capsys.readouterr()
        return written.out, written.err

    return call


def refused(*arguments: object) -> str:
    """The one line that says why."""
    with pytest.raises(UserError) as error:
        study_command([str(argument) for argument in arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------------------------------- one run


def test_one_run_gets_a_page_numbers_and_findings(runs: Path, study: Command) -> None:
    output, errors = study(runs / "zero", "--ablation-tokens", 64)
    folder = runs / "zero" / "study"
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "study.json"]
    assert "<html" in (folder / "index.html").read_text(encoding="utf-8")[:200]
    written = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    assert written["step"] == 4
    load = written["measurements"]["load"]
    assert [axis["name"] for axis in load["axes"]] == ["layer", "expert"]
    np.testing.assert_allclose(np.sum(load["values"], axis=1), 1)
    np.testing.assert_allclose(load["chance"], 1 / 4)
    assert {"saturation", "delta_loss", "loss_by_k", "co_activation"} <= written["measurements"].keys()
    assert all(f"- {sentence}" in output for sentence in written["findings"])
    assert "Entropy of the load" in output
    assert f"to look at: {folder / 'index.html'}" in output
    assert "recording all held-out text at step 4" in errors


def test_without_ablation_no_expert_is_knocked_out(runs: Path, study: Command, tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    _, errors = study(runs / "one", "--no-ablation", "--tokens", 64, "--out", page)
    assert page.is_file()
    # A study in the run would no longer be that of the page there.
    assert not (runs / "one" / "study").exists()
    written = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert "delta_loss" not in written["measurements"]
    assert written["tokens read"] <= 64
    assert "knocking out" not in errors


def test_a_checkpoint_has_a_study_of_its_own(runs: Path, study: Command) -> None:
    study(runs / "two" / "checkpoints" / "step-00000002", "--no-ablation")
    assert json.loads((runs / "two" / "study-00000002" / "study.json").read_text())["step"] == 2


def test_a_record_alone_is_studied_beside_its_folder(records, study: Command, tmp_path: Path) -> None:
    write_record(tmp_path / "planted", records.planted(2, 2, 1, n_layers=2))
    output, _ = study(tmp_path / "planted")
    assert (tmp_path / "planted-study" / "index.html").is_file()
    # Both domains are equally long, and each expert is of one: ln 2 of ln 2 is known.
    assert "What the expert tells of the domain: nmi" in output
    values = json.loads((tmp_path / "planted-study" / "study.json").read_text())["measurements"]["domain_information"]
    np.testing.assert_allclose(np.array(values["values"])[:, 0], 1)


def test_pictures_are_written_in_the_format_that_is_asked_for(
    records, study: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr("moe.study.command.require_browser", lambda: None)
    monkeypatch.setattr("moe.study.command.save_all", lambda figures: drawn.extend(figures))
    write_record(tmp_path / "record", records.planted(2, 2, 1, n_layers=2))
    study(tmp_path / "record", "--figures", tmp_path / "pictures", "--format", "png")
    assert tmp_path / "pictures" / "domain_specialisation.png" in drawn
    assert tmp_path / "pictures" / "drop_rate_by_domain.png" in drawn


def test_pictures_that_cannot_be_written_cost_a_line_and_not_the_study(
    records, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe.study.command.require_browser", lambda: None)
    write_record(tmp_path / "record", records.planted(2, 2, 1, n_layers=2))
    (tmp_path / "file").write_text("no folder")
    assert f"{tmp_path / 'file'}: cannot be written" in refused(tmp_path / "record", "--figures", tmp_path / "file")
    assert "Entropy of the load" in capsys.readouterr().out
    assert (tmp_path / "record-study" / "index.html").is_file()


def test_a_router_without_k_keeps_its_knockouts(
    runs: Path, study: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_k(*_args: object, **_settings: object) -> Measurement:
        raise ValueError("selection top_p decides for itself how many experts a token gets: it has no k")

    monkeypatch.setattr("moe.study.study.ablation.loss_by_k", no_k)
    page = tmp_path / "page.html"
    output, errors = study(runs / "zero", "--tokens", 64, "--ablation-tokens", 32, "--out", page)
    assert "left out: " in errors
    assert "it has no k" in errors
    measured = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["measurements"]
    assert "delta_loss" in measured
    assert "loss_by_k" not in measured
    assert "to look at" in output


def test_what_fails_while_writing_leaves_the_old_study(
    records, study: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(tmp_path / "record", records.planted(2, 2, 1))
    folder = tmp_path / "record-study"

    def full(path: Path, text: str, encoding: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as disk:
        disk.setattr("moe.study.command.Path.write_text", full)
        assert "No space left on device" in refused(tmp_path / "record")
        assert not folder.exists()
    study(tmp_path / "record")
    before = (folder / "index.html").read_bytes()
    with monkeypatch.context() as disk:
        disk.setattr("moe.study.command.Path.write_text", full)
        refused(tmp_path / "record")
    assert (folder / "index.html").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "study.json"]


def test_text_is_recorded_by_an_imported_model(
    records, study: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def importing(checkpoint, documents, folder, **options):
        seen.update(checkpoint=checkpoint, documents=documents)
        write_record(folder, records.planted(2, 2, 1))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moe.study.command.import_record", importing)
    for name in ("prose", "code"):
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    study("--import", tmp_path / "olmoe", "--text", "prose.txt", "code.txt")
    assert seen == {"checkpoint": tmp_path / "olmoe", "documents": {"prose": ["prose"], "code": ["code"]}}
    assert (tmp_path / "runs" / "olmoe-record-study" / "index.html").is_file()
    assert "study it again" in refused("--import", tmp_path / "olmoe", "--text", "prose.txt")


# --------------------------------------------------------------------------------------------------------- several runs


def test_two_runs_are_compared_expert_by_expert(runs: Path, study: Command) -> None:
    output, _ = study(runs / "zero", runs / "slow-zero")
    assert "experts matched by the tokens that they get" in output
    assert "95 % interval over sequences" in output
    assert f"  {runs / 'slow-zero'}" in output
    written = json.loads((runs / "zero" / "study" / "compared-with-slow-zero.json").read_text())
    ours, theirs = (read_record(runs / name / "records" / "validation-00000004") for name in ("zero", "slow-zero"))
    expected = match_experts(ours, theirs)
    assert written["matching"] == {str(block): expected.of(block).tolist() for block in expected.blocks}
    loads = np.array([part["values"] for part in written["measurements"]["load"]])
    # The second with its experts in the order of their partners.
    counts = np.bincount(theirs.layers[0].selected.ravel(), minlength=4)
    np.testing.assert_allclose(loads[1, 0], counts[expected.of(0)] / counts.sum())


def test_a_comparison_has_pictures_of_both_side_by_side(
    runs: Path, study: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("moe.study.command.require_browser", lambda: None)
    monkeypatch.setattr("moe.study.command.save_all", lambda figures: drawn.extend(path.name for path in figures))
    study(runs / "zero", runs / "one", "--figures", tmp_path)
    assert {"agreement.svg", "partner_overlap.svg", "load.svg", "load_entropy.svg"} <= set(drawn)


def test_two_checkpoints_of_one_run_are_compared(runs: Path, study: Command) -> None:
    folder = runs / "zero" / "checkpoints"
    output, _ = study(folder / "step-00000002", folder / "step-00000004")
    assert "seeds" not in output
    assert (runs / "zero" / "study-00000002" / "compared-with-step-00000004.json").is_file()


def test_three_seeds_have_a_mean_and_an_interval(runs: Path, study: Command) -> None:
    output, _ = study(runs / "zero", runs / "one", runs / "two")
    assert "over 3 seeds" in output
    assert "their held-out text differs" not in output
    written = json.loads((runs / "zero" / "study" / "compared-with-one-two.json").read_text())
    spread = written["seeds 1"]["Entropy of the load"]
    assert spread["n"] == 3
    each = []
    for name in ("zero", "one", "two"):
        layer = read_record(runs / name / "records" / "validation-00000004").layers[0]
        share = np.bincount(layer.selected.ravel(), minlength=4) / layer.selected.size
        each.append(-(share * np.log(share)).sum() / np.log(4))
    assert spread["values"][0] == pytest.approx(np.mean(each))
    # t(0.975, 2) = 4.303
    assert spread["half_width"][0] == pytest.approx(4.303 * np.std(each, ddof=1) / np.sqrt(3), rel=1e-3)


def test_two_seeds_are_compared_and_averaged(runs: Path, study: Command) -> None:
    output, _ = study(runs / "zero", runs / "one")
    assert "experts matched" in output
    assert "over 2 seeds" in output


def test_seeds_of_two_configurations_are_paired_whatever_their_order(runs: Path, study: Command) -> None:
    output, _ = study(runs / "zero", runs / "slow-one", runs / "one", runs / "slow-zero")
    assert "seed by seed" in output
    written = json.loads((runs / "zero" / "study" / "compared-with-slow-one-one-slow-zero.json").read_text())
    difference = written["differences"]["Entropy of a token's scores (difference)"]
    mean = {arm: written[arm]["Entropy of a token's scores"]["values"][0] for arm in ("seeds 1", "seeds 2")}
    assert difference["n"] == 2
    assert difference["values"][0] == pytest.approx(mean["seeds 2"] - mean["seeds 1"])


def test_three_runs_that_are_no_seeds_are_refused_before_anything_is_recorded(runs: Path, tmp_path: Path) -> None:
    copies = [
        shutil.copytree(runs / name, tmp_path / name, ignore=shutil.ignore_patterns("records", "study*"))
        for name in ("zero", "one", "slow-zero")
    ]
    assert "differ in training.optimizer.lr" in refused(*copies)
    assert not any((copy / "records").exists() for copy in copies)
    assert "differ in training.seed" in refused(*copies[:2], shutil.copytree(copies[0], tmp_path / "again"))


def test_records_of_different_tokens_are_refused(records, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_record(tmp_path / name, records.planted(2, 2, 1, seed=seed))
    assert "different tokens" in refused(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "a run folder is needed"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["."], "neither the folder of a run"),
        (["RUN", "RUN"], "given twice"),
        (["RUN", "RUN/../zero"], "given twice"),
        (["RUN", "--tokens", "many"], "--tokens is 'many', and must be a whole number"),
        (["RUN", "--tokens", "0"], "must be 1 or more"),
        (["RUN", "--ablation-tokens", "5", "--no-ablation"], "keep one of them"),
        (["RUN", "--out", "page.pdf"], "must end in .html"),
        (["RUN", "--format", "png"], "none without --figures"),
        (["RUN", "--figures", "F", "--format", "gif"], "must be one of svg, png, pdf"),
        (["RUN", "--text", "a.txt"], "add --import"),
        (["--import", "F"], "--import needs --text"),
        (["--import", "F", "--text", "nothing.txt"], "nothing.txt: cannot be read as text"),
        (["--import", "F", "--text", "a.txt", "--tokens", "5"], "all text in the files is read"),
        (["RUN", "--model.d_model", "64"], "belongs to training"),
        (["RUN", "OTHER", "--out", "page.html"], "is for the study of one run"),
        (["RUN", "--token", "5"], "--tokens"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], reason: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(runs / "zero"), "OTHER": str(runs / "one")}
    first = {argument: argument.split("/")[0] for argument in arguments}
    assert reason in refused(
        *(argument.replace(first[argument], places.get(first[argument], first[argument]), 1) for argument in arguments)
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("threads", "cores", "load", "expected"),
    [
        (2, 2, 1.0, 2),  # only this process was at work
        (2, 2, 2.1, 1),  # and one more
        (2, 2, 9.0, 1),  # never none
        (8, 16, 4.2, 8),  # 13 cores are left, and more threads than torch has are not asked for
        (16, 16, 0.0, 16),
    ],
)
def test_threads_leave_alone_the_cores_of_others(threads: int, cores: int, load: float, expected: int) -> None:
    assert _idle_cores(threads, cores, load) == expected


def test_help_names_every_flag(study: Command) -> None:
    output, _ = study("--help")
    for flag in ("--tokens", "--out", "--figures", "--format", "--no-ablation", "--import", "--text"):
        assert f"  {flag} " in output


# --------------------------------------------------------------------------------------------------------------- tables


def test_a_table_of_many_layers_shows_the_first_the_last_and_some_between() -> None:
    blocks = tuple(str(block) for block in range(50))
    text = table_text([Line("load", [f"{block}.5" for block in range(50)], "1", "")], blocks)
    header, _, row = text.splitlines()
    assert header.split() == ["layer", "0", "7", "14", "21", "28", "35", "42", "49", "chance"]
    assert row.split() == ["load", "0.5", "7.5", "14.5", "21.5", "28.5", "35.5", "42.5", "49.5", "1"]


def test_what_is_not_finite_is_null_in_json() -> None:
    measurement = Measurement(
        "m", "t", "r", np.array([1.0, np.nan]), (Axis("layer", ("0", "1")),), chance=np.array(np.inf)
    )
    written = as_json(measurement)
    assert json.loads(json.dumps(written, allow_nan=False))["values"] == [1.0, None]
    assert written["chance"] is None
