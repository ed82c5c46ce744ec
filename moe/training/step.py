"""One optimizer step: from the tokens of its micro-batches to new weights.

Nothing on the way waits for the device. Whether a step is good is decided there, and what it saw is sent to the host,
which may read it while the next step is computed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.config import Precision
from moe.model.moe_layer import MoELayer
from moe.model.router import Router
from moe.model.router.selection_bias import proportional_update, quantile_update, sign_update
from moe.model.routing import LoadSummary, summarise_layers
from moe.model.transformer import Transformer
from moe.parallel.pipeline import Pipeline, Span, with_loss
from moe.parallel.spread import spread_of
from moe.parallel.world import World
from moe.training.gpu import Transfer, preferred_attention, to_device
from moe.training.head_loss import model_loss
from moe.training.machine import autocast
from moe.training.objective import Objective, StepCounts, compose, measured_losses
from moe.training.optimizer import clip_gradients, gradient_norm, set_learning_rate


class MicroBatch(NamedTuple):
    """What one rank computes at once of a step."""

    tokens: Int[Tensor, "B S"]
    targets: Int[Tensor, "B S"]
    """the token after each"""
    seed: int | None = None
    """seeds dropout and noise; None: they go on drawing where they are"""


@dataclass(frozen=True)
class Step:
    """What one optimizer step saw, on all ranks together."""

    losses: dict[str, float]
    """lm_loss, the mean cross-entropy in nats per token, and each auxiliary loss, unweighted, on its own scale and as
    ``<name>/common`` on the common one; with a sparsity loss, also its coefficient and the share of gates that are off
    """
    gradient_norm: float
    """norm of the whole gradient, before clipping"""
    learning_rate: float
    skipped: bool
    """whether there was no update, because a loss or the gradient was not finite"""
    tokens: int
    """real tokens that were routed; 0 without a mixture"""
    counts: Int[Tensor, "L E"] | None
    """assignments to each expert of each mixture layer; None without one"""
    dropped: list[int]
    """dropped assignments of each mixture layer"""
    mlps_per_token: list[float]
    """expert MLPs that computed a token, on average, of each mixture layer"""

    @property
    def load(self) -> list[LoadSummary]:
        """The load of each mixture layer over the whole batch."""
        return summarise_layers(self.counts, self.dropped)


class TrainingStep:
    """The optimizer steps of ``model``: call it with the micro-batches of each.

    ``optimizer`` holds the model's parameters (what is here of them, where it is spread over processes) and must know
    ``found_inf``, as torch's fused ones do: a tensor that is 1 where the step is to change nothing. ``clip`` is the
    largest norm of the whole gradient (None: no clipping). ``world`` are those who share a batch, ``pipeline`` those
    who have the other blocks.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        clip: float | None,
        world: World | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.precision, self.clip = precision, clip
        self.world = World() if world is None else world
        self.spread = spread_of(model)
        self.pipeline = pipeline
        stages = [model.blocks] if pipeline is None else [*pipeline.blocks.values()]
        self._routers = [_routers_among(blocks) for blocks in stages]
        """of each stage that is here"""
        self.routers = [router for routers in self._routers for router in routers]
        """of the mixture layers that are here"""
        self.device = next(model.parameters()).device

    def __call__(
        self,
        micro_batches: Iterable[MicroBatch],
        learning_rate: float,
        *,
        accumulation: int = 1,
        sparsity_coefficient: float | None = None,
    ) -> "StepInFlight":
        """Forward and backward of ``accumulation`` micro-batches, clip, update; return what will be known of it.

        A loss or gradient that is not finite on any rank leaves the weights, the optimizer and the selection biases of
        all ranks as they were. ``sparsity_coefficient`` is what that of the sparsity loss has become.
        """
        set_learning_rate(self.optimizer, learning_rate)
        self.model.train()
        counts = [self._no_counts()]
        # Backward too: what it computes again must be computed by the same kernels.
        with preferred_attention(self.device):
            if self.pipeline is None:
                parts, total = self._one_after_the_other(micro_batches, counts, accumulation, sparsity_coefficient)
            else:
                parts, total, counts = self._through_the_pipeline(micro_batches, accumulation, sparsity_coefficient)
        norm = self._finish_gradients()
        clip_gradients(self.optimizer, self.clip, norm)
        means = self.world.sum(torch.stack([*parts.values()])) / self.world.size
        total = self.world.sum(total)
        finite = norm.isfinite() & total.isfinite()
        self.optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
        self.optimizer.step()
        for routers, seen in zip(self._routers, counts, strict=True):
            update_selection_biases(routers, seen, finite)
        self.optimizer.zero_grad(set_to_none=True)
        if self.spread is not None:
            self.spread.forget_gradients()
        if self.pipeline is None:
            return StepInFlight([*parts], means, norm, total, counts[0], learning_rate)
        experts = self.model.config.routed_experts
        joined = StepCounts.joined(counts, experts, self.device)
        return StepInFlight([*parts], means, norm, total, joined, learning_rate, self.pipeline)

    def _no_counts(self) -> StepCounts:
        config = self.model.config
        quantile = config.router.selection_bias == "quantile"
        return StepCounts(self.world, choices=config.balance.choices, keep_logits=quantile)

    def _one_after_the_other(
        self,
        micro_batches: Iterable[MicroBatch],
        counts: Sequence[StepCounts],
        accumulation: int,
        sparsity_coefficient: float | None,
    ) -> tuple[dict[str, Tensor], Float[Tensor, ""]]:
        """Forward and backward of each micro-batch: the means of the loss's parts, and the sum of the whole loss."""
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches, 1):
            objective, _ = self._objective(batch, counts[0], self._routers[0], sparsity_coefficient)
            if self.spread is not None:
                self.spread.begin_backward(last=number == accumulation)
            torch.autograd.backward(objective.total / accumulation)
            total = total + objective.total.detach()
            for name, value in {"lm_loss": objective.lm, **objective.auxiliary}.items():
                parts[name] = parts.get(name, 0) + value.detach() / accumulation
        return parts, total

    def _through_the_pipeline(
        self, micro_batches: Iterable[MicroBatch], accumulation: int, sparsity_coefficient: float | None
    ) -> tuple[dict[str, Tensor], Float[Tensor, ""], list[StepCounts]]:
        """The same, of all stages together, and the counts of each stage that is here."""
        pipeline, config = self.pipeline, self.model.config
        assert pipeline is not None
        batches = [
            MicroBatch(to_device(batch.tokens, self.device), to_device(batch.targets, self.device), batch.seed)
            for batch in micro_batches
        ]
        counts = {span: self._no_counts() for span in pipeline.spans}
        routers = dict(zip(pipeline.spans, self._routers, strict=True))
        names = ["lm_loss"]
        if config.moe_layers:
            measured = measured_losses(config.balance, config.router)
            names += [f"{name}{scale}" for name in measured for scale in ("", "/common")]
        # What is known of a layer counts in the mean over all of them, wherever they are.
        parts = {name: torch.zeros((), device=self.device) for name in names}
        total = torch.zeros((), device=self.device)

        def compute(span: Span, number: int, x: Tensor | None) -> Tensor:
            nonlocal total
            objective, hidden = self._objective(
                batches[number], counts[span], routers[span], sparsity_coefficient, span, x
            )
            total = total + objective.total.detach()
            share = len(routers[span]) / max(1, len(config.moe_layers))
            for name, value in objective.auxiliary.items():
                parts[name] = parts[name] + share * value.detach() / accumulation
            scaled = objective.total / accumulation
            if span.is_last:
                parts["lm_loss"] = parts["lm_loss"] + objective.lm.detach() / accumulation
                return scaled
            return with_loss(hidden, scaled) if scaled.requires_grad else hidden

        pipeline.run([batch.tokens for batch in batches], compute)
        means = pipeline.sum(torch.stack([*parts.values()]))
        return dict(zip(names, means, strict=True)), pipeline.sum(total), [*counts.values()]

    def _objective(
        self,
        batch: MicroBatch,
        counts: StepCounts,
        routers: Sequence[Router],
        sparsity_coefficient: float | None,
        span: Span | None = None,
        x: Float[Tensor, "B s D"] | None = None,
    ) -> tuple[Objective, Float[Tensor, "B s D"]]:
        """The loss of one micro-batch, or what a pipeline's stage adds to it, and the hidden states that are left.

        Stages draw from generators that differ, so with dropout or noise a pipeline draws other numbers than one
        process does.
        """
        if batch.seed is not None:
            torch.manual_seed(batch.seed + (0 if span is None else span.stage))
        tokens, targets = to_device(batch.tokens, self.device), to_device(batch.targets, self.device)
        with autocast(self.device, self.precision):
            if span is None or self.pipeline is None:
                hidden, routings = self.model.hidden(tokens)
            else:
                blocks = self.pipeline.blocks[span]
                hidden, routings = self.model.part(tokens, x=x, blocks=blocks, to_end=span.is_last)
            ends = span is None or span.is_last
            lm = model_loss(self.model, hidden, targets) if ends else hidden.new_zeros((), dtype=torch.float32)
        objective = compose(
            lm,
            routings,
            self.model.config.balance,
            counts,
            router=self.model.config.router,
            router_weights=[router.weight for router in routers],
            sparsity_coefficient=sparsity_coefficient,
        )
        return objective, hidden

    def _finish_gradients(self) -> Float[Tensor, ""]:
        """Make every gradient that of the mean over all ranks' micro-batches, and return the norm of all together."""
        if self.spread is None:
            self.world.average_gradients(self.model)
            return gradient_norm(self.model.parameters())
        self.spread.finish_gradients()
        if self.pipeline is None:
            return self.spread.gradient_norm()
        parameters = self.spread.parameters
        self.pipeline.add_tied_gradients(parameters.get("embedding.weight"))
        # What the first stage has too counts there.
        copies = {name: parameters[name].grad for name in parameters if self.spread.is_copy(name)}
        for name in copies:
            parameters[name].grad = None
        norm = self.pipeline.norm(self.spread.gradient_norm())
        for name, gradient in copies.items():
            parameters[name].grad = gradient
        return norm


