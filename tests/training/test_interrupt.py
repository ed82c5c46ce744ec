"""Signals that are asked for, not thrown."""

import os
import signal
from collections.abc import Iterator

import pytest

from moe.training.interrupt import StopSignal

both = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


class Default(Exception):  # noqa: N818
    """Stands for whatever a signal does by itself."""


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """SIGINT and SIGTERM raise Default, and are afterwards what they were."""

    def act(number: int, frame: object) -> None:
        raise Default(signal.Signals(number).name)

    before = {number: signal.signal(number, act) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@both
def test_the_first_signal_is_remembered_and_interrupts_nothing(number: signal.Signals) -> None:
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number.name


@both
def test_the_second_acts_by_itself(number: signal.Signals) -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Default, match=number.name):
            os.kill(os.getpid(), number)
        assert stop.received == "SIGTERM"


@both
@pytest.mark.parametrize("signals", [0, 1])
def test_afterwards_signals_act_as_before(number: signal.Signals, signals: int) -> None:
    before = signal.getsignal(number)

    with StopSignal():
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGINT)

    assert signal.getsignal(number) is before
    with pytest.raises(Default):
        os.kill(os.getpid(), number)


def test_an_exception_inside_restores_them_too() -> None:
    before = signal.getsignal(signal.SIGINT)

    with pytest.raises(ZeroDivisionError), StopSignal():
        _ = 1 / 0

    assert signal.getsignal(signal.SIGINT) is before
