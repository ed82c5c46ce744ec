"""What is read through a paged cache is what the plain forward reads, however blocks are cut, shared and given back."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.config import AttentionConfig, ExpertsConfig, LatentConfig, ModelConfig
from moe.inference.block_pool import OutOfBlocksError
from moe.inference.paged_cache import RELEASED, PagedCache, Table
from moe.inference.reading import read
from moe.model.cache import KVCache
from moe.model.transformer import Transformer
from moe.planner.serving import kv_bytes_of_sequence

TEXT = [5, 9, 11, 3, 60, 22, 7, 7, 1, 40, 13, 2, 33, 8, 19, 50, 4, 21, 6, 12, 44, 18, 31]


def cache_for(model: Transformer, n_blocks: int = 40, block_size: int = 4) -> PagedCache:
    return PagedCache(model.config, n_blocks, block_size, dtype=torch.float64)


@torch.inference_mode()
def logits_of(model: Transformer, cache: PagedCache, tables: list[Table], new: list[list[int]]) -> list[Tensor]:
    """Of the new tokens of each sequence."""
    hidden, _ = read(model, cache, tables, new)
    return [row[len(row) - len(own) :] for row, own in zip(model.head(hidden), new, strict=True)]


@torch.inference_mode()
def plainly(model: Transformer, text: list[int]) -> Tensor:
    return model(torch.tensor([text]))[0][0]


@pytest.mark.parametrize("chunks", [[23], [1] * 23, [4, 4, 8, 7], [3, 1, 10, 9]], ids=str)
def test_a_text_in_chunks_is_the_text(attending: Transformer, chunks: list[int]) -> None:
    cache, parts, start = cache_for(attending), [], 0
    table = cache.open()

    for size in chunks:
        [logits] = logits_of(attending, cache, [table], [TEXT[start : start + size]])
        cache.settle(table, TEXT)
        parts.append(logits)
        start += size

    torch.testing.assert_close(torch.cat(parts), plainly(attending, TEXT))


def test_rows_that_have_read_more_or_less_do_not_disturb_each_other(attending: Transformer) -> None:
    """Three sequences with 9, 0 and 2 tokens behind them read 1, 5 and 3 at once."""
    cache = cache_for(attending)
    texts = [TEXT[:10], TEXT[10:15], TEXT[3:8]]
    tables = [cache.open() for _ in texts]
    logits_of(attending, cache, [tables[0]], [texts[0][:9]])
    logits_of(attending, cache, [tables[2]], [texts[2][:2]])

    together = logits_of(attending, cache, tables, [texts[0][9:], texts[1], texts[2][2:]])

    for text, logits in zip(texts, together, strict=True):
        torch.testing.assert_close(logits, plainly(attending, text)[-len(logits) :])


def test_what_was_cut_off_leaves_no_trace(attending: Transformer) -> None:
    cache = cache_for(attending)
    table = cache.open()
    logits_of(attending, cache, [table], [TEXT[:9]])
    cache.settle(table, TEXT)
    logits_of(attending, cache, [table], [[1, 2, 3, 4, 5, 6]])

    cache.cut(table, 9)
    [logits] = logits_of(attending, cache, [table], [TEXT[9:12]])

    torch.testing.assert_close(logits, plainly(attending, TEXT[:12])[9:])


def test_texts_that_begin_alike_share_what_is_full(attending: Transformer) -> None:
    """Of 10 tokens in blocks of 4, two blocks are full; a text that agrees in 9 of them finds those two."""
    cache = cache_for(attending)
    first = cache.open(TEXT[:10])
    assert first.length == 0
    logits_of(attending, cache, [first], [TEXT[:10]])
    cache.settle(first, TEXT)
    # Where there is a window, some of what is found was given back, and is held again.
    full = [group.pool for group in cache.groups if group.window is None]
    before = [pool.n_free for pool in full]

    other = [*TEXT[:9], 1, 2, 3]
    second = cache.open(other)

    assert second.length == 8
    assert [pool.n_free for pool in full] == before
    [logits] = logits_of(attending, cache, [second], [other[8:]])
    torch.testing.assert_close(logits, plainly(attending, other)[8:])


def test_a_text_is_found_after_its_sequence_has_ended_but_its_last_token_is_read(plain: Transformer) -> None:
    cache = cache_for(plain)
    first = cache.open()
    logits_of(plain, cache, [first], [TEXT[:8]])
    cache.settle(first, TEXT)
    cache.close(first)
    assert cache.groups[0].pool.n_free == 40

    assert cache.open(TEXT[:8]).length == 4
    assert cache.open(TEXT[:9]).length == 8
    assert cache.open([1, *TEXT[1:9]]).length == 0
    assert cache.open(TEXT[:9], share=False).length == 0


def test_a_fork_writes_into_a_copy(attending: Transformer) -> None:
    """Six tokens in blocks of 4: the second block is half full, and both go on in it differently."""
    cache = cache_for(attending)
    one = cache.open()
    logits_of(attending, cache, [one], [TEXT[:6]])
    other = cache.fork(one)
    pool = cache.groups[0].pool
    held = pool.n_blocks - pool.n_free

    logits = logits_of(attending, cache, [one, other], [[1], [2]])
    logits += logits_of(attending, cache, [one, other], [[3], [3]])

    assert pool.n_blocks - pool.n_free == held + 1
    torch.testing.assert_close(logits[2], plainly(attending, [*TEXT[:6], 1, 3])[-1:])
    torch.testing.assert_close(logits[3], plainly(attending, [*TEXT[:6], 2, 3])[-1:])


def test_a_full_block_is_shared_without_a_copy(plain: Transformer) -> None:
    cache = cache_for(plain)
    one = cache.open()
    logits_of(plain, cache, [one], [TEXT[:8]])
    other = cache.fork(one)
    assert cache.blocks_for(other, 1) == [1]

    logits_of(plain, cache, [one, other], [[1], [2]])

    assert one.blocks[0][:2] == other.blocks[0][:2]
    assert one.blocks[0][2] != other.blocks[0][2]


def test_all_blocks_come_back(attending: Transformer) -> None:
    cache = cache_for(attending)
    one = cache.open()
    logits_of(attending, cache, [one], [TEXT])
    cache.settle(one, TEXT)
    other = cache.fork(one)
    logits_of(attending, cache, [one, other], [[1], [2]])

    cache.close(one)
    cache.close(other)

    for group in cache.groups:
        assert group.pool.n_free == group.pool.n_blocks
        assert group.pool.holders == [0] * group.pool.n_blocks


def test_room_is_told_before_it_is_taken(plain: Transformer) -> None:
    """Six blocks of 4: 13 tokens take 4 of them; a fork's next token takes a copy of the last one."""
    cache = cache_for(plain, n_blocks=6)
    table = cache.open()
    assert cache.blocks_for(table, 13) == [4]
    logits_of(plain, cache, [table], [TEXT[:13]])
    assert [cache.blocks_for(table, count) for count in (0, 1, 3, 4)] == [[0], [0], [0], [1]]
    fork = cache.fork(table)
    assert [cache.blocks_for(fork, count) for count in (0, 1, 4)] == [[0], [1], [2]]

    assert cache.has_room([2]) and not cache.has_room([3])
    with pytest.raises(OutOfBlocksError):
        cache.rows([table], [12])


