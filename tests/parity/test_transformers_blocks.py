"""Our layer against the mixture blocks of transformers (5.23), weights copied: output and every gradient to 1e-5.

Each family below is three things: a block of theirs, the axes of ours that represent it, and one table that says where
each of our tensors lies in theirs. The tables are linear, so they map their gradients into our layout as well.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    DbrxConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from moe.config import (
    CapacityConfig,
    ExpertBackend,
    ExpertsConfig,
    FeedForwardConfig,
    ModelConfig,
    RouterConfig,
    SharedExpertsConfig,
)
from moe.model.moe_layer import MoELayer
from moe.model.routing import Routing
from moe.presets import model_config

BATCH, SEQUENCE, N_EXPERTS = 3, 20, 16
OBLONG, SQUARE = (40, 24), (32, 32)
"""d_model and expert width; where they are equal a transposed copy has the right shape and the wrong numbers"""


# ------------------------------------------------------------------------------------------ where our tensors lie there


class Source(NamedTuple):
    """Where one of our tensors lies in their block: the names there, and what makes our layout of them."""

    names: tuple[str, ...]
    layout: Callable[..., Tensor]


def same(name: str) -> Source:
    return Source((name,), lambda tensor: tensor)


def transposed(name: str) -> Source:
    return Source((name,), lambda stack: stack.transpose(1, 2))


def gate_then_value(gate: str, value: str) -> Source:
    """Two matrices there, the two halves of the rows of one here."""
    return Source((gate, value), lambda *halves: torch.cat(halves))


def uninterleaved(name: str) -> Source:
    """GPT-OSS: gate and value alternate along the last axis of [E, D, 2F]; here they are halves of [E, 2F, D]."""
    return Source((name,), lambda stack: torch.cat([stack[..., ::2], stack[..., 1::2]], dim=-1).swapaxes(1, -1))


def one_each(name: str) -> Source:
    """A parameter an expert there, one stack here."""
    return Source(
        tuple(name.format(expert=expert) for expert in range(N_EXPERTS)), lambda *matrices: torch.stack(matrices)
    )


def flat(*names: str) -> Source:
    """DBRX: the experts' [F, D] matrices, one below the other; here one stack, gate above value."""
    return Source(names, lambda *flats: torch.cat([matrix.unflatten(0, (N_EXPERTS, -1)) for matrix in flats], dim=1))


def flat_transposed(name: str) -> Source:
    return Source((name,), lambda matrix: matrix.unflatten(0, (N_EXPERTS, -1)).transpose(1, 2))


STACKED = {"experts.w_in": same("experts.gate_up_proj"), "experts.w_out": same("experts.down_proj")}
GATE = {"router.weight": same("gate.weight")}
ROUTER = {"router.weight": same("router.weight")}
SELECTION_BIAS = {"router.selection_bias": same("gate.e_score_correction_bias")}


def shared(name: str) -> dict[str, Source]:
    return {
        "shared.mlp.w_in.weight": gate_then_value(f"{name}.gate_proj.weight", f"{name}.up_proj.weight"),
        "shared.mlp.w_out.weight": same(f"{name}.down_proj.weight"),
    }


# --------------------------------------------------------------------------------------------------------- the families


@dataclass(frozen=True)
class Family:
    """One block of transformers, and our axes that represent it."""

    block: Callable[[int, int], nn.Module]
    """their block, of a d_model and an expert width"""
    tensors: Mapping[str, Source]
    """our name of every tensor of a layer, and its source there"""
    router: RouterConfig
    feed_forward: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    shared: SharedExpertsConfig = field(default_factory=SharedExpertsConfig)
    spread: Mapping[str, float] = field(default_factory=dict)
    """standard deviation of what a matrix of theirs makes of the input, where it is not 1"""
    training: bool = True

    def ours(self, shape: tuple[int, int], backend: ExpertBackend = "reference") -> MoELayer:
        """Our layer, its weights undefined."""
        config = ModelConfig(
            d_model=shape[0],
            experts=ExpertsConfig(n_experts=N_EXPERTS, d_ff=shape[1], backend=backend),
            feed_forward=self.feed_forward,
            shared=self.shared,
            router=self.router,
        )
        return MoELayer(config).train(self.training)

    def theirs(self, shape: tuple[int, int], **changes: Any) -> nn.Module:
        """Their block, every parameter and every buffer drawn from a normal."""
        block = self.block(*shape, **changes).train(self.training)
        generator = torch.Generator().manual_seed(0)
        for name, tensor in block.state_dict().items():
            std = 0.3 if name.endswith("bias") else self.spread.get(name, 1.0) / math.sqrt(shape[0])
            # Biased scores below 0 lose against a group mask that writes 0 where it should write -inf.
            mean = -1.5 if name.endswith("e_score_correction_bias") else 0.0
            tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))
        return block

    def in_our_layout(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: source.layout(*(theirs[their_name] for their_name in source.names))
            for name, source in self.tensors.items()
            if set(source.names) <= theirs.keys()
        }


