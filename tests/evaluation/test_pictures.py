"""The picture of held-out text: every number of the table has its bar or its point, and files are written."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe.data.prepare import PreparedCorpus
from moe.evaluation.metrics import Summary, Unigram, summarise
from moe.evaluation.pictures import held_out_picture
from moe.evaluation.predictions import Predictions
from moe.study.plots import require_browser, save_all

pytest.importorskip("plotly")

CHROMIUM = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))


@pytest.fixture(scope="module")
def predictions(corpus: PreparedCorpus) -> list[Predictions]:
    """Of a model that is sure by half and right in a third, drawn at random."""
    source = np.random.default_rng(0)
    parts = []
    for domain in corpus.domains:
        n_documents, n_tokens = len(corpus.validation[domain].documents), 120
        by_context = np.zeros((n_documents, 32, 2))
        by_context[..., 0], by_context[..., 1] = source.random((n_documents, 32)) + 2, 1
        parts.append(
            Predictions(
                domain=domain,
                n_bytes=np.full(n_documents, 100),
                document=np.sort(np.arange(n_tokens) % n_documents),
                target=source.integers(0, corpus.tokenizer.size, n_tokens),
                loss=source.random(n_tokens) + 2,
                confidence=source.random(n_tokens),
                correct=source.random(n_tokens) < 1 / 3,
                by_context=by_context,
            )
        )
    return parts


@pytest.fixture(scope="module")
def domains(predictions: list[Predictions], corpus: PreparedCorpus) -> list[Summary]:
    return [summarise(part.domain, [part], Unigram.of(corpus)) for part in predictions]


@pytest.fixture(scope="module")
def pooled(predictions: list[Predictions], corpus: PreparedCorpus) -> Summary:
    return summarise("all text", predictions, Unigram.of(corpus))


def test_bars_are_the_numbers_of_the_table_and_marks_are_chance(domains: list[Summary], pooled: Summary) -> None:
    figure = held_out_picture("title", "subtitle", domains, pooled)

    bars, chance = figure.data[:6:2], figure.data[1:6:2]
    everything = [pooled, *reversed(domains)]
    for bar, mark, name, of_chance in zip(
        bars,
        chance,
        ("bits_per_byte", "accuracy", "calibration_error"),
        ("unigram_bits_per_byte", "unigram_accuracy", "calibrated"),
        strict=True,
    ):
        assert list(bar.y) == list(mark.y) == [summary.name for summary in everything]
        assert list(bar.x) == [getattr(summary, name).value for summary in everything]
        assert list(bar.error_x.array) == [getattr(summary, name).half_width for summary in everything]
        assert list(mark.x) == [getattr(summary, of_chance) for summary in everything]


def test_curves_are_those_of_all_text(domains: list[Summary], pooled: Summary) -> None:
    _, _, _, _, _, _, context, frequency, chance, _, reliability = held_out_picture("t", "s", domains, pooled).data

    assert list(context.x) == [1, 2, 3, 5, 9, 17]
    assert list(context.y) == [bin.cross_entropy.value for bin in pooled.by_context]
    shown = [bin for bin in pooled.by_frequency if bin.tokens]
    assert list(frequency.x) == list(chance.x) == [bin.label for bin in shown]
    assert list(frequency.y) == [bin.cross_entropy.value for bin in shown]
    assert list(chance.y) == [bin.unigram for bin in shown]
    assert list(reliability.x) == [bin.confidence for bin in pooled.reliability if bin.tokens]


def test_of_one_domain_there_is_one_bar_and_an_unknown_interval_has_no_whisker(
    predictions: list[Predictions], corpus: PreparedCorpus
) -> None:
    part = predictions[0]
    of_one = Predictions(
        part.domain,
        part.n_bytes.sum(keepdims=True),
        part.document * 0,
        part.target,
        part.loss,
        part.confidence,
        part.correct,
        part.by_context.sum(axis=0, keepdims=True),
    )
    summary = summarise("all text", [of_one], Unigram.of(corpus))
    assert math.isnan(summary.bits_per_byte.half_width)

    figure = held_out_picture("title", "subtitle", [summary], summary)

    assert list(figure.data[0].y) == ["all text"]
    assert list(figure.data[0].error_x.array) == [0]


def test_an_interval_that_is_very_wide_does_not_make_all_bars_short(domains: list[Summary], pooled: Summary) -> None:
    """The axis ends where one and a half times the longest bar or chance does, at most."""
    figure = held_out_picture("title", "subtitle", domains, pooled)

    for number, axis in enumerate((figure.layout.xaxis, figure.layout.xaxis2, figure.layout.xaxis3)):
        longest = max(*figure.data[2 * number].x, *figure.data[2 * number + 1].x)
        assert longest < axis.range[1] <= 1.08 * 1.5 * longest + 1e-9


def test_html_needs_neither_network_nor_browser(domains: list[Summary], pooled: Summary, tmp_path: Path) -> None:
    save_all({tmp_path / "held-out.html": held_out_picture("held-out text", "subtitle", domains, pooled)})

    page = (tmp_path / "held-out.html").read_text(encoding="utf-8")
    assert "held-out text" in page
    assert not re.search(r"<script[^>]*\ssrc=", page)


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="pictures are drawn by Chromium, and there is none")
def test_a_picture_is_drawn(domains: list[Summary], pooled: Summary, tmp_path: Path) -> None:
    require_browser()

    save_all({tmp_path / "held-out.png": held_out_picture("held-out text", "subtitle", domains, pooled)})

    assert (tmp_path / "held-out.png").read_bytes().startswith(b"\x89PNG")
