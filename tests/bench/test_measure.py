from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moe.bench.measure import kept_bytes, park, peak_bytes, timings, unpark

CPU = torch.device("cpu")


def test_work_is_repeated_until_the_time_is_over_and_often_enough():
    calls = []
    assert len(timings(calls.append, CPU, repetitions=3, seconds=0.0)) == 3
    assert calls == [0, 1, 2]
    taken = timings(lambda call: None, CPU, repetitions=1, seconds=0.01)
    assert len(taken) > 3
    assert sum(taken) <= 0.02


def test_what_is_kept_is_what_the_backward_pass_needs():
    # y = silu(x W^T): the product keeps x (64 · 32 floats), the activation its input (64 · 16); W is a parameter.
    weight = torch.randn(16, 32, requires_grad=True)
    kept = kept_bytes(lambda: F.silu(F.linear(torch.randn(64, 32), weight)), [weight], CPU)
    assert kept == 4 * (64 * 32 + 64 * 16)


def test_a_storage_that_is_kept_twice_counts_once():
    kept = kept_bytes(lambda: (lambda x: x * x.exp())(torch.randn(100).requires_grad_()), [], CPU)
    # exp keeps its result, the product both factors: x and exp(x).
    assert kept == 4 * 200


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_peak_sees_memory_that_is_gone_again():
    def work(n):
        torch.ones(n)

    small = peak_bytes(lambda: work(1), CPU)
    large = peak_bytes(lambda: work(64 << 20), CPU)  # 256 MiB
    if small is None:
        pytest.skip("this system does not let a process reset its peak")
    assert 200 << 20 < large - small < 300 << 20


def test_a_parked_tensor_stays_the_same_object_without_memory():
    weight = torch.nn.Parameter(torch.ones(8, 4))
    park([weight])
    assert weight.untyped_storage().nbytes() == 0
    unpark([weight])
    with torch.no_grad():
        weight.fill_(2.0)
    assert weight.sum() == 64
