"""A step whose shapes never change reads what a growing text reads; on a GPU, recorded and replayed."""

from dataclasses import replace

import pytest
import torch

from moe.inference.generate import generate
from moe.inference.graphed import GraphedSteps, NewestLast, can_graph
from moe.inference.sampling import Sampling
from moe.model.cache import KVCache
from moe.model.transformer import Transformer

TEXT = torch.tensor([[5, 9, 11, 3, 60, 22, 7], [0, 0, 7, 8, 9, 10, 11]])
PADDED = torch.tensor([[True] * 4, [False, False, True, True]])


@torch.inference_mode()
def test_the_newest_token_in_the_last_column_is_the_next_token(attending: Transformer) -> None:
    """Row 1 begins with padding; the columns grow from 6 to 9 on the way."""
    model = attending
    plain, fixed = (KVCache(model.config, 2, 9, torch.device("cpu"), torch.float64) for _ in range(2))
    for cache in (plain, fixed):
        model.hidden(TEXT[:, :4], PADDED, cache)
    steps = NewestLast(fixed, 6)

    for column in range(4, 7):
        if column == 5:
            steps = NewestLast(fixed, 9)
        expected, _ = model(TEXT[:, column : column + 1], None, plain)
        logits, _ = model(TEXT[:, column : column + 1], None, steps)
        torch.testing.assert_close(logits, expected)
        steps.place += 1
        fixed.length += 1

    torch.testing.assert_close(fixed.keys[:, :, :, :7], plain.keys[:, :, :, :7])


def test_a_step_reads_one_token(plain: Transformer) -> None:
    steps = NewestLast(KVCache(plain.config, 1, 9, torch.device("cpu")), 6)

    with pytest.raises(ValueError, match="a step reads one token, and 2 came"):
        steps.extend(2)


def test_it_is_for_gpus(plain: Transformer) -> None:
    assert not can_graph(plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_replayed_text_is_that_of_single_steps(plain: Transformer) -> None:
    """Of a dense model, whose tokens no rounding can send elsewhere."""
    config = replace(plain.config, max_seq=1024, dense_twin=True)
    model = Transformer(config).eval().bfloat16().cuda()
    assert can_graph(model)
    prompts = [[5, 9, 11], [7], list(range(40))]

    written = generate(model, prompts, 600, Sampling(temperature=0.0))

    ids = torch.tensor([[0] * (40 - len(prompt)) + list(prompt) for prompt in prompts]).cuda()
    mask = torch.tensor([[0] * (40 - len(prompt)) + [1] * len(prompt) for prompt in prompts]).cuda().bool()
    cache = KVCache(config, 3, 641, torch.device("cuda"), torch.bfloat16)
    model.hidden(ids, mask, cache)
    graph = GraphedSteps(model, cache)
    fed = torch.tensor(written).cuda()
    whole, _ = model(torch.cat([ids, fed], 1), torch.cat([mask, torch.ones_like(fed).bool()], 1))
    for step in range(599):
        logits = graph.read(fed[:, step])
        expected = whole[:, 40 + step]
        assert (logits - expected).float().norm() <= 0.05 * expected.float().norm()
