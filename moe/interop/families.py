"""The architectures of transformers that models of ours may be: two tables each, for reading and for writing.

Names and meanings are those of transformers 5.23 and 4.57, whose sources were read; tests hold every family against the
implementation there. A default is what the absence of a key means in both. To add a family, add its tables.
"""

from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from moe.config import ModelConfig
from moe.interop.family import Families, Family
from moe.interop.links import (
    Link,
    Part,
    Shape,
    every_second,
    gate_bias,
    gate_rows,
    third,
    transposed,
    value_bias,
    value_rows,
    whole,
)
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


def _split(tensor: Tensor, dim: int, sizes: Shape) -> Tensor:
    """A view with dimension ``dim`` as several."""
    view: Tensor = tensor.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return view


def _queries_at(start: bool) -> Part:
    """Of each head's rows of a query, those that do not turn, or those that do."""

    def part(tensor: Tensor, config: ModelConfig) -> Tensor:
        heads = _split(tensor, 0, (config.attention.n_heads, config.attention.query_dim))
        still = config.attention.head_dim
        return heads[:, :still] if start else heads[:, still:]

    return part


def _halves(part: Part) -> Part:
    """Rows that turn in pairs i and i + r/2, one pair after the other."""
    return lambda tensor, config: _split(part(tensor, config), -2, (2, -1)).transpose(-3, -2)


def _pairs(part: Part) -> Part:
    """Rows that turn in pairs of neighbours, one pair after the other."""
    return lambda tensor, config: _split(part(tensor, config), -2, (-1, 2))


def _keys_and_values(start: bool) -> Part:
    """Of each head's rows of ``kv_b_proj``, its key or its value."""

    def part(tensor: Tensor, config: ModelConfig) -> Tensor:
        width = config.attention.head_dim
        heads = _split(tensor, 0, (config.attention.n_heads, width + config.attention.value_dim))
        return heads[:, :width] if start else heads[:, width:]

    return part


def _of_each_head(tensor: Tensor, config: ModelConfig) -> Tensor:
    return _split(tensor, 0, (config.attention.n_heads, -1))


def _rank(config: ModelConfig) -> int:
    assert config.attention.latent.rank is not None
    return config.attention.latent.rank


def _latent_rows(tensor: Tensor, config: ModelConfig) -> Tensor:
    return tensor[: _rank(config)]


def _rotary_rows(tensor: Tensor, config: ModelConfig) -> Tensor:
    return tensor[_rank(config) :]


def _query_shape(config: ModelConfig) -> Shape:
    attention = config.attention
    return attention.n_heads * attention.query_dim, attention.latent.query_rank or config.d_model


def _down_shape(config: ModelConfig) -> Shape:
    return _rank(config) + config.attention.latent.rotary_dim, config.d_model


def _up_shape(config: ModelConfig) -> Shape:
    attention = config.attention
    return attention.n_heads * (attention.head_dim + attention.value_dim), _rank(config)


