"""Experts on several ranks compute what they compute on one, however uneven the load: no row is dropped or padded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe.config import ExpertsConfig, FeedForwardConfig
from moe.model.experts import Experts
from moe.model.routing import Routing
from moe.parallel.expert import PartOfExperts, _combine, _depart, _sorted_by_expert, _Travel
from moe.parallel.split import Split

Together = Callable[[Callable[[], Any], Path, int], list[Any]]

N_EXPERTS, WIDTH = 4, 8
SELECTED = {
    "a token each": [[[0, 1], [2, 3]], [[3, 0], [1, 2]]],
    "all to one expert of the second rank": [[[3], [3], [3]], [[3], [3], [3]]],
    "all to the first rank, from the second alone": [[], [[0, 1], [1, 0], [0, 1]]],
    "a rank without tokens, and no expert of its own is asked for": [[[2, 3], [3, 2]], []],
    "nobody": [[], []],
}


def routing_of(selected: list[list[int]], dropped: bool = False) -> Routing:
    """A routing with weights 0.5, 0.25 …, with or without the last place of each token dropped."""
    places = torch.tensor(selected, dtype=torch.int64).reshape(len(selected), -1 if selected else 2)
    weights = 0.5 ** torch.arange(1, places.shape[1] + 1).expand(places.shape).float()
    scores = torch.zeros(len(selected), N_EXPERTS)
    routing = Routing(logits=scores, scores=scores, selected=places, weights=weights.clone().requires_grad_())
    if not dropped:
        return routing
    last = torch.zeros_like(places, dtype=torch.bool)
    last[:, -1:] = True
    return routing.dropping(last)


def experts_of(backend: str) -> Experts:
    experts = Experts(ExpertsConfig(n_experts=N_EXPERTS, d_ff=12, backend=backend), FeedForwardConfig(), WIDTH)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return experts


def tokens_of(rank: int, n_tokens: int) -> Tensor:
    return torch.randn(n_tokens, WIDTH, generator=torch.Generator().manual_seed(rank)).requires_grad_()


def output_and_gradients(experts: nn.Module, rank: int, selected: list[list[int]], dropped: bool) -> dict[str, Tensor]:
    x, routing = tokens_of(rank, len(selected)), routing_of(selected, dropped)
    y = experts(x, routing)
    y.square().sum().backward()
    weights = routing.weights if routing.weights.is_leaf else None
    return {"y": y.detach(), "x": x.grad} | ({} if weights is None else {"weights": weights.grad})


@pytest.mark.parametrize("backend", ["reference", "segments", "grouped"])
def test_any_load_is_computed_whole(together: Together, tmp_path: Path, backend: str) -> None:
    cases = [(name, dropped) for name in SELECTED for dropped in (False, True)]

    def work() -> dict[tuple[str, bool], Any]:
        rank, results = dist.get_rank(), {}
        for case in cases:
            experts = experts_of(backend)
            for name, parameter in list(experts.named_parameters()):
                setattr(experts, name, nn.Parameter(Split(0, "expert").cut(parameter.detach(), rank, 2)))
            part = PartOfExperts(experts, expert_group=dist.group.WORLD, tensor_group=None)
            result = output_and_gradients(part, rank, SELECTED[case[0]][rank], case[1])
            results[case] = result | {name: parameter.grad for name, parameter in part.named_parameters()}
        return results

    ranks = together(work, tmp_path, 2)

    for case in cases:
        whole = experts_of("reference")
        alone = [output_and_gradients(whole, rank, SELECTED[case[0]][rank], case[1]) for rank in range(2)]
        for rank in range(2):
            for name, value in alone[rank].items():
                torch.testing.assert_close(ranks[rank][case][name], value, rtol=1e-5, atol=1e-6)
            for name, parameter in whole.named_parameters():
                mine = Split(0, "expert").cut(parameter.grad, rank, 2)
                torch.testing.assert_close(ranks[rank][case][name], mine, rtol=1e-5, atol=1e-6)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_what_departs_and_comes_back_untouched_is_weighed_at_home(data: st.DataObject) -> None:
    """Rows in order of their expert; the sum of a token's rows, each the token itself, is its weights' sum times it."""
    n_tokens = data.draw(st.integers(0, 6))
    selected = [data.draw(st.permutations(range(N_EXPERTS)))[:2] for _ in range(n_tokens)]
    routing = routing_of(selected, dropped=data.draw(st.booleans()))
    x = tokens_of(0, n_tokens)

    order, counts = _sorted_by_expert(routing)
    travel = _Travel(order[: int(counts.sum())], n_tokens, 2)
    rows = _depart(x, travel)
    y = _combine(rows, routing.weights, travel)

    wanted = routing.executed if routing.executed is not None else torch.ones_like(routing.selected, dtype=torch.bool)
    experts = routing.selected.flatten()[order[: len(rows)]].tolist()
    assert experts == sorted(routing.selected[wanted].tolist())
    torch.testing.assert_close(y, x * routing.weights.sum(dim=1, keepdim=True))
