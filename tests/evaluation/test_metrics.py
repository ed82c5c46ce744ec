"""Metrics on predictions made by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from moe.data.prepare import PreparedCorpus
from moe.evaluation.metrics import (
    Unigram,
    calibrated_error,
    calibration_error,
    calibration_sums,
    confidence_bins,
    context_ranges,
    frequency_bins,
    summarise,
)
from moe.evaluation.predictions import Predictions

UNIGRAM = Unigram(np.array([0.0, 0.5, 0.25, 0.25]), n_tokens=4)
"""smoothed by one occurrence each: (0 + 1, 2 + 1, 1 + 1, 1 + 1) / 8"""


def predictions(
    *, document: list[int], loss: list[float], n_bytes: list[int], domain: str = "a", **columns: list[float]
) -> Predictions:
    """N tokens; unless said the targets are 1, the confidences a half, and nothing is correct."""
    n_tokens = len(document)

    def column(name: str, dtype: type, default: float) -> np.ndarray:
        return np.array(columns.get(name, [default] * n_tokens), dtype=dtype)

    by_context = np.zeros((len(n_bytes), 8, 2))
    for number, nats in zip(document, loss, strict=True):
        by_context[number, 2] += (nats, 1)
    return Predictions(
        domain=domain,
        n_bytes=np.array(n_bytes),
        document=np.array(document),
        target=column("target", int, 1),
        loss=np.array(loss, dtype=float),
        confidence=column("confidence", float, 0.5),
        correct=column("correct", bool, 0),
        by_context=by_context,
    )


def test_loss_and_bits_are_sums_over_sums() -> None:
    """Two documents: 1 + 2 + 3 nats in three tokens of 6 bytes, and 4 in one of 4."""
    found = summarise("a", [predictions(document=[0, 0, 0, 1], loss=[1, 2, 3, 4], n_bytes=[6, 4])], UNIGRAM)
    assert (found.documents, found.tokens, found.n_bytes) == (2, 4, 10)
    assert found.cross_entropy.value == 10 / 4
    # Without either document 4 or 2 nats a token: the variance is 1/2 (1² + 1²).
    assert found.cross_entropy.half_width == pytest.approx(12.7062, abs=1e-4)
    assert found.bits_per_byte.value == pytest.approx(10 / math.log(2) / 10)
    # Without either document 1 nat a byte: no doubt is left.
    assert found.bits_per_byte.half_width == pytest.approx(0, abs=1e-12)


def test_accuracy_and_its_chance() -> None:
    """Three of four right; the most frequent token, 1, is the target of two of them."""
    part = predictions(document=[0, 0, 1, 1], loss=[1] * 4, n_bytes=[1, 1], correct=[1, 0, 1, 1], target=[1, 2, 1, 3])
    found = summarise("a", [part], UNIGRAM)
    assert found.accuracy.value == 0.75
    assert found.unigram_accuracy == 0.5
    # -ln(3/8) twice and -ln(2/8) twice.
    assert found.unigram_cross_entropy == pytest.approx((2 * math.log(8 / 3) + 2 * math.log(4)) / 4)
    assert found.unigram_bits_per_byte == pytest.approx((2 * math.log2(8 / 3) + 2 * math.log2(4)) / 2)


def test_calibration_error_by_hand() -> None:
    """Bins of 1/15: 0.9 and 0.92 share (13/15, 14/15], one of the two right; 0.3 is alone and right, 1.0 and wrong.

    |1 - 1.82| + |1 - 0.3| + |0 - 1| over four tokens.
    """
    part = predictions(
        document=[0, 0, 1, 1], loss=[1] * 4, n_bytes=[1, 1], confidence=[0.9, 0.92, 0.3, 1.0], correct=[1, 0, 1, 0]
    )
    sums = calibration_sums(part)
    assert sums.shape == (2, 15, 3)
    assert calibration_error(sums.sum(axis=0).ravel()) == pytest.approx((0.82 + 0.7 + 1.0) / 4)
    assert summarise("a", [part], UNIGRAM).calibration_error.value == pytest.approx((0.82 + 0.7 + 1.0) / 4)


def test_a_model_that_is_right_as_often_as_it_thinks_has_none() -> None:
    part = predictions(document=[0] * 4, loss=[1] * 4, n_bytes=[1], confidence=[0.75] * 4, correct=[1, 1, 1, 0])
    assert summarise("a", [part], UNIGRAM).calibration_error.value == 0


def test_bins_of_confidence_hold_their_upper_end() -> None:
    assert confidence_bins(np.array([1e-9, 1 / 15, 1.0001 / 15, 0.5, 1.0])).tolist() == [0, 0, 1, 7, 14]


def test_what_calibrated_models_show_is_what_draws_from_one_show() -> None:
    """20,000 tokens of one confidence: E|right - expected| / N = sqrt(2 / pi) sqrt(N 0.3 · 0.7) / N."""
    assert calibrated_error([np.full(20_000, 0.3)]) == pytest.approx(math.sqrt(2 / math.pi * 0.21 / 20_000))
    generator = np.random.default_rng(0)
    confidence = generator.random(3_000)
    part = predictions(document=[0] * 3_000, loss=[1] * 3_000, n_bytes=[1], confidence=confidence.tolist())
    seen = []
    for _ in range(200):
        drawn = replace(part, correct=generator.random(3_000) < confidence)
        seen.append(float(calibration_error(calibration_sums(drawn).ravel())))
    assert calibrated_error([confidence]) == pytest.approx(np.mean(seen), rel=0.05)


def test_reliability_is_told_bin_by_bin() -> None:
    part = predictions(
        document=[0, 0, 1], loss=[1] * 3, n_bytes=[1, 1], confidence=[0.91, 0.93, 0.3], correct=[1, 0, 1]
    )
    bins = summarise("a", [part], UNIGRAM).reliability
    assert bins[13].tokens == 2 and bins[13].confidence == pytest.approx(0.92) and bins[13].accuracy.value == 0.5
    assert math.isnan(bins[13].accuracy.half_width)  # both tokens are of one document
    assert bins[0].tokens == 0 and math.isnan(bins[0].confidence)
    assert sum(bin.tokens for bin in bins) == 3


def test_context_is_told_by_powers_of_two() -> None:
    assert context_ranges(1) == [(1, 1)]
    assert context_ranges(8) == [(1, 1), (2, 2), (3, 4), (5, 8)]
    assert context_ranges(11) == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 11)]
    found = summarise("a", [predictions(document=[0, 1], loss=[1, 2], n_bytes=[1, 1])], UNIGRAM).by_context
    assert [bin.label for bin in found] == ["1", "2", "3 to 4", "5 to 8"]
    assert [bin.tokens for bin in found] == [0, 0, 2, 0]
    assert found[2].cross_entropy.value == 1.5
    assert math.isnan(found[0].cross_entropy.value)


def test_frequency_is_told_by_powers_of_ten() -> None:
    """Shares of the training tokens, in a million: 0, 0.5, 1, 9.99, 10, 20,000."""
    share = np.array([0, 0.5, 1, 9.99, 10, 20_000]) / 1e6
    assert frequency_bins(share).tolist() == [0, 1, 2, 2, 3, 6]
    part = predictions(document=[0, 0, 1], loss=[9, 1, 2], n_bytes=[1, 1], target=[0, 1, 2])
    found = {bin.label: bin for bin in summarise("a", [part], UNIGRAM).by_frequency if bin.tokens}
    assert found["never"].tokens == 1 and found["never"].cross_entropy.value == 9
    assert found["never"].unigram == pytest.approx(math.log(8))  # one of four tokens and four added ones
    assert found["10,000 and more"].tokens == 2 and found["10,000 and more"].cross_entropy.value == 1.5
    assert found["10,000 and more"].unigram == pytest.approx((math.log(8 / 3) + math.log(4)) / 2)


def test_all_text_is_all_tokens_and_its_interval_is_within_domains() -> None:
    """Domains that differ, each of two equal documents: nothing is left in doubt."""
    one = predictions(document=[0, 1], loss=[1, 1], n_bytes=[1, 1])
    other = replace(predictions(document=[0, 1, 1], loss=[3, 3, 3], n_bytes=[1, 2]), domain="b")
    pooled = summarise("all text", [one, other], UNIGRAM)
    assert pooled.cross_entropy.value == pytest.approx(11 / 5)
    assert pooled.documents == 4
    # Leaving out a document changes how much each domain weighs: (10/4, 10/4) and (8/4, 5/3), of mean 11/6.
    variance = 1 / 2 * 2 * (1 / 6) ** 2
    assert pooled.cross_entropy.half_width == pytest.approx(12.7062 * math.sqrt(variance), rel=1e-5)


def test_the_unigram_model_is_counted_in_the_training_text_as_batches_draw_it(corpus: PreparedCorpus) -> None:
    """prose is drawn 1 time in 4 and lists 3: an end of line is in lists alone."""
    found = Unigram.of(corpus)
    assert found.share.sum() == pytest.approx(1)
    assert found.share[corpus.tokenizer.end_of_text] == 0
    [newline] = corpus.tokenizer.encode("\n")
    text = corpus.train["lists"][corpus.train["lists"] != corpus.tokenizer.end_of_text]
    assert newline not in corpus.train["prose"]
    assert found.share[newline] == pytest.approx(0.75 * (text == newline).mean())
    assert np.exp(-found.loss).sum() == pytest.approx(1)
    assert found.share[found.favourite] == found.share.max()
