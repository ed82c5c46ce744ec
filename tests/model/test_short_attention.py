"""Causal attention in C++: the function and gradients of ``scaled_dot_product_attention``, and when it is taken."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from moe.model import native
from moe.model.attention import attend
from moe.model.short_attention import LONGEST, WIDEST, pays, short_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Shape = tuple[int, int, int, int, int]

SHAPES = [(1, 1, 1, 1, 8), (2, 4, 4, 7, 16), (3, 8, 2, 33, 20), (2, 6, 1, 64, 40), (2, 4, 4, 100, 128), (1, 2, 2, 9, 1)]
"""batch, query heads, key heads, tokens, width of a head"""

with_kernels = pytest.mark.skipif(native.kernels() is None, reason="there is no compiler")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys, values, and a gradient of the output."""
    batch, n_heads, n_key_heads, length, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, heads, length, width) for heads in (n_heads, n_key_heads, n_key_heads, n_heads)]
    return tuple(torch.randn(size, generator=generator).to(dtype) for size in sizes)


def output_and_gradients(attention: Attention, drawn: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    *inputs, seen = (one.detach().to(dtype) for one in drawn)
    leaves = [one.requires_grad_() for one in inputs]
    output = attention(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, seen)]


def sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)


def plainly_causal(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return attend(queries, keys, values, None)


@with_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_it_is_scaled_dot_product_attention(shape: Shape, dtype: torch.dtype, tolerance: float) -> None:
    """Against the same numbers in float64; bfloat16 has 8 bits."""
    drawn = draw(shape, dtype)

    actual = output_and_gradients(short_attention, drawn, dtype)
    expected = output_and_gradients(sdpa, drawn, torch.float64)

    for name, one, other in zip(("output", "queries", "keys", "values"), actual, expected, strict=True):
        assert one.dtype == dtype
        # One token attends to itself alone: its queries and keys have a gradient of zero.
        assert (one.double() - other).norm() <= tolerance * max(1.0, other.norm().item()), name


@with_kernels
def test_two_tokens_on_paper() -> None:
    """Scores 0 and ln 3 (√d = 1): the second token takes 1/4 of the first value and 3/4 of its own."""
    queries, keys = torch.ones(1, 1, 2, 1), torch.tensor([1.0, 3.0]).log().view(1, 1, 2, 1)
    values = torch.tensor([4.0, 8.0]).view(1, 1, 2, 1)

    assert short_attention(queries, keys, values).flatten().tolist() == pytest.approx([4, 7], rel=1e-6)


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_no_bit(dtype: torch.dtype) -> None:
    """[B, S, H, d] seen as [B, H, S, d], as layers hand it over, and a width that is not contiguous."""
    drawn = draw((2, 4, 2, 19, 20), dtype)
    by_token = tuple(one.transpose(1, 2).contiguous().transpose(1, 2) for one in drawn)
    by_width = tuple(one.mT.contiguous().mT for one in drawn)

    expected = output_and_gradients(short_attention, drawn, dtype)

    for laid_out in (by_token, by_width):
        for one, other in zip(output_and_gradients(short_attention, laid_out, dtype), expected, strict=True):
            assert torch.equal(one, other)


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("later", [100.0, float("inf"), float("nan")])
@pytest.mark.parametrize("first_changed", [8, 13, 39])
def test_no_token_sees_a_later_one(dtype: torch.dtype, later: float, first_changed: int) -> None:
    """Whatever it holds, and neither does its query's gradient."""
    queries, keys, values, seen = draw((2, 4, 2, 40, 20), dtype)
    seen[:, :, first_changed:] = 0
    changed = keys.clone(), values.clone()
    for one in changed:
        one[:, :, first_changed:] = later

    before = output_and_gradients(short_attention, (queries, keys, values, seen), dtype)
    after = output_and_gradients(short_attention, (queries, *changed, seen), dtype)

    for one, other in zip(before[:2], after[:2], strict=True):
        assert torch.equal(one[:, :, :first_changed], other[:, :, :first_changed])
    assert not torch.equal(before[0][:, :, first_changed:], after[0][:, :, first_changed:])


@with_kernels
@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FC00001, -0x3FFFFF], ids=hex)
def test_what_is_no_number_shows(payload: int) -> None:
    queries, keys, values, _ = draw((1, 2, 2, 20, 8), torch.float32)
    queries[0, 1, 5, 3] = torch.tensor(payload, dtype=torch.int32).view(torch.float32)

    output = short_attention(queries, keys, values)

    assert output[0, 1, 5].isnan().all()
    output[0, 1, 5] = 0
    assert output.isfinite().all()


