"""Which parameter decays, by name, and what AdamW does to an expert that no token reaches."""

import pytest
import torch
from torch import Tensor, nn

from moe.config import (
    AttentionConfig,
    BalanceConfig,
    ExpertsConfig,
    FeedForwardConfig,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
    SharedExpertsConfig,
    SpecialExpertsConfig,
)
from moe.model.transformer import Transformer
from moe.training.optimizer import build_optimizer, parameter_groups


def every_option() -> Transformer:
    """A dense block and a mixture block, and every kind of parameter that there is."""
    return Transformer(
        ModelConfig(
            vocab_size=64,
            n_layers=2,
            d_model=32,
            norm="layernorm",
            tie_embeddings=False,
            attention=AttentionConfig(n_heads=4, head_dim=8, qk_norm="head", bias=True),
            feed_forward=FeedForwardConfig(bias=True),
            experts=ExpertsConfig(n_experts=4, d_ff=16, first_dense=1),
            shared=SharedExpertsConfig(n_experts=1, gated=True),
            router=RouterConfig(top_k=2),
        )
    )


ATTENTION = {f"blocks.{layer}.attention.{name}" for layer in (0, 1) for name in ("query", "key", "value", "output")}
STREAM_NORMS = {f"blocks.{layer}.{name}" for layer in (0, 1) for name in ("attention_norm", "feed_forward_norm")}
STREAM_NORMS |= {"norm"}
HEAD_NORMS = {f"blocks.{layer}.attention.{name}" for layer in (0, 1) for name in ("query_norm", "key_norm")}
DENSE = {
    f"blocks.{path}.{name}" for path in ("0.feed_forward", "1.feed_forward.shared.mlp") for name in ("w_in", "w_out")
}
EXPERTS = "blocks.1.feed_forward.experts"
ROUTER = "blocks.1.feed_forward.router.weight"

DECAY = {f"{name}.weight" for name in ATTENTION | DENSE}
DECAY |= {"embedding.weight", "head.weight", "blocks.1.feed_forward.shared.gate.weight"}
DECAY |= {f"{EXPERTS}.w_in", f"{EXPERTS}.w_out"}
NO_DECAY = {f"{name}.bias" for name in ATTENTION | DENSE | STREAM_NORMS}
NO_DECAY |= {f"{name}.weight" for name in STREAM_NORMS | HEAD_NORMS}
NO_DECAY |= {f"{EXPERTS}.b_in", f"{EXPERTS}.b_out"}


@pytest.mark.parametrize("decay_router", [False, True])
def test_every_parameter_is_in_the_group_that_its_name_says(decay_router: bool) -> None:
    """The stacked biases of the experts have two dimensions and still do not decay."""
    groups = parameter_groups(dict(every_option().named_parameters()), decay_router)

    assert set(groups["decay"]) == DECAY | ({ROUTER} if decay_router else set())
    assert set(groups["no_decay"]) == NO_DECAY | (set() if decay_router else {ROUTER})


class Named(nn.Module):
    """A module with these parameters and nothing else."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))


@pytest.mark.parametrize("decay_router", [False, True])
def test_the_matrices_of_a_router_decay_if_it_does_and_its_vectors_never(decay_router: bool) -> None:
    """Named as in a layer; a constant expert's mixture of two is a gate, its constant a bias."""
    matrices = {"weight", "inner_weight", "noise_weight", "residual_weight"}
    model = nn.ModuleDict(
        {
            "router": Named(
                bias=torch.zeros(4), temperature=torch.ones(()), **{m: torch.zeros(4, 4) for m in matrices}
            ),
            "special": Named(constant=torch.zeros(2, 8), mixing=torch.zeros(2, 2, 8)),
        }
    )

    groups = parameter_groups(dict(nn.ModuleDict({"feed_forward": model}).named_parameters()), decay_router)

    routing = {f"feed_forward.router.{name}" for name in matrices} | {"feed_forward.special.mixing"}
    never = {f"feed_forward.{name}" for name in ("router.bias", "router.temperature", "special.constant")}
    assert set(groups["decay"]) == (routing if decay_router else set())
    assert set(groups["no_decay"]) == never | (set() if decay_router else routing)


