"""The order of the fused kernels: by hand, against torch's stable sort, and laws of any schedule of tiles.

The kernels run compiled where there is a GPU, else in Triton's interpreter.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library

from moe.model.experts.fused.sort import (
    SortedAssignments,
    most_tiles,
    schedule_in_torch,
    schedule_in_triton,
    sort_assignments,
    sort_in_torch,
    sort_in_triton,
    tile_schedule,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def draw(n_tokens: int, top_k: int, n_experts: int, skewed: bool = False) -> tuple[Tensor, Tensor]:
    """Selected experts, some of them special ones beyond the E, and whether they are executed: three in four are."""
    generator = torch.Generator().manual_seed(n_tokens + n_experts)
    chosen = torch.rand(n_tokens, top_k, generator=generator)
    selected = ((chosen**4 if skewed else chosen) * (n_experts + 3)).long()
    return selected, torch.rand(n_tokens, top_k, generator=generator) < 0.75


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype == torch.int32
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("sort", [sort_in_torch, sort_in_triton])
def test_a_sort_by_hand(sort: object, kernel_device: str) -> None:
    """Three tokens, two choices, three experts. Assignments 0 to 5 go to 2 0 | 0 1 | 2 0, and 3 is not executed:
    expert 0 has 1, 2, 5, expert 1 has none, expert 2 has 0, 4."""
    selected = torch.tensor([[2, 0], [0, 1], [2, 0]], device=kernel_device)
    executed = torch.tensor([[True, True], [True, False], [True, True]], device=kernel_device)

    result = sort(selected, executed, 3)

    assert result.assignment_of_row.tolist() == [1, 2, 5, 0, 4, 3]
    assert result.row_of_assignment.tolist() == [3, 0, 1, 5, 4, 2]
    assert result.ends.tolist() == [3, 3, 5]


@pytest.mark.parametrize("schedule", [schedule_in_torch, schedule_in_triton])
def test_a_schedule_by_hand(schedule: object, kernel_device: str) -> None:
    """Rows 0-4 are expert 0's, none expert 1's, 5-12 expert 2's: tiles of 4 start at 0, 4 | 5, 9, and 9 is the last.
    By rows, 2 with eight comes before 0 with five and 1 with none."""
    result = schedule(torch.tensor([5, 5, 13], dtype=torch.int32, device=kernel_device), 4, 6)

    assert result.tile_expert.tolist() == [0, 0, 2, 2, -1, -1]
    assert result.tile_row.tolist() == [0, 4, 5, 9, 0, 0]
    assert result.n_tiles.tolist() == [4]
    assert result.busiest.tolist() == [2, 0, 1]


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize(
    ("n_tokens", "top_k", "n_experts"),
    [(1, 1, 1), (1, 4, 7), (43, 3, 5), (128, 8, 64), (129, 8, 128), (1000, 2, 16), (300, 4, 512), (700, 6, 1)],
)
def test_the_kernels_sort_as_torch_does(
    kernel_device: str, n_tokens: int, top_k: int, n_experts: int, executed: bool
) -> None:
    """One step; one block of several steps; several blocks; more experts than assignments of a block."""
    selected, mask = draw(n_tokens, top_k, n_experts)

    result = sort_in_triton(selected.to(kernel_device), mask.to(kernel_device) if executed else None, n_experts)

    assert_same(result, sort_in_torch(selected, mask if executed else None, n_experts))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(("n_tokens", "top_k", "n_experts"), [(32768, 8, 128), (131072, 8, 512), (300_001, 1, 60)])
def test_large_sorts_are_those_of_torch_every_time(n_tokens: int, top_k: int, n_experts: int, skewed: bool) -> None:
    selected, mask = (value.cuda() for value in draw(n_tokens, top_k, n_experts, skewed))
    expected = sort_in_torch(selected, mask, n_experts)

    for _ in range(20):
        result = sort_in_triton(selected, mask, n_experts)
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))


@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize(("n_rows", "n_experts"), [(1, 1), (20, 33), (3000, 5), (5000, 1), (4000, 128)])
def test_the_kernel_cuts_tiles_as_torch_does(kernel_device: str, n_rows: int, n_experts: int, block_m: int) -> None:
    cuts = torch.rand(n_experts, generator=torch.Generator().manual_seed(n_rows)).pow(3).sort().values
    ends = (cuts * n_rows).to(torch.int32)
    n_tiles_max = most_tiles(n_rows, block_m, n_experts)

    assert_same(
        schedule_in_triton(ends.to(kernel_device), block_m, n_tiles_max), schedule_in_torch(ends, block_m, n_tiles_max)
    )


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=9), block_m=st.integers(1, 20), idle=st.integers(0, 30))
def test_tiles_cover_every_row_once_and_fit_their_bound(counts: list[int], block_m: int, idle: int) -> None:
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    n_tiles_max = most_tiles(sum(counts) + idle, block_m, len(counts))

    expert, row, n_tiles, busiest = schedule_in_torch(ends, block_m, n_tiles_max)

    rows = []
    for tile in range(n_tiles.item()):
        end = ends[expert[tile]].item()
        rows += [(expert[tile].item(), one) for one in range(row[tile].item(), min(row[tile].item() + block_m, end))]
    assert rows == [
        (index, sum(counts[:index]) + place) for index, count in enumerate(counts) for place in range(count)
    ]
    assert (expert[n_tiles.item() :] == -1).all()
    assert busiest.tolist() == sorted(range(len(counts)), key=lambda index: -counts[index])


def test_no_tokens_give_empty_rows(kernel_device: str) -> None:
    none = torch.empty(0, 2, dtype=torch.int64, device=kernel_device)

    rows, places, ends = sort_in_triton(none, None, 4)

    assert rows.shape == places.shape == (0,)
    assert ends.tolist() == [0, 0, 0, 0]
    assert schedule_in_triton(ends, 64, 4).n_tiles.tolist() == [0]
    assert most_tiles(0, 64, 4) == 0
    assert schedule_in_torch(ends, 64, 0).tile_expert.shape == (0,)


def test_a_choice_that_is_not_contiguous_is_read_as_it_stands(kernel_device: str) -> None:
    selected, executed = (value.to(kernel_device)[:, :3] for value in draw(50, 5, 8))

    result = sort_in_triton(selected, executed, 8)

    assert_same(result, sort_in_torch(selected.cpu(), executed.cpu(), 8))


def test_both_are_one_operator_each_to_torch_compile() -> None:
    def sort_and_cut(selected: Tensor, executed: Tensor) -> tuple[Tensor, ...]:
        order = sort_assignments(selected, executed, 6)
        return *order, *tile_schedule(order.ends, 16, most_tiles(selected.numel(), 16, 6))

    compiled = torch.compile(sort_and_cut, fullgraph=True, backend="aot_eager", dynamic=True)

    for n_tokens in (40, 57):
        selected, executed = draw(n_tokens, 2, 6)
        assert_same(compiled(selected, executed), sort_and_cut(selected, executed))
        library.opcheck(torch.ops.moe.sort_assignments.default, (selected, executed, 6))


@pytest.mark.gpu
@needs_gpu
def test_a_cuda_graph_sorts_what_it_is_given_later() -> None:
    first, later = (draw(2000 + shift, 4, 32)[0][:2000].cuda() for shift in (0, 1))
    selected = first.clone()
    sort_assignments(selected, None, 32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        order = sort_assignments(selected, None, 32)
        tiles = tile_schedule(order.ends, 64, most_tiles(8000, 64, 32))

    selected.copy_(later)
    graph.replay()

    assert_same(SortedAssignments(*order), sort_in_torch(later, None, 32))
    assert_same(tiles, schedule_in_torch(order.ends, 64, most_tiles(8000, 64, 32)))
