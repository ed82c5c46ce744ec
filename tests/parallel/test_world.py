"""Two processes on one batch are one process on the whole batch: the same gradients, norm and weights."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config import AttentionConfig, BalanceConfig, ExpertsConfig, ModelConfig, OptimizerConfig, RouterConfig
from moe.model.transformer import Transformer
from moe.parallel.world import World, join_world, leave_world
from moe.training.head_loss import head_loss
from moe.training.objective import StepCounts, compose
from moe.training.optimizer import build_optimizer

Work = Callable[[World], Any]


def together(work: Work, folder: Path, size: int = 2) -> list[Any]:
    """What ``work`` returns in each of ``size`` processes that have joined over gloo."""
    processes = [
        multiprocessing.get_context("fork").Process(target=_member, args=(work, folder, rank, size))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def _member(work: Work, folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    meeting_point = f"file://{folder / 'meeting'}"
    dist.init_process_group(
        "gloo", init_method=meeting_point, rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )
    torch.save(work(join_world(torch.device("cpu"))), folder / f"{rank}.pt")
    leave_world()
    assert not dist.is_initialized()


# ------------------------------------------------------------------------------------------------------------ the value


def test_alone() -> None:
    world, tensor = join_world(torch.device("cpu")), torch.tensor([3.0])

    assert (world.rank, world.size, world.is_first) == (0, 1, True)
    assert torch.equal(world.sum(tensor), torch.tensor([3.0]))
    world.wait()
    leave_world()


def test_alone_gradients_are_left_as_they_are() -> None:
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)

    World().average_gradients(model)

    assert torch.equal(model.weight.grad, torch.ones(1, 2))
    assert model.bias.grad is None


def test_ranks_sizes_and_sums(tmp_path: Path) -> None:
    def work(world: World) -> tuple[int, int, bool, Tensor, Tensor]:
        mine = torch.tensor([world.rank + 1, 10])
        total = world.sum(mine)
        world.wait()
        return world.rank, world.size, world.is_first, total, mine

    first, second = together(work, tmp_path)

    assert first[:3] == (0, 2, True)
    assert second[:3] == (1, 2, False)
    assert first[3].tolist() == second[3].tolist() == [3, 20]
    assert second[4].tolist() == [2, 10]


def test_gradients_become_their_mean_and_a_missing_one_counts_as_zero(tmp_path: Path) -> None:
    """The frozen parameter takes no part; float32 and float64 are reduced apart."""

    def work(world: World) -> list[Tensor | None]:
        model = nn.ParameterList([torch.zeros(2), torch.zeros(2, 2).double(), torch.zeros(1), torch.zeros(3)])
        model[3].requires_grad_(False)
        model[0].grad = torch.full((2,), 1.0 + 2 * world.rank)
        if world.rank == 1:
            model[1].grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
        world.average_gradients(model)
        return [parameter.grad for parameter in model]

    for gradients in together(work, tmp_path):
        assert gradients[0].tolist() == [2.0, 2.0]
        assert gradients[1].tolist() == [[0.5, 1.0], [1.5, 2.0]]
        assert gradients[1].dtype == torch.float64
        assert gradients[2].tolist() == [0.0]
        assert gradients[3] is None


# ------------------------------------------------------------------------------------------------------- training steps

N_EXPERTS = 4
TOKENS_OF_EXPERT = 20
CLIP = 0.05


def routed_by_token(**experts: object) -> Transformer:
    """A model whose token ids 20 e to 20 e + 19 go to expert e, and e alone."""
    config = ModelConfig(
        vocab_size=N_EXPERTS * TOKENS_OF_EXPERT,
        n_layers=1,
        d_model=16,
        tie_embeddings=False,
        attention=AttentionConfig(n_heads=2, head_dim=8),
        experts=ExpertsConfig(n_experts=N_EXPERTS, d_ff=16, **experts),
        router=RouterConfig(top_k=1, normalise=False),
    )
    model = Transformer(config)
    with torch.no_grad():
        for expert in range(N_EXPERTS):
            ids = slice(expert * TOKENS_OF_EXPERT, (expert + 1) * TOKENS_OF_EXPERT)
            model.embedding.weight[ids, expert] += 1.0
            model.blocks[0].feed_forward.router.weight[expert, expert] += 0.5
    return model


def batch_of(step: int) -> Tensor:
    """Four rows; experts 0 and 1 in the first half, expert 2 in the second, expert 3 nowhere."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(0, 2 * TOKENS_OF_EXPERT, (2, 13), generator=generator)
    return torch.cat([first, torch.randint(2 * TOKENS_OF_EXPERT, 3 * TOKENS_OF_EXPERT, (2, 13), generator=generator)])


def three_steps(world: World, scope: str, backend: str) -> dict[str, Any]:
    """AdamW with clipping on this rank's rows of each batch, as the training loop does it."""
    model = routed_by_token(backend=backend)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, clip=CLIP))
    norms, first_gradient, loads = [], {}, []
    for step in range(3):
        rows = batch_of(step).chunk(world.size)[world.rank]
        counts = StepCounts(world)
        hidden, routings = model.hidden(rows[:, :-1])
        lm = head_loss(hidden, model.head.weight, rows[:, 1:])
        balance = BalanceConfig(load_balance=0.1, z_loss=0.01, scope=scope)
        compose(lm, routings, balance, counts).total.backward()
        world.average_gradients(model)
        if step == 0:
            first_gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        optimizer.zero_grad()
        loads.append(counts.counts)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"norms": torch.stack(norms), "gradient": first_gradient, "weights": weights, "loads": torch.cat(loads)}


@pytest.mark.parametrize("backend", ["segments", "reference", "grouped"])
def test_two_ranks_with_different_experts_are_one_process(tmp_path: Path, backend: str) -> None:
    """Loads over the global batch, so that the balance loss of two halves is that of the whole."""
    first, second = together(lambda world: three_steps(world, "global_batch", backend), tmp_path)
    alone = three_steps(World(), "global_batch", backend)

    # Each rank leaves experts empty that the other uses, and expert 3 is used by none.
    assert first["loads"][:, 2:].eq(0).all() and first["loads"][:, :2].gt(0).all()
    assert second["loads"].tolist() == [[0, 0, 24, 0]] * 3
    assert torch.equal(first["loads"] + second["loads"], alone["loads"])

    torch.testing.assert_close(first["gradient"], alone["gradient"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(first["norms"], alone["norms"], rtol=1e-5, atol=0)
    assert first["norms"].gt(CLIP).all(), "clipping must have had something to do"
    assert torch.equal(first["norms"], second["norms"])
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_loads_of_each_rank_alone_push_harder(tmp_path: Path) -> None:
    """With the scope of a micro-batch the ranks agree, but not with one process: half a batch is less balanced."""
    first, second = together(lambda world: three_steps(world, "micro_batch", "segments"), tmp_path)
    alone = three_steps(World(), "micro_batch", "segments")

    router = "blocks.0.feed_forward.router.weight"
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert (first["gradient"][router] - alone["gradient"][router]).norm() > 0.01 * alone["gradient"][router].norm()
