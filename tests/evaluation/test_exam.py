"""lm-evaluation-harness asks a run and its export the same questions, and marks come of its answers."""

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from moe.data.prepare import PreparedCorpus
from moe.errors import UserError
from moe.evaluation import exam
from moe.evaluation.exam import SHIPPED
from moe.evaluation.subject import Subject, open_subject
from moe.evaluation.tasks.write import FILES
from moe.interop.exporting import export_huggingface
from moe.training.command import main as train
from moe.training.run_folder import RunFolder

OF_TEXT = ["cloze_prose", "cloze_lists"]
WINDOW = 96
"""so few tokens that some questions lose their beginning"""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a name on a network fails."""

    def refuse(*arguments: Any, **_: Any) -> Any:
        raise OSError(f"no network in tests: {arguments[:2]}")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)


@pytest.fixture(scope="module")
def subject(tiny: Path, corpus: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A run of sixty steps, which no longer writes the same after everything, in windows of 96 tokens."""
    folder = tmp_path_factory.mktemp("exam")
    settings = ["--training.steps", "60", "--training.optimizer.lr", "0.02", "--run.folder", str(folder)]
    assert train([str(tiny), *settings, "--run.name", "run"], tiny) == 0
    flags = {"--device": "cpu", "--sequence-length": str(WINDOW), "--out": str(folder / "out")}
    return open_subject(folder / "run", flags)


@pytest.fixture(scope="module")
def everything() -> TaskManager:
    """What the harness brings, of which one folder is enough: to read all of them takes it a quarter of a minute."""
    return TaskManager(include_path=str(Path(lm_eval.tasks.__file__).parent / "arc"), include_defaults=False)


def take(subject: Subject, *names: str, limit: int | None = None) -> tuple[list[exam.Mark], dict[str, Any]]:
    return exam.take(subject, names, limit, lambda line: None)


# ------------------------------------------------------------------------------------------- the same as of the export


