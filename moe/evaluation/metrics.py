"""What predictions come to: loss, accuracy, calibration, by position and by frequency, each beside what chance gives.

Chance is a model that knows only how often each token is in the training text (the unigram model): it has a loss and
an accuracy of its own, in total and for rare and frequent tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moe.data.prepare import PreparedCorpus
from moe.evaluation.intervals import Estimate, Floats, Ints, over_documents, ratio
from moe.evaluation.predictions import Predictions

CALIBRATION_BINS = 15
"""as in Guo et al. 2017, arXiv 1706.04599"""

FREQUENCY_EDGES = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)
"""occurrences in a million training tokens at which tokens are parted; those that never occur are apart"""
FREQUENCY_LABELS = ("never", "below 1", "1 to 10", "10 to 100", "100 to 1,000", "1,000 to 10,000", "10,000 and more")

COUNTED_AT_ONCE = 1 << 24
"""training tokens, of which there may be more than fit memory as 64-bit numbers"""


@dataclass(frozen=True)
class Unigram:
    """How often each token of the vocabulary is in the training text, as the batches draw it."""

    share: Floats
    """[V] of all training tokens that are text; 0 for those that never occur"""
    n_tokens: int
    """how many training tokens that is told from"""

    @classmethod
    def of(cls, corpus: PreparedCorpus) -> "Unigram":
        """Counted from the training streams, each domain with its share of the batches; ends of text left out."""
        share, n_tokens = np.zeros(corpus.tokenizer.size), 0
        for domain, stream in corpus.train.items():
            counts = np.zeros(corpus.tokenizer.size)
            for start in range(0, len(stream), COUNTED_AT_ONCE):
                counts += np.bincount(stream[start : start + COUNTED_AT_ONCE], minlength=len(counts))
            counts[corpus.tokenizer.end_of_text] = 0
            share += float(corpus.shares[domain]) * counts / counts.sum()
            n_tokens += int(counts.sum())
        return cls(share / share.sum(), n_tokens)

    @cached_property
    def loss(self) -> Floats:
        """[V] nats of each token: -log of its share, one occurrence added to each so that none is impossible."""
        smoothed = self.share * self.n_tokens + 1
        loss: Floats = -np.log(smoothed / smoothed.sum())
        return loss

    @property
    def favourite(self) -> int:
        """The most frequent token."""
        return int(self.share.argmax())


@dataclass(frozen=True)
class Bin:
    """The loss on the tokens that have something in common."""

    label: str
    low: float
    """where the bin begins: tokens of context, or occurrences in a million"""
    tokens: int
    cross_entropy: Estimate
    """nats per token"""
    unigram: float
    """nats per token of the unigram model on the same tokens; NaN where it is no matter"""


@dataclass(frozen=True)
class Reliability:
    """The tokens of whose favourite a model was about equally sure."""

    confidence: float
    """mean probability of the favourite; NaN for an empty bin"""
    accuracy: Estimate
    """share of the favourites that were right"""
    tokens: int


@dataclass(frozen=True)
class Summary:
    """What a model is worth on the held-out text of one domain, or of all together."""

    name: str
    documents: int
    tokens: int
    n_bytes: int
    cross_entropy: Estimate
    """nats per token"""
    bits_per_byte: Estimate
    accuracy: Estimate
    """share of the tokens that were the likeliest one (top-1)"""
    calibration_error: Estimate
    """expected calibration error: see :func:`calibration_error`"""
    calibrated: float
    """what the calibration error of a perfectly calibrated model would be on so many tokens"""
    unigram_cross_entropy: float
    unigram_bits_per_byte: float
    unigram_accuracy: float
    by_context: tuple[Bin, ...]
    """by the tokens of context that there were"""
    by_frequency: tuple[Bin, ...]
    """by how often the token is in the training text"""
    reliability: tuple[Reliability, ...]


def summarise(name: str, predictions: Sequence[Predictions], unigram: Unigram) -> Summary:
    """All metrics on the text of ``predictions``, with intervals over its documents; several domains are strata."""
    domain = np.concatenate([np.full(part.n_documents, index) for index, part in enumerate(predictions)])
    n_bytes = np.concatenate([part.n_bytes for part in predictions])

    def per_document(values: Sequence[npt.NDArray[np.generic]] | None = None) -> Floats:
        parts = [part.per_document(None if values is None else values[i]) for i, part in enumerate(predictions)]
        return np.concatenate(parts)

    tokens = per_document()
    nats = per_document([part.loss for part in predictions])
    correct = per_document([part.correct for part in predictions])
    unigram_nats = sum(float(unigram.loss[part.target].sum()) for part in predictions)
    favourites = sum(int((part.target == unigram.favourite).sum()) for part in predictions)

    def share_of(sums: Floats, whole: Floats) -> Estimate:
        return over_documents(ratio, np.stack([sums, whole], axis=1), domain)

    calibration = np.concatenate([calibration_sums(part) for part in predictions])
    return Summary(
        name=name,
        documents=len(domain),
        tokens=int(tokens.sum()),
        n_bytes=int(n_bytes.sum()),
        cross_entropy=share_of(nats, tokens),
        bits_per_byte=share_of(nats / math.log(2), n_bytes.astype(np.float64)),
        accuracy=share_of(correct, tokens),
        calibration_error=over_documents(calibration_error, calibration.reshape(len(calibration), -1), domain),
        calibrated=calibrated_error([part.confidence for part in predictions]),
        unigram_cross_entropy=unigram_nats / float(tokens.sum()),
        unigram_bits_per_byte=unigram_nats / math.log(2) / float(n_bytes.sum()),
        unigram_accuracy=favourites / float(tokens.sum()),
        by_context=_by_context(predictions, domain),
        by_frequency=_by_frequency(predictions, domain, unigram),
        reliability=_reliability(calibration, domain),
    )


# -------------------------------------------------------------------------------------------------------- calibration


def confidence_bins(confidence: Floats) -> Ints:
    """The bin of each confidence: bin m of M holds those in (m / M, (m + 1) / M]."""
    bins: Ints = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    return bins


def calibration_sums(predictions: Predictions) -> Floats:
    """[n, M, 3] of each document and bin of confidence: tokens, the sum of their confidence, those that were right."""
    place = predictions.document * CALIBRATION_BINS + confidence_bins(predictions.confidence)
    size = predictions.n_documents * CALIBRATION_BINS
    sums = [
        np.bincount(place, weights=values, minlength=size)
        for values in (None, predictions.confidence, predictions.correct)
    ]
    stacked: Floats = np.stack(sums, axis=1).astype(np.float64).reshape(predictions.n_documents, CALIBRATION_BINS, 3)
    return stacked


def calibration_error(sums: Floats) -> Floats:
    """The expected calibration error of the ``sums`` [..., M · 3] of :func:`calibration_sums`.

    Σ n_m / N |accuracy_m - mean confidence_m| over the bins m (Guo et al. 2017, eq. 3, with the likeliest token as the
    prediction); 0 is a model that is right as often as it thinks.
    """
    bins = sums.reshape(*sums.shape[:-1], -1, 3)
    gaps = np.abs(bins[..., 2] - bins[..., 1]).sum(axis=-1)
    error: Floats = gaps / bins[..., 0].sum(axis=-1)
    return error


def calibrated_error(confidences: Sequence[Floats]) -> float:
    """The calibration error that a perfectly calibrated model is expected to show, as if tokens were independent.

    In a bin, right less expected is then about normal with variance Σ c (1 - c), and E|x| = σ √(2 / π).
    """
    confidence = np.concatenate(confidences)
    variance = np.bincount(
        confidence_bins(confidence), weights=confidence * (1 - confidence), minlength=CALIBRATION_BINS
    )
    return float(np.sqrt(2 / math.pi * variance).sum() / len(confidence))


def _reliability(sums: Floats, domain: Ints) -> tuple[Reliability, ...]:
    bins = []
    for index in range(CALIBRATION_BINS):
        tokens, confidence, _ = sums[:, index].sum(axis=0)
        accuracy = over_documents(ratio, sums[:, index][:, [2, 0]], domain, counted=sums[:, index, 0] > 0)
        bins.append(Reliability(confidence / tokens if tokens else math.nan, accuracy, int(tokens)))
    return tuple(bins)


# --------------------------------------------------------------------------------------------- position and frequency


def _by_context(predictions: Sequence[Predictions], domain: Ints) -> tuple[Bin, ...]:
    """A bin for each power of two: 1, 2, 3 to 4, 5 to 8, ... tokens of context."""
    # [n, S, 2]
    sums = np.concatenate([part.by_context for part in predictions])
    bins = []
    for low, high in context_ranges(sums.shape[1]):
        own = sums[:, low - 1 : high].sum(axis=1)
        bins.append(
            Bin(
                label=str(low) if low == high else f"{low} to {high}",
                low=low,
                tokens=int(own[:, 1].sum()),
                cross_entropy=over_documents(ratio, own, domain, counted=own[:, 1] > 0),
                unigram=math.nan,
            )
        )
    return tuple(bins)


def context_ranges(longest: int) -> list[tuple[int, int]]:
    """(1, 1), (2, 2), (3, 4), (5, 8), ... up to ``longest``, the first and the last number of each."""
    ranges, low = [], 1
    while low <= longest:
        high = min(longest, 1 << (low - 1).bit_length())
        ranges.append((low, high))
        low = high + 1
    return ranges


def _by_frequency(predictions: Sequence[Predictions], domain: Ints, unigram: Unigram) -> tuple[Bin, ...]:
    bin_of = frequency_bins(unigram.share)
    bins = []
    for index, label in enumerate(FREQUENCY_LABELS):
        has = [bin_of[part.target] == index for part in predictions]
        tokens = np.concatenate([part.per_document(own) for part, own in zip(predictions, has, strict=True)])
        nats = np.concatenate([part.per_document(part.loss * own) for part, own in zip(predictions, has, strict=True)])
        known = sum(float(unigram.loss[part.target[own]].sum()) for part, own in zip(predictions, has, strict=True))
        n_tokens = int(tokens.sum())
        bins.append(
            Bin(
                label=label,
                low=(0.0, 0.0, *FREQUENCY_EDGES)[index],
                tokens=n_tokens,
                cross_entropy=over_documents(ratio, np.stack([nats, tokens], axis=1), domain, counted=tokens > 0),
                unigram=known / n_tokens if n_tokens else math.nan,
            )
        )
    return tuple(bins)


def frequency_bins(share: Floats) -> Ints:
    """[V] the place in ``FREQUENCY_LABELS`` of each token, from its share of the training tokens."""
    bins: Ints = np.where(share == 0, 0, 1 + np.digitize(share * 1e6, FREQUENCY_EDGES))
    return bins
