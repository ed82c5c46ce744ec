"""``model.deterministic``: a text's logits are the same bits alone, in any batch, at any place in it, in any chunks."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe.config import (
    AttentionConfig,
    ConfigError,
    ExpertsConfig,
    FeedForwardConfig,
    LatentConfig,
    ModelConfig,
    RopeConfig,
    RouterConfig,
    SharedExpertsConfig,
    SpecialExpertsConfig,
)
from moe.model import attention
from moe.model.cache import KVCache
from moe.model.experts import Experts, reference_experts
from moe.model.invariant import InvariantLinear, attend, invariant_experts
from moe.model.invariant.products import by_weights, linear
from moe.model.moe_layer import MoELayer
from moe.model.router import Router
from moe.model.transformer import Transformer

VOCABULARY, LONGEST = 96, 110

ATTENTION: dict[str, dict[str, Any]] = {
    "multi-head": {"qk_norm": "full"},
    "multi-query": {"n_kv_heads": 1},
    "grouped": {"n_kv_heads": 2, "qk_norm": "head", "rope": RopeConfig(fraction=0.5)},
    "sinks": {"sinks": True},
    "windows": {"n_kv_heads": 2, "window": 24, "full_every": 2, "sinks": True},
    "latent": {"latent": LatentConfig(rank=20, rotary_dim=8)},
}
ROUTER = {
    "softmax": RouterConfig(),
    "sigmoid": RouterConfig(score="sigmoid", selection_bias="sign", normalise=False, top_k=3),
    "cosine": RouterConfig(projection="cosine"),
    "top_p": RouterConfig(selection="top_p", top_k=3, threshold=0.5, normalise=False),
}


@cache
def model_of(attention: str, router: str, weights: torch.dtype, deterministic: bool = True) -> Transformer:
    """A model of three layers with a shared expert, as all tests here use it."""
    config = ModelConfig(
        vocab_size=VOCABULARY,
        n_layers=3,
        d_model=48,
        max_seq=128,
        init_std=0.1,
        deterministic=deterministic,
        attention=AttentionConfig(n_heads=6, head_dim=16, **ATTENTION[attention]),
        experts=ExpertsConfig(n_experts=8, d_ff=40),
        shared=SharedExpertsConfig(n_experts=1),
        router=ROUTER[router],
    )
    return Transformer(config).eval().to(weights)


def logits(model: Transformer, tokens: Tensor, autocast: bool = False, **more: Any) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(tokens, **more)[0]


PRECISIONS = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(ATTENTION)),
    router=st.sampled_from(sorted(ROUTER)),
    precision=st.sampled_from(PRECISIONS),
)
def test_a_text_has_the_same_bits_in_any_company(
    data: st.DataObject, kind: str, router: str, precision: tuple[torch.dtype, bool]
) -> None:
    weights, autocast = precision
    model = model_of(kind, router, weights)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    length = data.draw(st.integers(1, LONGEST))
    text = torch.randint(VOCABULARY, (length,), generator=generator)
    alone = logits(model, text[None], autocast)[0]

    # Among strangers, some longer, so that there is padding before it and after it.
    n_others, slot = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 4))
    left, right = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    batch = torch.randint(VOCABULARY, (n_others + 1, left + length + right), generator=generator)
    mask = torch.ones_like(batch, dtype=torch.bool)
    slot = min(slot, n_others)
    batch[slot, left : left + length] = text
    mask[slot, :left] = mask[slot, left + length :] = False
    among = logits(model, batch, autocast, mask=None if mask.all() else mask)[slot, left : left + length]
    assert torch.equal(among, alone)

    # In chunks from a cache, beside a stranger of the same length.
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=4)) | {0, length})
    cache = KVCache(model.config, 2, length, torch.device("cpu"), weights)
    pair = torch.stack([text, batch[slot - 1, :length]]) if length <= batch.shape[1] else torch.stack([text, text])
    read = [logits(model, pair[:, start:end], autocast, cache=cache)[0] for start, end in pairwise(cuts)]
    assert torch.equal(torch.cat(read), alone)


@pytest.mark.parametrize("kind", ATTENTION)
def test_it_computes_what_the_plain_model_computes(kind: str) -> None:
    plain, invariant = (model_of(kind, "softmax", torch.float32, deterministic) for deterministic in (False, True))
    tokens = torch.randint(VOCABULARY, (3, 70), generator=torch.Generator().manual_seed(0))
    results = []
    for model in (plain, invariant):
        model.zero_grad()
        output, _ = model(tokens)
        output.square().mean().backward()
        results.append((output.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_everything_that_sums_is_replaced() -> None:
    model = model_of("sinks", "softmax", torch.float32)
    assert not [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert {type(module) for module in model.modules()} >= {InvariantLinear, Router, Experts}
    layer = MoELayer(ModelConfig(deterministic=True))
    assert layer.experts.compute is invariant_experts


def test_parameters_keep_their_names_and_values() -> None:
    plain, invariant = (model_of("multi-head", "softmax", torch.float32, chosen) for chosen in (False, True))
    states = plain.state_dict(), invariant.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_constant_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"deterministic: is true, but the products of constant experts"):
        ModelConfig(deterministic=True, special=SpecialExpertsConfig(constant=2))


# --------------------------------------------------------------------------------------------- the pieces by themselves


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_linear_map_is_torchs(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((3, 11, 20), (7, 20), (7,)))
    ours, torchs = linear(x, weight, bias), nn.functional.linear(x, weight, bias)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad(torchs.square().sum(), (x, weight, bias))
    for got, expected in zip(torch.autograd.grad(ours.square().sum(), (x, weight, bias)), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=4 * tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_is_the_plain_one(window: int | None, with_sinks: bool) -> None:
    """Seven new tokens after 130, one sequence without its first 20 columns; in float64."""
    queries, keys, values = (torch.randn(2, h, s, 8, dtype=torch.float64) for h, s in ((6, 7), (2, 137), (2, 137)))
    sinks = torch.randn(6, dtype=torch.float64) if with_sinks else None
    real = torch.ones(2, 137, dtype=torch.bool)
    real[1, :20] = False
    visible = attention.visible_keys(real, 7, window)
    plain = attention.attend(queries, keys, values, visible, sinks)
    ours = attend(queries, keys, values, visible, sinks, window=window)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("n_tokens", [0, 1, 90])
def test_experts_are_the_reference(activation: Any, n_tokens: int) -> None:
    """With biases, an expert that nobody chose, and everyone's first choice in one."""
    experts = Experts(ExpertsConfig(n_experts=5, d_ff=12), FeedForwardConfig(activation=activation, bias=True), 8)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    experts.double()
    x = torch.randn(n_tokens, 8, dtype=torch.float64, requires_grad=True)
    router = Router(RouterConfig(bias=True), 8, 5).double()
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    nn.init.constant_(router.bias, 0.0)
    router.bias.data[:2] = torch.tensor([50.0, -50.0])
    results = []
    for compute in (reference_experts, invariant_experts):
        y = compute(x, router(x), experts.weights)
        inputs = (x, router.weight, *experts.parameters())
        results.append((y, torch.autograd.grad(y.square().sum(), inputs)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)


# -------------------------------------------------------------------------------------------------------------- kernels


def kernels() -> Any:
    pytest.importorskip("triton")
    from moe.model.invariant import kernels

    return kernels


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_products_kernel(kernel_device: str, dtype: torch.dtype) -> None:
    """Widths that fill no tile; the second expert has no rows."""
    rows, weights = (torch.randn(*s, device=kernel_device).to(dtype) for s in ((96, 40), (3, 130, 40)))
    spans = [(0, 64), (64, 64), (64, 96)]
    product = kernels().rows_by_weights(rows, weights, spans)
    expected = by_weights(rows.double(), weights.double(), spans)
    torch.testing.assert_close(product.double(), expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    # One row's bits are its own: the last tile alone, with its rows in reverse.
    alone = kernels().rows_by_weights(rows[64:].flip(0), weights[2:], [(0, 32)])
    assert torch.equal(alone.flip(0), product[64:])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_attention_kernel(kernel_device: str, dtype: torch.dtype, window: int | None, with_sinks: bool) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=kernel_device).to(dtype)

    queries, keys, values = normal(2, 6, 5, 24), normal(2, 2, 100, 24), normal(2, 2, 100, 24)
    sinks = torch.randn(6, device=kernel_device) if with_sinks else None
    real = torch.ones(2, 100, dtype=torch.bool, device=kernel_device)
    real[1, :20] = False
    visible = attention.visible_keys(real, 5, window)
    attended = kernels().attend_backwards(queries, keys, values, visible, 24**-0.5, sinks, window)
    wide = (tensor.double().cpu() for tensor in (queries, keys, values))
    sinks_wide = None if sinks is None else sinks.double().cpu()
    expected = attention.attend(*wide, visible.cpu(), sinks_wide)
    torch.testing.assert_close(attended.double().cpu(), expected, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])
    # The second sequence alone, without its padding, and its last query alone.
    one = [tensor[1:, :, 20:] for tensor in (keys, values)]
    alone = kernels().attend_backwards(queries[1:, :, 4:], *one, None, 24**-0.5, sinks, window)
    assert torch.equal(alone, attended[1:, :, 4:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_text_has_the_same_bits_in_any_company(kind: str, weights: torch.dtype) -> None:
    model = Transformer(model_of(kind, "softmax", torch.float32).config).eval().to("cuda", weights)
    tokens = torch.randint(VOCABULARY, (6, LONGEST), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        together, alone = model(tokens)[0], model(tokens[2:3])[0]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[0, :30] = False
        padded = model(tokens.index_copy(0, torch.tensor([0], device="cuda"), tokens[2:3].roll(30)), mask)[0]
        cache = KVCache(model.config, 1, LONGEST, torch.device("cuda"), weights)
        chunks = torch.cat([model(tokens[2:3, a:b], cache=cache)[0] for a, b in ((0, 37), (37, 38), (38, LONGEST))], 1)
    assert torch.equal(together[2:3], alone)
    assert torch.equal(padded[:1, 30:], alone[:, : LONGEST - 30])
    assert torch.equal(chunks, alone)
