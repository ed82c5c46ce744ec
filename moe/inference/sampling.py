"""From the logits of a position to its next token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; raises ValueError for values out of range."""

    temperature: float = 1.0
    """divides the logits; 0 is greedy"""
    top_k: int | None = None
    """keep the k most likely tokens"""
    top_p: float | None = None
    """keep the smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2020)"""
    min_p: float | None = None
    """keep tokens with at least this share of the most likely one's probability (Nguyen et al. 2024, section 3)"""
    repetition_penalty: float = 1.0
    """logits of tokens that the text holds already are divided by this, or multiplied where they are negative
    (Keskar et al. 2019, section 4.1, whose equation is for positive ones); 1: they are left alone"""

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(f"temperature is {self.temperature}, and must be 0 (greedy) or from 0.001 to 1000")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, and must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, and must lie in (0, 1]")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}, and must lie in [0, 1]")
        if not 1e-3 <= self.repetition_penalty <= 1e3:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, and must be from 0.001 to 1000")


def sample(
    logits: Float[Tensor, "B V"],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    texts: Sequence[Sequence[int]] | None = None,
) -> Int[Tensor, " B"]:
    """Draw one token a row, row b with ``generators[b]``: what a row draws does not depend on the other rows.

    ``texts`` are the ids that each row holds so far, for the repetition penalty. Raises ValueError for logits that are
    not finite.
    """
    require_finite(logits)
    if sampling.temperature == 0:
        # The same as argmax, in a third of its time on a CPU.
        return penalise_repetition(logits, sampling.repetition_penalty, texts).max(dim=-1).indices
    return draw(distribution(logits, sampling, texts), generators)


def require_finite(logits: Float[Tensor, "B V"]) -> None:
    """Raise ValueError unless every logit is finite."""
    # The smallest and the largest are finite only if all are: NaN is passed on.
    if not all(math.isfinite(extreme.item()) for extreme in logits.aminmax()):
        raise ValueError("the model's logits are not finite, so there is nothing to draw from")


def distribution(
    logits: Float[Tensor, "B V"], sampling: Sampling, texts: Sequence[Sequence[int]] | None = None
) -> Float[Tensor, "B V"]:
    """The probabilities, float32, that each row's next token is drawn with; greedy has one of 1."""
    logits = penalise_repetition(logits.float(), sampling.repetition_penalty, texts)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.max(dim=-1, keepdim=True).indices, 1.0)
    return keep_likely(logits / sampling.temperature, sampling).softmax(dim=-1)


def draw(probabilities: Float[Tensor, "B V"], generators: Sequence[torch.Generator]) -> Int[Tensor, " B"]:
    """One token a row: the first at which the running sum of probabilities exceeds a uniform number of its generator.

    Rows need not sum to 1. A token without probability is never drawn.
    """
    uniform = torch.cat([torch.rand(1, dtype=torch.float64, generator=own) for own in generators])
    running = probabilities.double().cumsum(dim=-1)
    total = running[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(uniform.to(total.device)[:, None] * total, below_total)
    return torch.searchsorted(running, threshold, right=True).squeeze(1)


def penalise_repetition(
    logits: Float[Tensor, "B V"], penalty: float, texts: Sequence[Sequence[int]] | None
) -> Float[Tensor, "B V"]:
    """The logits of tokens in a row's text made less likely by ``penalty``, however often they are in it."""
    if penalty == 1 or texts is None:
        return logits
    penalised = logits.clone()
    for row, text in zip(penalised, texts, strict=True):
        held = torch.tensor(sorted(set(text)), dtype=torch.int64, device=logits.device)
        own = row[held]
        row[held] = torch.where(own > 0, own / penalty, own * penalty)
    return penalised


def keep_likely(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Logits with every token outside top-k, then top-p, then min-p, at -inf; the most likely token always stays."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kept = logits.topk(sampling.top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability
        ordered = ordered.masked_fill(before >= sampling.top_p, float("-inf"))
        logits = logits.scatter(-1, order, ordered)
    if sampling.min_p:
        # p ≥ min_p · max p, as logits: their normalisation cancels.
        floor = logits.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return logits
