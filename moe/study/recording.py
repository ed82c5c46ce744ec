"""Run a model over held-out text and write down, for every token, where it went and what it cost."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import Precision
from moe.data.batches import Batch, validation_batches
from moe.data.prepare import HeldOut, PreparedCorpus
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError
from moe.model.experts.weights import compute_dtype
from moe.model.routing import Routing
from moe.model.transformer import Transformer
from moe.study.record import EMPTY, Layer, Record
from moe.study.storage import RecordWriter
from moe.training.head_loss import BLOCK_BYTES
from moe.training.machine import autocast

ROWS = 32
"""sequences in a batch: routers that compare tokens compare those of so many"""

SAMPLE_TOKENS = 8192


def record_validation(
    model: Transformer,
    corpus: PreparedCorpus,
    folder: Path,
    *,
    sequence_length: int,
    precision: Precision = "fp32",
    scores: bool = True,
    tokens: int | None = None,
    source: str = "",
    step: int | None = None,
    advance: Callable[[int], object] = lambda rows: None,
) -> None:
    """Write the record of the held-out text of every domain to ``folder``, which must not exist.

    The text is cut into windows of ``sequence_length`` tokens that do not overlap, and each is a sequence of the
    record; only where the last window is moved back to end with the text are its first tokens context and no rows.
    Every text token is the target of one row. The end of a text is never a target, so a text's last token is no row,
    and the positions in a sequence have a gap there.

    ``tokens`` limits the record to about so many, whole windows, as many from each domain, spread evenly over its text.
    ``advance`` is called with the new rows after each batch. Nothing here draws a random number and the model's mode is
    restored, so training goes on as if nothing had been recorded; the same model gives the same record. Memory does not
    grow with the text. Raises UserError for a model without mixture layers, and what
    :class:`~moe.study.storage.RecordWriter` raises.
    """
    if not model.config.moe_layers:
        raise UserError("model.dense_twin: is true: a dense model has no routing to record")
    vocabulary = vocabulary_of(corpus.tokenizer, model.head.weight.shape[0])
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    try:
        # Compiled for training's shapes, blocks would be compiled again for these.
        with RecordWriter(folder) as writer, torch.no_grad(), torch.compiler.set_stance("force_eager"):
            first_sequence = 0
            for batch in held_out_windows(corpus, sequence_length, tokens):
                with autocast(device, precision):
                    hidden, routings = model.hidden(batch.tokens.to(device))
                    losses, predicted = losses_and_predictions(
                        hidden, model.head.weight, batch.targets.to(device), model.head.bias
                    )
                part = Record(
                    **_columns_of(batch, losses, predicted, first_sequence),
                    domains=corpus.domains,
                    layers=tuple(
                        layer_of(block, routing, _rows_of(batch), scores=scores)
                        for block, routing in zip(model.config.moe_layers, routings, strict=True)
                    ),
                    vocabulary=vocabulary,
                    source=source,
                    step=step,
                )
                writer.append(part)
                advance(part.n_tokens)
                first_sequence += len(batch.tokens)
    finally:
        model.train(was_training)


def record_sample(
    model: Transformer,
    corpus: PreparedCorpus,
    records: Path,
    step: int,
    *,
    sequence_length: int,
    precision: Precision = "fp32",
    tokens: int = SAMPLE_TOKENS,
    source: str = "",
) -> Path:
    """Write the small record of ``step`` to ``records/step-00000250`` and so on, and return that folder.

    Its tokens, about as many as ``tokens``, are the same at each step, and scores are left out. To be called between
    two training steps: what :func:`record_validation` says of random numbers and the mode holds. A record of the same
    step, of a run that was stopped since and goes on from an earlier checkpoint, is replaced.
    """
    folder = records / f"step-{step:08d}"
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise UserError(f"{folder}: this old record cannot be removed ({error}); remove it") from error
    record_validation(
        model,
        corpus,
        folder,
        sequence_length=sequence_length,
        precision=precision,
        scores=False,
        tokens=tokens,
        source=source,
        step=step,
    )
    return folder


def _columns_of(batch: Batch, losses: Tensor, predicted: Tensor, first_sequence: int) -> dict[str, npt.NDArray[Any]]:
    """The columns of a record that are not of a layer; the first sequence of ``batch`` is number ``first_sequence``."""
    n_sequences, length = batch.tokens.shape
    columns = {
        "token_id": batch.tokens,
        "target_id": batch.targets,
        "predicted_id": predicted,
        "position": torch.arange(length)[None],
        "sequence": torch.arange(first_sequence, first_sequence + n_sequences)[:, None],
        "domain": batch.domain[:, None],
    }
    row = _rows_of(batch)
    ints = {
        name: values.expand_as(batch.tokens).flatten().to(torch.int32).cpu().numpy()[row]
        for name, values in columns.items()
    }
    return {**ints, "loss": losses.flatten().float().cpu().numpy()[row]}


def _rows_of(batch: Batch) -> npt.NDArray[np.bool_]:
    """[B · S] which tokens are rows: those whose targets count."""
    assert batch.scored is not None
    return batch.scored.flatten().numpy()


def layer_of(block: int, routing: Routing, row: npt.NDArray[np.bool_], *, scores: bool) -> Layer:
    """What a record keeps of the routing of T tokens, those of which ``row`` [T] is True."""
    selected, present = routing.selected, routing.present
    if present is not None:
        selected = selected.masked_fill(~present, EMPTY)
    dropped = torch.zeros_like(selected, dtype=torch.bool) if routing.dropped is None else routing.dropped
    return Layer(
        block=block,
        n_experts=routing.n_experts,
        selected=selected.to(torch.int32).cpu().numpy()[row],
        weights=routing.weights.float().cpu().numpy()[row],
        dropped=dropped.cpu().numpy()[row],
        scores=routing.scores.half().cpu().numpy()[row] if scores else None,
    )


def losses_and_predictions(
    hidden: Float[Tensor, "B S D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "B S"],
    bias: Float[Tensor, " V"] | None = None,
) -> tuple[Float[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Cross-entropy of each target in nats, and the likeliest token, under the logits ``hidden`` Wᵀ + ``bias``.

    Never more than a block of logits is held. Losses are those of :func:`~moe.training.head_loss.token_losses`.
    """
    dtype = compute_dtype(hidden)
    rows, matrix, wanted = hidden.flatten(0, 1).to(dtype), weight.to(dtype).t(), targets.flatten()
    at_once = max(1, BLOCK_BYTES.get(rows.device.type, 64 << 20) // (4 * len(weight)))
    losses, predictions = [], []
    for some, their_targets in zip(torch.split(rows, at_once), torch.split(wanted, at_once), strict=True):
        logits = some @ matrix if bias is None else torch.addmm(bias.to(dtype), some, matrix)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(-logits.log_softmax(dim=-1).gather(1, their_targets[:, None]).squeeze(1))
        # On a CPU three times as fast as argmax.
        predictions.append(logits.max(dim=-1).indices)
    return torch.cat(losses).view_as(targets), torch.cat(predictions).view_as(targets)


def vocabulary_of(tokenizer: Tokenizer, size: int) -> tuple[str, ...]:
    """The text of each of ``size`` ids; ``<id>`` for those that a model has and its tokenizer has not."""
    return tuple(tokenizer.decode([index]) if index < tokenizer.size else f"<{index}>" for index in range(size))


def held_out_windows(corpus: PreparedCorpus, sequence_length: int, tokens: int | None = None) -> Iterator[Batch]:
    """Batches of windows over each domain's held-out text: those that a record of so many ``tokens`` is of.

    None: all of it; else about so many, in whole windows, as many from each domain, spread evenly over its text.
    """
    for domain, held_out in enumerate(corpus.validation.values()):

        def windows(rows: int, domain: int = domain, held_out: HeldOut = held_out) -> Iterator[Batch]:
            return validation_batches(
                held_out,
                domain=domain,
                end_of_text=corpus.tokenizer.end_of_text,
                sequence_length=sequence_length,
                stride=sequence_length,
                rows=rows,
            )

        if tokens is None:
            yield from windows(ROWS)
            continue
        n_windows = sum(1 for _ in windows(1))
        wanted = min(n_windows, max(1, round(tokens / len(corpus.validation) / sequence_length)))
        places = {index * n_windows // wanted for index in range(wanted)}
        chosen = [window for index, window in enumerate(windows(1)) if index in places]
        for first in range(0, wanted, ROWS):
            yield _stacked(chosen[first : first + ROWS])


def _stacked(windows: list[Batch]) -> Batch:
    return Batch(
        tokens=torch.cat([window.tokens for window in windows]),
        targets=torch.cat([window.targets for window in windows]),
        domain=torch.cat([window.domain for window in windows]),
        scored=torch.cat([window.scored for window in windows if window.scored is not None]),
    )
