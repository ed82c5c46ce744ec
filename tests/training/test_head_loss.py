"""The blockwise loss of the head is the cross-entropy of its logits: value and both gradients."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.training import head_loss as module
from moe.training.head_loss import head_loss, token_losses

VOCABULARY, WIDTH = 24, 8
ROWS_A_BLOCK = [1, 3, 5, 10, 1000]
"""of ten rows: each alone; an uneven last block; two halves; all in one, exactly and with room"""
in_blocks = pytest.mark.parametrize("rows", ROWS_A_BLOCK)
some_scored = pytest.mark.parametrize("masked", [False, True], ids=["all scored", "some scored"])


@pytest.fixture
def block_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make a block hold so many rows."""
    return lambda rows: monkeypatch.setitem(module.BLOCK_BYTES, "cpu", 4 * VOCABULARY * rows)


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and a head that want gradients, targets, and a mask of seven among ten."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (2, 5), generator=generator)
    scored = torch.tensor([[True, True, False, True, True], [False, True, True, False, True]])
    return hidden, weight, targets, scored


def by_logits(hidden: Tensor, weight: Tensor, targets: Tensor, scored: Tensor | None) -> Tensor:
    """The same from all logits at once."""
    losses = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), targets.flatten(), reduction="none")
    return losses.mean() if scored is None else losses[scored.flatten()].mean()


@in_blocks
@some_scored
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_value_and_gradients_are_those_of_the_logits(
    block_of: Callable[[int], None], rows: int, masked: bool, dtype: torch.dtype, tolerance: float
) -> None:
    hidden, weight, targets, scored = example(dtype)
    mask = scored if masked else None
    block_of(rows)

    loss = head_loss(hidden, weight, targets, mask)
    expected = by_logits(hidden, weight, targets, mask)

    assert loss.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        rtol=tolerance,
        atol=tolerance,
    )


@in_blocks
def test_a_bias_on_the_logits_counts_and_gets_its_gradient(block_of: Callable[[int], None], rows: int) -> None:
    hidden, weight, targets, scored = example()
    bias = torch.linspace(-2, 2, VOCABULARY, dtype=torch.float64).requires_grad_()
    block_of(rows)

    loss = head_loss(hidden, weight, targets, scored, bias)
    losses = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), targets.flatten(), reduction="none")
    expected = losses[scored.flatten()].mean()

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, weight, bias)), torch.autograd.grad(expected, (hidden, weight, bias))
    )
    torch.testing.assert_close(token_losses(hidden, weight, targets, bias).flatten(), losses)


@some_scored
def test_the_gradients_are_those_of_finite_differences(block_of: Callable[[int], None], masked: bool) -> None:
    hidden, weight, targets, scored = example()
    block_of(3)

    assert torch.autograd.gradcheck(
        lambda h, w: head_loss(h, w, targets, scored if masked else None), (hidden, weight), atol=1e-9
    )


@in_blocks
def test_the_gradient_from_above_multiplies(block_of: Callable[[int], None], rows: int) -> None:
    """As where the loss is divided by the number of micro-batches, or another loss is made of it."""
    hidden, weight, targets, scored = example()
    block_of(rows)

    actual = torch.autograd.grad(head_loss(hidden, weight, targets, scored).square() / 4, (hidden, weight))
    expected = torch.autograd.grad(by_logits(hidden, weight, targets, scored).square() / 4, (hidden, weight))

    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)


@in_blocks
def test_a_tied_head_and_embedding_add_their_gradients(block_of: Callable[[int], None], rows: int) -> None:
    _, weight, targets, _ = example()
    tokens = targets.flip(1)
    block_of(rows)

    actual = torch.autograd.grad(head_loss(F.embedding(tokens, weight), weight, targets), weight)
    expected = torch.autograd.grad(by_logits(F.embedding(tokens, weight), weight, targets, None), weight)

    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)


@in_blocks
@some_scored
def test_under_autocast_products_are_bfloat16_and_sums_float32(
    block_of: Callable[[int], None], rows: int, masked: bool
) -> None:
    """The value is that of the bfloat16 logits to float32's precision; the gradients to bfloat16's."""
    hidden, weight, targets, scored = example(torch.float32)
    mask = scored if masked else None
    block_of(rows)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head_loss(hidden, weight, targets, mask)
        logits = hidden @ weight.t()
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    actual = torch.autograd.grad(loss, (hidden, weight))
    exact = torch.autograd.grad(by_logits(hidden, weight, targets, mask), (hidden, weight))

    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, losses[mask.flatten() if masked else slice(None)].mean(), rtol=1e-6, atol=0)
    assert [gradient.dtype for gradient in actual] == [torch.float32] * 2
    for gradient, reference in zip(actual, exact, strict=True):
        assert (gradient - reference).norm() < 0.02 * reference.norm()


def test_nothing_scored_costs_nothing() -> None:
    hidden, weight, targets, _ = example()

    loss = head_loss(hidden, weight, targets, torch.zeros(2, 5, dtype=torch.bool))
    loss.backward()

    assert loss.item() == 0
    assert not hidden.grad.any() and not weight.grad.any()


