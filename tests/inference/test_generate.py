"""Generation: prompts together equal each alone, equals reading the whole text again for every token, and stops."""

from collections.abc import Sequence

import pytest
import torch

from moe.config import AttentionConfig, ExpertsConfig, ModelConfig, RouterConfig, SharedExpertsConfig
from moe.inference.generate import generate
from moe.inference.sampling import Sampling
from moe.model.transformer import Transformer

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5, 9, 11], [7], [1, 2, 3, 4, 5, 6, 7, 8], [63, 0]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Weights large enough that the most likely token depends on all that was read."""
    config = ModelConfig(
        vocab_size=64,
        n_layers=2,
        d_model=32,
        max_seq=32,
        init_std=0.3,
        dropout=0.5,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8),
        experts=ExpertsConfig(n_experts=4, d_ff=16),
        shared=SharedExpertsConfig(n_experts=1),
        router=RouterConfig(top_k=2),
    )
    return Transformer(config).eval()


def greedy_without_cache(model: Transformer, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """Read everything again for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_generation_is_the_most_likely_token_each_time(model: Transformer) -> None:
    for prompt in PROMPTS:
        assert generate(model, [prompt], 12, GREEDY) == [greedy_without_cache(model, prompt, 12)]


def test_prompts_of_different_lengths_do_not_disturb_each_other(model: Transformer) -> None:
    together = generate(model, PROMPTS, 12, GREEDY)

    assert together == [generate(model, [prompt], 12, GREEDY)[0] for prompt in PROMPTS]
    assert len({tuple(row) for row in together}) == len(PROMPTS)


def test_a_row_ends_before_its_stop_token_and_the_others_go_on(model: Transformer) -> None:
    free = generate(model, PROMPTS, 12, GREEDY)
    stop = next(token for token in free[0][2:] if token not in free[0][:2])
    assert any(stop not in row for row in free)

    stopped = generate(model, PROMPTS, 12, GREEDY, stop=stop)

    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]


def test_it_ends_early_once_every_row_has_stopped(model: Transformer) -> None:
    stop = generate(model, [[7]], 1, GREEDY)[0][0]
    calls = []
    handle = model.embedding.register_forward_pre_hook(lambda *_: calls.append(1))

    try:
        assert generate(model, [[7], [7]], 12, GREEDY, stop=stop) == [[], []]
    finally:
        handle.remove()
    assert len(calls) == 1


def test_each_token_is_read_once(model: Transformer) -> None:
    lengths = []
    handle = model.embedding.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))

    try:
        generate(model, [[1, 2, 3]], 5, GREEDY)
    finally:
        handle.remove()
    assert lengths == [3, 1, 1, 1, 1]


def test_padding_and_ended_rows_are_routed_nowhere(model: Transformer) -> None:
    """Prompts of 3 and 1 tokens: 4 real tokens, then 2, then 1 once the first row has stopped."""
    free = generate(model, [[5, 9, 11], [7]], 6, GREEDY)
    stop = free[0][1]
    assert stop != free[0][0] and stop not in free[1]
    real = []
    router = model.blocks[0].feed_forward.router
    handle = router.register_forward_hook(lambda _, __, routing: real.append(int(routing.real_tokens())))

    try:
        generate(model, [[5, 9, 11], [7]], 4, GREEDY, stop=stop)
    finally:
        handle.remove()
    assert real == [4, 2, 1, 1]


def test_samples_are_repeated_by_their_seed_and_do_not_depend_on_the_batch(model: Transformer) -> None:
    first = generate(model, PROMPTS, 12, Sampling(temperature=2.0), seed=1)

    assert first == generate(model, PROMPTS, 12, Sampling(temperature=2.0), seed=1)
    assert first != generate(model, PROMPTS, 12, Sampling(temperature=2.0), seed=2)
    assert first[:2] == generate(model, PROMPTS[:2], 12, Sampling(temperature=2.0), seed=1)


def test_rows_with_one_prompt_draw_differently(model: Transformer) -> None:
    first, second = generate(model, [[5], [5]], 12, Sampling(temperature=2.0))

    assert first != second


def test_dropout_is_off_and_training_mode_comes_back(model: Transformer) -> None:
    expected = generate(model, PROMPTS, 6, GREEDY)
    model.train()

    try:
        assert generate(model, PROMPTS, 6, GREEDY) == expected
        assert model.training
    finally:
        model.eval()


def test_no_new_tokens(model: Transformer) -> None:
    assert generate(model, [[1], [2]], 0) == [[], []]


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_an_empty_prompt_is_refused(model: Transformer, prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        generate(model, prompts, 3)


def test_what_does_not_fit_is_refused(model: Transformer) -> None:
    assert len(generate(model, [[1] * 20], 12)[0]) == 12
    with pytest.raises(ValueError, match="a prompt of 20 tokens and 13 new ones do not fit max_seq = 32"):
        generate(model, [[3], [1] * 20], 13)
