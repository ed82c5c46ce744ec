"""What the experts are worth: the loss without each of them, by domain, and the loss as k goes from 1 to E.

    batches = list(held_out_windows(corpus, sequence_length=256, tokens=8192))
    delta_loss(model, batches, corpus.domains)

Losses are in whatever precision autocast says around the call; differences are small, so float32 is the one to use.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.data.batches import Batch
from moe.model.routing import Routing
from moe.model.transformer import Transformer, normalise
from moe.study.intervene import change_k, knock_out, largest_k, mixture_layers, random_routing
from moe.study.measurement import Axis, Measurement
from moe.training.head_loss import token_losses

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Progress = Callable[[int, int], object]
"""called with what is done and what there is to do"""


def delta_loss(
    model: Transformer,
    batches: Sequence[Batch],
    domains: Sequence[str],
    *,
    progress: Progress = lambda done, total: None,
) -> Measurement:
    """How much the loss of each domain rises when one expert is knocked out: layer x expert x domain, nats per token.

    The mean over the same scored tokens, with the expert less without, in evaluation mode; nothing takes the expert's
    place (:func:`~moe.study.intervene.knock_out` without rerouting), but later layers may route otherwise than before.
    An expert without MLP counts as one. Where no token of a domain uses the expert, the rise is exactly 0. The null is
    an expert without effect: its mean is 0, and ``null_std`` the standard error of the rise over sequences (of a ratio
    of sums, Cochran 1977, "Sampling Techniques", eq. 2.46; NaN for a domain with a single sequence). Overlapping or
    neighbouring sequences are not independent, so it is a lower bound.

    Knocking out changes nothing before its block, so the hidden states there are computed once: of L mixture blocks
    with E experts, it takes about E L / 2 forward passes. Batches are taken as they are: routers that compare tokens
    compare those of a batch. ``batches`` need one token scored at least in each domain, else its values are NaN.
    Raises ValueError for a model without mixture layers.
    """
    layers = mixture_layers(model)
    if not layers:
        raise ValueError("the model has no mixture layer: there is no expert to knock out")
    n_experts = max(layer.router.n_experts for layer in layers.values())
    rises, done, total = [], 0, len(batches) * sum(layer.router.n_experts for layer in layers.values())
    with _evaluating(model):
        for batch in batches:
            rise = np.zeros((len(layers), n_experts, len(batch.tokens)))
            inputs, before, routings = _forward(model, batch)
            for place, ((number, layer), routing) in enumerate(zip(layers.items(), routings, strict=True)):
                used = routing.counts().tolist()
                for expert in range(layer.router.n_experts):
                    if used[expert]:
                        with knock_out(model, expert, layer=number):
                            after = _losses_from(model, number, inputs[number], batch)
                        rise[place, expert] = _sums(after - before, batch)
                    done += 1
                    progress(done, total)
                rise[place, layer.router.n_experts :] = np.nan
            rises.append(rise)
    rise = np.concatenate(rises, axis=-1)
    domain, tokens = _domains_and_tokens(batches)
    mean, error = _mean_and_error(rise, tokens, domain, len(domains))
    return Measurement(
        name="delta_loss",
        title="Rise of the loss when an expert is knocked out",
        reading=(
            "Nats per token by which a domain's loss rises when this one expert gives nothing, its tokens' other "
            "experts staying as they are; 0 is an expert that the domain does not need, below 0 one that harms it, and "
            "within twice its standard error over sequences nothing was seen."
        ),
        values=mean,
        axes=(
            Axis("layer", tuple(map(str, layers))),
            Axis("expert", tuple(map(str, range(n_experts)))),
            Axis("domain", tuple(domains)),
        ),
        unit="nats per token",
        chance=np.zeros(()),
        null=np.zeros(()),
        null_std=error,
    )


def loss_by_k(
    model: Transformer,
    batches: Sequence[Batch],
    domains: Sequence[str],
    *,
    ks: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Measurement:
    """The loss of each domain with k experts a token, for each of ``ks`` (None: 1 to as many as the rule can choose).

    Axes k x domain; nats per scored token, in evaluation mode. Its chance value is the loss when the same number of
    experts, with the same weights, are random ones (:func:`~moe.study.intervene.random_routing` with ``seed``). The
    router keeps its own rule about weights: without normalisation, other k also scale the output. It takes two forward
    passes a k. Raises ValueError as :func:`~moe.study.intervene.change_k` does, and for a model without mixture layers.
    """
    most = largest_k(model)
    ks = range(1, most + 1) if ks is None else ks
    trained = {layer.router.config.top_k for layer in mixture_layers(model).values()}
    domain, tokens = _domains_and_tokens(batches)
    losses = np.zeros((2, len(ks), len(domain)))
    with _evaluating(model):
        for place, k in enumerate(ks):
            first = 0
            for index, batch in enumerate(batches):
                rows = slice(first, first + len(batch.tokens))
                with change_k(model, k):
                    losses[0, place, rows] = _sums(_losses(model, batch), batch)
                    with random_routing(model, seed=seed):
                        losses[1, place, rows] = _sums(_losses(model, batch), batch)
                first = rows.stop
                progress(place * len(batches) + index + 1, len(ks) * len(batches))
    mean, _ = _mean_and_error(losses, tokens, domain, len(domains))
    return Measurement(
        name="loss_by_k",
        title="Loss with k experts a token",
        reading=(
            f"Nats per token when the router chooses k experts; it was trained with k = "
            f"{' and '.join(map(str, sorted(trained)))}, where the loss should be near its lowest, and chance is the "
            "loss when as many experts with the same weights are random ones: the distance is what the choice is worth."
        ),
        values=mean[0],
        axes=(Axis("k", tuple(map(str, ks))), Axis("domain", tuple(domains))),
        unit="nats per token",
        chance=mean[1],
    )


# ------------------------------------------------------------------------------------------------------ partial forward


def _forward(model: Transformer, batch: Batch) -> tuple[list[tuple[Any, ...]], Float[Tensor, "B S"], list[Routing]]:
    """What each block was called with, the loss of each target, and the routings."""
    inputs: list[tuple[Any, ...]] = []

    def keep(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments)

    handles = [block.register_forward_pre_hook(keep) for block in model.blocks]
    try:
        hidden, routings = model.hidden(batch.tokens.to(model.embedding.weight.device))
    finally:
        for handle in handles:
            handle.remove()
    return inputs, _losses_of(model, hidden, batch), routings


def _losses_from(model: Transformer, number: int, inputs: tuple[Any, ...], batch: Batch) -> Float[Tensor, "B S"]:
    """The loss of each target when the blocks from ``number`` on are computed again, from the first one's inputs."""
    x, context, previous_logits, cache, _ = inputs
    for block in model.blocks[number:]:
        x, routing = block(x, context, previous_logits, cache)
        if routing is not None and model.config.router.residual:
            previous_logits = routing.logits
    return _losses_of(model, normalise(model.norm, x), batch)