def test_another_number_of_tokens_than_there_is_room_for_is_refused(plain: Transformer) -> None:
    cache = cache_for(plain)
    rows = cache.rows([cache.open()], [2])

    with pytest.raises(ValueError, match="room was made for 2 tokens a row, and 3 came"):
        rows.extend(3)


@pytest.mark.parametrize(
    "attention",
    [
        AttentionConfig(n_heads=4, head_dim=8),
        AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8),
        AttentionConfig(n_heads=4, n_kv_heads=1, head_dim=8),
        AttentionConfig(n_heads=4, head_dim=8, latent=LatentConfig(rank=12, rotary_dim=4)),
    ],
    ids=["multi-head", "grouped", "multi-query", "latent"],
)
def test_memory_of_32768_tokens_is_2_l_c_bytes(plain: Transformer, attention: AttentionConfig) -> None:
    """Keys and values (2) of L layers, c = key heads times their width, of 2 bytes each; of latent attention the
    vector and the key that turns."""
    config = replace(plain.config, max_seq=32_768, n_layers=3, attention=attention)
    c = (12 + 4) / 2 if attention.is_latent else attention.kv_heads * 8
    expected = 2 * 3 * c * 2 * 32_768

    contiguous = KVCache(config, 1, 32_768, torch.device("cpu"), torch.bfloat16)
    paged = PagedCache(config, 32_768 // 16, 16, dtype=torch.bfloat16)

    assert contiguous.keys.nbytes + contiguous.values.nbytes == expected
    assert paged.n_bytes == expected
    assert kv_bytes_of_sequence(config, 32_768) == expected


def test_a_window_gives_back_what_it_sees_no_more() -> None:
    """23 tokens in blocks of 4 are six blocks. The next query of a window of 5 sees tokens 19 to 23: the first four
    blocks are given back; the layer without a window keeps all."""
    attention = AttentionConfig(n_heads=2, head_dim=4, window=5, full_every=2)
    config = ModelConfig(
        vocab_size=64,
        n_layers=2,
        d_model=8,
        max_seq=64,
        attention=attention,
        experts=ExpertsConfig(n_experts=2, d_ff=4),
    )
    model = Transformer(config).eval().double()
    cache = PagedCache(config, 10, 4, dtype=torch.float64, n_window_blocks=4)
    table, start = cache.open(), 0

    for size in (5, 1, 4, 1, 1, 5, 3, 3):
        [logits] = logits_of(model, cache, [table], [TEXT[start : start + size]])
        torch.testing.assert_close(logits, plainly(model, TEXT[: start + size])[-size:])
        cache.settle(table, TEXT)
        start += size

    windowed, full = cache.groups
    assert (windowed.window, full.window) == (5, None)
    assert [block == RELEASED for block in table.blocks[0]] == [True] * 4 + [False] * 2
    assert (windowed.pool.n_free, full.pool.n_free) == (2, 4)
    assert cache.open(TEXT[:23]).length == 20
