"""Validation: every held-out token once, as an independent sum over the text says, and nothing else touched."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe.config import AttentionConfig, ExpertsConfig, ModelConfig, RouterConfig
from moe.data.prepare import PreparedCorpus
from moe.model.routing import Routing
from moe.model.transformer import Transformer
from moe.training.evaluate import Score, Validation, mlps_computed, tokens_without_mlp, validate


@pytest.fixture
def model(corpus: PreparedCorpus) -> Transformer:
    """Two layers of four experts, two a token, wide enough initialised that tokens differ."""
    return Transformer(
        ModelConfig(
            vocab_size=320,
            n_layers=2,
            d_model=32,
            max_seq=64,
            init_std=0.2,
            dropout=0.2,
            attention=AttentionConfig(n_heads=2, head_dim=16),
            experts=ExpertsConfig(n_experts=4, d_ff=16),
        )
    )


def run(model: Transformer, corpus: PreparedCorpus, stride: int = 8) -> Validation:
    validation = validate(model, corpus, 16, stride, "fp32")
    assert validation is not None
    return validation


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_nats_are_those_of_each_token_after_its_context(
    model: Transformer, corpus: PreparedCorpus, stride: int
) -> None:
    """One forward pass a token: from the beginning of its window, found by going through the targets one by one."""
    model.eval()
    found = run(model, corpus, stride)

    for domain, held_out in corpus.validation.items():
        stream = torch.from_numpy(held_out.stream.astype(np.int64))
        nats, begin = 0.0, 0
        for target in range(1, len(stream)):
            if target > begin + 16:  # outside the window: the next one, the last moved back to end with the text
                begin = min(begin + stride, len(stream) - 1 - 16)
            if stream[target] != corpus.tokenizer.end_of_text:
                logits = model(stream[None, begin:target])[0][0, -1]
                nats -= logits.log_softmax(-1)[stream[target]].item()
        score = found.domains[domain]
        assert score.nats == pytest.approx(nats, rel=1e-5)
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(b"".join(held_out.documents)), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 7, 16])
def test_every_text_token_is_scored_once(model: Transformer, corpus: PreparedCorpus, stride: int) -> None:
    for domain, score in run(model, corpus, stride).domains.items():
        text_tokens = sum(len(corpus.tokenizer.encode(text.decode())) for text in corpus.validation[domain].documents)
        assert score.tokens == text_tokens > 0


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary(model: Transformer, corpus: PreparedCorpus) -> None:
    with torch.no_grad():
        model.embedding.weight.zero_()  # the head is tied to it

    assert run(model, corpus).pooled.cross_entropy == pytest.approx(math.log(320), rel=1e-6)


def test_it_repeats_itself_to_the_bit(model: Transformer, corpus: PreparedCorpus) -> None:
    first, second = run(model, corpus), run(model, corpus)

    assert first.domains == second.domains
    assert torch.equal(first.counts, second.counts)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stopping", [True, False])
def test_mode_randomness_and_gradients_are_left_alone(
    model: Transformer, corpus: PreparedCorpus, training: bool, stopping: bool
) -> None:
    model.train(training)
    before = torch.get_rng_state()

    validate(model, corpus, 16, 8, "fp32", should_stop=lambda: stopping)

    assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_in_training_mode_it_evaluates_all_the_same(model: Transformer, corpus: PreparedCorpus) -> None:
    """Without dropout."""
    assert run(model.train(), corpus).domains == run(model.eval(), corpus).domains


def test_a_stop_gives_nothing(model: Transformer, corpus: PreparedCorpus) -> None:
    """Half of a validation would look like a whole one."""
    asked = 0

    def after_the_second() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    assert validate(model, corpus, 16, 1, "fp32", after_the_second) is None
    assert asked == 3


def test_the_load_counts_what_was_routed(model: Transformer, corpus: PreparedCorpus) -> None:
    """Two assignments for every position of every window, none dropped; windows of 16 tokens without overlap."""
    validation = run(model, corpus, stride=16)

    windows = [math.ceil((len(held_out.stream) - 1) / 16) for held_out in corpus.validation.values()]
    assert validation.counts.sum(dim=1).tolist() == [sum(windows) * 16 * 2] * 2
    assert validation.dropped == [0, 0]
    assert [layer.dropped for layer in validation.load] == [0, 0]
    assert validation.mlps_per_token == [2.0, 2.0]
    assert validation.without_mlp == [0.0, 0.0]
    expected = [float(counts.max()) * 4 / float(counts.sum()) for counts in validation.counts]
    assert [layer.max_over_fair for layer in validation.load] == pytest.approx(expected)


def test_only_mlps_that_compute_are_counted() -> None:
    """Two MLPs and two special experts, a dropped assignment and a token of padding."""
    routing = Routing(
        logits=torch.zeros(3, 4),
        scores=torch.zeros(3, 4),
        selected=torch.tensor([[0, 1], [1, 3], [0, 2]]),
        weights=torch.ones(3, 2),
        mask=torch.tensor([True, True, False]),
        dropped=torch.tensor([[False, True], [False, False], [False, False]]),
        n_special=2,
    )

    # Token 0 keeps expert 0, token 1 keeps expert 1 and the copy, token 2 is padding.
    assert int(mlps_computed(routing)) == 2
    assert int(mlps_computed(replace(routing, mask=None))) == 3
    assert int(mlps_computed(replace(routing, dropped=None))) == 3
    assert int(mlps_computed(replace(routing, n_special=0))) == 3
    assert int(mlps_computed(replace(routing, mask=None, dropped=None, n_special=0))) == 6


def test_tokens_without_an_mlp_are_real_and_have_no_kept_choice_of_one() -> None:
    """Token 0 has an MLP left; token 1 a copy alone; token 2 a dropped MLP; token 3 is padding."""
    routing = Routing(
        logits=torch.zeros(4, 3),
        scores=torch.zeros(4, 3),
        selected=torch.tensor([[0, 2], [2, 1], [1, 2], [0, 1]]),
        weights=torch.ones(4, 2),
        mask=torch.tensor([True, True, True, False]),
        dropped=torch.tensor([[False, False], [False, True], [True, False], [False, False]]),
        n_special=1,
    )

    assert int(tokens_without_mlp(routing)) == 2
    assert int(tokens_without_mlp(replace(routing, mask=None, dropped=None, n_special=0))) == 0


def test_the_mean_of_mlps_follows_a_router_that_varies_their_number(corpus: PreparedCorpus) -> None:
    """ReLU routing takes every expert above 0: here four in the first layer, one in the second."""
    model = Transformer(
        ModelConfig(
            vocab_size=320,
            n_layers=2,
            d_model=32,
            max_seq=64,
            attention=AttentionConfig(n_heads=2, head_dim=16),
            experts=ExpertsConfig(n_experts=4, d_ff=16),
            router=RouterConfig(score="relu", selection="positive", normalise=False, bias=True),
        )
    )
    routers = [block.feed_forward.router for block in model.blocks]
    with torch.no_grad():
        for router, bias in zip(routers, ([1.0, 1.0, 1.0, 1.0], [1.0, -1.0, -1.0, -1.0]), strict=True):
            router.weight.zero_()
            router.bias.copy_(torch.tensor(bias))

    assert run(model, corpus).mlps_per_token == [4.0, 1.0]


def test_bf16_stays_close(model: Transformer, corpus: PreparedCorpus) -> None:
    half = validate(model, corpus, 16, 8, "bf16")

    assert half.pooled.nats != run(model, corpus).pooled.nats
    assert half.pooled.nats == pytest.approx(run(model, corpus).pooled.nats, rel=0.01)


def test_scores_on_paper() -> None:
    """8 bits over 4 bytes; with another 2 bits over 1 byte, 10 over 5."""
    first, second = Score(8 * math.log(2), 2, 4), Score(2 * math.log(2), 3, 1)
    both = Validation({"first": first, "second": second}, None, [], [], []).pooled

    assert first.bits_per_byte == pytest.approx(2)
    assert first.cross_entropy == pytest.approx(4 * math.log(2))
    assert (both.tokens, both.n_bytes) == (5, 5)
    assert both.bits_per_byte == pytest.approx(2)  # not the mean over domains of another weighting
    assert both.cross_entropy == pytest.approx(2 * math.log(2))
