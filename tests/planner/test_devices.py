"""The table of devices, and what a user adds to it."""

from pathlib import Path

import pytest

from moe.errors import UserError
from moe.planner.devices import OWN, device, read_devices


def test_the_devices_that_there_are() -> None:
    table = read_devices(OWN)

    assert list(table) == ["a100-40gb", "a100-80gb", "h100", "h200", "b200", "mi300x", "laptop-cpu"]
    assert (table["a100-80gb"].flops, table["a100-80gb"].memory, table["a100-80gb"].node) == (312e12, 80e9, 8)
    assert table["h200"].hourly is None
    assert table["h100"].link_over(8) == 450e9
    assert table["h100"].link_over(9) == 50e9


ROW = "{flops: 1e12, memory: 8e9, bandwidth: 1e11, node: 1, link: 1e9, network: 1e8, hourly: null, source: mine}"


def test_a_file_adds_a_device(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"tpu: {ROW}\nh100: {ROW}\n")

    assert device("tpu", path).memory == 8e9
    assert device("h100", path).flops == 1e12
    assert device("h200", path).flops == 989e12


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tpu: {flops: 1e12}", "tpu lacks memory"),
        ("tpu: " + ROW.replace("8e9", "-1"), "tpu.memory is -1, and must be a positive number"),
        ("tpu: " + ROW.replace("node: 1", "node: 1.5"), "tpu.node is 1.5, and must be a whole number"),
        ("tpu: " + ROW.replace("flops", "flop"), "tpu has flop, which is none of"),
        ("tpu: 3", "must map each device's name"),
        ("tpu: [", "cannot be read as a table of devices"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)

    with pytest.raises(UserError, match=r"mine\.yaml") as caught:
        device("tpu", path)
    assert words in str(caught.value)


def test_an_unknown_device_is_named_with_its_neighbour() -> None:
    with pytest.raises(UserError, match=r"--gpu h10: no such device; did you mean h100"):
        device("h10")
