"""The blocks over several ranks: five steps are those of one process, whatever the schedule and the cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import (
    AttentionConfig,
    BalanceConfig,
    Config,
    ConfigError,
    DataConfig,
    ExpertsConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RouterConfig,
    TrainingConfig,
    parse_layout,
)
from moe.errors import UserError
from moe.model.transformer import Transformer
from moe.parallel.mesh import build_mesh
from moe.parallel.parallelize import parallelize
from moe.parallel.pipeline import Pipeline, cut, spans, with_enough_micro_batches, with_loss
from moe.parallel.spread import spread_of
from moe.parallel.world import World
from moe.training.optimizer import build_optimizer
from moe.training.step import MicroBatch, TrainingStep

Together = Callable[[Callable[[], Any], Path, int], list[Any]]
STEPS, ROWS, LENGTH, VOCABULARY = 5, 8, 8, 96


def model_config(**changes: Any) -> ModelConfig:
    """Five blocks, of which the first is dense, for stages that are not even."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_layers": 5,
        "d_model": 16,
        "max_seq": 32,
        "init_std": 0.1,
        "attention": AttentionConfig(n_heads=2, head_dim=8),
        "experts": ExpertsConfig(n_experts=4, d_ff=12, first_dense=1),
        "router": RouterConfig(top_k=2, selection_bias="sign", bias_rate=0.01),
        "balance": BalanceConfig(load_balance=0.1, z_loss=0.01, scope="global_batch"),
    }
    return ModelConfig(**settings | changes)


MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "tied alone": {"balance": BalanceConfig(load_balance=0.1, z_loss=0.01)},
    "untied": {
        "tie_embeddings": False,
        "balance": BalanceConfig(load_balance=0.1, z_loss=0.01, importance=0.01),
    },
    "dense": {"dense_twin": True},
}


def whole_config(model: ModelConfig, parallel: ParallelConfig, **training: Any) -> Config:
    settings = TrainingConfig(
        batch_size=ROWS, optimizer=OptimizerConfig(lr=1e-2, clip=0.5, eps=1e-3), precision="fp32", **training
    )
    return Config(model=model, data=DataConfig(sequence_length=LENGTH), training=settings, parallel=parallel)