def _losses(model: Transformer, batch: Batch) -> Float[Tensor, "B S"]:
    hidden, _ = model.hidden(batch.tokens.to(model.embedding.weight.device))
    return _losses_of(model, hidden, batch)


def _losses_of(model: Transformer, hidden: Float[Tensor, "B S D"], batch: Batch) -> Float[Tensor, "B S"]:
    return token_losses(hidden, model.head.weight, batch.targets.to(hidden.device), model.head.bias)


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """Evaluation mode without gradients or compiled blocks; the mode is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


# ------------------------------------------------------------------------------------------------------------ sequences


def _sums(values: Float[Tensor, "B S"], batch: Batch) -> Floats:
    """The sum over the scored tokens of each sequence."""
    values = values.double()
    if batch.scored is not None:
        values = values.masked_fill(~batch.scored.to(values.device), 0.0)
    sums: Floats = values.sum(dim=1).cpu().numpy()
    return sums


def _domains_and_tokens(batches: Sequence[Batch]) -> tuple[Ints, Ints]:
    """The domain and the number of scored tokens of each sequence."""
    tokens = [
        torch.full((len(batch.tokens),), batch.tokens.shape[1]) if batch.scored is None else batch.scored.sum(dim=1)
        for batch in batches
    ]
    return torch.cat([batch.domain for batch in batches]).numpy(), torch.cat(tokens).numpy()


def _mean_and_error(sums: Floats, tokens: Ints, domain: Ints, n_domains: int) -> tuple[Floats, Floats]:
    """The mean per token in each domain and its standard error, from the ``sums`` [..., n] of n sequences.

    The mean is R = Σ y / Σ m over sequences with sum y and m tokens; its variance n / (n - 1) Σ (y - R m)² / (Σ m)².
    """
    mean = np.full((*sums.shape[:-1], n_domains), np.nan)
    error = mean.copy()
    for index in range(n_domains):
        own = domain == index
        y, m = sums[..., own], tokens[own]
        if m.sum() == 0:
            continue
        mean[..., index] = y.sum(axis=-1) / m.sum()
        n = int((m > 0).sum())
        if n > 1:
            squares = np.square(y - mean[..., index, None] * m).sum(axis=-1)
            error[..., index] = np.sqrt(n / (n - 1) * squares) / m.sum()
    return mean, error
