"""Processes here are one-line programs that answer as a contestant would, well or badly."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import pytest

from moe.bench import rounds
from moe.bench.contestants import Contestant, Entry
from moe.bench.rounds import Result, Worker, WorkerError, run_rounds

ECHO = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"got": json.loads(line)["do"]}), flush=True)
"""


def program(code, tmp_path, patience=20.0):
    return Worker([sys.executable, "-c", code], tmp_path / "log", patience)


def test_a_process_is_asked_and_answers(tmp_path):
    worker = program(ECHO, tmp_path)
    assert worker.ask(do="one") == {"got": "one"}
    worker.start(do="two")
    assert worker.ask(do="three") == {"got": "three"}, "the answer to what was started is read first"
    worker.start(do="four")
    worker.finish()
    assert worker.ask(do="five") == {"got": "five"}, "and once"
    worker.stop()
    assert worker.process.returncode == 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('no such kernel')", "its process ended with status 1: no such kernel"),
        ("import os; os.kill(os.getpid(), 9)", "its process was killed by SIGKILL"),
        ('print(\'{"failed": "not here", "unfit": true}\', flush=True); input()', "not here"),
        ("import time; time.sleep(60)", "no answer within 1 seconds"),
    ],
)
def test_how_it_failed_is_said(code, reason, tmp_path):
    worker = program(code, tmp_path, patience=1.0 if "sleep" in code else 20.0)
    with pytest.raises(WorkerError) as failed:
        worker.ask(do="prepare")
    assert str(failed.value) == reason
    assert failed.value.unfit == (reason == "not here")
    worker.stop()


@dataclass(frozen=True)
class Cell:
    name: str = "a cell"


class Scripted:
    """In place of a process: what a contestant answers, and the order in which all were asked."""

    def __init__(self, log, script):
        self.log, self.script, self.process = log, script, self

    def poll(self):
        return None

    def start(self, do, cell):
        self.log.append((self.script["name"], do))

    def finish(self):
        self.log.append((self.script["name"], "finish"))

    def ask(self, do, cell, round=None):
        self.log.append((self.script["name"], do))
        reply = self.script.get(do, {})
        if isinstance(reply, BaseException):
            raise reply
        return reply() if callable(reply) else reply

    def kill(self):
        self.log.append((self.script["name"], "kill"))

    def stop(self):
        self.log.append((self.script["name"], "stop"))


def run(monkeypatch, tmp_path, scripts, n_rounds=3, device="cpu"):
    log, said = [], []

    def start(command, path, patience):
        return Scripted(log, next(script for script in scripts if f'"{script["name"]}"' in command[-1]))

    monkeypatch.setattr(rounds, "Worker", start)
    entries = [Entry(Contestant(script["name"], partial(int), warm=script.get("warm")), "users") for script in scripts]
    [results] = run_rounds(
        "layer",
        entries,
        [Cell()],
        device=device,
        rounds=n_rounds,
        folder=tmp_path,
        patience=1,
        lock=tmp_path / "lock",
        say=said.append,
    )
    return results, log, said


def test_contestants_take_turns_and_each_round_another_begins(monkeypatch, tmp_path):
    scripts = [{"name": name, "turn": {"seconds": [1.0]}} for name in "abc"]
    results, log, _ = run(monkeypatch, tmp_path, scripts)
    assert [who for who, what in log if what == "turn"] == [*"abc", *"bca", *"cab"]
    assert [what for who, what in log if who == "a"] == ["prepare", "turn", "turn", "turn", "drop", "stop"]
    assert [result.turns for result in results] == [{"all": [[1.0]] * 3}] * 3


def test_on_a_gpu_all_compile_at_once_and_are_waited_for_before_one_is_prepared(monkeypatch, tmp_path):
    warm = {"a": None, "b": nullcontext, "c": nullcontext}
    scripts = [{"name": name, "turn": {"seconds": [1.0]}, "warm": warm[name]} for name in "abc"]
    _, log, _ = run(monkeypatch, tmp_path, scripts, n_rounds=1, device="cuda")
    assert log[:4] == [("b", "warm"), ("c", "warm"), ("b", "finish"), ("c", "finish")]
    assert log[4:7] == [(name, "prepare") for name in "abc"]


def test_who_fails_is_out_and_the_others_go_on(monkeypatch, tmp_path):
    answers = iter([{"seconds": [1.0]}])

    def one_turn():
        return next(answers, None) or (_ for _ in ()).throw(WorkerError("out of memory"))

    results, log, said = run(
        monkeypatch,
        tmp_path,
        [
            {"name": "good", "turn": {"seconds": {"forward": [1.0], "all": [3.0]}}},
            {"name": "wrong", "prepare": WorkerError("its output is off")},
            {"name": "elsewhere", "prepare": WorkerError("needs a GPU", unfit=True)},
            {"name": "tired", "turn": one_turn},
        ],
    )
    good, wrong, elsewhere, tired = results
    assert good.failure is None and good.turns == {"forward": [[1.0]] * 3, "all": [[3.0]] * 3}
    assert (wrong.failure, wrong.unfit) == ("its output is off", False)
    assert (elsewhere.failure, elsewhere.unfit) == ("needs a GPU", True)
    assert tired.failure == "out of memory"
    assert [what for who, what in log if who in ("wrong", "tired")].count("turn") == 2
    assert any("wrong: its output is off" in text for text in said)


def test_nobody_is_started_into_a_memory_that_is_full(monkeypatch, tmp_path):
    left = iter([8 << 30, 1 << 30])
    monkeypatch.setattr(rounds, "available_bytes", lambda: next(left))
    results, log, _ = run(monkeypatch, tmp_path, [{"name": name, "turn": {"seconds": [1.0]}} for name in "ab"])
    assert results[0].failure is None
    assert results[1].failure == (
        "1.0 GiB of memory are left beside the others, and 1.5 may be needed: name fewer with --only"
    )
    assert {who for who, _ in log} == {"a"}


def test_an_interrupt_kills_who_is_at_work(monkeypatch, tmp_path):
    scripts = [{"name": "a", "turn": KeyboardInterrupt()}]
    log = []
    monkeypatch.setattr(rounds, "Worker", lambda command, path, patience: Scripted(log, scripts[0]))
    entries = [Entry(Contestant("a", int), "users")]
    options = {"device": "cpu", "rounds": 1, "folder": tmp_path, "patience": 1, "lock": None, "say": str}
    with pytest.raises(KeyboardInterrupt):
        list(run_rounds("layer", entries, [Cell()], **options))
    assert [what for _, what in log] == ["prepare", "turn", "kill", "stop"]


def test_every_turn_counts_once_however_often_it_repeated():
    # Turns: medians 2, 4.5 and 10; in the middle 4.5, a range of 8 over 4.5.
    result = Result(Entry(Contestant("a", int), "users"), Cell(), {"all": [[1, 2, 2, 2, 3], [4, 5], [10]]})
    assert result.seconds() == 4.5
    assert result.spread() == pytest.approx(8 / 4.5)
    assert result.seconds("forward") is None
    result.turns["all"] = [[1.0, 2.0]]
    assert result.spread() is None, "one turn has no spread"