@with_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_large_scores_do_not_overflow(shape: Shape) -> None:
    """About 1e4, where the softmax chooses one token, or two by a last digit: so gradients are only to be finite."""
    queries, keys, values, seen = draw(shape, torch.float32)
    drawn = 100 * queries, 100 * keys, values, seen

    actual = output_and_gradients(short_attention, drawn, torch.float32)
    expected = output_and_gradients(sdpa, drawn, torch.float64)

    assert all(one.isfinite().all() for one in actual)
    assert (actual[0] - expected[0]).norm() <= 1e-3 * expected[0].norm()


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_repeats_itself_on_any_number_of_threads(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    drawn = draw((3, 4, 2, 50, 20), dtype)
    expected = output_and_gradients(short_attention, drawn, dtype)

    for repeat in range(20):
        threads(1 + repeat % 2)
        for one, other in zip(output_and_gradients(short_attention, drawn, dtype), expected, strict=True):
            assert torch.equal(one, other)


@with_kernels
def test_the_operators_are_what_torch_expects_of_one() -> None:
    *inputs, seen = draw((2, 4, 2, 7, 8), torch.float32)
    operators = torch.ops.moe.short_attention.default, torch.ops.moe.short_attention_backward.default
    kept = operators[0](*inputs)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

    library.opcheck(operators[0], tuple(one.requires_grad_() for one in inputs), test_utils=checks)
    library.opcheck(operators[1], (seen, *(one.detach() for one in inputs), *kept), test_utils=checks)


@with_kernels
def test_compiled_in_one_graph_it_is_what_it_is_uncompiled() -> None:
    torch._dynamo.reset()
    drawn = draw((2, 4, 2, 12, 8), torch.float32)
    compiled = torch.compile(plainly_causal, fullgraph=True, backend="aot_eager")

    actual = output_and_gradients(compiled, drawn, torch.float32)
    expected = output_and_gradients(short_attention, drawn, torch.float32)

    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@with_kernels
def test_it_is_for_causal_attention_of_short_sequences() -> None:
    one = ones(1, 2, 16, 8)
    assert pays(one, one, one, causal=True)
    assert pays(one.bfloat16(), one.bfloat16(), one.bfloat16(), causal=True)

    assert not pays(one, one, one, causal=False)
    assert not pays(one[:, :, :1], one, one, causal=True), "one query beside a cache"
    assert not pays(one[:, :, :0], one[:, :, :0], one[:, :, :0], causal=True), "nothing"
    assert not pays(one.double(), one.double(), one.double(), causal=True)
    assert not pays(one, one, one.bfloat16(), causal=True)
    assert not pays(one, one, ones(1, 2, 16, 4), causal=True), "values of another width"
    for limit in (ones(1, 1, LONGEST, 8), ones(1, 1, 4, WIDEST)):
        assert pays(limit, limit, limit, causal=True)
    for beyond in (ones(1, 1, LONGEST + 1, 8), ones(1, 1, 4, WIDEST + 1)):
        assert not pays(beyond, beyond, beyond, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_compiler_attention_is_the_same_by_sdpa(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    drawn = draw((2, 4, 2, 24, 8), dtype)
    expected = output_and_gradients(plainly_causal, drawn, dtype)

    monkeypatch.setattr(native, "kernels", lambda: None)

    assert not pays(*drawn[:3], causal=True)
    for one, other in zip(output_and_gradients(plainly_causal, drawn, dtype), expected, strict=True):
        assert (one - other).float().norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-6) * other.float().norm()