def eager(config: type, **settings: Any) -> Any:
    """A configuration of theirs whose experts are computed by their plain loop."""
    return config(experts_implementation="eager", **settings)


def mixtral(d_model: int, d_ff: int) -> nn.Module:
    return MixtralSparseMoeBlock(
        eager(
            MixtralConfig,
            hidden_size=d_model,
            intermediate_size=d_ff,
            num_local_experts=N_EXPERTS,
            num_experts_per_tok=2,
        )
    )


def switch(d_model: int, d_ff: int, expert_capacity: int = SEQUENCE) -> nn.Module:
    return SwitchTransformersSparseMLP(
        SwitchTransformersConfig(
            d_model=d_model,
            d_ff=d_ff,
            num_experts=N_EXPERTS,
            expert_capacity=expert_capacity,
            router_jitter_noise=0.0,
            dropout_rate=0.0,
        )
    )


def olmoe(d_model: int, d_ff: int) -> nn.Module:
    return OlmoeSparseMoeBlock(
        eager(
            OlmoeConfig,
            hidden_size=d_model,
            intermediate_size=d_ff,
            num_experts=N_EXPERTS,
            num_experts_per_tok=3,
            norm_topk_prob=False,
        )
    )


def qwen2(d_model: int, d_ff: int) -> nn.Module:
    return Qwen2MoeSparseMoeBlock(
        eager(
            Qwen2MoeConfig,
            hidden_size=d_model,
            moe_intermediate_size=d_ff,
            shared_expert_intermediate_size=28,
            num_experts=N_EXPERTS,
            num_experts_per_tok=3,
            norm_topk_prob=False,
        )
    )


def qwen3(d_model: int, d_ff: int) -> nn.Module:
    return Qwen3MoeSparseMoeBlock(
        eager(
            Qwen3MoeConfig,
            hidden_size=d_model,
            moe_intermediate_size=d_ff,
            num_experts=N_EXPERTS,
            num_experts_per_tok=3,
            norm_topk_prob=True,
        )
    )


def gpt_oss(d_model: int, d_ff: int, swiglu_limit: float = 7.0) -> nn.Module:
    return GptOssMLP(
        eager(
            GptOssConfig,
            hidden_size=d_model,
            intermediate_size=d_ff,
            num_local_experts=N_EXPERTS,
            num_experts_per_tok=4,
            swiglu_limit=swiglu_limit,
        )
    )


def glm4(d_model: int, d_ff: int) -> nn.Module:
    return Glm4MoeMoE(
        eager(
            Glm4MoeConfig,
            hidden_size=d_model,
            moe_intermediate_size=d_ff,
            n_routed_experts=N_EXPERTS,
            n_shared_experts=1,
            num_experts_per_tok=3,
            routed_scaling_factor=1.5,
        )
    )


def deepseek_v3(d_model: int, d_ff: int) -> nn.Module:
    return DeepseekV3MoE(
        eager(
            DeepseekV3Config,
            hidden_size=d_model,
            moe_intermediate_size=d_ff,
            n_routed_experts=N_EXPERTS,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
        )
    )


def deepseek_v2(d_model: int, d_ff: int) -> nn.Module:
    return DeepseekV2Moe(
        eager(
            DeepseekV2Config,
            hidden_size=d_model,
            num_attention_heads=4,
            moe_intermediate_size=d_ff,
            n_routed_experts=N_EXPERTS,
            n_shared_experts=2,
            num_experts_per_tok=3,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=4.0,
        )
    )


def phimoe(d_model: int, d_ff: int, margin: float = 0.01) -> nn.Module:
    return PhimoeSparseMoeBlock(
        eager(
            PhimoeConfig,
            hidden_size=d_model,
            intermediate_size=d_ff,
            num_local_experts=N_EXPERTS,
            num_experts_per_tok=2,
            router_jitter_noise=margin,
            input_jitter_noise=0.0,
        )
    )


def dbrx(d_model: int, d_ff: int) -> nn.Module:
    return DbrxFFN(
        DbrxConfig(
            d_model=d_model,
            ffn_config={
                "hidden_size": d_model,
                "ffn_hidden_size": d_ff,
                "moe_num_experts": N_EXPERTS,
                "moe_top_k": 4,
                "moe_normalize_expert_weights": 1.0,
            },
        )
    )


