"""Any choice on the axes that the configuration accepts: it trains, it evaluates, and its routings keep their promises.

Hypothesis draws settings at random, on top of nothing or of a preset's. What the configuration refuses is taken back
until it accepts; what it then accepts has no excuse.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.config import ConfigError, ModelConfig
from moe.model.routing import Routing
from moe.model.transformer import Transformer
from moe.parallel.world import World
from moe.presets import build, presets
from moe.training.objective import StepCounts, compose
from moe.training.step import routers_of, update_selection_biases

VALUES: dict[str, list[object]] = {
    "router.top_k": [1, 2, 4],
    "router.projection": ["linear", "cosine", "two_layer"],
    "router.projection_width": [3],
    "router.temperature": [0.1],
    "router.bias": [True],
    "router.logit_norm": [2.0],
    "router.residual": [True],
    "router.jitter": [0.1],
    "router.noise": ["none", "shazeer", "gumbel"],
    "router.score": ["softmax", "sigmoid", "sqrt_softplus", "relu"],
    "router.selection": [
        *("top_k", "group_limited", "top_p", "positive", "all", "sampled"),
        *("expert_choice", "sinkhorn", "base", "hash", "random"),
    ],
    "router.n_groups": [2],
    "router.top_groups": [1, 2],
    "router.group_score": ["max", "top_two"],
    "router.threshold": [0.7, 1.0],
    "router.sampling_margin": [0.5],
    "router.second_choice": [0.2, 1.0],
    "router.selection_bias": ["none", "sign", "proportional", "quantile"],
    "router.bias_rate": [0.5],
    "router.weights": ["scores", "equal"],
    "router.normalise": [False, True],
    "router.scale": [2.5],
    "router.apply": ["after", "before"],
    "router.gradient": ["selected", "all_experts", "heun"],
    "router.capacity.factor": [0.5, 1.0],
    "router.capacity.order": ["position", "choice", "score"],
    "router.capacity.scope": ["micro_batch", "sequence"],
    "router.capacity.in_evaluation": [True],
    "special.zero": [1, 2],
    "special.copy": [1],
    "special.constant": [1, 2],
    "shared.n_experts": [1],
    "shared.gated": [True],
    "balance.load_balance": [0.0, 0.1],
    "balance.scope": ["sequence", "micro_batch", "global_batch"],
    "balance.choices": ["all", "first"],
    "balance.special_weight": [0.75],
    "balance.z_loss": [0.1],
    "balance.importance": [0.1],
    "balance.noisy_load": [0.1],
    "balance.device": [0.1],
    "balance.n_devices": [2],
    "balance.sparsity": [0.1],
    "balance.sparsity_rate": [1.5],
    "balance.entropy": [0.1],
    "balance.orthogonality": [0.1],
    "feed_forward.bias": [True],
    "experts.backend": ["segments"],
}
FIXED: dict[str, object] = {
    "vocab_size": 16,
    "n_layers": 2,
    "d_model": 8,
    "init_std": 0.5,
    "attention.n_heads": 2,
    "attention.head_dim": 4,
    "experts.n_experts": 4,
    "experts.d_ff": 4,
}
COMPANIONS: dict[str, object] = {  # what an axis cannot do without, in the order in which it is asked for
    "router.n_groups": 2,
    "router.top_groups": 2,
    "balance.n_devices": 2,
}


def accepted(settings_of: Mapping[str, object]) -> ModelConfig | None:
    """The model with those of the settings that are not refused; None where what is refused was no setting of ours."""
    chosen = {"experts.backend": "reference", **settings_of, **FIXED}
    for _ in range(4 * len(VALUES)):
        try:
            return build(ModelConfig, chosen)
        except ConfigError as error:
            if error.key in chosen and error.key not in FIXED:
                del chosen[error.key]
            elif error.key in COMPANIONS:
                chosen[error.key] = COMPANIONS[error.key]
            elif error.key == "balance.load_balance":  # on by default
                chosen[error.key] = 0.0
            elif error.key == "router.normalise":
                chosen[error.key] = False
            else:
                return None
    return None


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    base = draw(st.sampled_from([{}, {}, *(dict(entry.set) for entry in presets().values())]))
    keys = draw(st.lists(st.sampled_from(list(VALUES)), max_size=10, unique=True))
    config = accepted(base | {key: draw(st.sampled_from(VALUES[key])) for key in keys})
    assume(config is not None)
    assert config is not None
    return config


def transformer(config: ModelConfig) -> Transformer:
    """In float64, its selection biases not zero."""
    model = Transformer(config).double()
    generator = torch.Generator().manual_seed(0)
    for router in routers_of(model):
        if router.selection_bias is not None:
            router.selection_bias.copy_(torch.randn(router.n_experts, generator=generator))
    return model


def require_promises(routing: Routing) -> None:
    """What :class:`Routing` says of its fields."""
    n_experts, n_places = routing.n_experts, routing.top_k
    assert routing.selected.min() >= 0
    assert routing.selected.max() < n_experts
    for chosen in routing.selected.tolist():
        assert len(set(chosen)) == n_places
    for values in (routing.logits, routing.scores, routing.weights):
        assert values.dtype == torch.float64
        assert torch.isfinite(values).all()
    assert (routing.weights >= 0).all()

    real = torch.ones(routing.n_tokens, 1, dtype=torch.bool) if routing.mask is None else routing.mask[:, None]
    there = real.expand_as(routing.selected)
    if routing.assigned is not None:
        there = there & routing.assigned
    dropped = torch.zeros_like(there) if routing.dropped is None else routing.dropped
    assert not (dropped & ~there).any()
    assert (routing.weights[~there | dropped] == 0).all()

    counts = [0] * n_experts
    for expert in routing.selected[there].tolist():
        counts[expert] += 1
    assert routing.counts().tolist() == counts
    assert routing.sequence_counts().sum(dim=0).tolist() == counts
    assert routing.dropped_count() == dropped.sum()


def padded_batch() -> tuple[Tensor, Tensor]:
    """Three sequences: whole, padded, and nothing but padding."""
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:], mask[2] = False, False
    return torch.randint(16, (3, 5)), mask


class Step(NamedTuple):
    total: Tensor
    routings: list[Routing]
    counts: StepCounts


def forward(model: Transformer, tokens: Tensor, mask: Tensor) -> Step:
    """The loss of one micro-batch; a sum, so that no token at all gives 0."""
    hidden, routings = model.hidden(tokens, mask)
    balance, router = model.config.balance, model.config.router
    counts = StepCounts(World(), choices=balance.choices, keep_logits=router.selection_bias == "quantile")
    weights = [router.weight for router in routers_of(model)]
    lm = hidden[mask].sin().sum()
    objective = compose(lm, routings, balance, counts, router=router, router_weights=weights)
    assert all(torch.isfinite(value) for value in objective.auxiliary.values())
    return Step(objective.total, routings, counts)


def step(model: Transformer, tokens: Tensor, mask: Tensor) -> Step:
    """A training step but for the optimizer, after which everything is finite."""
    model.zero_grad()
    done = forward(model, tokens, mask)
    done.total.backward()
    update_selection_biases(routers_of(model), done.counts)
    assert torch.isfinite(done.total)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.isfinite(tensor).all(), name
        assert tensor.grad is None or torch.isfinite(tensor.grad).all(), name
    return done


@settings(max_examples=200, derandomize=True, deadline=None)
@given(models(), st.integers(0, 2**16))
def test_whatever_is_accepted_trains_and_keeps_its_promises(config: ModelConfig, seed: int) -> None:
    torch.manual_seed(seed)
    model = transformer(config)
    tokens, mask = padded_batch()

    for routing in step(model, tokens, mask).routings:
        require_promises(routing)

    model.eval()
    with torch.no_grad():
        logits, routings = model(tokens, mask)
    for routing in routings:
        require_promises(routing)
    if config.router.is_batch_independent(training=False) and not config.router.capacity.in_evaluation:
        alone = unpadded(model, tokens, mask)
        assert torch.allclose(logits[mask], alone, rtol=0, atol=1e-9)


def unpadded(model: Transformer, tokens: Tensor, mask: Tensor) -> Tensor:
    """The logits of the real tokens, each sequence on its own and without padding."""
    with torch.no_grad():
        rows = [model(row[real][None])[0][0] for row, real in zip(tokens, mask, strict=True) if real.any()]
    return torch.cat(rows)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(models(), st.integers(0, 2**16))
def test_nothing_overflows_at_the_extremes_of_float32(config: ModelConfig, seed: int) -> None:
    """Logits all equal, or thousands apart; one token, no token, padding alone; products in bfloat16."""
    torch.manual_seed(seed)
    model = Transformer(config)
    tokens, mask = padded_batch()
    start = [parameter.detach().clone() for parameter in model.parameters()]

    for factor in (1.0, 0.0, 1e3):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start, strict=True):
                parameter.copy_(value)
            for router in routers_of(model):
                for parameter in router.parameters():
                    parameter.mul_(factor)
        step(model, tokens, mask)
    step(model, tokens, torch.zeros_like(mask))
    step(model, tokens[:1, :1], mask[:1, :1])
    step(model, tokens[:, :0], mask[:, :0])
    with torch.autocast("cpu", torch.bfloat16):
        _, routings = model.hidden(tokens, mask)
    for routing in routings:
        assert routing.logits.dtype == routing.scores.dtype == routing.weights.dtype == torch.float32


@settings(max_examples=80, derandomize=True, deadline=None)
@given(models(), st.integers(0, 2**16))
def test_recomputing_activations_changes_nothing(config: ModelConfig, seed: int) -> None:
    torch.manual_seed(seed)
    model, (tokens, mask) = Transformer(config), padded_batch()
    totals, gradients = [], []

    for model.activation_checkpointing in ("none", "block"):
        torch.manual_seed(seed)
        totals.append(forward(model, tokens, mask).total)
        gradients.append(torch.autograd.grad(totals[-1], list(model.parameters()), allow_unused=True))

    assert torch.equal(*totals)
    for kept, recomputed in zip(*gradients, strict=True):
        assert (kept is None) == (recomputed is None)
        assert kept is None or torch.equal(kept, recomputed)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(models(), st.integers(0, 2**16))
def test_the_gradient_is_the_derivative(config: ModelConfig, seed: int) -> None:
    """Along a random direction, for a choice that the small step leaves as it is; but for the two gradient options that
    are estimates, and are no derivative of the forward pass."""
    assume(config.router.gradient == "selected")
    torch.manual_seed(seed)
    model, (tokens, mask) = transformer(config), padded_batch()
    parameters = list(model.parameters())
    with torch.no_grad():
        for router in routers_of(model):
            if router.noise_weight is not None:  # a noisy router starts from zeros
                router.weight.normal_()
                router.noise_weight.normal_()
    direction = [torch.randn_like(parameter) for parameter in parameters]

    def moved(distance: float) -> Step:
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=distance)
        torch.manual_seed(seed)
        return forward(model, tokens, mask)

    here = moved(0.0)
    gradient = torch.autograd.grad(here.total, parameters, allow_unused=True)
    ahead, behind = moved(1e-6), moved(-2e-6)
    for chosen in zip(*(at.routings for at in (here, ahead, behind)), strict=True):
        assume(all(torch.equal(chosen[0].selected, other.selected) for other in chosen[1:]))

    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True) if g is not None)
    torch.testing.assert_close(slope, (ahead.total - behind.total).detach() / 2e-6, rtol=1e-5, atol=1e-5)