def test_the_run_has_the_scores_of_its_export(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every task that needs no network, by our LM and by the harness's own for transformers: the same score, and behind
    it the same answer to every item, to what float32 leaves open."""
    export_huggingface(subject.run, tmp_path / "export")
    names = exam.chosen("all", subject.run)
    seen: list[dict[str, Any]] = []
    whole = evaluator.evaluate
    monkeypatch.setattr(evaluator, "evaluate", lambda *a, **settings: seen.append(whole(*a, **settings)) or seen[-1])

    take(subject, *names)
    evaluator.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "export"), "max_length": WINDOW, "dtype": "float32"},
        device="cpu",
        batch_size=16,
        tasks=names,
        task_manager=TaskManager(include_path=[str(SHIPPED), str(subject.out / "tasks")], include_defaults=False),
        bootstrap_iters=0,
    )

    ours, theirs = seen
    assert set(names) == {*FILES, *OF_TEXT} == ours["results"].keys() == theirs["results"].keys()
    for name in names:
        scores, expected = (
            {key: value for key, value in found["results"][name].items() if key.startswith(("acc", "exact_match,"))}
            for found in (ours, theirs)
        )
        assert {key: value for key, value in scores.items() if "stderr" not in key} == {
            key: value for key, value in expected.items() if "stderr" not in key
        }, name
        for one, other in zip(answers_of(ours, name), answers_of(theirs, name), strict=True):
            assert one == pytest.approx(other, abs=1e-3) if isinstance(one, float) else one == other, name
    assert len(set(answers_of(ours, "copy"))) > 5, "there is something to get wrong"
    assert any(
        len(subject.run.tokenizer().encode(item["doc"]["question"])) > WINDOW - 24 for item in ours["samples"]["copy"]
    )


def answers_of(found: dict[str, Any], name: str) -> list[Any]:
    """What a model said of each item in turn: texts, or log-probabilities and whether greedy decoding is that."""
    flat: list[Any] = []

    def add(answer: Any) -> None:
        if isinstance(answer, list | tuple):
            for part in answer:
                add(part)
        else:
            flat.append(answer)

    for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"]):
        add(sample["resps"])
    return flat


# ---------------------------------------------------------------------------------------------------------------- marks


def test_marks_have_the_score_the_chance_and_the_interval_of_each_task(subject: Subject) -> None:
    marks, details = take(subject, "arithmetic", "copy", *OF_TEXT)

    assert [mark.task for mark in marks] == ["arithmetic", "copy", *OF_TEXT, "held_out_cloze, all 2"]
    arithmetic, copy, prose, lists, both = marks
    assert (arithmetic.metric, arithmetic.chance, arithmetic.items) == ("acc", 0.1, 110)
    assert (copy.metric, copy.chance, copy.items) == ("exact_match", 0.0, 64)
    assert (prose.metric, prose.chance) == ("acc_mutual_info", 0.25)
    assert both.items == prose.items + lists.items
    assert both.successes == prose.successes + lists.successes
    for mark in marks[:-1]:
        metric = f"{mark.metric},{'stripped' if mark.task == 'copy' else 'none'}"
        assert mark.score == details["results"][mark.task][metric] == mark.successes / mark.items
        assert mark.low <= mark.score <= mark.high
    assert details["harness"].startswith("lm_eval ")
    assert details["few_shot"] == dict.fromkeys(("arithmetic", "copy", *OF_TEXT), 0)
    json.dumps(details, allow_nan=False)


def test_a_model_that_ignores_the_question_scores_chance(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer's own tokens decide, whatever stands before: by acc, every balanced task gives exactly chance."""

    def by_the_answer(self: object, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return [(-float(sum(continuation) % 97) - len(continuation), False) for _, _, continuation in requests]

    monkeypatch.setattr(exam.RunLM, "_loglikelihood_tokens", by_the_answer)

    marks, _ = take(subject, "arithmetic", "brackets", "induction", "multiple_choice")

    for mark in marks:
        assert mark.score == pytest.approx(mark.chance), mark.task
        assert mark.verdict == "at chance"


def test_a_limit_asks_the_first_items(subject: Subject) -> None:
    marks, _ = take(subject, "brackets", "cloze_prose", limit=4)

    assert [mark.items for mark in marks] == [4, 4]


def test_a_task_of_text_is_written_where_results_go(subject: Subject) -> None:
    take(subject, "cloze_lists", limit=1)

    items = [json.loads(line) for line in (subject.out / "tasks" / "cloze_lists.jsonl").read_text().splitlines()]
    held_out = subject.run.corpus(subject.config.data, lambda line: None).validation["lists"]
    text = held_out.text.decode()
    assert all(item["question"] + item["choices"][item["answer"]] in text for item in items)


def test_too_little_held_out_text_is_said_and_left_out(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        exam,
        "write_cloze",
        lambda domain, held_out, folder: None if domain == "prose" else _write(domain, held_out, folder),
    )
    said: list[str] = []

    marks, _ = exam.take(subject, OF_TEXT, 1, said.append)

    assert [mark.task for mark in marks] == ["cloze_lists"]
    assert said[-1] == "left out: cloze_prose, whose held-out text is too short for a set of four pieces"
    with pytest.raises(UserError, match="--harness: no task is left to take"):
        exam.take(subject, ["cloze_prose"], 1, said.append)


_write = exam.write_cloze


# --------------------------------------------------------------------------------------------------------- which tasks


def test_all_are_those_that_need_no_network(run: RunFolder) -> None:
    assert exam.chosen("all", run) == [*FILES, *OF_TEXT]
    assert exam.chosen("held_out_cloze", run) == OF_TEXT
    assert exam.chosen(" copy , cloze_prose,copy,", run) == ["copy", "cloze_prose"]


def test_any_name_of_the_harness_is_taken(
    run: RunFolder, everything: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exam, "TaskManager", lambda **_: everything)
    assert exam.chosen("arc_easy,copy", run) == ["arc_easy", "copy"]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (" , ", "--harness names no task; there are: all, held_out_cloze, cloze, "),
        ("arithmetik", "--harness: there is no task arithmetik; did you mean arithmetic?"),
        ("cloze_pros", "--harness: there is no task cloze_pros; did you mean cloze_prose?"),
        ("x", "--harness: there is no task x; --harness list names those of this package"),
    ],
)
def test_a_name_that_nobody_knows_is_refused(
    run: RunFolder, everything: TaskManager, asked: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exam, "TaskManager", lambda **_: everything)
    with pytest.raises(UserError) as caught:
        exam.chosen(asked, run)
    assert str(caught.value).startswith(reason)


def test_a_run_without_a_corpus_has_no_text_of_its_own(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    assert exam.chosen("all", run) == list(FILES)
    with pytest.raises(UserError, match="has no corpus, and so no held-out text"):
        exam.chosen("held_out_cloze", run)


def test_a_damaged_manifest_is_told(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text("[]")

    with pytest.raises(UserError, match=r"corpus.json: is not the manifest of a corpus"):
        exam.chosen("all", RunFolder(tmp_path))


def test_a_task_of_the_harness_that_cannot_be_loaded_here_is_one_line(
    subject: Subject, everything: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data are on a host that nobody reaches."""

    def fail(names: list[str]) -> None:
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\nmany lines follow")

    monkeypatch.setattr(exam, "TaskManager", lambda **_: everything)
    monkeypatch.setattr(everything, "load", fail)

    with pytest.raises(UserError, match=r"--harness arc_easy: the harness cannot load that \(Couldn't reach") as caught:
        take(subject, "copy", "arc_easy", limit=1)
    assert "\n" not in str(caught.value)


def test_the_list_says_what_each_is(run: RunFolder) -> None:
    lines = exam.listing(run).splitlines()

    assert [line.split()[0] for line in lines] == [*FILES, "held_out_cloze", *OF_TEXT, "all"]
    assert lines[0].endswith("which names it before; right if greedy decoding would write it.")
    assert len(exam.listing(None).splitlines()) == len(FILES) + 2