ATTENTION, OURS = f"{LAYER}.self_attn", f"{BLOCK}.attention"
LATENT = (
    Link(f"{ATTENTION}.q_a_proj.weight", f"{OURS}.query_down.weight"),
    Link(f"{ATTENTION}.q_a_layernorm.weight", f"{OURS}.query_norm.weight"),
    Link(
        f"{ATTENTION}.q_b_proj.weight",
        f"{OURS}.query.weight",
        _queries_at(True),
        place=_queries_at(True),
        shape=_query_shape,
    ),
    Link(
        f"{ATTENTION}.q_b_proj.weight",
        f"{OURS}.query.weight",
        _halves(_queries_at(False)),
        place=_pairs(_queries_at(False)),
        shape=_query_shape,
    ),
    Link(f"{ATTENTION}.kv_a_proj_with_mqa.weight", f"{OURS}.latent.weight", place=_latent_rows, shape=_down_shape),
    Link(
        f"{ATTENTION}.kv_a_proj_with_mqa.weight",
        f"{OURS}.rotary_key.weight",
        _halves(whole),
        place=_pairs(_rotary_rows),
        shape=_down_shape,
    ),
    Link(f"{ATTENTION}.kv_a_layernorm.weight", f"{OURS}.latent_norm.weight"),
    Link(
        f"{ATTENTION}.kv_b_proj.weight",
        f"{OURS}.key.weight",
        _of_each_head,
        place=_keys_and_values(True),
        shape=_up_shape,
    ),
    Link(
        f"{ATTENTION}.kv_b_proj.weight",
        f"{OURS}.value.weight",
        _of_each_head,
        place=_keys_and_values(False),
        shape=_up_shape,
    ),
    Link(f"{ATTENTION}.o_proj.weight", f"{OURS}.output.weight"),
)
"""latent attention: matrices there that hold several of ours, and pairs of neighbours that turn where halves do here"""

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    settings=(
        *SHAPE,
        Only("rms_norm_eps", 1e-6, absent=1e-6, reason="and the norms of latent vectors have 1e-06 there"),
        Only("attention_bias", False, absent=False, reason="and our table has no biases of latent attention"),
        Only("rope_interleave", True, absent=True, reason="and our table is of pairs of neighbours"),
        Key("num_key_value_heads", "attention.n_heads"),
        Key("qk_nope_head_dim", "attention.head_dim"),
        Key("kv_lora_rank", "attention.latent.rank"),
        Key("q_lora_rank", "attention.latent.query_rank"),
        Key("qk_rope_head_dim", "attention.latent.rotary_dim", also=("head_dim",)),
        Key("v_head_dim", "attention.latent.value_dim", resolved="attention.value_dim"),
        Rotary(10_000.0, scales_softmax=True),
        LeadingDense(default=3),
        Key("n_routed_experts", "experts.n_experts", also=("num_local_experts",)),
        ROUTED_WIDTH,
        SharedCount(),
        TOP_K,
        Key("norm_topk_prob", "router.normalise", bool, default=True),
        Key("routed_scaling_factor", "router.scale", float, default=2.5),
        Groups(),
        Always({"router.score": "sigmoid", "router.selection_bias": "sign"}),
    ),
    tensors=(
        *(link for link in TRUNK if "self_attn" not in str(link.theirs)),
        *LATENT,
        *DENSE_MLP,
        *EXPERTS,
        Link(f"{MLP}.gate.e_score_correction_bias", f"{FEED_FORWARD}.router.selection_bias", zeros=_per_expert),
        *_shared("shared_experts"),
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


def _three_projections(config: ModelConfig) -> Shape:
    return config.d_model, 3 * config.attention.n_heads * config.attention.head_dim


def _three_biases(config: ModelConfig) -> Shape:
    return (3 * config.attention.n_heads * config.attention.head_dim,)


GPT2_LAYER = "transformer.h.{layer}"
GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    settings=(
        Key("vocab_size", "vocab_size"),
        Key("n_embd", "d_model"),
        Key("n_layer", "n_layers"),
        Key("n_positions", "max_seq"),
        Key("n_head", "attention.n_heads"),
        Key("layer_norm_epsilon", "norm_eps", float, default=1e-5),
        Key("tie_word_embeddings", "tie_embeddings", bool, default=True),
        HeadWidth(written=False, width="n_embd", heads="n_head"),
        Choice(
            "activation_function",
            "feed_forward.activation",
            {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"},
            default="gelu_new",
        ),
        DenseModel("n_inner", four_times="n_embd"),
        Only("scale_attn_weights", True, absent=True),
        Only("scale_attn_by_inverse_layer_idx", False, absent=False),
        Only("reorder_and_upcast_attn", False, absent=False),
        Only("add_cross_attention", False, absent=False),
        Always(
            {
                "norm": "layernorm",
                "positions": "learned",
                "attention.bias": True,
                "feed_forward.bias": True,
                "router.preset": None,
            }
        ),
    ),
    tensors=(
        Link("transformer.wte.weight", "embedding.weight"),
        Link("transformer.wpe.weight", "position_embedding.weight"),
        Link(f"{GPT2_LAYER}.ln_1.weight", f"{BLOCK}.attention_norm.weight"),
        Link(f"{GPT2_LAYER}.ln_1.bias", f"{BLOCK}.attention_norm.bias"),
        *(
            link
            for number, ours in enumerate(("query", "key", "value"))
            for link in (
                Link(
                    f"{GPT2_LAYER}.attn.c_attn.weight",
                    f"{BLOCK}.attention.{ours}.weight",
                    transposed(),
                    place=third(number),
                    shape=_three_projections,
                ),
                Link(
                    f"{GPT2_LAYER}.attn.c_attn.bias",
                    f"{BLOCK}.attention.{ours}.bias",
                    place=third(number),
                    shape=_three_biases,
                ),
            )
        ),
        Link(f"{GPT2_LAYER}.attn.c_proj.weight", f"{BLOCK}.attention.output.weight", transposed()),
        Link(f"{GPT2_LAYER}.attn.c_proj.bias", f"{BLOCK}.attention.output.bias"),
        Link(f"{GPT2_LAYER}.ln_2.weight", f"{BLOCK}.feed_forward_norm.weight"),
        Link(f"{GPT2_LAYER}.ln_2.bias", f"{BLOCK}.feed_forward_norm.bias"),
        Link(f"{GPT2_LAYER}.mlp.c_fc.weight", f"{FEED_FORWARD}.w_in.weight", transposed()),
        Link(f"{GPT2_LAYER}.mlp.c_fc.bias", f"{FEED_FORWARD}.w_in.bias"),
        Link(f"{GPT2_LAYER}.mlp.c_proj.weight", f"{FEED_FORWARD}.w_out.weight", transposed()),
        Link(f"{GPT2_LAYER}.mlp.c_proj.bias", f"{FEED_FORWARD}.w_out.bias"),
        Link("transformer.ln_f.weight", "norm.weight"),
        Link("transformer.ln_f.bias", "norm.bias"),
        Link("lm_head.weight", "head.weight"),
    ),
    tied_copy=HEAD_COPY,
    derived=(f"{GPT2_LAYER}.attn.bias", f"{GPT2_LAYER}.attn.masked_bias"),
)

FAMILIES: Families = MappingProxyType(
    {
        family.name: family
        for family in (MIXTRAL, OLMOE, QWEN3_MOE, QWEN2_MOE, GLM4_MOE, GPT_OSS, DEEPSEEK_V3, LLAMA, QWEN3, GPT2)
    }
)
"""by the ``model_type`` of a config.json; a run is exported as the first that can represent it"""

HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "bos_token_id",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "initializer_range",
        "keys_to_ignore_at_inference",
        "model_type",
        "n_ctx",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "resid_pdrop",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""keys of a config.json that decide nothing of what a model computes in evaluation"""
