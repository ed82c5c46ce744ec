"""A model is spread over 24,960 processes of which there is one, without a number in it: for a rehearsal."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe.config import (
    AttentionConfig,
    Config,
    DataConfig,
    ExpertsConfig,
    FeedForwardConfig,
    ModelConfig,
    TrainingConfig,
    parse_layout,
)
from moe.model.transformer import Transformer
from moe.parallel.mesh import build_mesh
from moe.parallel.parallelize import parallelize
from moe.parallel.spread import spread_of
from moe.training.head_loss import model_loss


def take_a_step(layout: str, processes: int) -> None:
    """In a process of its own, which has the fake group."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    model_config = ModelConfig(
        vocab_size=1024,
        n_layers=1,
        d_model=128,
        attention=AttentionConfig(n_heads=16, n_kv_heads=1, head_dim=8),
        feed_forward=FeedForwardConfig(activation="gelu"),
        experts=ExpertsConfig(n_experts=16, d_ff=960, backend="grouped"),
    )
    parallel = parse_layout(layout)
    config = Config(
        model=model_config,
        data=DataConfig(sequence_length=64),
        training=TrainingConfig(precision="bf16"),
        parallel=parallel,
    )
    mesh = build_mesh(parallel, processes, "cpu")
    with torch.device("meta"):
        model = Transformer(model_config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        parallelize(model, config, mesh, torch.device("cpu"), balanced=True)
        tokens = torch.zeros(2, 64, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16):
            hidden, _ = model.hidden(tokens)
            loss = model_loss(model, hidden, tokens)
        loss.backward()
        spread = spread_of(model)
        assert spread is not None
        spread.finish_gradients()
        assert spread.gradient_norm().shape == ()
    # 1,280 / 8 / 16 = 10 ranks have the same expert; of its 960 hidden units 8 have 120 each.
    w_in = spread.parameters["blocks.0.feed_forward.experts.w_in"]
    assert w_in.shape == (1, 12 if parallel.shard == "full" else 120, 128)


@pytest.mark.parametrize(("layout", "processes"), [("tp8,ep16", 24_960), ("tp8,ep16,full", 1_280)])
def test_a_step_of_one_of_very_many(layout: str, processes: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=take_a_step, args=(layout, processes))
    process.start()
    process.join(60)
    assert process.exitcode == 0
