"""The architectures of transformers that models of ours may be: two tables each, for reading and for writing.

Names and meanings are those of transformers 5.23 and 4.57, whose sources were read; tests hold every family against the
implementation there. A default is what the absence of a key means in both. To add a family, add its tables.
"""

from dataclasses import replace
from types import MappingProxyType

from moe.config import ModelConfig
from moe.interop.family import Families, Family
from moe.interop.links import Link, Shape, every_second, gate_bias, gate_rows, transposed, value_bias, value_rows
from moe.interop.settings import (
    Always,
    Choice,
    DenseModel,
    FullAttention,
    Groups,
    HeadWidth,
    Key,
    LeadingDense,
    Only,
    Rotary,
    SharedCount,
    SharedWidth,
    SparseSteps,
    Windows,
)

# ------------------------------------------------------------------------------------------------- what most have alike

SHAPE = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "d_model"),
    Key("num_hidden_layers", "n_layers"),
    Key("max_position_embeddings", "max_seq"),
    Key("num_attention_heads", "attention.n_heads"),
    Key("rms_norm_eps", "norm_eps", float),
    Key("tie_word_embeddings", "tie_embeddings", bool, default=False),
    Only("hidden_act", "silu", absent="silu", reason="and the gate of our experts is silu"),
    Always({"norm": "rmsnorm", "feed_forward.activation": "swiglu", "router.preset": None}),
)
KEY_HEADS = Key("num_key_value_heads", "attention.n_kv_heads", resolved="attention.kv_heads")
"""whose absence would mean a number that is another one in each of these families"""
KEY_HEADS_OR_QUERIES = replace(KEY_HEADS, default=None)
ATTENTION_BIAS = Key("attention_bias", "attention.bias", bool, default=False)
TOP_K = Key("num_experts_per_tok", "router.top_k")
NORMALISED = Key("norm_topk_prob", "router.normalise", bool, default=False)
SOFTMAX = Always({"router.score": "softmax", "router.selection": "top_k"})
ROUTED_WIDTH = Key("moe_intermediate_size", "experts.d_ff")

LAYER, BLOCK = "model.layers.{layer}", "blocks.{layer}"
MLP, FEED_FORWARD = f"{LAYER}.mlp", f"{BLOCK}.feed_forward"

TRUNK = (
    Link("model.embed_tokens.weight", "embedding.weight"),
    Link(f"{LAYER}.input_layernorm.weight", f"{BLOCK}.attention_norm.weight"),
    Link(f"{LAYER}.self_attn.q_proj.weight", f"{BLOCK}.attention.query.weight"),
    Link(f"{LAYER}.self_attn.q_proj.bias", f"{BLOCK}.attention.query.bias"),
    Link(f"{LAYER}.self_attn.k_proj.weight", f"{BLOCK}.attention.key.weight"),
    Link(f"{LAYER}.self_attn.k_proj.bias", f"{BLOCK}.attention.key.bias"),
    Link(f"{LAYER}.self_attn.v_proj.weight", f"{BLOCK}.attention.value.weight"),
    Link(f"{LAYER}.self_attn.v_proj.bias", f"{BLOCK}.attention.value.bias"),
    Link(f"{LAYER}.self_attn.q_norm.weight", f"{BLOCK}.attention.query_norm.weight"),
    Link(f"{LAYER}.self_attn.k_norm.weight", f"{BLOCK}.attention.key_norm.weight"),
    Link(f"{LAYER}.self_attn.o_proj.weight", f"{BLOCK}.attention.output.weight"),
    Link(f"{LAYER}.post_attention_layernorm.weight", f"{BLOCK}.feed_forward_norm.weight"),
    Link("model.norm.weight", "norm.weight"),
    Link("lm_head.weight", "head.weight"),
)
OUTPUT_BIAS = (Link(f"{LAYER}.self_attn.o_proj.bias", f"{BLOCK}.attention.output.bias"),)
NO_OUTPUT_BIAS = (Link(None, f"{BLOCK}.attention.output.bias"),)
"""biases on queries, keys and values, but none on the output: ours is zeros"""
DENSE_MLP = (
    Link(f"{MLP}.gate_proj.weight", f"{FEED_FORWARD}.w_in.weight", gate_rows),
    Link(f"{MLP}.gate_proj.bias", f"{FEED_FORWARD}.w_in.bias", gate_bias),
    Link(f"{MLP}.up_proj.weight", f"{FEED_FORWARD}.w_in.weight", value_rows),
    Link(f"{MLP}.up_proj.bias", f"{FEED_FORWARD}.w_in.bias", value_bias),
    Link(f"{MLP}.down_proj.weight", f"{FEED_FORWARD}.w_out.weight"),
    Link(f"{MLP}.down_proj.bias", f"{FEED_FORWARD}.w_out.bias"),
)
EXPERTS = (
    Link(f"{MLP}.gate.weight", f"{FEED_FORWARD}.router.weight"),
    Link(f"{MLP}.experts.{{expert}}.gate_proj.weight", f"{FEED_FORWARD}.experts.w_in", gate_rows),
    Link(f"{MLP}.experts.{{expert}}.up_proj.weight", f"{FEED_FORWARD}.experts.w_in", value_rows),
    Link(f"{MLP}.experts.{{expert}}.down_proj.weight", f"{FEED_FORWARD}.experts.w_out"),
)
HEAD_COPY = "lm_head.weight"
DERIVED = (f"{LAYER}.self_attn.rotary_emb.inv_freq",)


