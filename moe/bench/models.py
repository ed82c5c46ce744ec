"""Whole models of one shape with the same weights: ours, transformers' and a peer's layer in our skeleton."""

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.bench.agreement import UnfitError, sample
from moe.bench.measure import unpark
from moe.bench.shapes import ModelShape
from moe.config import Checkpointing, ExpertBackend, OptimizerConfig
from moe.model.transformer import Transformer
from moe.model.weight_dtype import keep_weights
from moe.training.compiled import compile_blocks
from moe.training.gpu import preferred_attention
from moe.training.head_loss import head_loss
from moe.training.machine import autocast
from moe.training.optimizer import build_optimizer

LEARNING_RATE = 1e-4
"""small: the loss of random tokens has nowhere to go, and no step is skipped or special"""
RESIDUAL_OUTPUTS = ("attention.output.weight", "w_out", "w_out.weight")
BATCHED_LIMIT = 2 << 30
"""bytes of copied weights a layer beyond which batched_mm is not tried"""


@dataclass
class ModelUnderTest:
    """A model that trains, by whoever wrote it."""

    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    """mean cross-entropy of targets [B, S] after tokens [B, S]"""
    optimizer: Callable[[], torch.optim.Optimizer]
    names: Mapping[str, tuple[str, ...]]
    """our name of a parameter -> its name in ``module``, or those of its parts; empty where the weights are not ours"""
    generate: Callable[[Tensor, int], Tensor] | None = None
    """(prompts [B, P], n) -> the n greedy tokens after each [B, n]"""

    def gradients(self) -> dict[str, Tensor]:
        """A :func:`~moe.bench.agreement.sample` of each gradient, by our names."""
        parameters = dict(self.module.named_parameters())
        return {
            name: sample(torch.cat([_gradient(parameters[part]) for part in parts], dim=-2))
            if len(parts) > 1
            else sample(_gradient(parameters[parts[0]]))
            for name, parts in self.names.items()
        }


