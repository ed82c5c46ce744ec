"""The architectures of llama.cpp that a run may be written as: tables as for transformers, read in one direction alone.

Settings are the metadata of a GGUF file without the architecture's name before them, read as llama.cpp's sources of
October 2026 read them (src/llama-model.cpp and src/models/). A key in parentheses is not written: llama.cpp sees it in
which tensors there are. Experts are one stack there as here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from moe.config import ModelConfig
from moe.interop.family import Families, Family
from moe.interop.links import Link, Shape, gate_bias, gate_rows, value_bias, value_rows
from moe.interop.settings import (
    Always,
    Choice,
    DenseModel,
    Groups,
    HeadWidth,
    Key,
    LeadingDense,
    Ours,
    SharedWidth,
    Theirs,
)

# ------------------------------------------------------------------------------------------------------------- settings

SHAPE = (
    Key("vocab_size", "vocab_size"),
    Key("context_length", "max_seq"),
    Key("embedding_length", "d_model"),
    Key("block_count", "n_layers"),
    Key("attention.head_count", "attention.n_heads"),
    Key("attention.layer_norm_rms_epsilon", "norm_eps", float),
    Key("rope.freq_base", "attention.rope_theta", float),
    Key("(tied)", "tie_embeddings", bool),
    Key("(biases of attention)", "attention.bias", bool),
    Always({"norm": "rmsnorm", "feed_forward.activation": "swiglu"}),
)
KEY_HEADS = Key("attention.head_count_kv", "attention.n_kv_heads", resolved="attention.kv_heads")
AS_MANY_KEY_HEADS = Key("attention.head_count_kv", "attention.n_heads")
HEAD_WIDTH = Key("attention.key_length", "attention.head_dim", also=("attention.value_length", "rope.dimension_count"))
HEADS_FILL_THE_WIDTH = HeadWidth(
    written=False, theirs="attention.key_length", width="embedding_length", heads="attention.head_count"
)
EXPERTS = (
    Key("expert_count", "experts.n_experts"),
    Key("expert_used_count", "router.top_k"),
)
WIDTH = Key("feed_forward_length", "experts.d_ff")
ROUTED_WIDTH = Key("expert_feed_forward_length", "experts.d_ff", also=("feed_forward_length",))
SOFTMAX = Always({"router.score": "softmax", "router.selection": "top_k"})
NORMALISED, NOT_NORMALISED = Always({"router.normalise": True}), Always({"router.normalise": False})


@dataclass(frozen=True)
class SharedOrZeros:
    """The number of shared experts, each as wide as a routed one; where we have none, there must be one of zeros."""

    keys: tuple[str, ...] = ("expert_shared_count", "(shared experts)")

    def read(self, theirs: Theirs) -> Ours:
        return {"shared.n_experts": theirs["(shared experts)"]}

    def write(self, config: ModelConfig) -> Theirs:
        count = config.shared_width // config.experts.d_ff
        return {"expert_shared_count": max(1, count), "(shared experts)": count}


def written(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What of the settings goes into the file."""
    return {key: value for key, value in metadata.items() if not key.startswith("(")}


# -------------------------------------------------------------------------------------------------------------- tensors


