"""Run a model over held-out text and keep what it said of every token: its loss, its favourite, and how sure it was."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.config import Precision
from moe.data.batches import validation_batches
from moe.data.prepare import HeldOut, PreparedCorpus
from moe.errors import UserError
from moe.evaluation.intervals import Floats, Ints
from moe.model.transformer import Transformer
from moe.training.evaluate import ROWS
from moe.training.head_loss import BLOCK_BYTES
from moe.training.machine import autocast


@dataclass(frozen=True)
class Predictions:
    """What a model said of the held-out text of one domain; N scored tokens in the order of the text, n documents."""

    domain: str
    n_bytes: Ints
    """[n] bytes of each document"""
    document: Ints
    """[N] the document of each token"""
    target: Ints
    """[N] the token that there was"""
    loss: Floats
    """[N] its cross-entropy in nats"""
    confidence: Floats
    """[N] the probability of the likeliest token"""
    correct: npt.NDArray[np.bool_]
    """[N] whether that was it"""
    by_context: Floats
    """[n, S, 2] nats and tokens of each document by the tokens of context, 1 to S: every target of every window counts
    here, so that each number of tokens of context is told of the same text"""

    @property
    def n_documents(self) -> int:
        """Documents of the held-out text."""
        return len(self.n_bytes)

    def per_document(self, values: npt.NDArray[np.generic] | None = None) -> Floats:
        """[n] the sum of ``values`` [N] over the tokens of each document; without values, how many tokens it has."""
        return np.bincount(self.document, weights=values, minlength=self.n_documents).astype(np.float64)


@torch.no_grad()
def predict(
    model: Transformer,
    corpus: PreparedCorpus,
    *,
    sequence_length: int,
    stride: int,
    precision: Precision = "fp32",
    rows: int = ROWS,
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[Predictions]:
    """The predictions of ``model`` for the held-out text of each domain, in windows as training's validation has them.

    Losses are those of :func:`~moe.training.evaluate.validate`: each text token is scored once, from at least
    ``sequence_length - stride`` tokens. ``advance`` is called with the tokens that were new in each batch. The model's
    mode is restored. Raises UserError where a loss is not finite, and for a stride outside 1 to ``sequence_length``.
    """
    was_training = model.training
    model.eval()
    try:
        # Blocks that are compiled for the batches of training would be compiled again for these.
        with torch.compiler.set_stance("force_eager"):
            return [
                _predict(model, corpus, index, sequence_length, stride, precision, rows, advance)
                for index in range(len(corpus.domains))
            ]
    finally:
        model.train(was_training)


def _predict(
    model: Transformer,
    corpus: PreparedCorpus,
    index: int,
    sequence_length: int,
    stride: int,
    precision: Precision,
    rows: int,
    advance: Callable[[int], object],
) -> Predictions:
    domain = corpus.domains[index]
    held_out = corpus.validation[domain]
    device = model.embedding.weight.device
    end_of_text = corpus.tokenizer.end_of_text
    document_of = document_numbers(held_out, end_of_text)
    n_targets = len(held_out.stream) - 1
    length = min(sequence_length, n_targets)
    by_context = np.zeros((len(held_out.documents), sequence_length, 2))
    columns: dict[str, list[npt.NDArray[np.generic]]] = {name: [] for name in ("document", "target", *PREDICTED)}
    first = 0
    for batch in validation_batches(
        held_out,
        domain=index,
        end_of_text=end_of_text,
        sequence_length=sequence_length,
        stride=stride,
        rows=rows,
    ):
        assert batch.scored is not None
        with autocast(device, precision):
            hidden, _ = model.hidden(batch.tokens.to(device))
            said = predictions_of(model, hidden, batch.targets.to(device))
        begins = [min((first + row) * stride, n_targets - length) for row in range(len(batch.tokens))]
        first += len(batch.tokens)
        document = document_of[np.array(begins)[:, None] + np.arange(length) + 1]
        predicted = {name: values.cpu().numpy() for name, values in zip(PREDICTED, said, strict=True)}
        if not np.isfinite(predicted["loss"]).all():
            raise UserError(f"domain {domain}: the model's losses are not finite: there is nothing to evaluate")
        is_text = (batch.targets != end_of_text).numpy()
        context = np.broadcast_to(np.arange(length), is_text.shape)[is_text]
        np.add.at(by_context, (document[is_text], context, 0), predicted["loss"][is_text])
        np.add.at(by_context, (document[is_text], context, 1), 1)
        scored = batch.scored.numpy()
        for name, values in {"document": document, "target": batch.targets.numpy(), **predicted}.items():
            columns[name].append(values[scored])
        advance(int(scored.sum()))
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Predictions(
        domain=domain,
        n_bytes=np.array([len(text) for text in held_out.documents], dtype=np.int64),
        document=whole["document"].astype(np.int64),
        target=whole["target"].astype(np.int64),
        loss=whole["loss"].astype(np.float64),
        confidence=whole["confidence"].astype(np.float64),
        correct=whole["correct"].astype(np.bool_),
        by_context=by_context,
    )


PREDICTED = ("loss", "confidence", "correct")
"""what :func:`predictions_of` returns"""


def predictions_of(
    model: Transformer, hidden: Float[Tensor, "B S D"], targets: Int[Tensor, "B S"]
) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """(cross-entropy of each target in nats, probability of the likeliest token, whether it is the target).

    Never more than a block of logits is held; their softmax is in float32 at least.
    """
    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    at_once = max(1, BLOCK_BYTES.get(flat.device.type, 64 << 20) // (4 * model.head.weight.shape[0]))
    losses, confidences, correct = [], [], []
    for some, their_targets in zip(torch.split(flat, at_once), torch.split(wanted, at_once), strict=True):
        logits = model.head(some)
        log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        best = log_probabilities.max(dim=-1)
        losses.append(-log_probabilities.gather(1, their_targets[:, None]).squeeze(1))
        confidences.append(best.values.exp())
        correct.append(best.indices == their_targets)
    loss, confidence, right = (torch.cat(parts).view_as(targets) for parts in (losses, confidences, correct))
    return loss, confidence, right


def document_numbers(held_out: HeldOut, end_of_text: int) -> Ints:
    """The number of the document that each token of the stream is of; an end of text begins the one after it."""
    numbers: Ints = np.cumsum(np.asarray(held_out.stream) == end_of_text, dtype=np.int64) - 1
    return numbers