def refill(model: ModelUnderTest, shape: ModelShape) -> None:
    """Write weights into a model that was parked: those it had at first, and for its own ones others like them."""
    own = dict(model.module.named_parameters())
    unpark(own.values())
    adopt(model.module, model.names, shape)
    for parts in model.names.values():
        for part in parts:
            del own[part]
    with torch.no_grad():
        for parameter in own.values():
            parameter.normal_(std=0.02)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def adopt(module: nn.Module, names: Mapping[str, tuple[str, ...]], shape: ModelShape) -> None:
    """Give ``module`` our weights; of a parameter in parts, each part has its share of the rows."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, parts in names.items():
            tensors: list[Tensor] = [parameters[part] for part in parts]
            if len(parts) == 1:
                fill(tensors[0], name, shape)
                continue
            whole = torch.cat(tensors, dim=-2)
            fill(whole, name, shape)
            for tensor, rows in zip(tensors, whole.chunk(len(parts), dim=-2), strict=True):
                tensor.copy_(rows)


# ----------------------------------------------------------------------------------------------------------------- ours


def our_transformer(
    shape: ModelShape, backend: ExpertBackend, device: torch.device, dtype: torch.dtype, *, dense_twin: bool = False
) -> Transformer:
    """Our model, its weights drawn on the device by :func:`fill`; with ``dtype`` bfloat16, all that training keeps so.

    The others are then rounded to bfloat16, so that they equal those of peers, which keep all so.
    """
    with torch.device("meta"):
        model = Transformer(shape.config(backend, dense_twin=dense_twin))
    keep_weights(model, "bf16" if dtype == torch.bfloat16 else "fp32")
    model = model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    adopt(model, {name: (name,) for name, _ in model.named_parameters()}, shape)
    if dtype == torch.bfloat16:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
    return model


def fill(parameter: Tensor, name: str, shape: ModelShape) -> None:
    """Draw one parameter as it is initialised in training: norms 1, matrices normal, from a seed of its own ``name``.

    On the parameter's own device, so that seven billion weights take no minute on the host; in float32, so that every
    dtype has the same.
    """
    if name.endswith("norm.weight"):
        nn.init.ones_(parameter)
        return
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
    std = 0.02 / math.sqrt(2 * shape.n_layers) if name.endswith(RESIDUAL_OUTPUTS) else 0.02
    drawn = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    parameter.copy_(nn.init.normal_(drawn, std=std, generator=generator))


def ours(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    backend: ExpertBackend = "auto",
    compiled: bool = False,
    dense_twin: bool = False,
    checkpointing: Checkpointing = "none",
) -> ModelUnderTest:
    """Our model as ``train.py`` trains it: blocks compiled one by one, cross-entropy without logits, fused AdamW.

    The loss is the cross-entropy alone, as for everyone here.
    """
    model = our_transformer(shape, backend, device, dtype, dense_twin=dense_twin)
    model.activation_checkpointing = checkpointing
    if compiled:
        compile_blocks(model, print)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        # Weights in bfloat16 are trained under autocast too, for some stay float32.
        mixed = autocast(device, "bf16") if dtype == torch.bfloat16 else nullcontext()
        with mixed, preferred_attention(device):
            hidden, _ = model.hidden(tokens)
            return head_loss(hidden, model.head.weight, targets)

    def optimizer() -> torch.optim.Optimizer:
        return build_optimizer(model, OptimizerConfig(lr=LEARNING_RATE, clip=None))

    names = {name: (name,) for name, _ in model.named_parameters()}
    return ModelUnderTest(model, loss, optimizer, names, lambda prompts, n: our_continuation(model, prompts, n))


def our_continuation(model: Transformer, prompts: Tensor, n: int) -> Tensor:
    """Greedy tokens of :func:`moe.inference.generate.generate`."""
    from moe.inference.generate import generate
    from moe.inference.sampling import Sampling

    written = generate(model, prompts.tolist(), n, Sampling(temperature=0.0))
    return torch.tensor(written, device=prompts.device)


# --------------------------------------------------------------------------------------------------------- transformers


def mixtral(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    experts: str = "grouped_mm",
    attention: str = "sdpa",
    compiled: bool = False,
    decoding: bool = False,
) -> ModelUnderTest:
    """transformers' Mixtral with one of its experts implementations, its weights ours."""
    from transformers import MixtralConfig, MixtralForCausalLM

    tokens = shape.batch if decoding else shape.tokens
    copied = 3 * tokens * shape.top_k * shape.d_model * shape.d_ff * dtype.itemsize
    if experts == "batched_mm" and copied > BATCHED_LIMIT:
        raise UnfitError(f"batched_mm copies the weights of every assignment: {copied / 2**30:.0f} GiB a layer here")
    described: dict[str, Any] = {"experts_implementation": experts, "attn_implementation": attention}
    config = MixtralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_heads,
        num_local_experts=shape.n_experts,
        num_experts_per_tok=shape.top_k,
        max_position_embeddings=shape.sequence,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        **described,
        bos_token_id=None,
        eos_token_id=None,
    )
    feed_forward = {
        "feed_forward.router.weight": ("mlp.gate.weight",),
        "feed_forward.experts.w_in": ("mlp.experts.gate_up_proj",),
        "feed_forward.experts.w_out": ("mlp.experts.down_proj",),
    }
    return _from_transformers(MixtralForCausalLM, config, shape, device, dtype, feed_forward, compiled)