def llama4(d_model: int, d_ff: int, top_k: int = 1) -> nn.Module:
    return Llama4TextMoe(
        Llama4TextConfig(
            hidden_size=d_model, intermediate_size=d_ff, num_local_experts=N_EXPERTS, num_experts_per_tok=top_k
        )
    )


def llama4_top_2(d_model: int, d_ff: int) -> nn.Module:
    return llama4(d_model, d_ff, top_k=2)


LLAMA4_TENSORS = (
    {
        "experts.w_in": transposed("experts.gate_up_proj"),
        "experts.w_out": transposed("experts.down_proj"),
    }
    | ROUTER
    | shared("shared_expert")
)

FAMILIES = {
    "mixtral": Family(mixtral, GATE | STACKED, RouterConfig(top_k=2)),
    "switch": Family(
        switch,
        {
            "router.weight": same("router.classifier.weight"),
            "experts.w_in": one_each("experts.expert_{expert}.wi.weight"),
            "experts.w_out": one_each("experts.expert_{expert}.wo.weight"),
        },
        RouterConfig(top_k=1, normalise=False),
        FeedForwardConfig(activation="relu"),
    ),
    "olmoe": Family(olmoe, GATE | STACKED, RouterConfig(top_k=3, normalise=False)),
    "qwen2": Family(
        qwen2,
        GATE | STACKED | shared("shared_expert") | {"shared.gate.weight": same("shared_expert_gate.weight")},
        RouterConfig(top_k=3, normalise=False),
        shared=SharedExpertsConfig(n_experts=1, d_ff=28, gated=True),
    ),
    "qwen3": Family(qwen3, GATE | STACKED, RouterConfig(top_k=3)),
    "gpt_oss": Family(
        gpt_oss,
        ROUTER
        | {
            "router.bias": same("router.bias"),
            "experts.w_in": uninterleaved("experts.gate_up_proj"),
            "experts.b_in": uninterleaved("experts.gate_up_proj_bias"),
            "experts.w_out": transposed("experts.down_proj"),
            "experts.b_out": same("experts.down_proj_bias"),
        },
        RouterConfig(top_k=4, bias=True),
        FeedForwardConfig(activation="swiglu_clamped", bias=True),
        # Large enough for the clamp at 7.
        spread={"experts.gate_up_proj": 3.0},
    ),
    "glm4": Family(
        glm4,
        GATE | SELECTION_BIAS | STACKED | shared("shared_experts"),
        RouterConfig(top_k=3, score="sigmoid", selection_bias="sign", scale=1.5),
        shared=SharedExpertsConfig(n_experts=1),
    ),
    "deepseek_v3": Family(
        deepseek_v3,
        GATE | SELECTION_BIAS | STACKED | shared("shared_experts"),
        RouterConfig(
            top_k=3,
            score="sigmoid",
            selection="group_limited",
            n_groups=4,
            top_groups=2,
            group_score="top_two",
            selection_bias="sign",
            scale=2.5,
        ),
        shared=SharedExpertsConfig(n_experts=2),
    ),
    "deepseek_v2": Family(
        deepseek_v2,
        GATE | STACKED | shared("shared_experts"),
        RouterConfig(
            top_k=3,
            selection="group_limited",
            n_groups=4,
            top_groups=2,
            group_score="max",
            normalise=False,
            scale=4.0,
        ),
        shared=SharedExpertsConfig(n_experts=2),
    ),
    # In training its experts are drawn: that has a test of its own below.
    "phimoe": Family(
        phimoe,
        ROUTER | STACKED,
        RouterConfig(top_k=2, selection="sampled", sampling_margin=0.01, gradient="heun", normalise=False),
        training=False,
    ),
    "dbrx": Family(
        dbrx,
        {
            "router.weight": same("router.layer.weight"),
            "experts.w_in": flat("experts.mlp.w1", "experts.mlp.v1"),
            "experts.w_out": flat_transposed("experts.mlp.w2"),
        },
        RouterConfig(top_k=4),
    ),
    "llama4": Family(
        llama4,
        LLAMA4_TENSORS,
        RouterConfig(top_k=1, score="sigmoid", normalise=False, apply="before"),
        shared=SharedExpertsConfig(n_experts=1),
    ),
    "llama4_top_2": Family(
        llama4_top_2,
        LLAMA4_TENSORS,
        RouterConfig(top_k=2, score="sigmoid", normalise=False, apply="before"),
        shared=SharedExpertsConfig(n_experts=1),
    ),
}


# ------------------------------------------------------------------------------------------------------ running the two


