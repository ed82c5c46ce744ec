"""Tiny models, one for each kind of attention, in float64, where equal means equal."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from moe.config import AttentionConfig, ExpertsConfig, LatentConfig, ModelConfig, RopeConfig, RouterConfig
from moe.model.transformer import Transformer

PLAIN = ModelConfig(
    vocab_size=64,
    n_layers=2,
    d_model=32,
    max_seq=64,
    init_std=0.3,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8),
    experts=ExpertsConfig(n_experts=4, d_ff=16),
    router=RouterConfig(top_k=2),
)
ATTENTION = {
    "multi-head": replace(PLAIN, attention=AttentionConfig(n_heads=4, head_dim=8)),
    "grouped": PLAIN,
    "multi-query": replace(PLAIN, attention=AttentionConfig(n_heads=4, n_kv_heads=1, head_dim=8)),
    "latent": replace(
        PLAIN, attention=AttentionConfig(n_heads=4, head_dim=8, latent=LatentConfig(rank=12, rotary_dim=4, value_dim=6))
    ),
    "sinks": replace(PLAIN, attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, sinks=True)),
    "window": replace(PLAIN, attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=5)),
    "window and sinks in every other layer": replace(
        PLAIN, attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=3, full_every=2, sinks=True)
    ),
    "learned positions": replace(PLAIN, positions="learned"),
    "no positions": replace(PLAIN, positions="none"),
    "YaRN": replace(
        PLAIN,
        attention=AttentionConfig(
            n_heads=4, n_kv_heads=2, head_dim=8, rope=RopeConfig(scaling="yarn", factor=4.0, original_max_seq=16)
        ),
    ),
}


def exact(config: ModelConfig, seed: int = 0) -> Transformer:
    """Weights large enough that the most likely token depends on all that was read."""
    return Transformer(config, seed).eval().double()


@pytest.fixture(scope="session")
def plain() -> Transformer:
    return exact(PLAIN)


@pytest.fixture(scope="session", params=ATTENTION.values(), ids=ATTENTION)
def attending(request: pytest.FixtureRequest) -> Transformer:
    """A model of each kind of attention."""
    return exact(request.param)


@pytest.fixture(scope="session")
def plain_greedy() -> Callable[[Transformer, Sequence[int], int], list[int]]:
    """The reference of all decoding: the likeliest token each time, everything read again for each."""

    known: dict[tuple[Transformer, tuple[int, ...]], list[int]] = {}

    @torch.no_grad()
    def write(model: Transformer, prompt: Sequence[int], n_tokens: int) -> list[int]:
        written = known.setdefault((model, tuple(prompt)), [])
        while len(written) < n_tokens:
            written.append(int(model(torch.tensor([[*prompt, *written]]))[0][0, -1].argmax()))
        return written[:n_tokens]

    return write
