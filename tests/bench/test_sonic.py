"""SonicMoE needs Python 3.12 and a Hopper GPU: but for the last test, what it and QuACK do is played by stand-ins."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from moe.bench import sonic


def stand_in(monkeypatch, name, **attributes):
    """A module that ``import`` finds, and its packages with it."""
    module = SimpleNamespace(**attributes)
    monkeypatch.setitem(sys.modules, name, module)
    package, _, last = name.rpartition(".")
    if package:
        if package not in sys.modules:
            stand_in(monkeypatch, package, __path__=[])
        setattr(sys.modules[package], last, module)
    return module


class Tuner:
    """Takes the fastest of its configurations for each size that it has not seen."""

    arg_names = ("x", "size")

    def __init__(self, configurations, cannot=()):
        self.configurations, self.cannot, self.cache_results = configurations, cannot, True
        self.cache, self.compiled = {}, []

    def do_bench(self, call, quantiles):
        call()
        return [2.0, 2.0, 2.0]

    def prune_configs(self, kwargs):
        return [SimpleNamespace(all_kwargs=lambda tile=tile: {"tile": tile}) for tile in self.configurations]

    def fn(self, x, size, tile):
        if tile in self.cannot:
            raise RuntimeError("shared memory exceeded")
        self.compiled.append(tile)


def test_while_untuned_everything_runs_once_and_is_forgotten(monkeypatch):
    tuners = [Tuner([]) for _ in range(4)]
    names = ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned")
    stand_in(monkeypatch, "quack.gemm_interface", **dict(zip(names, tuners, strict=False)))
    where = "sonicmoe.functional.reduction_over_k_gather"
    stand_in(monkeypatch, where, token_gather_sum_kernel=tuners[3])
    compiled_ahead, calls = [], []
    monkeypatch.setattr(sonic, "compile_products", lambda: compiled_ahead.append(True))
    for tuner in tuners:
        tuner.cache["toy"] = "tuned before"
    with sonic.untuned():
        assert compiled_ahead
        for tuner in tuners:
            assert tuner.do_bench(lambda: calls.append(1), quantiles=(0.5, 0.2, 0.8)) == [1.0, 1.0, 1.0]
            assert not tuner.cache_results, "nor is it written to disk"
            tuner.cache["qwen3"] = "the first"
    assert len(calls) == 4
    for tuner in tuners:
        assert tuner.cache == {"toy": "tuned before"}
        assert tuner.cache_results
        assert tuner.do_bench(int, quantiles=(0.5,)) == [2.0, 2.0, 2.0], "it measures again"


def test_shares_compile_each_configuration_once(monkeypatch, capsys):
    up, down = Tuner([128, 160, 192, 256]), Tuner([128, 208, 256], cannot=[208])
    interface = stand_in(monkeypatch, "quack.gemm_interface")
    settings = stand_in(monkeypatch, "quack.cache_utils", COMPILE_ONLY=False)
    registered = []

    def operator(name):
        return SimpleNamespace(_init_fn=name, register_fake=registered.append)

    forward = ("_up_projection_forward", "_down_projection_forward")
    backward = [f"_{which}_projection_backward_{of}" for which in ("down", "up") for of in ("act", "weight")]
    for module, operators in (("forward", forward), ("backward", backward)):
        stand_in(monkeypatch, f"sonicmoe.functional.{module}", **{name: operator(name) for name in operators})

    def layer(shape):
        interface._precompile_default_config(up, "x", size=shape.d_model)
        interface._precompile_default_config(down, "x", size=shape.d_model, seed=None)  # which the kernel does not take

    monkeypatch.setattr(sonic, "_run_without_storage", layer)
    for share in range(3):
        sonic.compile_share(share, 3)
        # Numbers 0 to 3 are the first product's, 4 to 6 the second's: the first share has 0, 3 and 6, and so on.
        assert (up.compiled, down.compiled) == [([128, 256], [256]), ([160], [128]), ([192], [])][share]
        up.compiled, down.compiled = [], []
    assert settings.COMPILE_ONLY
    assert registered[:6] == [*forward, *backward]
    assert "shared memory exceeded" in capsys.readouterr().err, "it is said, and passed over as QuACK's tuner does"


@pytest.mark.parametrize("status", [0, 1])
def test_all_shares_start_at_once_unless_they_are_done(status, monkeypatch, tmp_path):
    started, waited = [], []

    class Process:
        def __init__(self, command, env):
            assert not waited
            started.append((command[2:], env["QUACK_ARCH"]))

        def wait(self):
            waited.append(len(started))
            return status

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(sonic, "_kernels", lambda: tmp_path)
    compile_products = sonic.compile_products.__wrapped__
    if status:
        with pytest.raises(RuntimeError, match="compiling the products of QuACK ahead failed"):
            compile_products()
    else:
        compile_products()
        compile_products()
    assert started == [(["moe.bench.sonic", str(share), "3"], "sm_90") for share in range(3)]
    assert waited == [3, 3, 3]


def test_six_products_have_eighty_configurations(monkeypatch):
    pytest.importorskip("sonicmoe")
    monkeypatch.setenv("QUACK_ARCH", "sm_90")
    # Both products with a gather of rows, and both gradients of weights, 9; the others 22: 6 and 5 tiles, 2 clusters.
    assert sonic.compile_share(80, 81) == 4 * 9 + 2 * 22, "none of them has number 80"
