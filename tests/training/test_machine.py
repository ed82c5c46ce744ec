"""Device and precision: what the configuration asks for, and what ``auto`` makes of this machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe.errors import UserError
from moe.training import machine
from moe.training.machine import (
    CPU_BACKENDS,
    autocast,
    choose_device,
    choose_precision,
    fastest_backend,
    keep_freed_memory,
    use_fastest_float32,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(UserError, match=r"training.device is cuda, and torch finds no CUDA device here"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == CPU


def test_each_rank_has_a_gpu_of_its_own_as_far_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert [choose_device("auto", rank).index for rank in range(3)] == [0, 1, 0]
    assert choose_device("cuda", 1) == torch.device("cuda", 1)
    assert choose_device("cpu", 1) == CPU


@pytest.mark.parametrize(("seconds_of_bf16", "chosen"), [(0.5, "bf16"), (0.8, "bf16"), (0.9, "fp32"), (2.0, "fp32")])
def test_auto_takes_bf16_where_it_is_a_fifth_faster(
    monkeypatch: pytest.MonkeyPatch, seconds_of_bf16: float, chosen: str
) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: seconds_of_bf16}
    monkeypatch.setattr(machine, "_seconds_of_product", lambda dtype, d_model: seconds[dtype])

    assert choose_precision("auto", CPU, 32) == chosen


def test_auto_measures_this_cpu() -> None:
    assert choose_precision("auto", CPU, 32) in ("fp32", "bf16")


def test_a_precision_that_is_asked_for_is_taken_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(machine, "_seconds_of_product")

    assert [choose_precision(wanted, CPU, 32) for wanted in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert choose_precision("auto", torch.device("cuda"), 32) == "bf16"


def test_autocast_is_bf16_or_nothing() -> None:
    square = torch.ones(2, 2)

    with autocast(CPU, "bf16"):
        assert (square @ square).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (square @ square).dtype == torch.float32


def test_keeping_memory_is_harmless_with_any_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    keep_freed_memory()
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: object())  # one without mallopt
    keep_freed_memory()


def test_one_disturbed_round_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 takes twice as long, but float32 is held up twice in eight rounds."""
    calls = iter([5.0 if number in (4, 10) else 1.0 + number % 2 for number in range(16)])
    monkeypatch.setattr(machine, "_seconds_of_product", lambda dtype, d_model: next(calls))

    assert choose_precision("auto", CPU, 32) == "fp32"


def test_this_cpu_is_measured_once_and_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was found: float32 products stay float32, and a second process would ask no more."""
    use_fastest_float32()
    backend = fastest_backend("fp32")
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))

    assert backend in CPU_BACKENDS
    torch.testing.assert_close((x @ x.t()).double(), x.double() @ x.double().t(), rtol=1e-5, atol=1e-4)
    monkeypatch.delattr(machine, "_Block")
    use_fastest_float32()
    assert fastest_backend("fp32") == backend


class Stopwatch:
    """A block whose time is decided by the setting and by its back-end."""

    seconds_of: dict[str, float]

    def __init__(self, backend: str, d_model: int = 128) -> None:
        self.backend = backend

    def seconds(self, precision: str) -> float:
        setting = torch.backends.mkldnn.matmul.fp32_precision
        return self.seconds_of.get(self.backend, 9.0) * self.seconds_of.get(setting, 1.0)


@pytest.mark.parametrize(
    ("exact", "seconds", "expected"),
    [(True, 0.9, "bf16"), (True, 0.99, "none"), (True, 1.5, "none"), (False, 0.5, "none")],
)
def test_onednn_is_taken_where_it_is_exact_and_faster(
    exact: bool, seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_Block", Stopwatch)
    monkeypatch.setattr(machine, "_onednn_is_exact", lambda: exact)
    monkeypatch.setattr(Stopwatch, "seconds_of", {"segments": 1.0, "bf16": seconds}, raising=False)

    use_fastest_float32()

    assert torch.backends.mkldnn.matmul.fp32_precision == expected


def test_units_that_round_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)

    assert not machine._onednn_is_exact()


@pytest.mark.parametrize(("grouped", "expected"), [(0.9, "grouped"), (0.99, "segments"), (2.0, "segments")])
def test_another_back_end_is_taken_where_it_is_clearly_faster(
    grouped: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_Block", Stopwatch)
    monkeypatch.setattr(Stopwatch, "seconds_of", {"segments": 1.0, "grouped": grouped}, raising=False)

    assert fastest_backend("bf16") == expected
