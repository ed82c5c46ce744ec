"""AdamW in bfloat16: against AdamW in float64, where rounding to the nearest would stand still, and in Triton."""

import os

import pytest
import torch
from torch import Tensor, nn

from moe.training import adamw as module
from moe.training.adamw import adamw_in_bf16, move_in_bf16
from moe.training.mixed_optimizer import MixedOptimizer

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def state_of(parameter: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(parameter), torch.zeros_like(parameter)


@pytest.fixture(params=["torch", "triton"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The definition, and the kernels in Triton's interpreter, in blocks that the tensors do not fill."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("with a GPU, the kernels run there")
        monkeypatch.setattr(module, "use_kernels", lambda parameter: True)
        monkeypatch.setattr("moe.training.optimizer_kernels.BLOCK", 32)
    return request.param


def test_a_step_is_that_of_float64_to_one_rounding(where: str) -> None:
    """The same start, so after one step weight and moments differ by less than one step of a bfloat16."""
    torch.manual_seed(0)
    parameter = (torch.randn(5, 23) * 0.02).bfloat16()
    gradient = torch.randn(5, 23).bfloat16()
    first, second = (torch.randn(5, 23) * 0.1).bfloat16(), torch.rand(5, 23).bfloat16()
    exact = nn.Parameter(parameter.double())
    optimizer = torch.optim.AdamW([exact], **SETTINGS)
    optimizer.state[exact] = {
        "step": torch.tensor(6.0),
        "exp_avg": first.double(),
        "exp_avg_sq": second.double(),
    }
    exact.grad = gradient.double() * 0.5

    adamw_in_bf16(parameter, gradient, first, second, torch.tensor(7.0), **SETTINGS, salt=1, factor=torch.tensor(0.5))
    optimizer.step()

    for ours, theirs in (
        (parameter, exact.detach()),
        (first, optimizer.state[exact]["exp_avg"]),
        (second, optimizer.state[exact]["exp_avg_sq"]),
    ):
        assert ours.dtype == torch.bfloat16
        assert ((ours.double() - theirs).abs() <= theirs.abs() / 127).all()


def test_the_kernels_round_as_the_definition(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Five steps: the same numbers, but where float32 sums in another order tip a rounding."""
    torch.manual_seed(0)
    start = (torch.randn(7, 30) * 0.02).bfloat16()
    gradients = [torch.randn(7, 30).bfloat16() for _ in range(5)]

    def run() -> list[Tensor]:
        parameter = start.clone()
        first, second = state_of(parameter)
        for number, gradient in enumerate(gradients, start=1):
            step = torch.tensor(float(number))
            adamw_in_bf16(parameter, gradient, first, second, step, **SETTINGS, salt=9)
            move_in_bf16(parameter, gradient, step, decay=0.999, rate=1e-3, salt=9)
        return [parameter, first, second]

    actual = run()
    monkeypatch.setattr(module, "use_kernels", lambda parameter: False)
    expected = run()

    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours != theirs).sum() <= 4
        torch.testing.assert_close(ours, theirs, rtol=1 / 64, atol=1e-6)


def test_a_move_is_right_on_average(where: str) -> None:
    """1 · 0.9999 - 0.5 · 0.001 = 0.9994 lies between 1 and its lower neighbour 1 - 1/256; 8,192 draws."""
    parameter = torch.ones(8192, dtype=torch.bfloat16)
    direction = torch.full_like(parameter, 0.5)
    if where == "triton":
        parameter, direction = parameter[:2048].clone(), direction[:2048]

    move_in_bf16(parameter, direction, torch.tensor(1.0), decay=0.9999, rate=1e-3, salt=0)

    down = 0.0006 * 256
    deviation = (down * (1 - down) / len(parameter)) ** 0.5
    assert set(parameter.float().tolist()) == {1.0, 1 - 1 / 256}
    assert float((parameter.float() < 1).float().mean()) == pytest.approx(down, abs=4 * deviation)


def test_small_steps_add_up(where: str) -> None:
    """A hundred steps of 1e-4 from weights near 1, whose neighbours are 0.004 and more away: to the nearest, none of
    them moves; by chance, their mean goes as far as in float64."""
    n = 2048 if where == "torch" else 256
    torch.manual_seed(0)
    start = (1 + torch.rand(n)).bfloat16()
    small = SETTINGS | {"lr": 1e-4, "weight_decay": 0.0}
    parameter, exact, nearest = start.clone(), nn.Parameter(start.double()), nn.Parameter(start.clone())
    first, second = state_of(parameter)
    others = [torch.optim.AdamW([other], **small) for other in (exact, nearest)]

    steps = 100 if where == "torch" else 40
    for number in range(1, steps + 1):
        gradient = torch.ones(n, dtype=torch.bfloat16)
        adamw_in_bf16(parameter, gradient, first, second, torch.tensor(float(number)), **small, salt=0)
        for other, optimizer in zip((exact, nearest), others, strict=True):
            other.grad = gradient.to(other.dtype)
            optimizer.step()

    wanted = float((exact.detach() - start.double()).mean())
    assert wanted == pytest.approx(-1e-4 * steps, rel=1e-3)
    assert torch.equal(nearest.detach(), start)
    # Each step adds a variance of at most (1/128)² / 4 · 2.56 %, so after 100 the mean of n has a deviation below this.
    deviation = (steps * 1e-4 / 128 / n) ** 0.5
    assert float((parameter.double() - start.double()).mean()) == pytest.approx(wanted, abs=4 * deviation)


def test_a_second_moment_fades_however_slowly(where: str) -> None:
    """With β₂ = 0.999 it falls by a thousandth in a step, a quarter of half the way to the next bfloat16."""
    n = 2048 if where == "torch" else 256
    parameter = torch.zeros(n, dtype=torch.bfloat16)
    first, second = torch.zeros_like(parameter), torch.ones_like(parameter)
    slow = SETTINGS | {"betas": (0.9, 0.999)}

    for number in range(1, 41):
        adamw_in_bf16(
            parameter, torch.zeros_like(parameter), first, second, torch.tensor(float(number)), **slow, salt=3
        )

    assert float(second.double().mean()) == pytest.approx(0.999**40, abs=4 * (40 * 1e-3 / 128 / n) ** 0.5)


def test_a_bad_step_changes_nothing(where: str) -> None:
    tensors = [torch.rand(40).bfloat16() for _ in range(3)]
    before = [tensor.clone() for tensor in tensors]
    bad = {"found_inf": torch.tensor(1.0), "salt": 0}
    poison = torch.full((40,), float("nan"), dtype=torch.bfloat16)

    adamw_in_bf16(tensors[0], poison, tensors[1], tensors[2], torch.tensor(1.0), **SETTINGS, **bad)
    move_in_bf16(tensors[0], poison, torch.tensor(1.0), decay=1.0, rate=1.0, **bad)

    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
    adamw_in_bf16(
        tensors[0], torch.ones_like(poison), tensors[1], tensors[2], torch.tensor(1.0), **SETTINGS, salt=0,
        found_inf=torch.tensor(0.0),
    )  # fmt: skip
    assert not any(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


# -------------------------------------------------------------------------------------------------------- the optimizer


def groups(*parameters: nn.Parameter) -> MixedOptimizer:
    return MixedOptimizer([{"params": list(parameters)} | SETTINGS])


def test_float32_weights_move_as_by_torchs_adamw() -> None:
    torch.manual_seed(0)
    start = torch.randn(6, 5)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    rounded = nn.Parameter(start.bfloat16())
    optimizers = groups(ours, rounded), torch.optim.AdamW([theirs], **SETTINGS, fused=True)

    for _ in range(3):
        ours.grad = torch.randn(6, 5)
        theirs.grad, rounded.grad = ours.grad.clone(), ours.grad.bfloat16()
        for optimizer in optimizers:
            optimizer.step()

    assert torch.equal(ours, theirs)
    assert {kind: value.dtype for kind, value in optimizers[0].state[rounded].items()} == {
        "step": torch.float32,
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.bfloat16,
    }


def test_two_tensors_round_apart_and_a_repetition_alike() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.ones(256, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = groups(*parameters)
        for _ in range(4):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    first, second = run()
    assert not torch.equal(first, second)
    assert all(torch.equal(*pair) for pair in zip(run(), (first, second), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_a_bad_step_is_not_counted(dtype: torch.dtype, rule: str) -> None:
    """Good, bad, good is good, good."""

    def run(badness: list[float]) -> list[Tensor]:
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(8, 8).to(dtype))
        optimizer = MixedOptimizer([{"params": [parameter], "rule": rule} | SETTINGS])
        for number, bad in enumerate(badness):
            parameter.grad = torch.full_like(parameter, float("nan") if bad else 1.0) * (number + 1)
            parameter.grad = parameter.grad if bad else torch.eye(8).to(dtype)
            optimizer.found_inf = torch.tensor(bad)
            optimizer.step()
        return [parameter.detach(), *optimizer.state[parameter].values()]

    assert all(torch.equal(*pair) for pair in zip(run([0.0, 1.0, 0.0]), run([0.0, 0.0]), strict=True))
    assert all(torch.equal(*pair) for pair in zip(run([1.0, 0.0]), run([0.0]), strict=True))


def test_a_factor_scales_the_gradients() -> None:
    """Those of float32 and bfloat16 alike: a quarter is exact in both."""

    def run(factor: Tensor | None, scale: float) -> list[Tensor]:
        parameters = [nn.Parameter(torch.full((64,), 0.5, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
        optimizer = groups(*parameters)
        optimizer.factor = factor
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.linspace(-1, 1, 64).to(parameter.dtype) * scale
            optimizer.step()
        return [value for parameter in parameters for value in optimizer.state[parameter].values()]

    assert all(torch.equal(*pair) for pair in zip(run(torch.tensor(0.25), 1.0), run(None, 0.25), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_kernels_round_as_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million elements and one; another order of float32 sums tips less than one in a hundred.

    But for the first moment: it is rounded to the nearest, and 0.9 m + 0.1 g of bfloat16 numbers often lies just half
    way, where the last bit decides (3 % of a million, on an H200).
    """
    torch.manual_seed(0)
    n = 1_000_001
    start = (torch.randn(n, device="cuda") * 0.02).bfloat16()
    gradients = [torch.randn(n, device="cuda").bfloat16() for _ in range(3)]
    factor, good = torch.tensor(0.5, device="cuda"), torch.tensor(0.0, device="cuda")

    def run() -> list[Tensor]:
        parameter = start.clone()
        first, second = state_of(parameter)
        for number, gradient in enumerate(gradients, start=1):
            step = torch.tensor(float(number), device="cuda")
            guard = {"found_inf": good, "salt": number}
            adamw_in_bf16(parameter, gradient, first, second, step, **SETTINGS, factor=factor, **guard)
            move_in_bf16(parameter, gradient, step, decay=0.999, rate=1e-3, **guard)
        return [parameter, first, second]

    actual = run()
    monkeypatch.setattr(module, "use_kernels", lambda parameter: False)
    for ours, theirs, tipped in zip(actual, run(), (0.01, 0.06, 0.01), strict=True):
        assert float((ours != theirs).float().mean()) < tipped
        # One that tipped and was then nearly cancelled is off by a step of what it had been.
        torch.testing.assert_close(ours, theirs, rtol=1 / 32, atol=2**-7 * float(theirs.abs().max()))
