"""Whatever the layout, five steps are those of one process: loss, norm of the gradient, counts, biases and weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import (
    AttentionConfig,
    BalanceConfig,
    Config,
    DataConfig,
    ExpertsConfig,
    FeedForwardConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RouterConfig,
    SharedExpertsConfig,
    SpecialExpertsConfig,
    TrainingConfig,
    parse_layout,
)
from moe.model.transformer import Transformer
from moe.parallel.mesh import build_mesh
from moe.parallel.parallelize import parallelize
from moe.parallel.spread import spread_of
from moe.parallel.world import World
from moe.training.optimizer import build_optimizer
from moe.training.step import MicroBatch, TrainingStep

Together = Callable[[Callable[[], Any], Path, int], list[Any]]

STEPS, ROWS, LENGTH, VOCABULARY = 5, 4, 8, 96


def model_config(**changes: Any) -> ModelConfig:
    """Two blocks, with all that a layout has to cut: gated MLPs, biases, several key heads, a selection bias."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_layers": 2,
        "d_model": 16,
        "max_seq": 32,
        "init_std": 0.1,
        "attention": AttentionConfig(n_heads=4, n_kv_heads=4, head_dim=8, qk_norm="head", bias=True),
        "feed_forward": FeedForwardConfig(bias=True),
        "experts": ExpertsConfig(n_experts=4, d_ff=12),
        "shared": SharedExpertsConfig(n_experts=1, gated=True),
        "router": RouterConfig(top_k=2, selection_bias="sign", bias_rate=0.01),
        "balance": BalanceConfig(load_balance=0.1, z_loss=0.01, scope="global_batch"),
    }
    return ModelConfig(**settings | changes)


MODELS: dict[str, dict[str, Any]] = {
    "shared expert, biases": {},
    "untied, one key head, a dense block, gelu": {
        "tie_embeddings": False,
        "attention": AttentionConfig(n_heads=4, n_kv_heads=1, head_dim=8),
        "feed_forward": FeedForwardConfig(activation="gelu"),
        "experts": ExpertsConfig(n_experts=4, d_ff=12, first_dense=1),
        "shared": SharedExpertsConfig(),
    },
    "what four ranks cannot share evenly": {
        "d_model": 15,
        "feed_forward": FeedForwardConfig(activation="gelu"),
        "experts": ExpertsConfig(n_experts=6, d_ff=9),
    },
    "special experts": {
        "shared": SharedExpertsConfig(),
        "special": SpecialExpertsConfig(zero=1, copy=1, constant=2),
    },
}


