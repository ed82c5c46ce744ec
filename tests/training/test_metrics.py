"""Every row is in the file at once, is JSON, and appears once however often the run was killed and resumed."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.errors import UserError
from moe.training.metrics import MetricsLog, read_metrics


def test_a_row_is_one_flat_line_and_is_there_before_the_log_is_closed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, "train", {"loss": 2.5, "tokens": 4096})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "kind": "train", "loss": 2.5, "tokens": 4096}\n'
    log.write(1, "validation", {"loss/prose": 2.25})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "kind": "train", "loss": 2.5, "tokens": 4096},
        {"step": 1, "kind": "validation", "loss/prose": 2.25},
    ]
    log.close()


def test_numbers_that_are_not_finite_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(1, "train", {"loss": math.nan, "norm": math.inf, "low": -math.inf})

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1, "kind": "train", "loss": "NaN", "norm": "Infinity", "low": "-Infinity",
    }  # fmt: skip
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(row["loss"]) and row["norm"] == math.inf and row["low"] == -math.inf


def test_numbers_of_other_libraries_are_taken(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(1, "train", {"a": np.float32(0.5), "b": np.int64(2**53 + 1), "c": torch.tensor(1.5)})
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == {
        "step": 1, "kind": "train", "a": 0.5, "b": 2**53 + 1, "c": 1.5,
    }  # fmt: skip


def test_a_value_cannot_take_the_name_of_a_field(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log, pytest.raises(ValueError, match="'step' belongs to the row"):
        log.write(1, "train", {"step": 2})


def test_resuming_removes_later_rows_and_a_line_cut_short(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in (1, 2, 3, 4):
            log.write(step, "train", {"loss": math.nan if step == 1 else 1 / step})
        log.write(2, "validation", {"loss": 9.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "kind": "tr')
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()

    with MetricsLog(tmp_path / "metrics.jsonl", resume_step=2) as log:
        log.write(3, "train", {"loss": 0.25})

    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert after == [before[0], before[1], before[4], '{"step": 3, "kind": "train", "loss": 0.25}']
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_lost_nothing_but_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train"}')
    with MetricsLog(tmp_path / "metrics.jsonl", resume_step=1) as log:
        log.write(2, "train", {})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_new_run_starts_afresh(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsLog(tmp_path / "metrics.jsonl") as log:
            log.write(6, "train", {})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 6, "kind": "train"}]


def test_a_resumed_run_that_lost_its_file_starts_another(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", resume_step=5) as log:
        log.write(6, "train", {})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 6, "kind": "train"}]


@pytest.mark.parametrize("torn", ['{"step": 5, "kind": "tr', '{"step": 5}', "\0\0\0", "12", "\xff"])
def test_the_reader_skips_a_torn_last_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "kind": "train"}\n' + torn.encode("latin-1"))
    assert read_metrics(path) == [{"step": 1, "kind": "train"}]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 2,\n{"step": 3, "kind": "train"}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: is no row of metrics"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"metrics.jsonl:2: is no row of metrics"):
        MetricsLog(tmp_path / "metrics.jsonl", resume_step=3)


def test_a_missing_file_and_a_place_that_cannot_be_written_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read \(No such file"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl")


def test_tensorboard_is_imported_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None in sys.modules makes the import fail, as where it is not installed."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    MetricsLog(tmp_path / "metrics.jsonl").close()
    with pytest.raises(UserError, match=r"pip install -e '\.\[tensorboard\]'"):
        MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True)


def test_tensorboard_events_hold_the_same_numbers_and_are_purged_on_resuming(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True) as log:
        for step in (1, 2, 3):
            log.write(step, "train", {"loss": step / 4})
    with MetricsLog(tmp_path / "metrics.jsonl", resume_step=2, tensorboard=True) as log:
        log.write(3, "train", {"loss": 8.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.25), (2, 0.5), (3, 8.0)]
