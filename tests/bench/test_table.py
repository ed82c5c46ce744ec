import json
from dataclasses import dataclass

import pytest

from moe.bench.contestants import Contestant, Entry, Package
from moe.bench.picture import read_cells
from moe.bench.rounds import Result
from moe.bench.shapes import Work
from moe.bench.table import missing_packages, rows, table, write_json
from moe.errors import UserError


@dataclass(frozen=True)
class Cell:
    precision: str = "fp32"
    name: str = "a cell"

    @property
    def work(self):
        return Work(tokens=1000, flops=4_000_000_000_000)


def result(name, seconds, failure=None, unfit=False, facts=None, **contestant):
    turns = {} if seconds is None else {"forward": [[seconds / 4]], "all": [[seconds], [seconds]]}
    return Result(Entry(Contestant(name, int, **contestant), "users"), Cell(), turns, facts or {}, failure, unfit)


RESULTS = [
    result("slow", 4.0, facts={"kept_bytes": 3 << 29, "peak_bytes": 2 << 30, "error": 0.00321, "first_seconds": 12.34}),
    result("dropper", 1.0, drops=True),
    result("the bound", 0.5, bound=True),
    result("half", 2.0, low_precision=True, facts={"note": "in its own way"}),
    result("broken", None, failure="its output is off"),
    result("elsewhere", None, failure="needs a GPU", unfit=True),
]


def test_rows_are_in_order_of_speed_with_shares_of_the_bound():
    made = rows(RESULTS)
    assert [row.name for row in made] == ["the bound", "dropper", "half", "slow", "broken", "elsewhere"]
    # 1000 tokens and 4 TFLOP: 4 s are 250 tokens/s and 1 TFLOP/s; the bound took an eighth of it.
    slow = made[3]
    assert (slow.tokens_per_second, slow.tflops, slow.share, slow.ms, slow.forward_ms) == (250, 1, 0.125, 4000, 1000)
    assert [row.share for row in made] == [1.0, 0.5, 0.25, 0.125, None, None]


def test_the_fastest_of_two_bounds_counts():
    made = rows([result("bound", 1.0, bound=True), result("bound + our settings", 0.5, bound=True), RESULTS[0]])
    assert made[-1].share == 0.125


def test_without_a_bound_there_are_no_shares():
    text = table("a title", rows(RESULTS[:1]))
    assert "share" not in text
    assert "tok/s" in text


def test_the_table_says_who_drops_rounds_or_failed():
    lines = table("layer: a cell", rows(RESULTS)).splitlines()
    assert lines[0] == "layer: a cell"
    assert lines[2].split() == [
        *("tok/s", "±", "%", "forward", "ms", "ms", "TFLOP/s", "share", "kept", "GiB", "peak", "GiB", "first", "s"),
        "error",
    ]
    [slow] = [line for line in lines if line.startswith("slow")]
    assert slow.split()[1:] == ["250", "0.0", "1000.00", "4000.00", "1", "0.12", "1.5", "2", "12.3", "3.2e-03"]
    assert any(line.startswith("dropper †") for line in lines)
    assert any(line.startswith("half ‡") for line in lines)
    assert lines[-5:] == [
        "half: in its own way",
        "† drops assignments beyond a capacity, and so does less work",
        "‡ computes in bf16 whatever it is given",
        "broken: failed: its output is off",
        "elsewhere: does not run here: needs a GPU",
    ]


def test_missing_packages_are_listed_with_how_to_get_them():
    package = Package("theirs", "their-package", "pip install their-package")
    entries = [Entry(Contestant(name, int, package), how) for name in ("a", "b") for how in ("users", "ours")]
    assert missing_packages(entries) == "a, b: not installed (pip install their-package)"
    assert missing_packages([]) == ""


def test_the_json_file_holds_every_repetition_and_can_be_read_again(tmp_path):
    path = tmp_path / "new" / "bench-layer.json"
    write_json(path, "layer", {"device": "a CPU"}, {"torchtitan": "1.0"}, [RESULTS])
    content = json.loads(path.read_text())
    assert content["versions"] == {"torchtitan": "1.0"}
    assert content["cells"][0]["seconds"]["slow"]["all"] == [[4.0], [4.0]]
    bench, device, [(name, read)] = read_cells(path)
    assert (bench, device, name) == ("layer", "a CPU", "a cell")
    assert read == rows(RESULTS)


@pytest.mark.parametrize("content", ["", "[]", '{"cells": [{"name": "x", "rows": [{"name": "y"}]}]}'])
def test_another_file_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"other.json: cannot be read as what a bench wrote") as refused:
        read_cells(path)
    assert "\n" not in str(refused.value)
