"""Our attention against that of transformers (5.23), weights copied: padded on both sides and cached too, to 1e-5."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, Glm4MoeConfig, GptOssConfig, LlamaConfig, OlmoeConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.glm4_moe import modeling_glm4_moe as glm
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama import modeling_llama as llama
from transformers.models.olmoe import modeling_olmoe as olmoe

from moe.config import AttentionConfig, LatentConfig, ModelConfig, RopeConfig
from moe.model.attention import visible_keys
from moe.model.cache import KVCache
from moe.model.rotation import rotation_of
from moe.model.transformer import Block

BATCH, LENGTH, WIDTH, LONGEST = 3, 40, 24, 512
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LONGEST,
    "attn_implementation": "eager",
}
OURS = ModelConfig(
    d_model=WIDTH,
    max_seq=LONGEST,
    norm_eps=1e-6,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16),
)
YARN = {"rope_type": "yarn", "rope_theta": 150.0, "factor": 8.0, "original_max_position_embeddings": 64}
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "rope_interleave": False}


def ours(**attention: Any) -> ModelConfig:
    return replace(OURS, attention=replace(OURS.attention, **attention))


def latent(query_rank: int | None, rope: RopeConfig) -> ModelConfig:
    narrow = LatentConfig(rank=12, query_rank=query_rank, rotary_dim=6, value_dim=10)
    attention = AttentionConfig(
        n_heads=4, head_dim=8, rope_theta=150.0, rope=rope, latent=narrow, bias=query_rank == 20
    )
    return replace(OURS, attention=attention)


def of_gpt_oss(**settings: Any) -> tuple[nn.Module, nn.Module]:
    config = GptOssConfig(**SHAPE, num_hidden_layers=2, sliding_window=7, **settings)
    return gpt_oss.GptOssAttention(config, 0), gpt_oss.GptOssRotaryEmbedding(config)


def of_llama(**settings: Any) -> tuple[nn.Module, nn.Module]:
    config = LlamaConfig(**SHAPE, **settings)
    return llama.LlamaAttention(config, 0), llama.LlamaRotaryEmbedding(config)


def of_glm(**settings: Any) -> tuple[nn.Module, nn.Module]:
    config = Glm4MoeConfig(**SHAPE, **settings)
    return glm.Glm4MoeAttention(config, 0), glm.Glm4MoeRotaryEmbedding(config)


def of_olmoe(**settings: Any) -> tuple[nn.Module, nn.Module]:
    config = OlmoeConfig(
        **{key: value for key, value in SHAPE.items() if key != "head_dim"} | {"hidden_size": 64}, **settings
    )
    return olmoe.OlmoeAttention(config, 0), olmoe.OlmoeRotaryEmbedding(config)


def of_deepseek(**settings: Any) -> tuple[nn.Module, nn.Module]:
    config = DeepseekV3Config(**SHAPE | {"num_key_value_heads": 4, "head_dim": 6}, **LATENT, **settings)
    return deepseek.DeepseekV3Attention(config, 0), deepseek.DeepseekV3RotaryEmbedding(config)


YARN_OF_OURS = RopeConfig(scaling="yarn", factor=8, original_max_seq=64)
CASES: dict[str, tuple[Any, dict[str, Any], ModelConfig]] = {
    "sinks, a window, biases, yarn": (
        of_gpt_oss,
        {"rope_parameters": YARN | {"truncate": False}, "attention_bias": True},
        ours(
            sinks=True,
            window=7,
            full_every=2,
            bias=True,
            rope_theta=150.0,
            rope=replace(YARN_OF_OURS, truncate=False),
        ),
    ),
    "llama3": (
        of_llama,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 150.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        ours(rope_theta=150.0, rope=RopeConfig(scaling="llama3", factor=8, original_max_seq=64)),
    ),
    "linear": (
        of_llama,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 150.0, "factor": 4.0}},
        ours(rope_theta=150.0, rope=RopeConfig(scaling="linear", factor=4)),
    ),
    "yarn, whole dimensions": (
        of_llama,
        {"rope_parameters": YARN},
        ours(rope_theta=150.0, rope=YARN_OF_OURS),
    ),
    "half of each head turns": (
        of_glm,
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 150.0, "partial_rotary_factor": 0.5},
            "attention_bias": True,
            "use_qk_norm": True,
            "rms_norm_eps": 1e-6,
        },
        ours(rope_theta=150.0, rope=RopeConfig(fraction=0.5), bias=True, output_bias=False, qk_norm="head"),
    ),
    "clipped": (
        of_olmoe,
        {"clip_qkv": 0.7, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 150.0}},
        replace(ours(rope_theta=150.0, clip=0.7, qk_norm="full"), d_model=64),
    ),
    "latent": (
        of_deepseek,
        {"q_lora_rank": None, "rope_parameters": {"rope_type": "default", "rope_theta": 150.0}},
        latent(None, RopeConfig()),
    ),
    "latent, narrow queries, biases, yarn with mscale": (
        of_deepseek,
        {
            "q_lora_rank": 20,
            "attention_bias": True,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        },
        latent(20, replace(YARN_OF_OURS, mscale=0.7, mscale_all_dim=1.3)),
    ),
}
NAMES = {
    "q_proj": "query",
    "q_b_proj": "query",
    "q_a_proj": "query_down",
    "q_a_layernorm": "query_norm",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "q_norm": "query_norm",
    "k_norm": "key_norm",
    "kv_a_layernorm": "latent_norm",
}


def in_our_names(theirs: nn.Module) -> dict[str, Tensor]:
    """Every tensor of theirs; what is one matrix there and two here is cut."""
    found: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module == "kv_a_proj_with_mqa":
            found[f"latent.{kind}"], found[f"rotary_key.{kind}"] = tensor.split([12, 6])
        elif module == "kv_b_proj":
            keys, values = tensor.unflatten(0, (4, 18)).split([8, 10], dim=1)
            found[f"key.{kind}"], found[f"value.{kind}"] = keys.flatten(0, 1), values.flatten(0, 1)
        else:
            found[f"{NAMES[module]}.{kind}" if module else name] = tensor
    return found


def mask_of(case: str) -> Tensor | None:
    """Where tokens are real: row 1 is padded on the left, row 2 on the right."""
    if case == "nowhere":
        return None
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    real[1, :9], real[2, 30:] = False, False
    return real


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, nn.Module, ModelConfig]:
    """Their attention and rotation, and ours with the same weights."""
    make, settings, config = CASES[request.param]
    theirs, rotary = make(**settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            gain = 1.0 if "norm" in name else 0.0
            std = 0.3 if tensor.dim() == 1 else 1.5 * tensor.shape[-1] ** -0.5
            tensor.copy_(gain + std * torch.randn(tensor.shape, generator=generator))
    attention = Block(config, layer=0).attention
    attention.load_state_dict(in_our_names(theirs))
    return theirs.eval(), rotary, attention.eval(), config


def their_output(theirs: nn.Module, rotary: nn.Module, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    bias = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    output: Tensor = theirs(x, position_embeddings=rotary(x, positions), attention_mask=bias)[0]
    return output


@pytest.mark.parametrize("padding", ["nowhere", "on both sides"])
@torch.no_grad()
def test_it_is_their_attention(pair: tuple[nn.Module, nn.Module, nn.Module, ModelConfig], padding: str) -> None:
    theirs, rotary, attention, config = pair
    x = torch.randn(BATCH, LENGTH, config.d_model, generator=torch.Generator().manual_seed(1))
    real = mask_of(padding)
    there = torch.ones(BATCH, LENGTH, dtype=torch.bool) if real is None else real
    positions = (there.cumsum(dim=1) - 1).clamp(min=0)
    window = config.attention.window_of(0)
    visible = visible_keys(there, LENGTH, window)

    expected = their_output(theirs, rotary, x, positions, visible)
    y = attention(x, rotation_of(positions, config), None if real is None and window is None else visible)

    torch.testing.assert_close(y[there], expected[there], rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [30, 1, 1, 8]], ids=["by token", "in chunks"])
@pytest.mark.parametrize("padding", ["nowhere", "on both sides"])
@torch.no_grad()
def test_cached_equals_uncached(
    pair: tuple[nn.Module, nn.Module, nn.Module, ModelConfig], padding: str, chunks: list[int]
) -> None:
    _, _, attention, config = pair
    x = torch.randn(BATCH, LENGTH, config.d_model, generator=torch.Generator().manual_seed(1))
    real = mask_of(padding)
    there = torch.ones(BATCH, LENGTH, dtype=torch.bool) if real is None else real
    positions = (there.cumsum(dim=1) - 1).clamp(min=0)
    window = config.attention.window_of(0)
    whole = attention(x, rotation_of(positions, config), visible_keys(there, LENGTH, window))

    cache, parts, start = KVCache(config, BATCH, LENGTH, torch.device("cpu")), [], 0
    for size in chunks:
        end = start + size
        cache.extend(size, None if real is None else real[:, start:end])
        visible = visible_keys(there[:, :end], size, window)
        parts.append(attention(x[:, start:end], rotation_of(positions[:, start:end], config), visible, cache))
        start = end

    torch.testing.assert_close(torch.cat(parts, dim=1)[there], whole[there], rtol=0, atol=1e-5)
