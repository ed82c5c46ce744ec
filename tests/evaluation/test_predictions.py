"""Predictions of every held-out token: those of training's validation, and what a token at a time gives."""

import math

import numpy as np
import pytest
import torch

from moe.config import AttentionConfig, ExpertsConfig, ModelConfig
from moe.data.prepare import PreparedCorpus
from moe.errors import UserError
from moe.evaluation.predictions import document_numbers, predict
from moe.model.transformer import Transformer
from moe.training.evaluate import validate


@pytest.fixture
def model(corpus: PreparedCorpus) -> Transformer:
    """Two layers of four experts, wide enough initialised that tokens differ."""
    return Transformer(
        ModelConfig(
            vocab_size=320,
            n_layers=2,
            d_model=32,
            max_seq=64,
            init_std=0.2,
            attention=AttentionConfig(n_heads=2, head_dim=16),
            experts=ExpertsConfig(n_experts=4, d_ff=16),
        )
    )


@pytest.mark.parametrize("stride", [5, 16])
def test_losses_are_those_of_training_s_validation(model: Transformer, corpus: PreparedCorpus, stride: int) -> None:
    expected = validate(model, corpus, 16, stride, "fp32")
    assert expected is not None
    for part in predict(model, corpus, sequence_length=16, stride=stride):
        score = expected.domains[part.domain]
        assert len(part.loss) == score.tokens
        assert part.loss.sum() == pytest.approx(score.nats, rel=1e-6)
        assert part.n_bytes.sum() == score.n_bytes


def test_each_token_is_the_text_s_in_its_order_and_of_its_document(model: Transformer, corpus: PreparedCorpus) -> None:
    for part in predict(model, corpus, sequence_length=16, stride=8):
        for number, text in enumerate(corpus.validation[part.domain].documents):
            tokens = part.target[part.document == number]
            assert corpus.tokenizer.decode(tokens.tolist()) == text.decode()


def test_confidence_and_favourite_are_those_of_a_forward_pass(model: Transformer, corpus: PreparedCorpus) -> None:
    part = predict(model, corpus, sequence_length=16, stride=16)[0]
    stream = torch.from_numpy(corpus.validation[part.domain].stream.astype(np.int64))
    model.eval()
    with torch.no_grad():
        probabilities = model(stream[None, :16])[0][0].softmax(-1)
    scored = [place for place in range(16) if stream[place + 1] != corpus.tokenizer.end_of_text]
    for row, place in enumerate(scored):
        assert part.confidence[row] == pytest.approx(probabilities[place].max().item(), rel=1e-5)
        assert part.correct[row] == (probabilities[place].argmax() == stream[place + 1])
        assert part.loss[row] == pytest.approx(-math.log(probabilities[place, stream[place + 1]]), rel=1e-5)


def test_by_context_every_window_counts(model: Transformer, corpus: PreparedCorpus) -> None:
    """A window at a time: the nats of each target after so many tokens, whichever window would have scored it."""
    part = predict(model, corpus, sequence_length=12, stride=7, rows=3)[1]
    held_out = corpus.validation[part.domain]
    stream = torch.from_numpy(held_out.stream.astype(np.int64))
    document = document_numbers(held_out, corpus.tokenizer.end_of_text)
    expected = np.zeros_like(part.by_context)
    last = len(stream) - 1 - 12
    model.eval()
    for begin in [*range(0, last, 7), last]:
        with torch.no_grad():
            losses = -model(stream[None, begin : begin + 12])[0][0].log_softmax(-1)
        for place in range(12):
            target = stream[begin + place + 1]
            if target != corpus.tokenizer.end_of_text:
                expected[document[begin + place + 1], place] += (losses[place, target].item(), 1)
    np.testing.assert_allclose(part.by_context, expected, rtol=1e-4)


def test_documents_are_numbered_from_end_of_text_to_end_of_text(corpus: PreparedCorpus) -> None:
    held_out = corpus.validation["prose"]
    numbers = document_numbers(held_out, corpus.tokenizer.end_of_text)
    assert numbers[0] == 0
    assert numbers[-1] == len(held_out.documents) - 1
    assert np.count_nonzero(np.diff(numbers)) == len(held_out.documents) - 1


def test_progress_counts_each_scored_token_and_the_mode_is_put_back(model: Transformer, corpus: PreparedCorpus) -> None:
    model.train()
    seen: list[int] = []
    parts = predict(model, corpus, sequence_length=16, stride=8, advance=seen.append)
    assert sum(seen) == sum(len(part.loss) for part in parts)
    assert model.training


def test_a_uniform_model_has_the_loss_of_the_vocabulary(model: Transformer, corpus: PreparedCorpus) -> None:
    with torch.no_grad():
        model.head.weight.zero_()
    for part in predict(model, corpus, sequence_length=16, stride=8):
        np.testing.assert_allclose(part.loss, math.log(320), rtol=1e-6)
        np.testing.assert_allclose(part.confidence, 1 / 320, rtol=1e-5)


def test_losses_that_are_no_numbers_are_refused(model: Transformer, corpus: PreparedCorpus) -> None:
    with torch.no_grad():
        model.embedding.weight.fill_(math.nan)
    with pytest.raises(UserError, match="prose: the model's losses are not finite"):
        predict(model, corpus, sequence_length=16, stride=8)
