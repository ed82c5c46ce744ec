"""The search keeps to what divides and fits."""

from dataclasses import replace
from pathlib import Path

from moe import config_file
from moe.planner.devices import device
from moe.planner.memory import largest
from moe.planner.search import search
from moe.planner.step import Step

MIXTRAL = config_file.load(Path("configs/published/mixtral-8x7b.yaml")).model
H100 = device("h100")
STEP = Step(sequence=4096, micro_batch=1, n_micro_batches=1)


def test_what_is_found_divides_and_fits_and_is_sorted() -> None:
    found = search(MIXTRAL, H100, 16, STEP, batch=64)

    assert found
    for one in found:
        layout = one.layout
        assert layout.devices <= 16
        assert 8 % layout.expert == 0
        assert layout.data % layout.expert == 0
        assert 32 % layout.pipeline == 0
        assert layout.tensor <= H100.node
        assert one.memory.total <= 0.9 * H100.memory
        assert one.memory == largest(MIXTRAL, layout, one.step)[1]
        assert one.step.micro_batch * one.step.n_micro_batches * layout.data >= 64
    speeds = [one.tokens_per_second for one in found]
    assert speeds == sorted(speeds, reverse=True)


def test_where_nothing_fits_nothing_is_found() -> None:
    assert search(MIXTRAL, replace(H100, memory=8e9), 4, STEP, batch=64) == []
