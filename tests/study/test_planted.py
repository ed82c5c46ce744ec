"""A model trained on a corpus of planted domains: its specialisation is found where it was planted, and only there."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import AttentionConfig, BalanceConfig, ExpertsConfig, ModelConfig, RouterConfig
from moe.model.balance import load_balancing_loss
from moe.model.transformer import Transformer
from moe.study.measurement import Measurement
from moe.study.metrics.specialisation import domain_information, domain_specialisation, token_dependence
from moe.study.metrics.stability import saturation
from moe.study.record import Layer, Record

DOMAINS = ("ants", "bees", "wasps")
SHARED, OWN, LENGTH = 8, 8, 32
VOCABULARY = SHARED + 2 * OWN
ALPHABETS = (np.r_[:SHARED, SHARED : SHARED + OWN], np.r_[:SHARED, SHARED + OWN : VOCABULARY])
LANGUAGE_OF = np.array([0, 1, 1])
"""Bees and wasps speak the same language: between these two there is nothing to find."""


@dataclass(frozen=True)
class Text:
    """B sequences, each of one domain."""

    tokens: Tensor
    """[B, LENGTH + 1]; ids below SHARED occur in both languages, the others in one"""
    domain: Tensor
    """[B]"""


def text_of(n_sequences: int, seed: int) -> Text:
    """Sequences in which a token has one usual successor in each language, and takes it eight times in ten."""
    fixed, generator = np.random.default_rng(0), np.random.default_rng(seed)
    successor = np.zeros((2, VOCABULARY), dtype=np.int64)
    for language, alphabet in enumerate(ALPHABETS):
        successor[language, alphabet] = fixed.permutation(alphabet)
    domain = generator.permutation(np.arange(n_sequences) % len(DOMAINS))
    language = LANGUAGE_OF[domain]
    anything = np.stack([generator.choice(ALPHABETS[one], LENGTH + 1) for one in language])
    tokens = anything.copy()
    for place in range(LENGTH):
        usual = generator.random(n_sequences) < 0.8
        tokens[:, place + 1] = np.where(usual, successor[language, tokens[:, place]], anything[:, place + 1])
    return Text(torch.from_numpy(tokens), torch.from_numpy(domain))


def model_of(**router: object) -> Transformer:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        n_layers=2,
        d_model=32,
        max_seq=LENGTH,
        init_std=0.1,
        attention=AttentionConfig(n_heads=2, head_dim=16),
        experts=ExpertsConfig(n_experts=6, d_ff=16),
        router=RouterConfig(**router),
        balance=BalanceConfig(load_balance=0),
    )
    return Transformer(config)


def train(model: Transformer, steps: int) -> Iterator[int]:
    """Next-token loss, and the load-balancing loss over a batch that holds all domains; yields each step when done."""
    text = text_of(24 * steps, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, tokens in enumerate(text.tokens.split(24), start=1):
        logits, routings = model.train()(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss = loss + 0.01 * sum(load_balancing_loss(routing) for routing in routings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step


@torch.no_grad()
def record_of(model: Transformer, step: int = 0) -> Record:
    """The routing of 150 sequences that were not trained on."""
    text = text_of(150, seed=2)
    tokens, targets = text.tokens[:, :-1], text.tokens[:, 1:]
    logits, routings = model.eval()(tokens)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")

    def column(values: Tensor) -> np.ndarray:
        return values.expand_as(tokens).flatten().to(torch.int32).numpy()

    return Record(
        token_id=column(tokens),
        target_id=column(targets),
        predicted_id=column(logits.argmax(dim=-1)),
        loss=losses.numpy(),
        position=column(torch.arange(LENGTH)),
        sequence=column(torch.arange(len(tokens))[:, None]),
        domain=column(text.domain[:, None]),
        domains=DOMAINS,
        layers=tuple(
            Layer(
                block,
                routing.n_experts,
                routing.selected.to(torch.int32).numpy(),
                routing.weights.numpy(),
                np.zeros(tuple(routing.selected.shape), np.bool_),
            )
            for block, routing in enumerate(routings)
        ),
        step=step,
    )


def where(record: Record, rows: np.ndarray) -> Record:
    """The record of some of its tokens."""
    columns = {
        column.name: values[rows]
        for column in fields(record)
        if isinstance(values := getattr(record, column.name), np.ndarray)
    }
    layers = tuple(
        replace(layer, selected=layer.selected[rows], weights=layer.weights[rows], dropped=layer.dropped[rows])
        for layer in record.layers
    )
    return replace(record, layers=layers, **columns)


def above_null(measured: Measurement) -> np.ndarray:
    """In deviations of the null."""
    return (measured.values - measured.null) / measured.null_std


@pytest.fixture(scope="module")
def over_training() -> list[Record]:
    """Records of one model before, during and after its training."""
    model = model_of()
    recorded = [record_of(model)]
    recorded += [record_of(model, step) for step in train(model, 150) if step in (50, 150)]
    return recorded


def test_the_model_has_learned_both_languages(over_training: list[Record]) -> None:
    # Of 24 ids at first: ln 24 = 3.2. A usual successor has probability 0.8 + 0.2/16, 15 others 0.2/16 each: 0.99.
    before, *_, after = (float(record.loss.mean()) for record in over_training)

    assert before > 3
    assert 0.95 < after < 1.2


def test_specialisation_is_found_between_the_languages(over_training: list[Record]) -> None:
    information = domain_information(over_training[-1])

    # Both in the domain, and in what it adds to the token: shared tokens go elsewhere in another language.
    assert (above_null(information) > 20).all()
    assert (information.values > 0.04).all()


def test_nothing_is_found_between_two_domains_of_one_language(over_training: list[Record]) -> None:
    record = over_training[-1]
    bees_and_wasps = where(record, record.domain > 0)

    information = domain_information(bees_and_wasps)

    assert (np.abs(above_null(information)) < 4).all()
    assert (information.values < 0.01).all()


def test_the_shares_of_experts_differ_where_the_language_does(over_training: list[Record]) -> None:
    ants, bees, wasps = domain_specialisation(over_training[-1]).values.transpose(1, 0, 2)

    # Distances between the domains' shares, in each layer.
    assert (np.abs(ants - bees).sum(axis=1) > 4 * np.abs(bees - wasps).sum(axis=1)).all()


def test_saturation_rises_during_training(over_training: list[Record]) -> None:
    measured = saturation(over_training)

    assert measured.axes[1].labels == ("0", "50", "150")
    untrained, early, last = measured.values[..., 0].T
    assert (early > untrained + 0.1).all()
    assert (early < 0.95).all()
    assert (last == 1).all()


def test_routing_at_random_tells_of_the_domain_what_its_hash_happens_to_tell() -> None:
    # The experts are a fixed function of id and position, of 24 · 32 pairs, of which a language has 512. So the domain
    # is not quite independent of the expert: as if 512 pairs had been drawn once for each language, about
    # (2 - 1)(6 - 1)/(2 · 2 · 512) = 0.002 nats. Once the id is known, the position tells nothing of the domain.
    information = domain_information(record_of(model_of(selection="random")))

    assert (information.values[:, 0] < 0.005).all()
    assert (np.abs(above_null(information)[:, 1]) < 4).all()


def test_routing_by_id_tells_of_the_domain_only_what_the_id_tells() -> None:
    record = record_of(model_of(selection="hash"))

    assert (domain_information(record).values[:, 1] == 0).all()
    assert token_dependence(record).values[:, 0] == pytest.approx([1, 1])