class StepInFlight:
    """An optimizer step that the device may still be computing; its numbers are on their way to the host."""

    def __init__(
        self,
        names: list[str],
        means: Float[Tensor, " P"],
        norm: Float[Tensor, ""],
        total: Float[Tensor, ""],
        counts: StepCounts,
        learning_rate: float,
        pipeline: Pipeline | None = None,
    ) -> None:
        """``means`` are the parts of the loss, called ``names``; ``total`` is their weighted sum."""
        self._names, self._learning_rate = names, learning_rate
        numbers = [means, norm, total]
        self._shape: tuple[int, int] | None = None
        if counts.counts is not None and (pipeline is None or pipeline.model_config.moe_layers):
            layers = [counts.over_ranks(), counts.dropped_over_ranks(), counts.computed_over_ranks()]
            tokens = counts.tokens_over_ranks()
            if pipeline is not None:
                layers = [pipeline.of_all_mixtures(rows) for rows in layers]
                tokens = pipeline.sum(tokens if 0 in pipeline.mixtures else torch.zeros_like(tokens))
            self._shape = (layers[0].shape[0], layers[0].shape[1])
            numbers += [*layers, tokens]
        # One transfer, in float64, which holds every float32 and every count below 2⁵³.
        self._transfer = Transfer(torch.cat([number.detach().double().flatten() for number in numbers]))

    def read(self) -> Step:
        """The step's numbers; waits until it is done."""
        numbers = iter(self._transfer.read())
        losses = {name: next(numbers) for name in self._names}
        norm, total = next(numbers), next(numbers)
        tokens, counts, dropped, computed = 0, None, [], []
        if self._shape is not None:
            layers, experts = self._shape
            counts = torch.tensor([[int(next(numbers)) for _ in range(experts)] for _ in range(layers)])
            dropped = [int(next(numbers)) for _ in range(layers)]
            computed = [next(numbers) for _ in range(layers)]
            tokens = int(next(numbers))
        return Step(
            losses=losses,
            gradient_norm=norm,
            learning_rate=self._learning_rate,
            skipped=not (math.isfinite(norm) and math.isfinite(total)),
            tokens=tokens,
            counts=counts,
            dropped=dropped,
            mlps_per_token=[mlps / tokens for mlps in computed],
        )