class Outcome(NamedTuple):
    """What a block made of the same input and the same gradient from above, in our layout."""

    output: Tensor
    gradients: dict[str, Tensor]
    """of the input, and of every parameter by our name"""


def inputs(d_model: int) -> tuple[Tensor, Tensor]:
    """An input that wants a gradient, and the gradient of the output, small enough for gradients of about 1."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, SEQUENCE, d_model, generator=generator)
    return x.requires_grad_(), 0.1 * torch.randn(BATCH, SEQUENCE, d_model, generator=generator)


def gradient_of(tensor: Tensor) -> Tensor:
    """An expert that no token chose has no gradient in a block of separate experts, and zeros in a stack."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def run_theirs(block: nn.Module, family: Family, d_model: int) -> Outcome:
    x, upstream = inputs(d_model)
    returned = block(x)
    output = (returned[0] if isinstance(returned, tuple) else returned).view_as(x)
    output.backward(upstream)
    gradients = family.in_our_layout({name: gradient_of(tensor) for name, tensor in block.named_parameters()})
    return Outcome(output.detach(), gradients | {"input": gradient_of(x)})


def run_ours(layer: MoELayer, d_model: int) -> tuple[Outcome, Routing]:
    x, upstream = inputs(d_model)
    output, routing = layer(x)
    output.backward(upstream)
    gradients = {name: gradient_of(tensor) for name, tensor in layer.named_parameters()}
    return Outcome(output.detach(), gradients | {"input": gradient_of(x)}), routing


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    """Output and every gradient to 1e-5, none of them so small that anything would pass."""
    torch.testing.assert_close(ours.output, theirs.output, atol=1e-5, rtol=1e-5)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert gradient.abs().max() > 0.05, f"{name} has next to no gradient"
        torch.testing.assert_close(
            ours.gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda report, name=name: f"{name}: {report}"
        )


# ----------------------------------------------------------------------------------------------------------- the blocks


