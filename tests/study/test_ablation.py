"""Losses without an expert, and with another k, against whole forward passes done by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.data.batches import Batch
from moe.data.prepare import HeldOut
from moe.model.transformer import Transformer
from moe.presets import model_config
from moe.study.ablation import _forward, _losses_from, _mean_and_error, delta_loss, loss_by_k
from moe.study.intervene import change_k, knock_out, mixture_layers, random_routing
from moe.study.recording import held_out_windows

VOCABULARY, LENGTH, EXPERTS = 32, 8, 4
DOMAINS = ("prose", "code", "nothing")


def small(preset: str = "mixtral", **settings: Any) -> Transformer:
    """A model of three blocks, the first of them dense, in float64."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_layers": 3,
        "d_model": 16,
        "max_seq": 24,
        "init_std": 0.5,
        "attention": {"n_heads": 2, "head_dim": 8},
        "experts": {"n_experts": EXPERTS, "d_ff": 8, "first_dense": 1, "backend": "reference"},
    }
    return Transformer(model_config(preset, **(shape | settings)), seed=0).double()


def batch_of(domain: list[int], seed: int, low: int = 0, high: int = VOCABULARY) -> Batch:
    """Random sequences of these domains, of whose targets about two in three are scored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(low, high, (len(domain), LENGTH + 1), generator=generator)
    scored = torch.rand(len(domain), LENGTH, generator=generator) < 2 / 3
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.tensor(domain), scored)


BATCHES = [batch_of([0, 1, 0], 1), batch_of([1, 1], 2)]


def means_by_hand(model: Transformer) -> dict[str, float]:
    """The mean loss of each domain, token by token."""
    losses: dict[str, list[float]] = {"prose": [], "code": []}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in BATCHES:
            log_probabilities = model(batch.tokens)[0].log_softmax(dim=-1)
            assert batch.scored is not None
            for row, domain in enumerate(batch.domain.tolist()):
                for place in range(LENGTH):
                    if batch.scored[row, place]:
                        loss = -log_probabilities[row, place, batch.targets[row, place]]
                        losses[DOMAINS[domain]].append(float(loss))
    model.train(was_training)
    return {domain: sum(values) / len(values) for domain, values in losses.items()}


@pytest.mark.parametrize("preset", ["mixtral", "moe_plus_plus", "expert_choice", "top_p", "switch"])
def test_computing_the_blocks_from_a_layer_on_equals_the_whole_forward_pass(preset: str) -> None:
    # moe_plus_plus: a router that needs the logits of the mixture before; it must get those of the changed one.
    model = small(preset).eval()
    batch = BATCHES[0]
    with torch.no_grad():
        inputs, _, _ = _forward(model, batch)
        for number in (1, 2):
            with knock_out(model, layer=number, experts=[0, 1]):
                whole = _forward(model, batch)[1]
                part = _losses_from(model, number, inputs[number], batch)
            assert torch.equal(part, whole)


def test_delta_loss_is_the_loss_with_zeroed_weights_less_the_plain_one() -> None:
    model = small()
    measured = delta_loss(model, BATCHES, DOMAINS)
    plain = means_by_hand(model)
    for place, number in enumerate((1, 2)):
        for expert in range(EXPERTS):
            w_out = mixture_layers(model)[number].experts.w_out
            kept = w_out[expert].clone()
            with torch.no_grad():
                w_out[expert] = 0.0
                without = means_by_hand(model)
                w_out[expert] = kept
            for index, domain in enumerate(("prose", "code")):
                difference = without[domain] - plain[domain]
                assert measured.values[place, expert, index] == pytest.approx(difference, abs=1e-12)
    assert np.abs(measured.values[..., :2]).max() > 1e-3
    # No sequence is of the third domain.
    assert np.isnan(measured.values[..., 2]).all()
    assert [axis.name for axis in measured.axes] == ["layer", "expert", "domain"]
    assert measured.axes[0].labels == ("1", "2")
    assert measured.chance == 0


def test_an_expert_that_a_domain_never_uses_is_worth_nothing_to_it() -> None:
    # A hash router sends each id to one expert, so four ids use four experts at most.
    model = small("hash", experts={"n_experts": 16, "d_ff": 8, "first_dense": 1, "backend": "reference"}).eval()
    batches = [batch_of([0, 0], 3, high=4), batch_of([1, 1], 4, low=28)]
    measured = delta_loss(model, batches, DOMAINS[:2])
    for index, batch in enumerate(batches):
        used = model(batch.tokens)[1][0].counts() > 0
        rises = measured.values[0, :, index]
        assert (rises[~used.numpy()] == 0).all()
        assert (rises[used.numpy()] != 0).all()
        assert 0 < used.sum() < 16


def test_the_mode_and_the_model_are_put_back_and_progress_is_told() -> None:
    model = small().train()
    told: list[tuple[int, int]] = []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    delta_loss(model, BATCHES, DOMAINS, progress=lambda done, total: told.append((done, total)))
    # Two batches, two mixture layers, four experts.
    assert told == [(done, 16) for done in range(1, 17)]
    loss_by_k(model, BATCHES, DOMAINS, ks=[1, 2], progress=lambda done, total: told.append((done, total)))
    assert told[16:] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_loss_by_k_is_the_plain_loss_at_the_trained_k_and_that_of_another_k_elsewhere() -> None:
    model = small()
    measured = loss_by_k(model, BATCHES, DOMAINS, seed=5)
    assert measured.axes[0].labels == ("1", "2", "3", "4")
    assert "trained with k = 2," in measured.reading
    assert measured.chance is not None
    plain = means_by_hand(model)
    with change_k(model, 3):
        three = means_by_hand(model)
        with random_routing(model, seed=5):
            by_chance = means_by_hand(model)
    for index, domain in enumerate(("prose", "code")):
        assert measured.values[1, index] == pytest.approx(plain[domain], abs=1e-12)
        assert measured.values[2, index] == pytest.approx(three[domain], abs=1e-12)
        assert measured.chance[2, index] == pytest.approx(by_chance[domain], abs=1e-12)


def test_with_all_experts_alike_neither_k_nor_chance_matters() -> None:
    model = small()
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            for parameter in layer.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
    measured = loss_by_k(model, BATCHES, DOMAINS[:2])
    assert np.ptp(measured.values, axis=0).max() < 1e-12
    assert measured.chance is not None
    assert np.abs(measured.values - measured.chance).max() < 1e-12


class Corpus:
    """The held-out part of a corpus: 40 and 100 tokens of text."""

    class tokenizer:  # noqa: N801
        end_of_text = 0

    validation = {  # noqa: RUF012
        "prose": HeldOut((), (), np.array([0, *range(1, 41)], np.uint16)),
        "code": HeldOut((), (), np.array([0, *range(1, 101)], np.uint16)),
    }


def test_held_out_windows_are_as_many_of_each_domain_and_not_its_beginning_alone() -> None:
    corpus: Any = Corpus()
    batches = list(held_out_windows(corpus, sequence_length=10, tokens=40))
    # 40 tokens are 20 of each domain: two windows of ten. Of 4 windows of prose the first and third, of 10 of code the
    # first and sixth.
    assert [batch.domain.tolist() for batch in batches] == [[0, 0], [1, 1]]
    assert [batch.targets[:, 0].tolist() for batch in batches] == [[1, 21], [1, 51]]


def test_models_without_experts_or_without_k_are_refused() -> None:
    dense = small(dense_twin=True)
    with pytest.raises(ValueError, match="no mixture layer"):
        delta_loss(dense, BATCHES, DOMAINS)
    with pytest.raises(ValueError, match="no mixture layer"):
        loss_by_k(dense, BATCHES, DOMAINS)
    with pytest.raises(ValueError, match="decides for itself"):
        loss_by_k(small("top_p"), BATCHES, DOMAINS)


def test_the_standard_error_over_sequences() -> None:
    # Sums 2 and 6 over two tokens each: a mean of 8 / 4 = 2, of which the sequences are off by -2 and 2 in their sums;
    # 2 / 1 · (4 + 4) = 16, its root over 4 tokens is 1. That is the deviation of 1 and 3 (√2) over √2.
    mean, error = _mean_and_error(np.array([2.0, 6.0]), np.array([2, 2]), np.array([0, 0]), 1)
    assert mean.tolist() == [2.0]
    assert error.tolist() == [1.0]
    # One sequence has no deviation, and a domain without scored tokens no mean.
    mean, error = _mean_and_error(np.array([2.0, 6.0]), np.array([2, 0]), np.array([0, 1]), 2)
    assert mean[0] == 1.0
    assert np.isnan([mean[1], *error]).all()


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.integers(1, 9))
def test_with_sequences_of_one_length_it_is_the_error_of_a_mean(values: list[float], length: int) -> None:
    sums, tokens = np.array(values) * length, np.full(len(values), length)
    _, error = _mean_and_error(sums, tokens, np.zeros(len(values), np.int64), 1)
    assert error[0] == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, abs=1e-9)
