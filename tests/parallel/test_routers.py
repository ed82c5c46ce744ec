"""Routers do not notice that the experts are elsewhere: for what is published, two ranks with half of them each are two
ranks with all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe import config_file
from moe.config import ParallelConfig
from moe.model.transformer import Transformer
from moe.parallel.mesh import Mesh, build_mesh
from moe.parallel.parallelize import parallelize
from moe.parallel.spread import spread_of
from moe.parallel.world import World
from moe.presets import presets
from moe.training.optimizer import build_optimizer
from moe.training.step import MicroBatch, TrainingStep

Together = Callable[[Callable[[], Any], Path, int], list[Any]]

SETTINGS = """\
model:
  vocab_size: 64
  n_layers: 2
  d_model: 16
  max_seq: 32
  init_std: 0.1
  attention: {n_heads: 2, head_dim: 8}
  experts: {n_experts: 16, d_ff: 8}
data: {sequence_length: 8}
training: {precision: fp32}
"""
NAMES = [name for name in presets() if name != "dense_mixer"]  # it asks every expert about every token


def two_steps(name: str, mesh: Mesh) -> dict[str, Any]:
    config = config_file.parse(
        SETTINGS, "small", {"model.router.preset": name, "parallel.expert": str(mesh.layout.expert)}
    )
    model = Transformer(config.model)
    parallelize(model, config, mesh, torch.device("cpu"))
    spread, world = spread_of(model), World()
    optimizer = build_optimizer(model, config.training.optimizer, spread.parameters)
    take = TrainingStep(model, optimizer, precision="fp32", clip=1.0, world=world)
    steps = []
    for number in range(2):
        rows = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(2 * number + world.rank))
        steps.append(take([MicroBatch(rows[:, :-1], rows[:, 1:], seed=number)], 1e-3, sparsity_coefficient=1e-3).read())
    return {
        "norms": [step.gradient_norm for step in steps],
        "counts": torch.stack([step.counts for step in steps]),
        "dropped": [step.dropped for step in steps],
        "losses": [step.losses for step in steps],
        "buffers": dict(model.named_buffers()),
    }


def test_every_published_router(together: Together, tmp_path: Path) -> None:
    def work() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        whole, halves = (build_mesh(ParallelConfig(expert=ranks), 2, "cpu") for ranks in (1, 2))
        return {name: (two_steps(name, whole), two_steps(name, halves)) for name in NAMES}

    ranks = together(work, tmp_path, 2)

    for name in NAMES:
        whole, halves = ranks[0][name]
        assert torch.equal(halves["counts"], whole["counts"]), name
        assert halves["dropped"] == whole["dropped"], name
        assert halves["norms"] == pytest.approx(whole["norms"], rel=1e-5), name
        for mine, theirs in zip(halves["losses"], whole["losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6), name
        for key, buffer in whole["buffers"].items():
            torch.testing.assert_close(halves["buffers"][key], buffer, rtol=1e-5, atol=1e-7, msg=name)
            assert torch.equal(ranks[1][name][1]["buffers"][key], halves["buffers"][key]), name
