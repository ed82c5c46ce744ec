"""``python -m moe evaluate``: what it prints and writes, every flag, and every mistake in one line."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moe import cli, config_file
from moe.data.prepare import PreparedCorpus
from moe.training import checkpoint
from moe.training.run_folder import RunFolder

pytest.importorskip("plotly")


def evaluate(*arguments: object) -> None:
    assert cli.main(["evaluate", *map(str, arguments), "--device", "cpu"]) == 0


def numbers(out: Path, stem: str = "held-out") -> dict:
    return json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------------- held-out text


@pytest.fixture(scope="module")
def evaluated(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run's numbers."""
    out = tmp_path_factory.mktemp("command") / "out"
    evaluate(run.path, "--out", out)
    return out


def test_numbers_are_those_of_a_token_at_a_time(run: RunFolder, corpus: PreparedCorpus, evaluated: Path) -> None:
    """Everything again by other means: each token by a pass over its own window alone, sums by a loop over documents,
    and the interval from the jackknife's definition."""
    model, end, stride, length = run.load_model(), corpus.tokenizer.end_of_text, run.config().data.stride, 32
    found = numbers(evaluated)
    for summary in found["domains"]:
        held_out = corpus.validation[summary["name"]]
        stream = [int(token) for token in held_out.stream]
        documents: list[list[tuple[float, float, bool]]] = []
        last = len(stream) - 1 - length
        begins = [*range(0, last, stride), last]
        for place, token in enumerate(stream):
            if token == end:
                documents.append([])
                continue
            begin = next(begin for begin in begins if begin < place <= begin + length)
            with torch.no_grad():
                probabilities = model(torch.tensor([stream[begin:place]]))[0][0, -1].double().softmax(-1)
            best = int(probabilities.argmax())
            documents[-1].append((-math.log(probabilities[token]), float(probabilities[best]), best == token))

        def totals(some: list[list[tuple[float, float, bool]]]) -> tuple[float, float, float]:
            """nats a token, accuracy and calibration error of some documents."""
            tokens = [token for document in some for token in document]
            error = 0.0
            for number in range(15):
                own = [t for t in tokens if number / 15 < t[1] <= (number + 1) / 15]
                error += abs(sum(t[2] for t in own) - sum(t[1] for t in own)) / len(tokens)
            return sum(t[0] for t in tokens) / len(tokens), sum(t[2] for t in tokens) / len(tokens), error

        n = len(documents)
        assert summary["documents"] == n > 2
        without = [totals(documents[:left] + documents[left + 1 :]) for left in range(n)]
        for index, name in enumerate(("cross_entropy", "accuracy", "calibration_error")):
            assert summary[name]["value"] == pytest.approx(totals(documents)[index], rel=1e-4, abs=1e-6), name
            own = np.array([values[index] for values in without])
            variance = (n - 1) / n * ((own - own.mean()) ** 2).sum()
            t = {2: 4.302653, 3: 3.182446, 4: 2.776445, 5: 2.570582, 6: 2.446912}[n - 1]
            assert summary[name]["half_width"] == pytest.approx(t * math.sqrt(variance), rel=1e-3, abs=1e-6), name
        nats = sum(token[0] for document in documents for token in document)
        n_bytes = len("".join(text.decode() for text in held_out.documents).encode())
        assert summary["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)


def test_loss_by_frequency_is_that_of_the_tokens_that_are_as_frequent(
    run: RunFolder, corpus: PreparedCorpus, evaluated: Path
) -> None:
    """Shares in training by a count of one domain at a time, prose 1 in 4 and lists 3; tokens of held-out text by the
    same shares; and the bins together are all tokens and all nats."""
    share: dict[int, float] = {}
    for domain, part in (("prose", 0.25), ("lists", 0.75)):
        text = [int(token) for token in corpus.train[domain] if token != corpus.tokenizer.end_of_text]
        for token in text:
            share[token] = share.get(token, 0.0) + part / len(text)
    expected = {"never": 0, "100 to 1,000": 0, "1,000 to 10,000": 0, "10,000 and more": 0}
    for held_out in corpus.validation.values():
        for token in held_out.stream[held_out.stream != corpus.tokenizer.end_of_text].tolist():
            per_million = 1e6 * share.get(token, 0.0)
            bounds = ((0, "never"), (1e3, "100 to 1,000"), (1e4, "1,000 to 10,000"), (math.inf, "10,000 and more"))
            expected[next(label for bound, label in bounds if per_million <= bound)] += 1

    pooled = numbers(evaluated)["pooled"]

    found = {bin["label"]: bin["tokens"] for bin in pooled["by_frequency"]}
    assert {label: found[label] for label in expected} == expected
    assert sum(found.values()) == pooled["tokens"]
    nats = sum(bin["tokens"] * bin["cross_entropy"]["value"] for bin in pooled["by_frequency"] if bin["tokens"])
    assert nats == pytest.approx(pooled["tokens"] * pooled["cross_entropy"]["value"])


def test_all_numbers_and_a_picture_are_written(run: RunFolder, evaluated: Path) -> None:
    found = numbers(evaluated)

    assert (found["run"], found["step"], found["sequence_length"]) == (str(run.path), 6, 32)
    assert found["stride"] == run.config().data.stride
    assert [summary["name"] for summary in found["domains"]] == list(found["documents"]) == ["prose", "lists"]
    assert found["pooled"]["tokens"] == sum(summary["tokens"] for summary in found["domains"])
    assert {path.name for path in evaluated.iterdir()} == {"held-out.json", "held-out.html"}


def test_the_table_has_a_row_for_each_domain(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(run.path, "--out", tmp_path / "out", "--batch-size", 5)

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"held-out text under {run.path} at step 6: windows of 32 tokens, fp32"
    assert lines[2].split()[:4] == ["domain", "documents", "tokens", "nats/token"]
    assert [line.split()[0] for line in lines[4:6]] == ["prose", "lists"]
    pooled = numbers(tmp_path / "out")["pooled"]
    value, half = (pooled["bits_per_byte"][key] for key in ("value", "half_width"))
    [row] = [line for line in lines if line.startswith("all text")]
    assert f"{value:.3f} ± {half:.3f}" in row
    assert lines[-2:] == [f"all numbers: {tmp_path}/out/held-out.json", f"picture: {tmp_path}/out/held-out.html"]


def test_a_checkpoint_other_windows_and_a_precision(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--sequence-length", 48, "--precision", "bf16", "--batch-size", 7, "--out", tmp_path / "out"]

    evaluate(run.checkpoints_path / "step-00000003", *flags)

    assert "at step 3: windows of 48 tokens, bf16" in capsys.readouterr().out
    found = numbers(tmp_path / "out")
    assert (found["step"], found["stride"], found["precision"], found["batch_size"]) == (3, 24, "bf16", 7)
    assert found["pooled"]["by_context"][-1]["label"] == "33 to 48"


def test_a_window_of_one_token(run: RunFolder, tmp_path: Path) -> None:
    evaluate(run.path, "--sequence-length", 1, "--out", tmp_path / "out")

    assert [bin["label"] for bin in numbers(tmp_path / "out")["pooled"]["by_context"]] == ["1"]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_format_of_the_picture(
    run: RunFolder, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr("moe.evaluation.subject.require_browser", lambda: None)
    monkeypatch.setattr("moe.evaluation.subject.save_all", lambda figures: drawn.extend(figures))

    evaluate(run.path, "--format", suffix, "--out", tmp_path)

    assert drawn == [tmp_path / f"held-out.{suffix}"]


def test_a_model_that_diverged_is_told(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = RunFolder(tmp_path / "run")
    broken.path.mkdir()
    for name in ("config.yaml", "tokenizer.json", "corpus.json"):
        (broken.path / name).write_bytes((run.path / name).read_bytes())
    model = run.load_model()
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    checkpoint.save(broken.checkpoints_path, 1, model, None, {}, keep=1)

    assert cli.main(["evaluate", str(broken.path), "--device", "cpu"]) == 2
    assert one_line(capsys) == "domain prose: the model's losses are not finite: there is nothing to evaluate"


# ---------------------------------------------------------------------------------------------------------- score cards


def test_a_score_card(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")

    evaluate(run.path, "--harness", "brackets,held_out_cloze", "--limit", 8, "--out", tmp_path / "out")

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"score card of {run.path} at step 6: fp32, windows of 32 tokens"
    assert [line.split()[0] for line in lines[4:7]] == ["brackets", "cloze_prose", "cloze_lists"]
    found = numbers(tmp_path / "out", "score-card")
    assert found["limit"] == 8
    assert [mark["items"] for mark in found["marks"]] == [8, 8, 8, 16]
    assert "score card of" in (tmp_path / "out" / "score-card.html").read_text(encoding="utf-8")


def test_the_list_of_tasks(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")

    assert cli.main(["evaluate", "--harness", "list"]) == 0
    general = capsys.readouterr().out
    assert cli.main(["evaluate", str(run.path), "--harness", "list"]) == 0
    of_run = capsys.readouterr().out

    assert "cloze_prose" not in general and "cloze_prose" in of_run
    assert re.search(r"^brackets +Which of four brackets", general, re.MULTILINE)


def test_without_the_harness_the_remedy_is_told(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("moe.evaluation.exam", "moe.evaluation.language_model", "lm_eval"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("moe.evaluation.exam", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing("lm_eval"), *sys.meta_path])

    assert cli.main(["evaluate", str(run.path), "--harness", "all"]) == 2
    assert one_line(capsys) == "--harness needs lm_eval: pip install 'moe-lab[evaluate]'"


class Missing:
    """As if a package were not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


# ------------------------------------------------------------------------------------------------------------- mistakes


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What is said on the error stream, which is one line; nothing was printed."""
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "one run folder is needed, and 0 were given: "),
        (["RUN", "RUN"], "one run folder is needed, and 2 were given: "),
        (["nowhere"], "nowhere: is no run folder: it has no config.yaml"),
        (["RUN/checkpoints/step-00000099"], "RUN/checkpoints/step-00000099/manifest.json: missing"),
        (["RUN", "--limit", "3"], "--limit is of the items of tasks, and there are none without --harness TASKS"),
        (["RUN", "--training.steps", "3"], "--training.steps belongs to training: a run's settings are in its folder"),
        (["RUN", "--hraness", "all"], "--hraness is unknown; did you mean --harness?"),
        (["RUN", "--harness"], "--harness needs a value"),
        (["RUN", "--harness", ","], "--harness names no task; there are: all, "),
        (["RUN", "--harness", "copy", "--limit", "0"], "--limit is 0, and must be 1 or more"),
        (["RUN", "--harness", "copy", "--limit", "1.5"], "--limit is '1.5', and must be a whole number"),
        (["--harness", "list", "RUN", "RUN"], "one run at a time, and 2 were given"),
        (["--harness", "list", "nowhere"], "nowhere: is no run folder"),
        (["RUN", "--device", "tpu"], "--device is tpu, and must be auto, cpu or cuda"),
        (["RUN", "--precision", "fp8"], "--precision is fp8, and must be fp32 or bf16"),
        (["RUN", "--format", "gif"], "--format is gif, and must be one of png, svg, pdf, html"),
        (["RUN", "--batch-size", "-1"], "--batch-size is -1, and must be 1 or more"),
        (["RUN", "--sequence-length", "161"], "--sequence-length is 161, and the model reads at most model.max_seq"),
    ],
)
def test_a_mistake_is_one_line(
    run: RunFolder, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--harness" in arguments:
        pytest.importorskip("lm_eval")
    before = sorted(run.path.rglob("*"))

    assert cli.main(["evaluate", *(argument.replace("RUN", str(run.path)) for argument in arguments)]) == 2

    assert one_line(capsys).startswith(reason.replace("RUN", str(run.path)))
    assert sorted(run.path.rglob("*")) == before


def test_a_run_without_text_is_told(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one that was imported without --data.corpus."""
    bare = RunFolder(tmp_path / "bare")
    bare.path.mkdir()
    for name in ("config.yaml", "tokenizer.json"):
        (bare.path / name).write_bytes((run.path / name).read_bytes())
    checkpoint.save(bare.checkpoints_path, 0, run.load_model(), None, {}, keep=1)

    assert cli.main(["evaluate", str(bare.path), "--device", "cpu"]) == 2
    assert one_line(capsys).startswith(f"{bare.path}: has no text to be evaluated on: import it with --data.corpus")
    assert not (bare.path / "evaluation").exists()


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    from moe.evaluation.command import FLAGS

    assert cli.main(["evaluate", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in FLAGS)
    assert set(config_file.parse_flags(["--help"], FLAGS).options) == {"--help"}


def test_needles_are_looked_for_beyond_training_s_context(run: RunFolder, tmp_path: Path) -> None:
    """Trained on 32 tokens, with a max_seq of 160: three lengths up to 300, five depths."""
    evaluate(run.path, "--needle", 300, "--out", tmp_path / "out")

    places = [(cell["length"], cell["depth"]) for cell in numbers(tmp_path / "out", "needle")["cells"]]
    assert places == [(length, depth) for length in (128, 256, 300) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert "depth of the needle" in (tmp_path / "out" / "needle.html").read_text()


def test_a_needle_needs_room(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run.path), "--needle", "100"]) == 2
    assert capsys.readouterr().err == "--needle is 100, and must be at least 128 tokens\n"
