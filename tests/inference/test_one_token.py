"""A token read in few calls is the token that the model reads: the same logits, and the same cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config import (
    AttentionConfig,
    BalanceConfig,
    CapacityConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LatentConfig,
    ModelConfig,
    RopeConfig,
    RouterConfig,
    SharedExpertsConfig,
    SpecialExpertsConfig,
)
from moe.inference import generate as generate_module
from moe.inference.generate import generate
from moe.inference.one_token import OneToken, can_read, without_onednn
from moe.inference.sampling import Sampling
from moe.model.cache import KVCache
from moe.model.experts.few import MOST_ASSIGNMENTS
from moe.model.transformer import Transformer
from moe.study.intervene import knock_out

PLAIN = ModelConfig(
    vocab_size=64,
    n_layers=3,
    d_model=32,
    max_seq=48,
    init_std=0.2,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6),
    experts=ExpertsConfig(n_experts=4, d_ff=24),
    router=RouterConfig(top_k=2),
)
NO_BALANCE = BalanceConfig(load_balance=0.0, z_loss=0.0)
VARIANTS = {
    "plain": PLAIN,
    "multi-head": replace(PLAIN, attention=AttentionConfig(n_heads=4, head_dim=6)),
    "untied": replace(PLAIN, tie_embeddings=False),
    "gelu, biases": replace(PLAIN, feed_forward=FeedForwardConfig(activation="gelu", bias=True)),
    "three experts, raw and scaled": replace(PLAIN, router=RouterConfig(top_k=3, normalise=False, scale=2.0)),
    "sigmoid": replace(PLAIN, router=RouterConfig(score="sigmoid")),
    "dense first": replace(PLAIN, experts=ExpertsConfig(n_experts=4, d_ff=24, first_dense=1)),
    "dense twin": replace(PLAIN, dense_twin=True),
    "shared": replace(PLAIN, shared=SharedExpertsConfig(n_experts=1, gated=True)),
    "special": replace(PLAIN, special=SpecialExpertsConfig(zero=1, copy=1, constant=1), balance=NO_BALANCE),
    "selection bias": replace(PLAIN, router=RouterConfig(score="sigmoid", selection_bias="sign")),
    "router's bias": replace(PLAIN, router=RouterConfig(bias=True)),
    "logit norm": replace(PLAIN, router=RouterConfig(logit_norm=1.0)),
    "weigh before": replace(PLAIN, router=RouterConfig(apply="before")),
    "capacity": replace(PLAIN, router=RouterConfig(capacity=CapacityConfig(factor=0.5, in_evaluation=True))),
    "hash": replace(PLAIN, router=RouterConfig(selection="hash", weights="equal"), balance=NO_BALANCE),
    "random": replace(PLAIN, router=RouterConfig(selection="random", weights="equal"), balance=NO_BALANCE),
    "loop": replace(PLAIN, experts=ExpertsConfig(n_experts=4, d_ff=24, backend="reference")),
}


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model in which nothing is 1 or 0 that need not be."""
    model = Transformer(config).eval().to(dtype)
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.ndim == 1:
            tensor.data += (0.2 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    return model


def text(batch: int, length: int) -> Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(1))


def caches_after(model: Transformer, tokens: Tensor, mask: Tensor | None, capacity: int = 20) -> list[KVCache]:
    """Two caches that hold ``tokens``."""
    dtype = model.embedding.weight.dtype
    caches = [KVCache(model.config, len(tokens), capacity, torch.device("cpu"), dtype) for _ in range(2)]
    for cache in caches:
        model(tokens, mask, cache)
    return caches


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@torch.inference_mode()
def test_it_reads_what_the_model_reads(config: ModelConfig, padded: bool) -> None:
    """Row 1 begins with padding; row 2 stops at the tenth token and is padding from there."""
    model, tokens = model_of(config), text(3, 14)
    mask = None
    if padded:
        mask = torch.ones(3, 14, dtype=torch.bool)
        mask[1, :3], mask[2, 10:] = False, False
    one, other = caches_after(model, tokens[:, :6], None if mask is None else mask[:, :6])
    assert can_read(model, 3)

    reader = OneToken(model, one)
    for column in range(6, 14):
        going = [True] * 3 if mask is None else mask[:, column].tolist()
        own = None if all(going) else mask[:, column : column + 1]
        expected = model(tokens[:, column : column + 1], own, other)[0][:, 0]
        torch.testing.assert_close(reader.read(tokens[:, column], going)[going], expected[going])

    assert one.length == other.length
    torch.testing.assert_close(one.keys, other.keys)
    torch.testing.assert_close(one.values, other.values)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_lower_precision_is_no_lower_than_the_model_s_own(dtype: torch.dtype, tolerance: float, batch: int) -> None:
    """Against the model in float64. All experts are chosen, so that rounding cannot choose others."""
    config = replace(PLAIN, router=RouterConfig(top_k=4))
    model, exact = model_of(config, dtype), model_of(config, dtype).double()
    tokens = text(batch, 9)
    one, _ = caches_after(model, tokens[:, :8], None)

    logits = OneToken(model, one).read(tokens[:, 8], [True] * batch)

    expected = exact(tokens)[0][:, -1]
    assert logits.dtype == dtype
    assert (logits.double() - expected).norm() <= tolerance * expected.norm()


@torch.inference_mode()
def test_reader_and_model_may_take_turns() -> None:
    model, tokens = model_of(PLAIN), text(2, 12)
    whole = model(tokens)[0]
    cache, _ = caches_after(model, tokens[:, :4], None)

    reader, going = OneToken(model, cache), [True, True]
    parts = [
        reader.read(tokens[:, 4], going)[:, None],
        model(tokens[:, 5:6], None, cache)[0],
        model(tokens[:, 6:9], None, cache)[0],
        reader.read(tokens[:, 9], going)[:, None],
        reader.read(tokens[:, 10], going)[:, None],
        model(tokens[:, 11:], None, cache)[0],
    ]

    torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, 4:])


