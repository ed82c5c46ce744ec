"""Products and attention of a few rows: torch's, in float64, and where they are taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.model import few_rows, native
from moe.model.few_rows import MOST_ROWS, attend_to_cache, product

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 3, 4, MOST_ROWS + 3])
@pytest.mark.parametrize(("width", "columns"), [(1, 1), (16, 16), (24, 33), (31, 7), (256, 100), (300, 515)])
def test_a_product_is_torchs(dtype: torch.dtype, rows: int, width: int, columns: int) -> None:
    """Of widths that fill no vector, too."""
    x, weight = draw(rows, width).to(dtype), draw(columns, width, seed=1).to(dtype)

    actual = product(x, weight)

    assert actual.dtype == dtype
    assert error(actual, F.linear(x.double(), weight.double())) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=["each its own", "grouped", "one key head"])
@pytest.mark.parametrize("length", [1, 5, 16, 77])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_attention_is_torchs(dtype: torch.dtype, heads: tuple[int, int], length: int, padded: bool) -> None:
    """In a cache with room for more, of which the first tokens are read."""
    n_heads, n_key_heads = heads
    queries = draw(3, n_heads, 1, 20).to(dtype)
    keys, values = (draw(3, n_key_heads, 90, 20, seed=s).to(dtype).narrow(2, 0, length) for s in (1, 2))
    visible = None
    if padded:
        visible = (torch.arange(length) >= torch.tensor([0, length // 2, length - 1])[:, None])[:, None, None]

    actual = attend_to_cache(queries, keys, values, visible)

    wide = (tensor.double() for tensor in (queries, keys, values))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=visible, enable_gqa=True)
    assert actual.shape == (3, n_heads, 1, 20)
    assert error(actual, expected) <= TOLERANCE[dtype]


@pytest.mark.skipif(native.kernels() is None, reason="torch's attention multiplies it by zero")
def test_what_is_not_visible_has_no_say() -> None:
    """Not even by being no number."""
    queries, keys = draw(1, 2, 1, 16).bfloat16(), draw(1, 2, 4, 16, seed=1).bfloat16()
    values = draw(1, 2, 4, 16, seed=2).bfloat16()
    visible = torch.tensor([True, False, True, True])[None, None, None]
    expected = attend_to_cache(queries, keys, values, visible)
    for tensor in (keys, values):
        tensor[:, :, 1] = float("nan")

    assert torch.equal(attend_to_cache(queries, keys, values, visible), expected)


def test_large_scores_do_not_overflow() -> None:
    """The largest score takes all."""
    queries = torch.full((1, 1, 1, 16), 200.0, dtype=torch.bfloat16)
    keys = torch.stack([torch.full((16,), value) for value in (-200.0, 200.0, 100.0)]).bfloat16()[None, None]
    values = torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 16).bfloat16()[None, None]

    assert attend_to_cache(queries, keys, values.contiguous(), None).eq(2).all()


def test_without_a_compiler_they_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(2, 16), draw(5, 16, seed=1)
    monkeypatch.setattr(few_rows.native, "computes", lambda *_: False)

    assert torch.equal(product(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("threads", [1, 2])
def test_they_repeat_themselves_on_any_threads(threads: int) -> None:
    x, weight = draw(3, 64).bfloat16(), draw(200, 64, seed=1).bfloat16()
    expected = product(x, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(product(x, weight), expected) for _ in range(20))
    finally:
        torch.set_num_threads(before)


def test_the_kernels_are_what_is_tested_here() -> None:
    """Where there is a compiler they run, or else these tests would say nothing of them."""
    assert native.computes(draw(1, 1)) == (native.kernels() is not None)