def batch_of(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def five_steps(model_config: ModelConfig, layout: str | None, accumulation: int = 4) -> dict[str, Any]:
    """What five steps with clipping see and leave, in one process or of those parts of the model that are here."""
    model, world, pipeline, sequence = Transformer(model_config), World.alone(), None, (0, LENGTH)
    if layout is not None:
        config = whole_config(model_config, parse_layout(layout))
        mesh = build_mesh(config.parallel, World().size, "cpu")
        cut(model, config, mesh.pipeline_rank)
        parallelize(model, config, mesh, torch.device("cpu"))
        length = LENGTH // config.parallel.tensor
        sequence = (length * mesh.tensor_rank, length * (mesh.tensor_rank + 1))
        pipeline = Pipeline(model, config, mesh, torch.device("cpu"), torch.float32)
        world = World(mesh.data_group) if mesh.data_group is not None else world
    spread = spread_of(model)
    settings = OptimizerConfig(lr=1e-2, clip=0.5, eps=1e-3)
    optimizer = build_optimizer(model, settings, None if spread is None else spread.parameters)
    take = TrainingStep(model, optimizer, precision="fp32", clip=0.5, world=world, pipeline=pipeline)
    steps = []
    for number in range(STEPS):
        rows = batch_of(number).chunk(accumulation * world.size)
        micro_batches = [MicroBatch(row[:, :-1], row[:, 1:]) for row in rows[world.rank :: world.size]]
        steps.append(take(micro_batches, 1e-2, accumulation=accumulation).read())
    whole = (lambda name, value: value) if spread is None else (lambda name, value: spread.whole(name))
    weights = {name: whole(name, value).detach().clone() for name, value in model.named_parameters()}
    if pipeline is not None:
        with torch.no_grad():
            hidden, _ = pipeline.forward(model, batch_of(0)[:, :-1])
    else:
        hidden = model.hidden(batch_of(0)[:, :-1])[0].detach()
    return {
        "losses": [step.losses for step in steps],
        "norms": [step.gradient_norm for step in steps],
        "counts": [step.counts for step in steps],
        "tokens": [step.tokens for step in steps],
        "mlps": [step.mlps_per_token for step in steps],
        "weights": weights,
        "biases": {name: value for name, value in model.state_dict().items() if name.endswith("selection_bias")},
        "hidden": hidden,
        "sequence": sequence,
    }


def require_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Everything that ranks know is what one process knows, and together they have all of the model."""
    for here in ranks:
        assert here["tokens"] == alone["tokens"]
        assert here["mlps"] == alone["mlps"]
        assert all(
            mine is theirs is None or torch.equal(mine, theirs)
            for mine, theirs in zip(here["counts"], alone["counts"], strict=True)
        )
        assert here["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        for mine, theirs in zip(here["losses"], alone["losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        for name, bias in here["biases"].items():
            assert torch.equal(bias, alone["biases"][name])
        for name, weight in here["weights"].items():
            torch.testing.assert_close(
                weight, alone["weights"][name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        if here["hidden"] is not None:
            first, end = here["sequence"]
            torch.testing.assert_close(here["hidden"], alone["hidden"][:, first:end], rtol=0, atol=1e-4)
    assert {name for here in ranks for name in here["weights"]} == alone["weights"].keys()
    assert {name for here in ranks for name in here["biases"]} == alone["biases"].keys()
    assert any(here["hidden"] is not None for here in ranks)


CASES = {
    2: [("pp2", "tied"), ("pp2", "untied"), ("pp2,vp2", "tied"), ("pp2,vp2", "dense")],
    4: [
        ("pp4", "tied"),
        ("pp2,tp2", "tied"),
        ("pp2,dp2,full", "tied alone"),
        ("pp2,dp2", "untied"),
        ("pp2,vp2,dp2,full", "untied"),
        ("pp2,ep2", "untied"),
    ],
}


@pytest.mark.parametrize("size", CASES)
def test_five_steps_are_those_of_one_process(together: Together, tmp_path: Path, size: int) -> None:
    """Tied embeddings, whose copies stay equal; loads over the global batch; biases; layers without a mixture."""

    def work() -> dict[tuple[str, str], dict[str, Any]]:
        return {
            (layout, name): five_steps(model_config(**MODELS[name]), layout, 2 if data_ranks(layout) == 2 else 4)
            for layout, name in CASES[size]
        }

    ranks = together(work, tmp_path, size)

    alone = {name: five_steps(model_config(**MODELS[name]), None) for name in {name for _, name in CASES[size]}}
    for layout, name in CASES[size]:
        require_one_process([rank[layout, name] for rank in ranks], alone[name])


def data_ranks(layout: str) -> int:
    return 2 if "dp2" in layout or "ep2" in layout else 1


def test_stages_are_even_and_the_second_gets_what_is_left_over() -> None:
    assert [(span.first, span.end) for span in spans(8, 4)] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [(span.first, span.end) for span in spans(6, 4)] == [(0, 1), (1, 3), (3, 5), (5, 6)]
    assert [span.is_first for span in spans(3, 3)] == [True, False, False]
    assert [span.is_last for span in spans(3, 3)] == [False, False, True]


def test_what_is_cut_keeps_its_names_and_what_is_elsewhere_is_gone() -> None:
    config = whole_config(model_config(tie_embeddings=False), ParallelConfig(pipeline=2))
    names = dict.fromkeys(name for name, _ in Transformer(config.model).named_parameters())
    parts = []
    for rank in range(2):
        model = Transformer(config.model)
        cut(model, config, rank)
        parts.append([name for name, _ in model.named_parameters()])

    assert sorted([*parts[0], *parts[1]]) == sorted(names)
    assert "embedding.weight" in parts[0] and "head.weight" in parts[1]
    assert "blocks.2.attention.query.weight" in parts[1]


def test_a_loss_on_the_way_gets_a_gradient_of_one_and_changes_nothing_else() -> None:
    x, weight = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(3.0, requires_grad=True)

    y = with_loss(x, weight * weight)
    y.backward(torch.tensor([10.0, 20.0]))

    assert torch.equal(y, torch.tensor([1.0, 2.0]))
    assert torch.equal(x.grad, torch.tensor([10.0, 20.0]))
    assert weight.grad == 6.0


def test_a_pipeline_takes_a_micro_batch_for_each_of_its_ranks() -> None:
    def accumulation(batch: int, processes: int, given: int = 1, **parallel: Any) -> int:
        training = TrainingConfig(batch_size=batch, accumulation=given)
        config = Config(training=training, parallel=ParallelConfig(**parallel), model=ModelConfig(n_layers=8))
        return with_enough_micro_batches(config, processes).training.accumulation

    assert accumulation(16, 2, pipeline=2) == 2
    assert accumulation(16, 2, given=8, pipeline=2) == 8
    assert accumulation(12, 6, pipeline=3) == 3
    assert accumulation(12, 4, pipeline=4, stages=2, schedule="interleaved") == 4
    assert accumulation(16, 1) == 1
    with pytest.raises(UserError, match=r"training\.batch_size: 2 sequences cannot be divided"):
        accumulation(2, 4, pipeline=4)


def test_a_residual_router_is_refused_since_its_logits_stay_on_their_stage() -> None:
    with pytest.raises(ConfigError, match=r"model\.router\.residual"):
        whole_config(model_config(router=RouterConfig(top_k=2, residual=True)), ParallelConfig(pipeline=2))