def llama(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, *, attention: str = "sdpa", compiled: bool = False
) -> ModelUnderTest:
    """transformers' Llama of the mixture's active parameters: the dense twin as others have it, its weights ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    described: dict[str, Any] = {"attn_implementation": attention}
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=shape.top_k * shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_heads,
        max_position_embeddings=shape.sequence,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        **described,
        bos_token_id=None,
        eos_token_id=None,
    )
    feed_forward = {
        "feed_forward.w_in.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "feed_forward.w_out.weight": ("mlp.down_proj.weight",),
    }
    return _from_transformers(LlamaForCausalLM, config, shape, device, dtype, feed_forward, compiled)


ATTENTION_AND_NORMS = {
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
}


def _from_transformers(
    kind: Any,
    config: Any,
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    feed_forward: Mapping[str, tuple[str, ...]],
    compiled: bool,
) -> ModelUnderTest:
    with torch.device(device):
        model = kind(config).to(dtype)
    per_block = {name: (theirs,) for name, theirs in ATTENTION_AND_NORMS.items()} | dict(feed_forward)
    names: dict[str, tuple[str, ...]] = {
        "embedding.weight": ("model.embed_tokens.weight",),
        "norm.weight": ("model.norm.weight",),
        "head.weight": ("lm_head.weight",),
    }
    for block in range(shape.n_layers):
        for name, parts in per_block.items():
            names[f"blocks.{block}.{name}"] = tuple(f"model.layers.{block}.{part}" for part in parts)
    adopt(model, names, shape)
    called = torch.compile(model) if compiled else model

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        # Their loss shifts the labels itself, unless it is given shifted ones.
        output: Any = called(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False)
        result: Tensor = output.loss
        return result

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def continuation(prompts: Tensor, n: int) -> Tensor:
        length = prompts.shape[1]
        written: Tensor = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        return written[:, length:]

    return ModelUnderTest(model, loss, optimizer, names, continuation)


# ------------------------------------------------------------------------------------ a peer's layer in our transformer


def grafted(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    layer: Callable[[ModelShape], nn.Module],
    feed_forward: Mapping[str, tuple[str, ...]] | None = None,
) -> ModelUnderTest:
    """Our transformer with another's mixture layer in every block, its router included.

    Attention, norms and cross-entropy are ours, so that what differs is the layer. ``feed_forward`` says which of its
    parameters are ours by another name; without it the weights of the whole model are its own.
    """
    model = our_transformer(shape, "auto", device, dtype, dense_twin=True)
    with torch.device(device):
        for block in model.blocks.children():
            block.register_module("feed_forward", layer(shape).to(dtype))
    names: dict[str, tuple[str, ...]] = {}
    if feed_forward is not None:
        names = {name: (name,) for name, _ in model.named_parameters() if ".feed_forward." not in name}
        for index in range(shape.n_layers):
            for name, parts in feed_forward.items():
                names[f"blocks.{index}.feed_forward.{name}"] = tuple(
                    f"blocks.{index}.feed_forward.{part}" for part in parts
                )
    adopt(model, names, shape)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        hidden, _ = model.hidden(tokens)
        return head_loss(hidden, model.head.weight, targets)

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    return ModelUnderTest(model, loss, optimizer, names)


TORCHTITAN_NAMES = {
    "router.weight": ("router.gate.weight",),
    "experts.w_in": ("routed_experts.inner_experts.w1_EFD", "routed_experts.inner_experts.w3_EFD"),
    "experts.w_out": ("routed_experts.inner_experts.w2_EDF",),
}


class FirstOfResult(nn.Module):
    """A layer that returns more than its output, cut down to it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The output alone."""
        output: Tensor = self.layer(x)[0]
        return output


def mixture_of_experts_layer(shape: ModelShape) -> nn.Module:
    """lucidrains' mixture-of-experts: top-2 with a capacity; two matrices of 1.5 F, which is as many weights.

    A capacity of 2.5 tokens a place (fair is 2) and no random second choice: the least that it drops.
    """
    from mixture_of_experts import MoE

    return FirstOfResult(
        MoE(
            shape.d_model,
            num_experts=shape.n_experts,
            hidden_dim=shape.d_ff * 3 // 2,
            activation=nn.GELU,
            second_policy_train="all",
            capacity_factor_train=2.5,
        )
    )


def st_moe_layer(shape: ModelShape) -> nn.Module:
    """lucidrains' st-moe-pytorch: GEGLU experts of width F, capacity 2.5, second choices by chance as ST-MoE has it."""
    from st_moe_pytorch import MoE

    return FirstOfResult(
        MoE(
            shape.d_model,
            num_experts=shape.n_experts,
            expert_hidden_mult=1.5 * shape.d_ff / shape.d_model,
            gating_top_n=shape.top_k,
            capacity_factor_train=2.5,
        )
    )


def torchtitan_layer(shape: ModelShape) -> nn.Module:
    """torchtitan's mixture layer: softmax router, normalised, dropless; its experts compute in bf16 whatever x is."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    layer: nn.Module = MoE.Config(
        num_experts=shape.n_experts,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=shape.d_model, hidden_dim=shape.d_ff, num_experts=shape.n_experts),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=shape.n_experts, top_k=shape.top_k),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=shape.n_experts,
            gate=Linear.Config(in_features=shape.d_model, out_features=shape.n_experts, bias=False),
            top_k=shape.top_k,
            score_func="softmax",
            route_norm=True,
        ),
        load_balance_coeff=None,
    ).build()
    return layer


def reference_gradients(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, tokens: Tensor, targets: Tensor, *, dense_twin: bool
) -> tuple[float, dict[str, Tensor]]:
    """Loss and a sample of the gradients of the loop over experts in float32, on weights rounded to ``dtype``.

    One sequence at a time, so that a large model fits: dropless, a mean over sequences is the mean of theirs.
    """
    model = our_transformer(shape, "reference", device, dtype, dense_twin=dense_twin).float()
    total = 0.0
    for sequence, target in zip(torch.split(tokens, 1), torch.split(targets, 1), strict=True):
        hidden, _ = model.hidden(sequence)
        logits: Tensor = model.head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten()) / len(tokens)
        torch.autograd.backward(loss)
        total += loss.item()
    return total, {name: sample(_gradient(parameter)) for name, parameter in model.named_parameters()}