def test_targets_that_are_not_scored_change_nothing() -> None:
    hidden, weight, targets, scored = example()
    other = torch.where(scored, targets, (targets + 1) % VOCABULARY)

    assert torch.equal(head_loss(hidden, weight, targets, scored), head_loss(hidden, weight, other, scored))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(poison: float) -> None:
    """The training loop skips such a step, if it is told."""
    hidden, weight, targets, _ = example()
    with torch.no_grad():
        hidden[0, 0, 0] = poison

    assert not head_loss(hidden, weight, targets).isfinite()


@in_blocks
def test_token_losses_are_those_of_the_logits(block_of: Callable[[int], None], rows: int) -> None:
    hidden, weight, targets, _ = example()
    block_of(rows)

    losses = token_losses(hidden, weight, targets)

    assert not losses.requires_grad
    expected = F.cross_entropy((hidden @ weight.t()).transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-14, atol=1e-14)


def test_token_losses_under_autocast_are_float32() -> None:
    hidden, weight, targets, _ = example(torch.float32)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = token_losses(hidden, weight, targets)
        logits = hidden @ weight.t()

    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, -logits.float().log_softmax(-1).gather(2, targets[..., None])[..., 0])


# ----------------------------------------------------------------------------------------------------------- the kernel


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter in place of a GPU, and a row of 24 in two parts, the second of them half empty."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("with a GPU, the kernel runs there")
    monkeypatch.setattr("moe.training.head_loss_kernel.COLUMNS", 16)
    monkeypatch.setattr(module, "_kernel_takes", lambda logits: logits.dtype != torch.float64)


@in_blocks
@some_scored
def test_the_kernel_gives_value_and_gradients_of_the_logits(
    by_kernel: None, block_of: Callable[[int], None], rows: int, masked: bool
) -> None:
    hidden, weight, targets, scored = example(torch.float32)
    mask = scored if masked else None
    block_of(rows)

    loss = head_loss(hidden, weight, targets, mask)
    exact = by_logits(hidden.double(), weight.double(), targets, mask)

    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(exact, (hidden, weight)),
        rtol=1e-5,
        atol=1e-7,
    )


@some_scored
def test_the_kernel_in_bfloat16_is_as_good_as_bfloat16(
    by_kernel: None, block_of: Callable[[int], None], masked: bool
) -> None:
    """The loss of bfloat16 logits in float32; a gradient that was rounded to 1/256 before two products."""
    hidden, weight, targets, scored = (tensor.detach() for tensor in example(torch.bfloat16))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    mask = scored if masked else None
    block_of(3)

    loss = head_loss(hidden, weight, targets, mask)
    of_rounded_logits = F.cross_entropy(
        (hidden @ weight.t()).double().flatten(0, 1), targets.flatten(), reduction="none"
    )
    exact = by_logits(hidden.double(), weight.double(), targets, mask)

    torch.testing.assert_close(
        loss.double(), of_rounded_logits[mask.flatten() if masked else slice(None)].mean(), rtol=1e-6, atol=0
    )
    for gradient, reference in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - reference).norm() < 0.01 * reference.norm()


def test_the_kernel_leaves_logits_alone_where_no_gradient_is_wanted(by_kernel: None) -> None:
    hidden, weight, targets, _ = example(torch.float32)
    logits = (hidden @ weight.t()).detach().flatten(0, 1)
    before = logits.clone()

    losses = module._losses(logits, targets.flatten())

    assert torch.equal(logits, before)
    torch.testing.assert_close(losses.double(), F.cross_entropy(before.double(), targets.flatten(), reduction="none"))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_the_kernel(by_kernel: None, poison: float) -> None:
    hidden, weight, targets, _ = example(torch.float32)
    with torch.no_grad():
        hidden[0, 0, 0] = poison

    assert not head_loss(hidden, weight, targets).isfinite()


def test_the_kernel_takes_no_row_at_all(by_kernel: None) -> None:
    assert module._losses(torch.zeros(0, VOCABULARY), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocabulary", [1000, 32768, 50257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, vocabulary: int, dtype: torch.dtype) -> None:
    """Several blocks, the last one shorter, against all logits in float64."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 701, 64, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 64, device="cuda").mul(0.3).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (3, 701), device="cuda")
    monkeypatch.setitem(module.BLOCK_BYTES, "cuda", 4 * vocabulary * 1000)

    loss = head_loss(hidden, weight, targets)
    actual = torch.autograd.grad(loss, (hidden, weight))
    exact = by_logits(hidden.double(), weight.double(), targets, None)
    expected = torch.autograd.grad(exact, (hidden, weight))

    error = 1e-2 if dtype == torch.bfloat16 else 1e-4
    assert float((loss - exact).abs()) < 1e-3 * float(exact)
    for gradient, reference in zip(actual, expected, strict=True):
        assert float((gradient - reference).norm()) < error * float(reference.norm())
    torch.testing.assert_close(token_losses(hidden, weight, targets).mean(), loss.detach(), rtol=1e-5, atol=0)