def _shared_in(config: ModelConfig) -> Shape:
    return config.shared_width, config.d_model


def _shared_out(config: ModelConfig) -> Shape:
    return config.d_model, config.shared_width


def _shared_gate(config: ModelConfig) -> Shape:
    return 1, config.d_model


def _per_expert(config: ModelConfig) -> Shape:
    return (config.experts.n_experts,)


def _shared(name: str) -> tuple[Link, ...]:
    """Shared experts under ``name``; where our model has none, theirs have no width."""
    return (
        Link(f"{MLP}.{name}.gate_proj.weight", f"{FEED_FORWARD}.shared.mlp.w_in.weight", gate_rows, zeros=_shared_in),
        Link(f"{MLP}.{name}.up_proj.weight", f"{FEED_FORWARD}.shared.mlp.w_in.weight", value_rows, zeros=_shared_in),
        Link(f"{MLP}.{name}.down_proj.weight", f"{FEED_FORWARD}.shared.mlp.w_out.weight", zeros=_shared_out),
    )


# ------------------------------------------------------------------------------------------------------------- mixtures

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    settings=(
        *SHAPE,
        KEY_HEADS,
        HeadWidth(),
        Rotary(1_000_000.0),
        Windows(),
        Key("num_local_experts", "experts.n_experts", also=("num_experts",)),
        Key("intermediate_size", "experts.d_ff"),
        TOP_K,
        SOFTMAX,
        Always({"router.normalise": True}),
    ),
    tensors=(
        *TRUNK,
        Link(f"{LAYER}.block_sparse_moe.gate.weight", f"{FEED_FORWARD}.router.weight"),
        Link(f"{LAYER}.block_sparse_moe.experts.{{expert}}.w1.weight", f"{FEED_FORWARD}.experts.w_in", gate_rows),
        Link(f"{LAYER}.block_sparse_moe.experts.{{expert}}.w3.weight", f"{FEED_FORWARD}.experts.w_in", value_rows),
        Link(f"{LAYER}.block_sparse_moe.experts.{{expert}}.w2.weight", f"{FEED_FORWARD}.experts.w_out"),
    ),
    tied_copy=HEAD_COPY,
    derived=DERIVED,
)

OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    settings=(
        *SHAPE,
        KEY_HEADS_OR_QUERIES,
        HeadWidth(written=False),
        ATTENTION_BIAS,
        Rotary(10_000.0),
        Key("clip_qkv", "attention.clip", float, default=None),
        Key("num_experts", "experts.n_experts", also=("num_local_experts",)),
        Key("intermediate_size", "experts.d_ff"),
        TOP_K,
        NORMALISED,
        SOFTMAX,
        Always({"attention.qk_norm": "full"}),
    ),
    tensors=(*TRUNK, *OUTPUT_BIAS, *EXPERTS),
    tied_copy=HEAD_COPY,
    derived=DERIVED,
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    settings=(
        *SHAPE,
        KEY_HEADS,
        HeadWidth(),
        ATTENTION_BIAS,
        Rotary(10_000.0),
        FullAttention(),
        SparseSteps(),
        Key("num_experts", "experts.n_experts", also=("num_local_experts",)),
        ROUTED_WIDTH,
        TOP_K,
        NORMALISED,
        SOFTMAX,
        Always({"attention.qk_norm": "head"}),
    ),
    tensors=(*TRUNK, *OUTPUT_BIAS, *DENSE_MLP, *EXPERTS),
    tied_copy=HEAD_COPY,
    derived=DERIVED,
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    settings=(
        *SHAPE,
        KEY_HEADS,
        HeadWidth(written=False),
        Key("qkv_bias", "attention.bias", bool, default=True),
        Rotary(10_000.0),
        FullAttention(),
        SparseSteps(),
        Key("num_experts", "experts.n_experts", also=("num_local_experts",)),
        ROUTED_WIDTH,
        SharedWidth(),
        TOP_K,
        NORMALISED,
        SOFTMAX,
    ),
    tensors=(
        *TRUNK,
        *NO_OUTPUT_BIAS,
        *DENSE_MLP,
        *EXPERTS,
        *_shared("shared_expert"),
        Link(f"{MLP}.shared_expert_gate.weight", f"{FEED_FORWARD}.shared.gate.weight", zeros=_shared_gate),
    ),
    tied_copy=HEAD_COPY,
    derived=DERIVED,
)

GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    settings=(
        *SHAPE,
        KEY_HEADS,
        HeadWidth(),
        ATTENTION_BIAS,
        Choice("use_qk_norm", "attention.qk_norm", {True: "head", False: "none"}, default=False),
        Rotary(10_000.0, default_partial=0.5),
        LeadingDense(default=1),
        Key("n_routed_experts", "experts.n_experts", also=("num_local_experts",)),
        ROUTED_WIDTH,
        SharedCount(),
        TOP_K,
        Key("norm_topk_prob", "router.normalise", bool, default=True),
        Key("routed_scaling_factor", "router.scale", float, default=1.0),
        Groups(),
        Only("num_nextn_predict_layers", 0, absent=0, reason="and our model predicts one token at a time"),
        Always({"router.score": "sigmoid", "router.selection_bias": "sign"}),
    ),
    tensors=(
        *TRUNK,
        *NO_OUTPUT_BIAS,
        *DENSE_MLP,
        *EXPERTS,
        Link(f"{MLP}.gate.e_score_correction_bias", f"{FEED_FORWARD}.router.selection_bias", zeros=_per_expert),
        *_shared("shared_experts"),
    ),
    tied_copy=HEAD_COPY,
    derived=DERIVED,
)


def _gates_and_values(config: ModelConfig) -> Shape:
    return config.experts.n_experts, config.d_model, 2 * config.experts.d_ff


def _their_biases(config: ModelConfig) -> Shape:
    return config.experts.n_experts, 2 * config.experts.d_ff


GATE_UP, EXPERT_BIASES = f"{MLP}.experts.gate_up_proj", f"{MLP}.experts.gate_up_proj_bias"
W_IN, B_IN = f"{FEED_FORWARD}.experts.w_in", f"{FEED_FORWARD}.experts.b_in"

GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    settings=(
        *SHAPE,
        KEY_HEADS,
        HeadWidth(default=64),
        Key("attention_bias", "attention.bias", bool, default=True),
        Rotary(150_000.0),
        Windows(alternate=True),
        Key("num_local_experts", "experts.n_experts", also=("num_experts",)),
        Key("intermediate_size", "experts.d_ff"),
        TOP_K,
        SOFTMAX,
        Only("swiglu_limit", 7.0, absent=7.0, reason="and ours is clamped at 7"),
        Always(
            {
                "attention.sinks": True,
                "feed_forward.activation": "swiglu_clamped",
                "feed_forward.bias": True,
                "router.bias": True,
                "router.normalise": True,
            }
        ),
    ),
    tensors=(
        *TRUNK,
        *OUTPUT_BIAS,
        Link(f"{LAYER}.self_attn.sinks", f"{BLOCK}.attention.sinks"),
        Link(f"{MLP}.router.weight", f"{FEED_FORWARD}.router.weight"),
        Link(f"{MLP}.router.bias", f"{FEED_FORWARD}.router.bias"),
        Link(GATE_UP, W_IN, transposed(gate_rows), place=every_second(0), shape=_gates_and_values),
        Link(GATE_UP, W_IN, transposed(value_rows), place=every_second(1), shape=_gates_and_values),
        Link(EXPERT_BIASES, B_IN, gate_bias, place=every_second(0), shape=_their_biases),
        Link(EXPERT_BIASES, B_IN, value_bias, place=every_second(1), shape=_their_biases),
        Link(f"{MLP}.experts.down_proj", f"{FEED_FORWARD}.experts.w_out", transposed()),
        Link(f"{MLP}.experts.down_proj_bias", f"{FEED_FORWARD}.experts.b_out"),
    ),
    tied_copy=HEAD_COPY,
    derived=DERIVED,
)

# --------------------------------------------------------------------------------------------------------- dense models

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    settings=(
        *SHAPE,
        KEY_HEADS_OR_QUERIES,
        HeadWidth(),
        ATTENTION_BIAS,
        Key("mlp_bias", "feed_forward.bias", bool, default=False),
        Rotary(10_000.0),
        DenseModel(),
    ),
    tensors=(*TRUNK, *OUTPUT_BIAS, *DENSE_MLP),
    tied_copy=HEAD_COPY,
    derived=DERIVED,
)

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    settings=(
        *SHAPE,
        KEY_HEADS,
        HeadWidth(default=128),
        ATTENTION_BIAS,
        Rotary(10_000.0),
        FullAttention(),
        DenseModel(),
        Always({"attention.qk_norm": "head"}),
    ),
    tensors=(*TRUNK, *OUTPUT_BIAS, *DENSE_MLP),
    tied_copy=HEAD_COPY,
    derived=DERIVED,
)

FAMILIES: Families = MappingProxyType(
    {family.name: family for family in (MIXTRAL, OLMOE, QWEN3_MOE, QWEN2_MOE, GLM4_MOE, GPT_OSS, LLAMA, QWEN3)}
)
"""by the ``model_type`` of a config.json; a run is exported as the first that can represent it"""

HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "keys_to_ignore_at_inference",
        "model_type",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""keys of a config.json that decide nothing of what a model computes in evaluation"""
