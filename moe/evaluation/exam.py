"""Let lm-evaluation-harness ask a run its questions: tasks of this package, of the run's own text, or of the harness.

This file needs the extra ``evaluate``.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.api.task
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from moe.errors import UserError
from moe.evaluation.language_model import RunLM
from moe.evaluation.score_card import Mark, mark_of, pooled_mark
from moe.evaluation.subject import Subject
from moe.evaluation.table import finite
from moe.evaluation.tasks.held_out import names_of, write_cloze
from moe.evaluation.tasks.write import FILES
from moe.training.run_folder import RunFolder

SHIPPED = Path(__file__).parent / "tasks"
ALL, HELD_OUT = "all", "held_out_cloze"
"""what stands for all tasks that need no network, and for those of the run's held-out text"""
PREFERRED = ("acc", "exact_match")
"""metrics that are shown of a task that does not say which, before any other"""
BOOTSTRAP = 1000
"""resamplings for the standard error of the harness's own metrics that are no mean"""


def chosen(asked: str, run: RunFolder) -> list[str]:
    """The names of the tasks that ``asked``, names with commas between, stands for.

    Raises UserError for a name that neither this package, the run's corpus nor the harness knows.
    """
    of_text = names_of(_domains(run))
    names: list[str] = []
    for name in filter(None, map(str.strip, asked.split(","))):
        if name == HELD_OUT and not of_text:
            raise UserError(f"--harness {name}: {run.path} has no corpus, and so no held-out text")
        names += {ALL: [*FILES, *of_text], HELD_OUT: of_text}.get(name, [name])
    if not names:
        raise UserError(f"--harness names no task; there are: {ALL}, {HELD_OUT}, {', '.join(FILES)}")
    unknown = [name for name in names if name not in FILES and name not in of_text]
    if unknown:
        # All YAML files of the harness are read for it, which takes seconds.
        known = TaskManager().all_tasks
        for name in unknown:
            if name not in known:
                guesses = get_close_matches(name, [ALL, HELD_OUT, *FILES, *of_text, *known], n=1)
                hint = f"; did you mean {guesses[0]}?" if guesses else "; --harness list names those of this package"
                raise UserError(f"--harness: there is no task {name}{hint}")
    return list(dict.fromkeys(names))


def listing(run: RunFolder | None) -> str:
    """The names of the tasks that need no network, one a line, with what each is."""
    meanings = {name: _first_comment(SHIPPED / f"{name}.yaml") for name in FILES}
    meanings[HELD_OUT] = "four ways to go on with a piece of held-out text, a task for each domain of the run"
    if run is not None:
        meanings |= {name: f"that of {name.partition('_')[2]}" for name in names_of(_domains(run))}
    meanings[ALL] = "all of these"
    width = max(map(len, meanings))
    return "\n".join(f"{name:<{width}}  {meaning}" for name, meaning in meanings.items())


def take(
    subject: Subject, names: Sequence[str], limit: int | None, say: Callable[[str], None]
) -> tuple[list[Mark], dict[str, Any]]:
    """The marks of the tasks ``names``, in their order, and what a reader has to know of them as JSON holds it.

    ``limit`` asks only the first items of each. Raises UserError where a task cannot be loaded, and where there is too
    little held-out text for any of them.
    """
    written = _write_held_out(subject, names, say)
    names = [name for name in names if name in written or name not in names_of(_domains(subject.run))]
    if not names:
        raise UserError("--harness: no task is left to take; --harness list names others")
    model = RunLM(
        subject.model,
        subject.run.tokenizer(),
        max_length=subject.sequence_length,
        batch_size=subject.batch_size,
        precision=subject.precision,
        say=say,
    )
    with _quiet():
        tasks = _load(names, subject.out / "tasks")
        results = evaluator.evaluate(lm=model, task_dict=tasks, limit=limit, bootstrap_iters=BOOTSTRAP)
    assert results is not None
    marks = [_mark(name, results) for name in results["results"] if name in results["samples"]]
    of_text = [mark for mark in marks if mark.task in written]
    if len(of_text) > 1:
        marks.append(pooled_mark(f"{HELD_OUT}, all {len(of_text)}", of_text))
    details = {
        "harness": f"lm_eval {version('lm_eval')}",
        "results": {
            name: {key: value for key, value in values.items() if isinstance(value, int | float)}
            for name, values in results["results"].items()
        },
        "versions": results["versions"],
        "few_shot": results["n-shot"],
    }
    return marks, finite(details)