@pytest.mark.filterwarnings("error:experts fall back")
@pytest.mark.parametrize("backend", ["reference", "grouped", "segments"])
@pytest.mark.parametrize("shape", [OBLONG, SQUARE], ids=["oblong", "square"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_of_transformers_is_our_layer(name: str, shape: tuple[int, int], backend: ExpertBackend) -> None:
    family = FAMILIES[name]
    block, layer = family.theirs(shape), family.ours(shape, backend)
    layer.load_state_dict(family.in_our_layout(block.state_dict()))

    ours, _ = run_ours(layer, shape[0])

    assert_same(ours, run_theirs(block, family, shape[0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_of_a_family_names_every_tensor_of_its_block_once(name: str) -> None:
    family = FAMILIES[name]

    named = [their_name for source in family.tensors.values() for their_name in source.names]

    assert sorted(named) == sorted(family.theirs(OBLONG).state_dict())


def test_the_input_of_gpt_oss_above_reaches_the_clamps() -> None:
    """Else the parity would say nothing of them: with the limit out of reach the block computes something else."""
    family = FAMILIES["gpt_oss"]
    x, _ = inputs(OBLONG[0])

    clamped, _ = family.theirs(OBLONG)(x)
    unclamped, _ = family.theirs(OBLONG, swiglu_limit=1e9)(x)

    assert (clamped - unclamped).abs().max() > 0.1


@pytest.mark.parametrize("name", ["glm4", "deepseek_v3"])
def test_the_selection_bias_above_changes_the_choice(name: str) -> None:
    family = FAMILIES[name]
    block = family.theirs(OBLONG)
    layer = family.ours(OBLONG)
    layer.load_state_dict(family.in_our_layout(block.state_dict()))
    x, _ = inputs(OBLONG[0])

    _, biased = layer(x)
    layer.router.selection_bias.zero_()
    _, plain = layer(x)

    assert (biased.counts() - plain.counts()).abs().sum() > 10


PRESETS = {
    "mixtral": "mixtral",
    "switch": "switch",
    "olmoe": "olmoe",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gpt_oss": "gpt_oss",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v2": "deepseek_v2",
    "phimoe": "grin",
    "dbrx": "dbrx",
    "llama4": "llama4",
}
"""the published router that each family above stands for"""
SIZES = ("top_k", "n_groups", "top_groups", "scale")
"""what follows from a model's size"""
IN_TRAINING = {"jitter": 0.0, "bias_rate": None, "capacity": CapacityConfig()}
"""what acts in training alone, beside the block"""


@pytest.mark.parametrize("name", PRESETS)
def test_the_preset_of_a_family_is_the_router_compared_above(name: str) -> None:
    family = FAMILIES[name]
    sizes = {key: getattr(family.router, key) for key in SIZES if getattr(family.router, key) is not None}

    preset = model_config(PRESETS[name], router=sizes, experts={"n_experts": N_EXPERTS})

    compared = replace(family.router, **IN_TRAINING)
    assert replace(preset.router, preset=None, **IN_TRAINING) == compared
    assert preset.shared.gated == family.shared.gated
    assert (preset.shared.n_experts > 0) == (family.shared.n_experts > 0)


# --------------------------------------------------------------------------------------------------- capacity of Switch


def with_capacity(**settings: Any) -> Family:
    """Switch with ceil(1.5 · 20 tokens / 16 experts) = 2 places an expert in each sequence."""
    family = FAMILIES["switch"]
    capacity = CapacityConfig(factor=1.5, scope="sequence", **settings)
    return replace(family, router=replace(family.router, capacity=capacity))


def test_switch_drops_the_tokens_that_come_too_late_in_their_sequence() -> None:
    """By position in each sequence, as transformers 5.23 counts (5.10: over the batch); their output is 0 in both."""
    family = with_capacity()
    block, layer = family.theirs(OBLONG, expert_capacity=2), family.ours(OBLONG)
    layer.load_state_dict(family.in_our_layout(block.state_dict()))

    ours, routing = run_ours(layer, OBLONG[0])
    theirs = run_theirs(block, family, OBLONG[0])

    assert_same(ours, theirs)
    assert routing.dropped is not None
    dropped = routing.dropped.view(BATCH, SEQUENCE)
    assert dropped.any(dim=1).all(), "every sequence loses a token"
    assert not dropped.all(dim=1).any()
    assert torch.equal(dropped, (theirs.output == 0).all(dim=-1))
    assert (ours.output[dropped] == 0).all()


def test_switch_of_transformers_drops_in_evaluation_too_and_ours_only_if_asked() -> None:
    block = with_capacity().theirs(OBLONG, expert_capacity=2).eval()
    dropless, dropping = with_capacity().ours(OBLONG).eval(), with_capacity(in_evaluation=True).ours(OBLONG).eval()
    for layer in (dropless, dropping):
        layer.load_state_dict(with_capacity().in_our_layout(block.state_dict()))
    x, _ = inputs(OBLONG[0])

    theirs = block(x)

    torch.testing.assert_close(dropping(x)[0], theirs, atol=1e-5, rtol=1e-5)
    dropped = (theirs == 0).all(dim=-1)
    everything = dropless(x)[0]
    torch.testing.assert_close(everything[~dropped], theirs[~dropped], atol=1e-5, rtol=1e-5)
    assert (everything[dropped] != 0).any(dim=-1).all()


# --------------------------------------------------------------------------------------------------- training of PhiMoE


class SparseMixerOfThePaper(TorchFunctionMode):
    """Inside, transformers' SparseMixer is that of its paper (Liu et al. 2024, GRIN) in two details of its code.

    Its scale of a third is the constant 0.3333 (and the rest 0.6667). And for the second choice it draws the uniform
    number of Heun's rule twice and uses the second draw, so that one seed would not give both of us the same numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.full: list[Tensor] = []
        """for each choice in turn, which tokens' outputs keep their scale"""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.uniform_:
            return args[0]
        if function is torch.add and kwargs.get("alpha") == 0.6667:
            self.full.append(args[1])
            return torch.where(args[1], 1.0, 1 / 3)
        return function(*args, **kwargs)


@pytest.mark.parametrize("margin", [0.01, 0.6])
def test_phimoe_draws_its_experts_and_their_gradient_as_we_do(margin: float) -> None:
    """From one seed; the published margin of 0.01 leaves hardly any choice, 0.6 leaves many."""
    family = FAMILIES["phimoe"]
    family = replace(family, router=replace(family.router, sampling_margin=margin), training=True)
    block, layer = family.theirs(OBLONG, margin=margin), family.ours(OBLONG)
    layer.load_state_dict(family.in_our_layout(block.state_dict()))

    torch.manual_seed(2)
    with SparseMixerOfThePaper() as theirs_drew:
        theirs = run_theirs(block, family, OBLONG[0])
    torch.manual_seed(2)
    ours, routing = run_ours(layer, OBLONG[0])

    assert_same(ours, theirs)
    if margin == 0.6:
        others = routing.selected[:, 0] != routing.logits.argmax(dim=-1)
        assert others.sum() > 10, "many tokens drew another expert than their best"
        scaled = ~torch.cat(theirs_drew.full, dim=-1)
        assert scaled.sum() > 10, "and many outputs were scaled by a third"