ROUTERS: dict[str, RouterConfig] = {
    "shazeer": RouterConfig(top_k=2, noise="shazeer"),
    "cosine": RouterConfig(top_k=2, projection="cosine"),
    "moe_plus_plus": RouterConfig(top_k=2, projection="two_layer", residual=True, bias=True),
    "hash": RouterConfig(top_k=2, selection="hash", weights="equal"),
    "deepseek_v3": RouterConfig(top_k=2, score="sigmoid", selection_bias="sign"),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_every_parameter_of_a_router_has_a_rule_and_a_selection_bias_is_no_parameter(name: str) -> None:
    special = SpecialExpertsConfig(constant=2) if name == "moe_plus_plus" else SpecialExpertsConfig()
    config = ModelConfig(
        vocab_size=64,
        n_layers=2,
        d_model=32,
        experts=ExpertsConfig(n_experts=4, d_ff=16),
        router=ROUTERS[name],
        special=special,
        balance=BalanceConfig(load_balance=0.0),
    )
    model = Transformer(config)

    groups = parameter_groups(dict(model.named_parameters()), decay_router=True)

    optimised = sorted(groups["decay"] | groups["no_decay"])
    assert optimised == sorted(path for path, _ in model.named_parameters())
    assert not [path for path in optimised if "selection_bias" in path]


def test_a_tied_embedding_is_optimised_once() -> None:
    model = Transformer(ModelConfig(vocab_size=64, n_layers=1, d_model=32))
    optimizer = build_optimizer(model, OptimizerConfig())

    optimised = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(optimised) == sorted(id(parameter) for parameter in model.parameters())


def test_a_compiled_model_has_the_same_groups() -> None:
    """torch.compile puts _orig_mod. into names."""
    model = every_option()
    model.blocks[1] = torch.compile(model.blocks[1])

    groups = parameter_groups(dict(model.named_parameters()), decay_router=False)

    assert {name.replace("_orig_mod.", "") for name in groups["decay"]} == DECAY


def test_an_unknown_parameter_is_refused_by_name() -> None:
    model = every_option()
    model.blocks[1].temperature = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match=r"no rule says whether blocks.1.temperature takes weight decay"):
        build_optimizer(model, OptimizerConfig())


def test_settings_reach_the_optimizer() -> None:
    config = OptimizerConfig(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)

    optimizer = build_optimizer(every_option(), config)

    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {"decay": 0.3, "no_decay": 0.0}
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.9), 1e-6)


def test_a_zero_gradient_leaves_decay_alone() -> None:
    """Matrices shrink by 1 - lr · weight_decay = 0.99 in a step; biases, norms and the router stay."""
    model = every_option()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)

    build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.1)).step()

    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.99 if name in DECAY else 1.0))


def test_an_expert_that_is_never_hit_decays_and_nothing_else() -> None:
    """Ten steps in which only expert 0 has a gradient: the others are 0.99^10 of what they were."""
    model = every_option()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.1))
    w_in = dict(model.named_parameters())[f"{EXPERTS}.w_in"]
    before = w_in.detach().clone()

    for _ in range(10):
        w_in.grad = torch.zeros_like(w_in)
        w_in.grad[0] = 1.0
        optimizer.step()

    torch.testing.assert_close(w_in.detach()[1:], before[1:] * 0.99**10)
    assert (w_in.detach()[0] < before[0] * 0.99**10 - 0.9).all()


def test_an_expert_that_is_hit_no_more_coasts_on_its_momentum() -> None:
    """One step with gradient 1, then none: m and v fade by beta1 and beta2, so the moves shrink but do not stop."""
    model = every_option()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, beta1=0.9, beta2=0.95, weight_decay=0.0))
    w_in = dict(model.named_parameters())[f"{EXPERTS}.w_in"]
    moves = []
    for step in range(3):
        before = w_in.detach().clone()
        w_in.grad = torch.full_like(w_in, 1.0 if step == 0 else 0.0)
        optimizer.step()
        moves.append((before - w_in.detach()).mean().item())

    # lr · m̂ / √v̂ with m = 0.1 · 0.9^t, v = 0.05 · 0.95^t, corrected by 1 - 0.9^(t+1) and 1 - 0.95^(t+1).
    expected = [
        0.1 * (0.1 * 0.9**t / (1 - 0.9 ** (t + 1))) / (0.05 * 0.95**t / (1 - 0.95 ** (t + 1))) ** 0.5 for t in range(3)
    ]
    assert moves == pytest.approx(expected, rel=1e-4)
    assert moves[0] > moves[1] > moves[2] > 0
