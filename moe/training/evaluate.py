"""Validation: the loss of every held-out text token, per domain, and the load of every expert on the way."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import Precision
from moe.data.batches import validation_batches
from moe.data.prepare import PreparedCorpus
from moe.model.routing import LoadSummary, Routing, summarise_layers
from moe.model.transformer import Transformer
from moe.parallel.pipeline import Pipeline
from moe.training.head_loss import model_token_losses
from moe.training.machine import autocast

ROWS = 32


@dataclass(frozen=True)
class Score:
    """The loss on some held-out text."""

    nats: float
    """sum of the cross-entropy over the scored tokens; no auxiliary loss"""
    tokens: int
    """tokens scored: every token of the text once, ends of text not"""
    n_bytes: int
    """bytes of the text"""

    @property
    def cross_entropy(self) -> float:
        """Nats per token: it depends on the tokenizer."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: comparable between tokenizers, and with a compressor."""
        return self.nats / math.log(2) / self.n_bytes

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.n_bytes + other.n_bytes)


@dataclass(frozen=True)
class Validation:
    """The score of each domain, and how the mixture layers were used."""

    domains: dict[str, Score]
    counts: Int[Tensor, "L E"] | None
    """assignments to each expert over all domains; None without mixture layers"""
    dropped: list[int]
    """dropped assignments of each mixture layer"""
    mlps_per_token: list[float]
    """expert MLPs that computed a token, on average, of each mixture layer: neither dropped nor special ones"""
    without_mlp: list[float]
    """share of the tokens of each mixture layer that no expert's MLP computed"""

    @property
    def pooled(self) -> Score:
        """The score on all held-out text together."""
        return sum(self.domains.values(), Score(0.0, 0, 0))

    @property
    def load(self) -> list[LoadSummary]:
        """The load of each mixture layer."""
        return summarise_layers(self.counts, self.dropped)


@torch.no_grad()
def validate(
    model: Transformer,
    corpus: PreparedCorpus,
    sequence_length: int,
    stride: int,
    precision: Precision,
    should_stop: Callable[[], bool] = lambda: False,
    pipeline: Pipeline | None = None,
) -> Validation | None:
    """Score all held-out text; None if ``should_stop`` said so on the way. Leaves the model's mode as it was.

    Every text token is scored once, from at least ``sequence_length - stride`` tokens of context. Nothing here draws a
    random number, so training goes on as if there had been no validation. ``pipeline`` has the blocks that are not
    here; all its ranks validate together, and know the same in the end.
    """
    device = next(model.parameters()).device
    scores: dict[str, Score] = {}
    counts = dropped = computed = without = None
    routed = 0
    was_training = model.training
    model.eval()
    try:
        for index, (domain, held_out) in enumerate(corpus.validation.items()):
            nats, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
            for batch in validation_batches(
                held_out,
                domain=index,
                end_of_text=corpus.tokenizer.end_of_text,
                sequence_length=sequence_length,
                stride=stride,
                rows=ROWS,
            ):
                if should_stop():
                    return None
                assert batch.scored is not None
                # Blocks that are compiled for the batches of training would be compiled again for these.
                with autocast(device, precision), torch.compiler.set_stance("force_eager"):
                    hidden, routings = _hidden(model, batch.tokens.to(device), pipeline)
                    if hidden is not None:
                        losses = model_token_losses(model, hidden, batch.targets.to(device))
                        nats += losses.double().masked_fill(~batch.scored.to(device), 0.0).sum()
                tokens += int(batch.scored.sum())
                if routings:
                    batch_counts = torch.stack([routing.counts() for routing in routings])
                    batch_dropped = torch.stack([routing.dropped_count() for routing in routings])
                    counts = batch_counts if counts is None else counts + batch_counts
                    dropped = batch_dropped if dropped is None else dropped + batch_dropped
                    batch_computed = torch.stack([mlps_computed(routing) for routing in routings])
                    computed = batch_computed if computed is None else computed + batch_computed
                    batch_without = torch.stack([tokens_without_mlp(routing) for routing in routings])
                    without = batch_without if without is None else without + batch_without
                routed += batch.tokens.numel()
            nats = nats if pipeline is None else pipeline.sum(nats)
            scores[domain] = Score(float(nats), tokens, held_out.n_bytes)
    finally:
        model.train(was_training)
    if pipeline is not None and model.config.moe_layers:
        nothing = torch.zeros(0, model.config.routed_experts, dtype=torch.int64, device=device)
        counts = pipeline.of_all_mixtures(nothing if counts is None else counts)
        dropped, computed, without = (
            pipeline.of_all_mixtures(nothing[:, 0] if seen is None else seen) for seen in (dropped, computed, without)
        )
    return Validation(
        scores,
        None if counts is None else counts.cpu(),
        [] if dropped is None else dropped.tolist(),
        [] if computed is None else (computed.double() / routed).tolist(),
        [] if without is None else (without.double() / routed).tolist(),
    )


def _hidden(
    model: Transformer, tokens: Int[Tensor, "B S"], pipeline: Pipeline | None
) -> tuple[Float[Tensor, "B S D"] | None, list[Routing]]:
    """The hidden states, or None where they end up on another rank; and the routings of the layers that are here."""
    return model.hidden(tokens) if pipeline is None else pipeline.forward(model, tokens)


def mlps_computed(routing: Routing) -> Int[Tensor, ""]:
    """Assignments that an expert's MLP computes: of real tokens, not dropped, to no special expert."""
    executed = routing.executed
    if executed is None:
        return torch.full((), routing.selected.numel(), dtype=torch.int64, device=routing.selected.device)
    return executed.sum()


def tokens_without_mlp(routing: Routing) -> Int[Tensor, ""]:
    """Real tokens that no expert's MLP computes."""
    executed = routing.executed
    if executed is None:
        return torch.zeros((), dtype=torch.int64, device=routing.selected.device)
    return routing.real_tokens() - executed.any(dim=1).sum()
