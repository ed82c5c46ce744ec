"""The room for keys and values, written and read by hand."""

import pytest
import torch

from moe.config import AttentionConfig, ModelConfig
from moe.model.cache import KVCache

CONFIG = ModelConfig(n_layers=2, d_model=8, attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6))


def cache(capacity: int = 5, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(CONFIG, batch=3, capacity=capacity, device=torch.device("cpu"), dtype=dtype)


def test_it_holds_key_heads_not_query_heads() -> None:
    assert cache().keys.shape == cache().values.shape == (2, 3, 2, 5, 6)
    assert cache().capacity == 5
    assert cache(dtype=torch.bfloat16).keys.dtype == torch.bfloat16


def test_two_chunks_come_back_as_one_and_layers_stay_apart() -> None:
    kept = cache()
    chunks = torch.randn(2, 2, 3, 2, 5, 6, generator=torch.Generator().manual_seed(0))  # key or value, layer, ...

    for start, end in ((0, 3), (3, 5)):
        assert kept.extend(end - start) is None
        for layer in range(2):
            keys, values = kept.store(layer, chunks[0, layer, ..., start:end, :], chunks[1, layer, ..., start:end, :])
            assert torch.equal(keys, chunks[0, layer, ..., :end, :])
            assert torch.equal(values, chunks[1, layer, ..., :end, :])

    assert kept.length == 5


def test_it_remembers_which_columns_are_padding() -> None:
    kept = cache()

    kept.extend(2, torch.tensor([[False, True], [True, True], [True, True]]))
    real = kept.extend(1, torch.tensor([[True], [True], [False]]))

    assert real is not None
    assert real.tolist() == [[False, True, True], [True, True, True], [True, True, False]]
    assert kept.extend(1).tolist() == [[False, True, True, True], [True, True, True, True], [True, True, False, True]]


def test_columns_without_a_mask_are_real_once_another_has_one() -> None:
    kept = cache()

    assert kept.extend(2) is None
    real = kept.extend(1, torch.tensor([[True], [False], [True]]))

    assert real is not None
    assert real.tolist() == [[True, True, True], [True, True, False], [True, True, True]]


def test_keys_and_values_of_a_layer_lie_side_by_side() -> None:
    """So that a new token's are written at once: of two key heads, heads 0 and 1 are keys, 2 and 3 values."""
    kept = cache()
    kept.extend(1)

    kept.store(1, torch.full((3, 2, 1, 6), 2.0), torch.full((3, 2, 1, 6), 3.0))

    assert kept.keys_and_values[1, 0, :, 0, 0].tolist() == [2.0, 2.0, 3.0, 3.0]
    assert kept.keys_and_values[0].count_nonzero() == 0


def test_more_than_its_capacity_is_refused_and_changes_nothing() -> None:
    kept = cache(capacity=3)
    kept.extend(2)

    with pytest.raises(ValueError, match="holds 3 tokens, and 4 were wanted"):
        kept.extend(2)
    assert kept.length == 2