def _mark(name: str, results: Mapping[str, Any]) -> Mark:
    """What the harness found on one task."""
    metadata = results["configs"][name].get("metadata") or {}
    samples = results["samples"][name]
    metrics: list[str] = list(dict.fromkeys(metric for sample in samples for metric in sample["metrics"]))
    metric: str = next((known for known in (metadata.get("score"), *PREFERRED) if known in metrics), metrics[0])
    values = results["results"][name]
    key = next(key for key in values if key.partition(",")[0] == metric)
    error = values.get(f"{metric}_stderr,{key.partition(',')[2]}")
    return mark_of(
        name,
        metric,
        float(values[key]),
        [sample[metric] for sample in samples if sample["filter"] == key.partition(",")[2]],
        error=error if isinstance(error, float) else None,
        chance=metadata.get("chance"),
        higher_is_better=bool(results["higher_is_better"][name].get(metric, True)),
    )


def _load(names: Sequence[str], of_text: Path) -> Any:
    """The harness's tasks of these names."""
    own = [name for name in names if name in FILES or (of_text / f"{name}.yaml").is_file()]
    others = [name for name in names if name not in own]
    folders = [str(folder) for folder in (SHIPPED, of_text) if folder.is_dir()]
    manager = TaskManager(include_path=folders, include_defaults=bool(others))
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # whatever a data set's host, format or cache comes up with
        if not others:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--harness {','.join(others)}: the harness cannot load that ({reason}); its own tasks need a network, or "
            "their data in the cache of Hugging Face"
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    return loaded


FEW_SHOT_SEED = 1234
"""that of the harness's own command"""


def _write_held_out(subject: Subject, names: Sequence[str], say: Callable[[str], None]) -> set[str]:
    """Write the tasks of held-out text that are among ``names``; those for which there is enough text."""
    domains = _domains(subject.run)
    wanted = [domain for domain, name in zip(domains, names_of(domains), strict=True) if name in names]
    if not wanted:
        return set()
    corpus = subject.run.corpus(subject.config.data, say)
    written = set()
    try:
        for domain in wanted:
            if name := write_cloze(domain, corpus.validation[domain], subject.out / "tasks"):
                written.add(name)
            else:
                say(f"left out: {names_of([domain])[0]}, whose held-out text is too short for a set of four pieces")
    except OSError as error:
        raise UserError(f"{error.filename or subject.out}: cannot be written ({error.strerror or error})") from error
    return written


def _domains(run: RunFolder) -> list[str]:
    """The domains of the run's corpus; none where it has none, as an imported model."""
    if not run.corpus_path.is_file():
        return []
    try:
        return list(json.loads(run.corpus_path.read_text(encoding="utf-8"))["domains"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{run.corpus_path}: is not the manifest of a corpus: {error!r}") from error


def _first_comment(path: Path) -> str:
    """What a task's file says of it, on one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    return " ".join(comments)


@contextmanager
def _quiet() -> Iterator[None]:
    """Bars for terminals alone, and of the harness's messages only errors: the others are on how it was called."""
    logger, task = logging.getLogger("lm_eval"), vars(lm_eval.api.task)
    level, bar = logger.level, task["tqdm"]
    logger.setLevel(logging.ERROR)
    task["tqdm"] = partial(tqdm, leave=False, disable=None)
    try:
        yield
    finally:
        logger.setLevel(level)
        task["tqdm"] = bar