@torch.inference_mode()
def test_it_makes_far_fewer_calls_than_the_model() -> None:
    """154 against 277 operators when this was written; a test is no place to time them."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    model, tokens = model_of(PLAIN, torch.float32), text(1, 3)
    one, other = caches_after(model, tokens[:, :2], None)
    reader = OneToken(model, one)

    with Count() as by_reader:
        reader.read(tokens[:, 2], [True])
    with Count() as by_model:
        model(tokens[:, 2:], None, other)

    assert by_reader.calls < 0.6 * by_model.calls


def test_a_norm_on_paper() -> None:
    """x = (3, 4), ε = 0.5: the mean square is 12.5, its root with ε √13."""
    config = replace(PLAIN, d_model=2, norm_eps=0.5)
    model = Transformer(config).double()
    reader = OneToken(model, KVCache(config, 1, 1, torch.device("cpu")))
    gain = torch.tensor([1.0, 2.0], dtype=torch.float64) * 2**0.5

    normed = reader._normalise(torch.tensor([[3.0, 4.0]], dtype=torch.float64), gain)

    torch.testing.assert_close(normed, torch.tensor([[3.0, 8.0]], dtype=torch.float64) / 13**0.5)


# ------------------------------------------------------------------------------------------------- where it is not used


SOFTENED = RopeConfig(scaling="yarn", factor=4, mscale_all_dim=1.0)


@pytest.mark.parametrize(
    "config",
    [
        replace(PLAIN, norm="layernorm"),
        replace(PLAIN, attention=replace(PLAIN.attention, qk_norm="head")),
        replace(PLAIN, attention=replace(PLAIN.attention, qk_norm="full")),
        replace(PLAIN, attention=replace(PLAIN.attention, bias=True)),
        replace(PLAIN, attention=replace(PLAIN.attention, output_bias=True)),
        replace(PLAIN, attention=replace(PLAIN.attention, clip=8.0)),
        replace(PLAIN, attention=replace(PLAIN.attention, sinks=True)),
        replace(PLAIN, attention=replace(PLAIN.attention, window=4)),
        replace(PLAIN, attention=AttentionConfig(latent=LatentConfig(rank=8))),
        replace(PLAIN, attention=replace(PLAIN.attention, head_dim=8, rope=RopeConfig(fraction=0.5))),
        replace(PLAIN, attention=replace(PLAIN.attention, rope=SOFTENED)),
        replace(PLAIN, positions="learned"),
        replace(PLAIN, positions="none"),
        replace(PLAIN, head_bias=True),
        replace(PLAIN, router=RouterConfig(residual=True)),
    ],
    ids=[
        "layer norm",
        "norm of heads",
        "norm of queries",
        "biases",
        "bias of the output",
        "clip",
        "sinks",
        "window",
        "latent",
        "half of each head turns",
        "scale of the softmax",
        "learned positions",
        "no positions",
        "bias of the head",
        "residual router",
    ],
)
def test_it_is_not_for_every_model(config: ModelConfig) -> None:
    assert not can_read(Transformer(config), 1)


def test_it_is_for_few_sequences() -> None:
    assert can_read(Transformer(PLAIN), MOST_ASSIGNMENTS // 2)
    assert not can_read(Transformer(PLAIN), MOST_ASSIGNMENTS // 2 + 1)


def test_hooks_and_autocast_speak_against_it() -> None:
    model = Transformer(PLAIN)
    handles = [
        model.blocks[1].attention.register_forward_hook(lambda *_: None),
        model.embedding.register_forward_pre_hook(lambda *_: None),
    ]
    for handle in handles:
        assert not can_read(model, 1)
        handle.remove()
    assert can_read(model, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_read(model, 1)


# -------------------------------------------------------------------------------------------------------- in generation


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens a reader reads."""
    calls: list[int] = []

    class Counting(OneToken):
        def read(self, tokens: Tensor, going: list[bool]) -> Tensor:
            calls.append(len(tokens))
            return super().read(tokens, going)

    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "OneToken", Counting)
        yield calls


@pytest.mark.parametrize("prompts", [[[5, 9, 11]], [[5, 9, 11], [7]]], ids=["one", "padded"])
def test_generation_takes_it_and_writes_the_same(prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, greedy = model_of(PLAIN), Sampling(temperature=0.0)

    with counted(monkeypatch) as calls:
        written = generate(model, prompts, 8, greedy)
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "can_read", lambda *_: False)
        by_model = generate(model, prompts, 8, greedy)

    assert written == by_model
    assert calls == [len(prompts)] * 7  # the prompt itself is read by the model


def test_an_intervention_acts_in_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four experts knocked out of every layer: the model without them writes, token by token."""
    model, greedy = model_of(PLAIN), Sampling(temperature=0.0)
    out = {layer: [0, 1] for layer in range(3)}

    free = generate(model, [[5, 9, 11]], 8, greedy)
    with knock_out(model, out), counted(monkeypatch) as calls:
        [written] = generate(model, [[5, 9, 11]], 8, greedy)
        ids = [5, 9, 11]
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))

    assert written == ids[3:]
    assert [written] != free
    assert not calls


def test_onednn_comes_back() -> None:
    before = torch.backends.mkldnn.enabled
    with pytest.raises(KeyError), without_onednn():
        assert not torch.backends.mkldnn.enabled
        raise KeyError
    assert torch.backends.mkldnn.enabled is before
