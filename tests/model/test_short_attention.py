"""Attention as plain products: the function and gradients of ``scaled_dot_product_attention``, and when it is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.model import short_attention as module
from moe.model.attention import attend
from moe.model.short_attention import LONGEST, pays, short_attention

SHAPES = [(1, 1, 1, 1, 8), (2, 4, 4, 7, 16), (3, 8, 2, 33, 8), (2, 6, 1, 64, 24), (9, 8, 8, 128, 16)]
"""batch, query heads, key heads, tokens, width of a head"""


def draw(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    batch, n_heads, n_key_heads, length, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, heads, length, width) for heads in (n_heads, n_key_heads, n_key_heads, n_heads)]
    return tuple(torch.randn(size, generator=generator).to(dtype) for size in sizes)


def output_and_gradients(attention: object, drawn: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    *inputs, seen = (one.to(dtype) for one in drawn)
    leaves = [one.requires_grad_() for one in inputs]
    output = attention(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, seen)]


def sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_it_is_scaled_dot_product_attention(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    """Against the same numbers in float64; bfloat16 has 8 bits."""
    drawn = draw(shape, dtype)

    actual = output_and_gradients(short_attention, drawn, dtype)
    expected = output_and_gradients(sdpa, drawn, torch.float64)

    for name, one, other in zip(("output", "queries", "keys", "values"), actual, expected, strict=True):
        # One token attends to itself alone: its queries and keys have a gradient of zero.
        assert (one.double() - other).norm() <= tolerance * max(1.0, other.norm().item()), name


def test_no_token_sees_a_later_one() -> None:
    queries, keys, values, _ = draw((2, 4, 2, 20, 8), torch.bfloat16)
    changed = values.clone()
    changed[:, :, 12:] = 100.0

    before, after = short_attention(queries, keys, values), short_attention(queries, keys, changed)

    assert torch.equal(before[:, :, :12], after[:, :, :12])
    assert not torch.equal(before[:, :, 12:], after[:, :, 12:])


def test_it_is_for_training_in_bfloat16_on_short_sequences() -> None:
    queries, keys, _, _ = draw((1, 2, 2, 16, 8), torch.bfloat16)
    queries.requires_grad_()
    assert pays(queries, keys, causal=True)

    assert not pays(queries, keys, causal=False)
    assert not pays(queries.float(), keys.float(), causal=True)
    assert not pays(queries[:, :, :1], keys, causal=True), "one query beside a cache"
    long = torch.zeros(1, 1, LONGEST + 1, 8, dtype=torch.bfloat16, requires_grad=True)
    assert not pays(long, long, causal=True)
    with torch.no_grad():
        assert not pays(queries, keys, causal=True)


def test_in_float32_it_is_for_products_through_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside which SDPA is slow, with a gradient or without."""
    queries, keys, _, _ = draw((1, 2, 2, 16, 8), torch.float32)
    assert not pays(queries, keys, causal=True)

    monkeypatch.setattr(module, "_float32_goes_through_onednn", lambda: True)

    assert pays(queries, keys, causal=True)
    assert not pays(queries, keys, causal=False)
    assert not pays(queries.double(), keys.double(), causal=True)


def test_attention_gives_the_same_either_way() -> None:
    """In float32 ``attend`` takes SDPA, in bfloat16 the products."""
    drawn = draw((2, 4, 2, 24, 8), torch.bfloat16)

    def plainly_causal(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attend(queries, keys, values, None)

    short = output_and_gradients(plainly_causal, drawn, torch.bfloat16)
    flash = output_and_gradients(plainly_causal, drawn, torch.float32)

    for one, other in zip(short, flash, strict=True):
        assert (one.float() - other).norm() <= 2e-2 * other.norm()
