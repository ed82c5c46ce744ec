"""The library of kernels: built once, found again, done without where it cannot be; and its rounding to bfloat16."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from moe.model import native
from moe.model.experts import row_passes

with_kernels = pytest.mark.skipif(native.kernels() is None, reason="there is no compiler")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What this process has loaded is asked for again, here and by the tests that follow."""
    native.kernels.cache_clear()
    yield
    native.kernels.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moe-lab"


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one source of a library that is built at once."""
    source = tmp_path / "source.cpp"
    source.write_text('extern "C" int three() { return 3; }')
    monkeypatch.setattr(native, "SOURCES", (str(source),))
    return source


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands by which a compiler was called."""
    commands: list[list[str]] = []
    run = subprocess.run

    def counted(command: list[str], **options: object) -> object:
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    return commands


def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "c++"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))


@with_kernels
def test_it_is_built_once_and_found_again(folder: Path, short: Path, built: list[list[str]]) -> None:
    first = native.kernels()
    native.kernels.cache_clear()
    second = native.kernels()

    assert first.three() == second.three() == 3
    assert len(built) == 1
    assert len(list(folder.iterdir())) == 1, "nothing half built is left"


@with_kernels
def test_another_source_makes_another_library(folder: Path, short: Path, built: list[list[str]]) -> None:
    native.kernels()
    short.write_text('extern "C" int three() { return 33; }')
    native.kernels.cache_clear()

    assert native.kernels().three() == 33
    assert len(built) == len(list(folder.iterdir())) == 2


def test_a_compiler_that_fails_is_told_of_once(
    folder: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path, monkeypatch, "echo 'no such processor' >&2; exit 1")

    with pytest.warns(UserWarning, match=r"torch's operators are used: no such processor$") as told:
        assert native.kernels() is None
        assert native.kernels() is None

    assert len(told) == 1
    assert not native.computes(torch.ones(1))
    assert list(folder.iterdir()) == []


def test_a_compiler_that_is_not_there_is_told_of(folder: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.warns(UserWarning, match="/nowhere/c\\+\\+"):
        assert native.kernels() is None


def test_no_compiler_is_nothing_to_speak_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.kernels() is None
    assert not folder.exists()


@with_kernels
def test_without_a_folder_for_caches_it_is_built_for_this_process(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where the folder should be stops root as well."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    assert native.kernels().three() == 3


@with_kernels
def test_two_processes_may_build_at_once(tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither finds the library there: the compiler of each waits until that of the other is called."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    arrive = f'touch "{meeting}/$$"\nuntil [ "$(ls "{meeting}" | wc -l)" = 2 ]; do sleep 0.02; done'
    compiler(tmp_path, monkeypatch, f'{arrive}\nexec "$(command -v g++ || command -v clang++)" "$@"')
    code = f"from moe.model import native; native.SOURCES = ({str(short)!r},); print(native.kernels().three())"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}

    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]

    assert [process.communicate(timeout=60)[0].strip() for process in running] == ["3", "3"]
    assert len(list((tmp_path / "moe-lab").iterdir())) == 1


@with_kernels
def test_stores_round_to_bfloat16_as_torch_does() -> None:
    """Every upper half with lower halves below, at and above the tie: numbers, infinities and what is no number.

    The units that round may make zero of what is below 2^-126.
    """
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    numbers = (upper[:, None] | lower).view(torch.float32)

    stored = row_passes.gather(numbers, torch.arange(len(numbers)), torch.bfloat16)
    expected = numbers.to(torch.bfloat16)

    assert torch.equal(stored.isnan(), expected.isnan())
    assert torch.equal(stored.isnan(), numbers.isnan())
    tiny = numbers.abs() < torch.finfo(torch.float32).tiny
    real = ~expected.isnan() & ~tiny
    assert torch.equal(stored[real].view(torch.int16), expected[real].view(torch.int16))
    assert (stored[tiny] == expected[tiny]).logical_or(stored[tiny] == 0).all()


@with_kernels
def test_what_only_stands_for_a_tensor_is_not_theirs() -> None:
    """A fake one, as a rehearsal's, has no memory, and neither has one that is still on its way from other ranks."""
    real = torch.zeros(2, 16)
    assert native.computes(real, real.bfloat16())
    assert not native.computes(real, real.double())
    assert not native.computes(real.to("meta"))
    with FakeTensorMode():
        assert not native.computes(torch.zeros(2, 16))
    assert not native.computes(AsyncCollectiveTensor(real))
