"""Device and precision: what the configuration asks for, and what ``auto`` makes of this machine."""

import pytest
import torch

from moe.errors import UserError
from moe.training import machine
from moe.training.machine import autocast, choose_device, choose_precision, keep_freed_memory

CPU = torch.device("cpu")


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
