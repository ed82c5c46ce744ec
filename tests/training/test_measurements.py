"""Answers that are measured once a machine."""

import json
from pathlib import Path

import pytest

from moe.training import measurements
from moe.training.measurements import measured_once


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moe-lab" / "machine.json"


def never() -> str:
    raise AssertionError("measured again")


def test_it_is_measured_once(path: Path) -> None:
    assert measurements.file() == path
    assert measured_once("which", ("a", "b"), lambda: "b") == "b"
    assert measured_once("which", ("a", "b"), never) == "b"
    assert measured_once("another", ("a", "b"), lambda: "a") == "a"
    assert json.loads(path.read_text()) == {
        f"{measurements.machine()} | another": "a",
        f"{measurements.machine()} | which": "b",
    }


def test_another_machine_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_once("which", ("a", "b"), lambda: "b")
    monkeypatch.setattr(measurements, "machine", lambda: "another")

    assert measured_once("which", ("a", "b"), lambda: "a") == "a"


def test_an_answer_that_is_none_any_more_is_measured_anew() -> None:
    measured_once("which", ("a", "b"), lambda: "b")

    assert measured_once("which", ("a", "c"), lambda: "c") == "c"


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\x00", b'{"half'])
def test_a_damaged_file_is_made_anew(content: bytes, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(content)

    assert measured_once("which", ("a", "b"), lambda: "a") == "a"
    assert measured_once("which", ("a", "b"), never) == "a"


def test_where_nothing_can_be_written_it_is_measured_each_time(path: Path) -> None:
    path.parent.write_text("a file in the folder's place")

    assert measured_once("which", ("a", "b"), lambda: "a") == "a"
    assert measured_once("which", ("a", "b"), lambda: "b") == "b"
