"""Attention against a softmax written out head by head."""

import pytest
import torch
from torch import Tensor, nn

from moe.config import AttentionConfig, ModelConfig
from moe.model.attention import Attention, visible_keys
from moe.model.cache import KVCache
from moe.model.rotation import rotation_of

THETA = 100.0
CONFIG = ModelConfig(d_model=10, attention=AttentionConfig(n_heads=4, head_dim=6, rope_theta=THETA))


def attention(**settings: object) -> Attention:
    """Width 10, four query heads of width 6: 4 x 6 is not 10."""
    config = ModelConfig(d_model=10, attention=AttentionConfig(n_heads=4, head_dim=6, rope_theta=THETA, **settings))
    layer = Attention(config, layer=0).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(x: Tensor, position: int) -> Tensor:
    """Rotary positions as products of complex numbers: entries i and i + d/2 are real and imaginary part."""
    half = x.shape[-1] // 2
    angles = torch.tensor([position * THETA ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def unit_square(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * gain


def attend_by_hand(layer: Attention, x: Tensor, kv_heads: int, qk_norm: str) -> Tensor:
    """One sequence [S, D] through ``layer``: every query head and every query on its own."""
    n_heads, width = 4, 6
    queries, keys, values = (
        x @ p.weight.T + (0 if p.bias is None else p.bias) for p in (layer.query, layer.key, layer.value)
    )
    if qk_norm == "full":
        queries = torch.stack([unit_square(row, layer.query_norm.weight) for row in queries])
        keys = torch.stack([unit_square(row, layer.key_norm.weight) for row in keys])
    heads = []
    for head in range(n_heads):
        shared = head // (n_heads // kv_heads)
        q, k, v = (
            t[:, index * width : (index + 1) * width]
            for t, index in ((queries, head), (keys, shared), (values, shared))
        )
        if qk_norm == "head":
            q = torch.stack([unit_square(row, layer.query_norm.weight) for row in q])
            k = torch.stack([unit_square(row, layer.key_norm.weight) for row in k])
        rows = []
        for i in range(len(x)):
            scores = torch.stack([turn(q[i], i) @ turn(k[j], j) / width**0.5 for j in range(i + 1)])
            rows.append(scores.softmax(0) @ v[: i + 1])
        heads.append(torch.stack(rows))
    output = torch.cat(heads, dim=1) @ layer.output.weight.T
    return output if layer.output.bias is None else output + layer.output.bias


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["multi-head", "grouped", "multi-query"])
@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_equals_a_softmax_written_out(kv_heads: int, qk_norm: str, bias: bool) -> None:
    layer = attention(n_kv_heads=kv_heads, qk_norm=qk_norm, bias=bias)
    x = draw(2, 7, 10)

    y = layer(x, rotation_of(torch.arange(7)[None], CONFIG), None)

    # The angles are float32, so the two agree to its precision.
    expected = torch.stack([attend_by_hand(layer, row, kv_heads, qk_norm) for row in x])
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)


def test_an_explicit_causal_mask_is_the_same_as_none() -> None:
    layer = attention(n_kv_heads=2)
    x, rotation = draw(2, 7, 10), rotation_of(torch.arange(7)[None], CONFIG)

    torch.testing.assert_close(
        layer(x, rotation, visible_keys(torch.ones(2, 7, dtype=torch.bool), 7)), layer(x, rotation, None)
    )


def test_shapes_do_not_need_head_dim_to_divide_the_width() -> None:
    layer = attention(n_kv_heads=2)

    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "query.weight": (24, 10),
        "key.weight": (12, 10),
        "value.weight": (12, 10),
        "output.weight": (10, 24),
    }


@pytest.mark.parametrize(("qk_norm", "widths"), [("head", (6, 6)), ("full", (24, 12))])
def test_query_and_key_norms_are_as_wide_as_what_they_divide(qk_norm: str, widths: tuple[int, int]) -> None:
    layer = attention(n_kv_heads=2, qk_norm=qk_norm)

    assert (layer.query_norm.weight.numel(), layer.key_norm.weight.numel()) == widths


def test_visible_keys_on_paper() -> None:
    """Row 0 is padded on the left, row 1 on the right. Padding sees at least itself, so that no row is empty."""
    real = torch.tensor([[False, True, True], [True, True, False]])

    assert visible_keys(real, 3)[:, 0].int().tolist() == [
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
    ]
    assert visible_keys(real, 1)[:, 0].int().tolist() == [[[0, 1, 1]], [[1, 1, 1]]]


def test_the_cache_continues_where_it_stopped() -> None:
    layer = attention(n_kv_heads=2)
    config = ModelConfig(n_layers=1, attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6))
    x = draw(2, 7, 10)
    whole = layer(x, rotation_of(torch.arange(7)[None], CONFIG), None)

    cache, parts = KVCache(config, 2, 7, torch.device("cpu"), torch.float64), []
    for start, end in ((0, 4), (4, 5), (5, 7)):
        cache.extend(end - start)
        real = torch.ones(2, end, dtype=torch.bool)
        rotation = rotation_of(torch.arange(start, end)[None], CONFIG)
        parts.append(layer(x[:, start:end], rotation, visible_keys(real, end - start), cache))

    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