def routers_of(model: Transformer) -> list[Router]:
    """The router of each mixture layer, first layer first; none in the dense twin."""
    return _routers_among(model.blocks)


def _routers_among(blocks: Iterable[nn.Module]) -> list[Router]:
    return [block.feed_forward.router for block in blocks if isinstance(block.feed_forward, MoELayer)]


def update_selection_biases(
    routers: Sequence[Router], counts: StepCounts, wanted: Bool[Tensor, ""] | None = None
) -> None:
    """Move every selection bias, once an optimizer step, by what ``counts`` saw on all ranks; no bias, nothing.

    Where ``wanted`` is False, at the end they are as they were; the host need not know.
    """
    if all(router.selection_bias is None for router in routers):
        return
    for layer, (router, load) in enumerate(zip(routers, counts.over_ranks(), strict=True)):
        bias, rule = router.selection_bias, router.config.selection_bias
        if bias is None:
            continue
        before = bias.clone()
        if rule == "sign":
            sign_update(bias, load, router.config.bias_step)
        elif rule == "proportional":
            proportional_update(bias, load, router.config.bias_step, router.n_special)
        elif rule == "quantile":
            quantile_update(bias, counts.logits_over_ranks(layer), router.config.top_k)
        if wanted is not None:
            bias.copy_(torch.where(wanted, bias, before))
