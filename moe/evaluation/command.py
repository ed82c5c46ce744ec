"""``python -m moe evaluate RUN``: how good is the model of a run, with intervals; or its score card on tasks."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moe import config_file
from moe.errors import UserError
from moe.evaluation.intervals import require_scipy
from moe.evaluation.metrics import Unigram, summarise
from moe.evaluation.needle import (
    DEPTHS,
    SHORTEST,
    find_needles,
    lengths_up_to,
    needle_picture,
    needle_table,
    texts_of,
)
from moe.evaluation.pictures import held_out_picture
from moe.evaluation.predictions import predict
from moe.evaluation.score_card import card_picture, card_table
from moe.evaluation.subject import BATCH_SIZE, Subject, competition, count, open_subject, run_of, say
from moe.evaluation.table import as_json, held_out_tables
from moe.study.plots import FORMATS, graph_objects
from moe.training.console import showable
from moe.training.run_folder import RunFolder

USAGE = "python -m moe evaluate RUN [--harness TASKS] [--sequence-length N] [--format NAME] ..."
MEANING = """\
How good is a model? Of a RUN (a run folder, or one of its checkpoints, RUN/checkpoints/step-00000250): loss, bits per
byte, top-1 accuracy and calibration on the held-out text of each domain, and the loss by tokens of context and by how
often a token is in the training text, each with its 95 % interval over documents and beside what chance gives.
With --harness: a score card by lm-evaluation-harness (pip install 'moe-lab[evaluate]'), on tasks that come with this
package or are made of the run's held-out text, offline; any other name is looked for among the harness's own.
With --needle: a sentence is hidden at five depths of texts of growing length, and asked for at their end.
A table is printed; its numbers and a picture go to RUN/evaluation."""
FLAGS = {
    "--harness TASKS": "tasks, with commas between: all, or any of those that --harness list names",
    "--needle N": "find one sentence in texts of 128, 256, ... up to N tokens, however short those of training were",
    "--limit N": "with --harness, the first N items of each task",
    "--batch-size N": f"sequences at once (default {BATCH_SIZE})",
    "--sequence-length N": "tokens that the model reads at once (default: as many as in training)",
    "--precision NAME": "fp32 or bf16 (default fp32, whatever the run was trained in)",
    "--device NAME": "auto, cpu or cuda (default auto)",
    "--format NAME": f"of the picture: {', '.join(f[1:] for f in FORMATS)} (default html, which needs no browser here)",
    "--out FOLDER": "where numbers and picture go (default RUN/evaluation)",
    "--help": "show this",
}


def evaluate_command(arguments: Sequence[str]) -> int:
    """``python -m moe evaluate RUN``: predictions of held-out text, or with ``--harness`` a score card."""
    line = config_file.parse_flags(arguments, FLAGS)
    options = line.options
    if "--help" in options:
        print(USAGE, "", MEANING, "", *(f"  {flag:22}{meaning}" for flag, meaning in FLAGS.items()), sep="\n")
        return 0
    if line.overrides:
        raise UserError(f"--{next(iter(line.overrides))} belongs to training: a run's settings are in its folder")
    if options.get("--harness") == "list":
        return _list_tasks(line.positional)
    if len(line.positional) != 1:
        raise UserError(f"one run folder is needed, and {len(line.positional)} were given: {USAGE}")
    if "--limit" in options and "--harness" not in options:
        raise UserError("--limit is of the items of tasks, and there are none without --harness TASKS")
    # All that can be refused is refused before the first minute of work.
    graph_objects()
    require_scipy()
    path = Path(line.positional[0])
    if "--harness" in options:
        _give_exam(path, options["--harness"], options)
    else:
        run = RunFolder.open(run_of(path))
        if not run.corpus_path.is_file():
            raise UserError(
                f"{run.path}: has no text to be evaluated on: import it with --data.corpus FILE, or give it tasks with "
                "--harness TASKS"
            )
        if "--needle" in options:
            _look_for_needles(path, options)
        else:
            _evaluate_held_out(open_subject(path, options))
    return 0


def _evaluate_held_out(subject: Subject) -> None:
    config, length = subject.config, subject.sequence_length
    stride = config.data.stride if length == config.data.sequence_length else max(1, length // 2)
    corpus = subject.run.corpus(config.data, say)
    if note := competition(config.model):
        say(f"note: {note}")
    unigram = Unigram.of(corpus)
    total = sum(len(held_out.stream) for held_out in corpus.validation.values())
    with tqdm(total=total, unit="token", unit_scale=True, desc="held-out text", leave=False, disable=None) as bar:
        predictions = predict(
            subject.model,
            corpus,
            sequence_length=length,
            stride=stride,
            precision=subject.precision,
            rows=subject.batch_size,
            advance=bar.update,
        )
    domains = [summarise(part.domain, [part], unigram) for part in predictions]
    pooled = summarise("all text", predictions, unigram)
    numbers = {
        "stride": stride,
        "documents": {domain: list(held_out.names) for domain, held_out in corpus.validation.items()},
        "domains": [as_json(summary) for summary in domains],
        "pooled": as_json(pooled),
    }
    heading = f"held-out text under {subject.title}: windows of {length} tokens, {subject.precision}"
    print(showable(f"{heading}\n\n{held_out_tables(domains, pooled)}", sys.stdout))
    subtitle = (
        "whiskers: 95 % interval over documents; orange: chance, which knows only how often a token is in the training "
        "text, and for the calibration error what a calibrated model would show"
    )
    figure = held_out_picture(heading, subtitle, domains, pooled)
    subject.write("held-out", numbers, figure)


def _look_for_needles(path: Path, options: Mapping[str, str]) -> None:
    """Hide a sentence at every depth of texts of every length, and show where it was found."""
    longest = count(options, "--needle") or 0
    if longest < SHORTEST:
        raise UserError(f"--needle is {longest}, and must be at least {SHORTEST} tokens")
    subject = open_subject(path, options, longest)
    corpus = subject.run.corpus(subject.config.data, say)
    if note := competition(subject.config.model):
        say(f"note: {note}")
    lengths = lengths_up_to(longest)
    total = sum(texts_of(length) * length * (1 + len(DEPTHS)) for length in lengths)
    with tqdm(total=total, unit="token", unit_scale=True, desc="needles", leave=False, disable=None) as bar:
        cells = find_needles(subject.model, corpus, lengths, subject.precision, bar.update)
    trained = subject.run.config().data.sequence_length
    heading = f"needles in held-out text under {subject.title}: trained on {trained:,} tokens, {subject.precision}"
    print(showable(f"{heading}\n\n{needle_table(cells)}", sys.stdout))
    subtitle = (
        "blue: the sentence makes its number likelier where it is asked for at the end of the text than the same text "
        "without it does, which is 0; depth 100 % is right before the question"
    )
    subject.write("needle", {"cells": [asdict(cell) for cell in cells]}, needle_picture(heading, subtitle, cells))


def _give_exam(path: Path, tasks: str, options: Mapping[str, str]) -> None:
    """Take the tasks and show the score card."""
    exam = _exam()
    limit = count(options, "--limit")
    names = exam.chosen(tasks, RunFolder.open(run_of(path)))
    subject = open_subject(path, options)
    if note := competition(subject.config.model):
        say(f"note: {note}")
    marks, details = exam.take(subject, names, limit, say)
    heading = f"score card of {subject.title}"
    print(showable(f"{heading}: {subject.precision}, windows of {subject.sequence_length} tokens\n", sys.stdout))
    print(showable(card_table(marks), sys.stdout))
    subject.write(
        "score-card",
        {"limit": limit, "marks": [as_json(mark) for mark in marks], **details},
        card_picture(heading, marks),
    )


def _list_tasks(positional: Sequence[str]) -> int:
    """Print the names that ``--harness`` takes, those of a run's held-out text too where one is given."""
    if len(positional) > 1:
        raise UserError(f"one run at a time, and {len(positional)} were given")
    run = RunFolder.open(run_of(Path(positional[0]))) if positional else None
    print(showable(_exam().listing(run), sys.stdout))
    return 0


def _exam() -> Any:
    """:mod:`moe.evaluation.exam`, which needs the harness; raises UserError where that is missing."""
    try:
        from moe.evaluation import exam
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "moe":
            raise
        raise UserError(f"--harness needs {error.name}: pip install 'moe-lab[evaluate]'") from error
    return exam
