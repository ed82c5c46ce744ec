"""Caches, concurrency and bounds of decoding against published numbers and closed forms."""

from dataclasses import replace
from pathlib import Path

import pytest

from moe import config_file
from moe.config import AttentionConfig, LatentConfig, ModelConfig
from moe.planner.devices import device
from moe.planner.serving import (
    Server,
    cost_per_thousand,
    distinct_experts,
    kv_bytes_of_sequence,
    kv_bytes_per_token,
    tokens_at_cost,
)

GPT4 = config_file.load(Path("configs/gpt4.yaml")).model
SERVER = Server(model=GPT4, device=device("a100-80gb"), tensor=8, pipeline=16)
SMALLER = replace(SERVER, device=device("a100-40gb"))


def test_palms_cache_would_be_3_terabytes_with_a_key_for_every_head() -> None:
    """Pope et al. 2022, section 3.3: 118 layers of 48 heads of 128, 512 sequences of 2,048 in bfloat16."""
    palm = ModelConfig(vocab_size=8, n_layers=118, d_model=18_432, attention=AttentionConfig(n_heads=48, head_dim=128))
    assert 512 * kv_bytes_of_sequence(palm, 2048) == pytest.approx(3.04e12, rel=1e-3)


def test_gpt4s_cache() -> None:
    """120 layers x 2 x 128 x 2 bytes a token: half a GB for 8,192 tokens, 2 for 32,768."""
    assert kv_bytes_per_token(GPT4) == 61_440
    assert kv_bytes_of_sequence(GPT4, 8192) == pytest.approx(0.503e9, rel=1e-3)
    assert kv_bytes_of_sequence(GPT4, 32_768) == pytest.approx(2.013e9, rel=1e-3)


def test_a_latent_cache_holds_one_vector_and_one_key() -> None:
    """DeepSeek-V2: 512 and 64 numbers a layer, whatever the heads are."""
    attention = AttentionConfig(n_heads=128, head_dim=128, latent=LatentConfig(rank=512))
    assert kv_bytes_per_token(ModelConfig(n_layers=3, attention=attention)) == 3 * 576 * 2


def test_a_window_bounds_its_layers_cache() -> None:
    attention = AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=4, window=10, full_every=2)
    model = ModelConfig(n_layers=4, attention=attention)
    assert kv_bytes_of_sequence(model, 100) == (2 * 10 + 2 * 100) * (4 + 4) * 2


def test_how_many_sequences_128_gpus_hold() -> None:
    """43.5 GB are left on each of 90 % of 80; one key head is on all eight tensor ranks, unless they share out the
    batch."""
    assert SERVER.weights == pytest.approx(28.45e9, rel=1e-3)
    assert SERVER.free == pytest.approx(43.5e9, rel=2e-3)
    assert SERVER.concurrent(32_768) == 346
    assert SERVER.concurrent(8192) == 1384
    assert replace(SERVER, share_batch=True).concurrent(32_768) == 8 * 346
    assert SERVER.context_at(4096) == 2768
    assert (SMALLER.concurrent(32_768), SMALLER.concurrent(8192)) == (59, 239)


def test_with_a_key_for_every_head_hardly_any_fits() -> None:
    """d 10,752, 56 heads of 192: 42.3 GB for 8,192 tokens; 33 sequences of 32k on 80 GB, 5 on 40."""
    shape = replace(GPT4, d_model=10_752, attention=AttentionConfig(n_heads=56, head_dim=192))
    many = replace(shape, experts=replace(shape.experts, d_ff=43_008))
    assert kv_bytes_of_sequence(many, 8192) == pytest.approx(42.279e9, rel=1e-4)
    assert replace(SERVER, model=many).concurrent(32_768) == 32
    assert replace(SMALLER, model=many).concurrent(32_768) == 5


@pytest.mark.parametrize(("batch", "experts", "speed"), [(1, 2.0, 29.5), (8, 10.5, 6.72), (1e6, 16.0, 4.48)])
def test_experts_hit_and_the_bound_by_bandwidth(batch: float, experts: float, speed: float) -> None:
    """16 (1 - (7/8)^b) experts of a layer are read, and each token waits for all stages, one after the other."""
    assert distinct_experts(16, 2, batch) == pytest.approx(experts, abs=0.01)
    assert SERVER.tokens_per_user(batch) == pytest.approx(speed, rel=2e-3)


def test_eight_bits_are_twice_as_fast() -> None:
    assert replace(SERVER, weight_bytes=1).tokens_per_user(1e6) == pytest.approx(8.96, abs=0.01)


def test_the_bound_by_arithmetic_and_where_it_takes_over() -> None:
    assert SERVER.tokens_by_compute() == pytest.approx(72.2e3, rel=1e-3)
    assert SERVER.tokens_by_compute(0.34) == pytest.approx(24.6e3, rel=2e-3)
    assert SERVER.crossover() == pytest.approx(1008, rel=2e-3)


def test_dollars_for_a_thousand_tokens() -> None:
    assert tokens_at_cost(128, 1.0, 0.0049) == pytest.approx(7256, abs=0.5)
    assert cost_per_thousand(128, 1.0, 7256) == pytest.approx(0.0049, rel=1e-4)
    assert cost_per_thousand(128, 701 / 128, 7256) == pytest.approx(0.0268, abs=5e-5)