def batch_of(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def five_steps(
    model_config: ModelConfig, parallel: ParallelConfig | None, accumulation: int = 1, checkpointing: str = "none"
) -> dict[str, Any]:
    """What five steps with clipping see and leave, whole, in one process or as one of those of a layout."""
    training = TrainingConfig(optimizer=OptimizerConfig(lr=1e-2, clip=0.5, eps=1e-3), precision="fp32")
    model, world = Transformer(model_config), World.alone()
    if parallel is not None:
        mesh = build_mesh(parallel, World().size, "cpu")
        config = Config(
            model=model_config, data=DataConfig(sequence_length=LENGTH), training=training, parallel=parallel
        )
        parallelize(model, config, mesh, torch.device("cpu"))
        world = World(mesh.data_group) if mesh.data_group is not None else world
    model.activation_checkpointing = checkpointing
    spread = spread_of(model)
    optimizer = build_optimizer(model, training.optimizer, None if spread is None else spread.parameters)
    take = TrainingStep(model, optimizer, precision="fp32", clip=0.5, world=world)
    steps = []
    for number in range(STEPS):
        rows = batch_of(number).chunk(accumulation * world.size)
        mine = rows[world.rank :: world.size]
        micro_batches = [MicroBatch(row[:, :-1], row[:, 1:]) for row in mine]
        steps.append(take(micro_batches, 1e-2, accumulation=accumulation).read())
    whole = (lambda name, value: value) if spread is None else (lambda name, value: spread.whole(name))
    return {
        "losses": [step.losses for step in steps],
        "norms": [step.gradient_norm for step in steps],
        "counts": torch.stack([step.counts for step in steps]),
        "weights": {name: whole(name, value).detach().clone() for name, value in model.named_parameters()},
        "biases": {name: value for name, value in model.state_dict().items() if name.endswith("selection_bias")},
    }


def require_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for here in ranks:
        assert torch.equal(here["counts"], alone["counts"])
        assert here["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        for mine, theirs in zip(here["losses"], alone["losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        for name, bias in alone["biases"].items():
            assert torch.equal(here["biases"][name], bias)
        assert here["weights"].keys() == alone["weights"].keys()
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(
                here["weights"][name], weight, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert torch.equal(here["weights"][name], ranks[0]["weights"][name]), name


FIRST, *OTHERS = MODELS
ODD = "what four ranks cannot share evenly"
LAYOUTS = {
    2: ["replicate", "full", "full,keep", "hybrid2", "ep2", "ep2,full", "tp2"],
    4: ["hybrid2", "ep2", "ep2,full", "ep4,full", "ep2,hybrid2", "ep2,hybrid4", "tp2,ep2", "tp2,full", "tp4"],
}
CASES = {size: [(layout, FIRST) for layout in layouts] for size, layouts in LAYOUTS.items()}
CASES[2] += [(layout, name) for layout in ("ep2,full", "tp2") for name in OTHERS if name != ODD]
CASES[4] += [("tp2,ep2", name) for name in OTHERS if name != ODD] + [("full", ODD), ("ep2,full", ODD)]


@pytest.fixture(scope="module")
def alone() -> Mapping[str, dict[str, Any]]:
    return {name: five_steps(model_config(**changes), None) for name, changes in MODELS.items()}


@pytest.mark.parametrize("size", LAYOUTS)
def test_five_steps_are_those_of_one_process(
    together: Together, alone: Mapping[str, dict[str, Any]], tmp_path: Path, size: int
) -> None:
    """Every layout of so many processes, some with every model."""

    def work() -> dict[tuple[str, str], dict[str, Any]]:
        return {
            (layout, name): five_steps(model_config(**MODELS[name]), parse_layout(layout))
            for layout, name in CASES[size]
        }

    ranks = together(work, tmp_path, size)

    for case in ranks[0]:
        try:
            require_one_process([rank[case] for rank in ranks], alone[case[1]])
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_micro_batches_and_recomputation_change_nothing(together: Together, tmp_path: Path) -> None:
    """Two micro-batches of one row on each of two ranks; the loads of a micro-batch, which do not see the others."""
    local = {"balance": BalanceConfig(load_balance=0.1, scope="micro_batch")}
    cases = [("full", "block"), ("ep2,full", "experts")]

    def work() -> dict[tuple[str, str], dict[str, Any]]:
        return {
            case: five_steps(model_config(**local), parse_layout(case[0]), accumulation=2, checkpointing=case[1])
            for case in cases
        }

    alone = five_steps(model_config(**local), None, accumulation=4)
    ranks = together(work, tmp_path, 2)

    for case in cases:
        require_one_process([rank[case] for rank in ranks], alone)


def test_the_size_of_what_is_here(together: Together, tmp_path: Path) -> None:
    """Of W_in [4 experts, 24 rows, 16], with two ranks for the experts and two for the matrices: [2, 12, 16]."""

    def work() -> dict[str, tuple[int, ...]]:
        model, config = (
            Transformer(model_config()),
            Config(model=model_config(), data=DataConfig(sequence_length=LENGTH)),
        )
        parallelize(model, config, build_mesh(parse_layout("tp2,ep2"), 4, "cpu"), torch.device("cpu"))
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    for sizes in together(work, tmp_path, 4):
        assert sizes["blocks.0.feed_forward.experts.w_in"] == (2, 12, 16)
        assert sizes["blocks.0.feed_forward.experts.w_out"] == (2, 16, 6)
        assert sizes["blocks.0.attention.query.weight"] == (16, 16)
        assert sizes["blocks.0.feed_forward.router.weight"] == (4, 16)
        assert sizes["embedding.weight"] == (VOCABULARY // 2, 16)