def in_pairs(tensor: Tensor, config: ModelConfig) -> Tensor:
    """Of queries or keys, the rows of each head in the order 0, d/2, 1, d/2 + 1, ...

    Ours turn the pairs (i, i + d/2) by their angles; the architecture ``llama`` turns neighbours.
    """
    half = config.attention.head_dim // 2
    return tensor.reshape(-1, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def first_row(tensor: Tensor, config: ModelConfig) -> Tensor:
    """[1, D] as [D]."""
    return tensor[0]


def _zero_shared_in(config: ModelConfig) -> Shape:
    return config.experts.d_ff, config.d_model


def _zero_shared_out(config: ModelConfig) -> Shape:
    return config.d_model, config.experts.d_ff


def _per_expert(config: ModelConfig) -> Shape:
    return (config.experts.n_experts,)


LAYER, BLOCK = "blk.{layer}", "blocks.{layer}"
FEED_FORWARD = f"{BLOCK}.feed_forward"

ENDS = (
    Link("token_embd.weight", "embedding.weight"),
    Link("output_norm.weight", "norm.weight"),
    Link("output.weight", "head.weight"),
)
ENDS_WITH_HEAD = (*ENDS[:2], Link("output.weight", "head.weight", instead="embedding.weight"))
"""an architecture that wants a head of its own gets a copy of a tied one"""
ATTENTION = (
    Link(f"{LAYER}.attn_norm.weight", f"{BLOCK}.attention_norm.weight"),
    Link(f"{LAYER}.attn_q.weight", f"{BLOCK}.attention.query.weight"),
    Link(f"{LAYER}.attn_q.bias", f"{BLOCK}.attention.query.bias"),
    Link(f"{LAYER}.attn_k.weight", f"{BLOCK}.attention.key.weight"),
    Link(f"{LAYER}.attn_k.bias", f"{BLOCK}.attention.key.bias"),
    Link(f"{LAYER}.attn_v.weight", f"{BLOCK}.attention.value.weight"),
    Link(f"{LAYER}.attn_v.bias", f"{BLOCK}.attention.value.bias"),
    Link(f"{LAYER}.attn_q_norm.weight", f"{BLOCK}.attention.query_norm.weight"),
    Link(f"{LAYER}.attn_k_norm.weight", f"{BLOCK}.attention.key_norm.weight"),
    Link(f"{LAYER}.attn_output.weight", f"{BLOCK}.attention.output.weight"),
    Link(None, f"{BLOCK}.attention.output.bias"),
)
PAIRED_ATTENTION = (
    Link(f"{LAYER}.attn_norm.weight", f"{BLOCK}.attention_norm.weight"),
    Link(f"{LAYER}.attn_q.weight", f"{BLOCK}.attention.query.weight", in_pairs),
    Link(f"{LAYER}.attn_q.bias", f"{BLOCK}.attention.query.bias", in_pairs),
    Link(f"{LAYER}.attn_k.weight", f"{BLOCK}.attention.key.weight", in_pairs),
    Link(f"{LAYER}.attn_k.bias", f"{BLOCK}.attention.key.bias", in_pairs),
    Link(f"{LAYER}.attn_v.weight", f"{BLOCK}.attention.value.weight"),
    Link(f"{LAYER}.attn_v.bias", f"{BLOCK}.attention.value.bias"),
    Link(f"{LAYER}.attn_output.weight", f"{BLOCK}.attention.output.weight"),
    Link(f"{LAYER}.attn_output.bias", f"{BLOCK}.attention.output.bias"),
)
NORM = (Link(f"{LAYER}.ffn_norm.weight", f"{BLOCK}.feed_forward_norm.weight"),)
MLP = (
    Link(f"{LAYER}.ffn_gate.weight", f"{FEED_FORWARD}.w_in.weight", gate_rows),
    Link(f"{LAYER}.ffn_gate.bias", f"{FEED_FORWARD}.w_in.bias", gate_bias),
    Link(f"{LAYER}.ffn_up.weight", f"{FEED_FORWARD}.w_in.weight", value_rows),
    Link(f"{LAYER}.ffn_up.bias", f"{FEED_FORWARD}.w_in.bias", value_bias),
    Link(f"{LAYER}.ffn_down.weight", f"{FEED_FORWARD}.w_out.weight"),
    Link(f"{LAYER}.ffn_down.bias", f"{FEED_FORWARD}.w_out.bias"),
)
ROUTED = (
    Link(f"{LAYER}.ffn_gate_inp.weight", f"{FEED_FORWARD}.router.weight"),
    Link(f"{LAYER}.ffn_gate_exps.weight", f"{FEED_FORWARD}.experts.w_in", gate_rows),
    Link(f"{LAYER}.ffn_up_exps.weight", f"{FEED_FORWARD}.experts.w_in", value_rows),
    Link(f"{LAYER}.ffn_down_exps.weight", f"{FEED_FORWARD}.experts.w_out"),
)
SHARED_IN, SHARED_OUT = f"{FEED_FORWARD}.shared.mlp.w_in.weight", f"{FEED_FORWARD}.shared.mlp.w_out.weight"

ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
"""ends of names of tensors that stay float32: they decide where a token goes"""


# -------------------------------------------------------------------------------------------------------- architectures

LLAMA = Family(
    name="llama",
    architecture="llama",
    settings=(
        *SHAPE,
        KEY_HEADS,
        HEAD_WIDTH,
        DenseModel("feed_forward_length"),
        Key("(biases)", "feed_forward.bias", bool),
    ),
    tensors=(*ENDS, *PAIRED_ATTENTION, *NORM, *MLP),
)
QWEN3 = Family(
    name="qwen3",
    architecture="qwen3",
    settings=(
        *SHAPE,
        KEY_HEADS,
        HEAD_WIDTH,
        DenseModel("feed_forward_length"),
        Always({"attention.qk_norm": "head"}),
    ),
    tensors=(*ENDS, *ATTENTION, *NORM, *MLP),
)
MIXTRAL = Family(
    name="llama with experts",
    architecture="llama",
    settings=(*SHAPE, KEY_HEADS, HEAD_WIDTH, *EXPERTS, WIDTH, SOFTMAX, NORMALISED),
    tensors=(*ENDS, *PAIRED_ATTENTION, *NORM, *ROUTED),
)
QWEN3_MOE = Family(
    name="qwen3moe",
    architecture="qwen3moe",
    settings=(
        *SHAPE,
        KEY_HEADS,
        HEAD_WIDTH,
        *EXPERTS,
        ROUTED_WIDTH,
        SOFTMAX,
        NORMALISED,
        Always({"attention.qk_norm": "head"}),
    ),
    tensors=(*ENDS, *ATTENTION, *NORM, *ROUTED),
)
OLMOE = Family(
    name="olmoe",
    architecture="olmoe",
    settings=(
        *SHAPE,
        AS_MANY_KEY_HEADS,
        HEADS_FILL_THE_WIDTH,
        *EXPERTS,
        WIDTH,
        SOFTMAX,
        NOT_NORMALISED,
        Always({"attention.qk_norm": "full"}),
    ),
    tensors=(*ENDS_WITH_HEAD, *ATTENTION, *NORM, *ROUTED),
)
QWEN2_MOE = Family(
    name="qwen2moe",
    architecture="qwen2moe",
    settings=(
        *SHAPE,
        KEY_HEADS,
        HEADS_FILL_THE_WIDTH,
        *EXPERTS,
        ROUTED_WIDTH,
        SharedWidth("expert_shared_feed_forward_length"),
        Always({"shared.gated": True}),
        SOFTMAX,
        NOT_NORMALISED,
    ),
    tensors=(
        *ENDS_WITH_HEAD,
        *ATTENTION,
        *NORM,
        *ROUTED,
        Link(f"{LAYER}.ffn_gate_inp_shexp.weight", f"{FEED_FORWARD}.shared.gate.weight", first_row),
        Link(f"{LAYER}.ffn_gate_shexp.weight", SHARED_IN, gate_rows),
        Link(f"{LAYER}.ffn_up_shexp.weight", SHARED_IN, value_rows),
        Link(f"{LAYER}.ffn_down_shexp.weight", SHARED_OUT),
    ),
)
GLM4_MOE = Family(
    name="glm4moe",
    architecture="glm4moe",
    settings=(
        *SHAPE,
        KEY_HEADS,
        HEAD_WIDTH,
        *EXPERTS,
        Key("expert_feed_forward_length", "experts.d_ff"),
        LeadingDense("leading_dense_block_count", width="feed_forward_length"),
        SharedOrZeros(),
        Choice("expert_gating_func", "router.score", {1: "softmax", 2: "sigmoid"}),
        Key("expert_weights_norm", "router.normalise", bool),
        Key("expert_weights_scale", "router.scale", float),
        Groups("expert_group_count", "expert_group_used_count"),
        Choice("(norms of queries and keys)", "attention.qk_norm", {True: "head", False: "none"}),
        Always({"router.selection_bias": "sign"}),
    ),
    tensors=(
        *ENDS,
        *ATTENTION,
        Link(f"{LAYER}.post_attention_norm.weight", f"{BLOCK}.feed_forward_norm.weight"),
        *MLP,
        *ROUTED,
        Link(f"{LAYER}.exp_probs_b.bias", f"{FEED_FORWARD}.router.selection_bias", zeros=_per_expert),
        Link(f"{LAYER}.ffn_gate_shexp.weight", SHARED_IN, gate_rows, zeros=_zero_shared_in),
        Link(f"{LAYER}.ffn_up_shexp.weight", SHARED_IN, value_rows, zeros=_zero_shared_in),
        Link(f"{LAYER}.ffn_down_shexp.weight", SHARED_OUT, zeros=_zero_shared_out),
    ),
)

ARCHITECTURES: Families = MappingProxyType(
    {family.name: family for family in (LLAMA, QWEN3, MIXTRAL, QWEN3_MOE, OLMOE, QWEN2_MOE, GLM4_MOE)}
)
"""a run is written as the first that can represent it; glm4moe can be most of what the others are"""
