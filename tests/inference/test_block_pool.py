"""Blocks that are taken, shared and given back, counted by hand and against a plain set of holders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.inference.block_pool import BlockPool, OutOfBlocksError


def test_blocks_are_taken_until_all_are_held() -> None:
    pool = BlockPool(2)

    assert {pool.take(), pool.take()} == {0, 1}
    assert pool.n_free == 0
    with pytest.raises(OutOfBlocksError, match="all 2 blocks are held"):
        pool.take()


def test_a_block_of_two_holders_is_free_after_both() -> None:
    pool = BlockPool(1)
    block = pool.take()
    pool.share(block)

    pool.release(block)
    assert pool.n_free == 0
    pool.release(block)
    assert pool.n_free == 1
    with pytest.raises(ValueError, match="block 0 is released, and nobody holds it"):
        pool.release(block)


def test_a_free_block_is_found_until_it_is_taken() -> None:
    pool = BlockPool(1)
    block = pool.take()
    pool.name(block, b"the sea")
    pool.release(block)

    assert pool.find(b"the sea") == block
    pool.share(block)
    assert (pool.n_free, pool.holders) == (0, [1])
    pool.release(block)
    assert pool.take() == block
    assert pool.find(b"the sea") is None


def test_what_cannot_be_found_is_taken_first_then_what_was_let_go_first() -> None:
    pool = BlockPool(3)
    blocks = [pool.take() for _ in range(3)]
    pool.name(blocks[0], b"a")
    pool.name(blocks[1], b"b")
    for block in (1, 0, 2):
        pool.release(blocks[block])

    assert [pool.take() for _ in range(3)] == [blocks[2], blocks[1], blocks[0]]


def test_the_first_of_two_blocks_with_one_text_keeps_the_name() -> None:
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    pool.name(first, b"a")
    pool.name(second, b"a")

    pool.release(second)
    assert pool.take() == second
    assert pool.find(b"a") == first


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release", "name"]), st.integers(0, 9))))
def test_holders_are_counted_whatever_happens(events: list[tuple[str, int]]) -> None:
    """Beside a list that holds each block as often as it is held."""
    pool, held = BlockPool(4), []
    for event, number in events:
        if event == "take" and len(set(held)) < 4:
            block = pool.take()
            assert block not in held
            held.append(block)
        elif event == "share" and held:
            held.append(held[number % len(held)])
            pool.share(held[-1])
        elif event == "release" and held:
            pool.release(held.pop(number % len(held)))
        elif event == "name" and held:
            pool.name(held[number % len(held)], bytes([number]))
        assert pool.n_free == 4 - len(set(held))
        assert pool.holders == [held.count(block) for block in range(4)]
