"""The router after its logits in one kernel: scores, selected experts, weights, and sums over the tokens.

For the routers that choose by the score of one token at a time (:func:`supports`), on a GPU: the choice costs about one
pass over the [T, E] logits, where the functions of :mod:`.selection` and :mod:`.weights`, which say what is computed,
take a dozen. Results are theirs to float32 rounding. Among equal scores the expert of the lowest index wins (torch.topk
promises nothing there).

Sums over tokens are summed by program, then over the programs: no atomics, the same bits every time.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, library

from moe.config import RouterConfig
from moe.model.routing import Tally

MOST_CHOICES = 16
TILE = 2048
"""entries of a tile of tokens by experts: 16 a thread, which with what is derived from them fit its registers"""
MOST_TOKENS = 64
"""of a tile"""
MOST_PROGRAMS = 1024
"""of the forward pass, each of which writes a row of partial sums; no number of the device's, so that all sum alike"""
HAS_TRITON = importlib.util.find_spec("triton") is not None


class Routed(NamedTuple):
    """What the kernel decides for T tokens."""

    scores: Float[Tensor, "T E"]
    selected: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    """0 for padding and for zero experts"""
    tally: Tally


def usable(config: RouterConfig, logits: Float[Tensor, "T E"], training: bool) -> bool:
    """Whether the kernel can, and should, take these logits: it is compiled for GPUs, and computes in float32."""
    fits = logits.is_cuda and logits.dtype == torch.float32 and logits.shape[1] <= TILE
    return fits and HAS_TRITON and supports(config, training)


def supports(config: RouterConfig, training: bool) -> bool:
    """Whether the kernel knows this router: top-k of scores, within groups or not, biased or not, without a draw."""
    if config.selection not in ("top_k", "group_limited") or config.weights != "scores":
        return False
    draws = config.noise == "gumbel" or config.second_choice is not None
    return config.top_k <= MOST_CHOICES and not (draws and training)


def route(
    config: RouterConfig,
    logits: Float[Tensor, "T E"],
    selection_bias: Float[Tensor, " E"] | None,
    mask: Bool[Tensor, " T"] | None,
    *,
    first_zero: int = 0,
    n_zero: int = 0,
) -> Routed:
    """Route by ``config``, which :func:`supports` accepts.

    The ``n_zero`` experts from ``first_zero`` on take no weight and no share of the sum. Gradients flow from the
    scores, the weights and the tally's shares to the logits.
    """
    grouped = config.selection == "group_limited"
    scores, selected, weights, counts, share_sums = _route(
        logits.contiguous(),
        selection_bias,
        mask,
        config.score,
        config.selection_bias == "quantile",
        config.top_k,
        config.normalise,
        config.scale,
        (config.n_groups or 1) if grouped else 1,
        (config.top_groups or 1) if grouped else 1,
        config.group_score == "top_two",
        first_zero,
        n_zero,
    )
    return Routed(scores, selected, weights, Tally(scores, selected, mask, counts[:-1], share_sums, counts[-1]))


# ------------------------------------------------------------------------------------- the operators for torch.compile


@library.custom_op("moe::route", mutates_args=())
def _route(
    logits: Tensor,
    selection_bias: Tensor | None,
    mask: Tensor | None,
    score: str,
    bias_on_logits: bool,
    top_k: int,
    normalise: bool,
    scale: float,
    n_groups: int,
    top_groups: int,
    top_two: bool,
    first_zero: int,
    n_zero: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from moe.model.router import fused_kernels as kernels

    n_tokens, n_experts = logits.shape
    groups, members = _power_of_two(n_groups), _power_of_two(n_experts // n_groups)
    tokens = _tokens_of_a_tile(groups * members)
    n_programs = min(MOST_PROGRAMS, max(1, -(-n_tokens // tokens)))
    device = logits.device
    scores = torch.empty_like(logits)
    selected = torch.empty(n_tokens, top_k, dtype=torch.int64, device=device)
    weights = torch.empty(n_tokens, top_k, dtype=torch.float32, device=device)
    # The last column counts the tokens that have shares.
    counts = torch.empty(n_programs, n_experts + 1, dtype=torch.int32, device=device)
    share_sums = torch.empty(n_programs, n_experts, dtype=torch.float32, device=device)
    kernels.route[(n_programs,)](
        logits,
        selection_bias,
        mask,
        scores,
        selected,
        weights,
        counts,
        share_sums,
        n_tokens,
        n_experts,
        scale,
        first_zero,
        first_zero + n_zero,
        SCORE=score,
        BIAS_ON_LOGITS=bias_on_logits,
        TOP_K=top_k,
        NORMALISE=normalise,
        N_GROUPS=n_groups,
        TOP_GROUPS=top_groups,
        TOP_TWO=top_two,
        TOKENS=tokens,
        GROUPS=groups,
        MEMBERS=members,
        CHOICES=_power_of_two(top_k),
    )
    return scores, selected, weights, counts.sum(0), share_sums.sum(0)


@_route.register_fake
def _(
    logits: Tensor, selection_bias: Tensor | None, mask: Tensor | None, score: str, bias_on_logits: bool, top_k: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n_tokens, n_experts = logits.shape
    return (
        torch.empty_like(logits),
        logits.new_empty(n_tokens, top_k, dtype=torch.int64),
        logits.new_empty(n_tokens, top_k),
        logits.new_empty(n_experts + 1, dtype=torch.int64),
        logits.new_empty(n_experts),
    )


@library.custom_op("moe::route_backward", mutates_args=())
def _route_backward(
    grad_scores: Tensor | None,
    grad_weights: Tensor | None,
    grad_share_sums: Tensor | None,
    logits: Tensor | None,
    scores: Tensor,
    selected: Tensor,
    mask: Tensor | None,
    score: str,
    normalise: bool,
    scale: float,
    first_zero: int,
    n_zero: int,
) -> Tensor:
    from moe.model.router import fused_kernels as kernels

    n_tokens, n_experts = scores.shape
    grad_logits = torch.empty_like(scores)
    experts = _power_of_two(n_experts)
    tokens = _tokens_of_a_tile(experts)
    if n_tokens:
        kernels.route_backward[(-(-n_tokens // tokens),)](
            *(None if grad is None else grad.contiguous() for grad in (grad_scores, grad_weights, grad_share_sums)),
            logits,
            scores,
            selected,
            mask,
            grad_logits,
            n_tokens,
            n_experts,
            scale,
            first_zero,
            first_zero + n_zero,
            SCORE=score,
            TOP_K=selected.shape[1],
            NORMALISE=normalise,
            TOKENS=tokens,
            EXPERTS=experts,
            CHOICES=_power_of_two(selected.shape[1]),
        )
    return grad_logits


@_route_backward.register_fake
def _(
    grad_scores: Tensor | None, grad_weights: Tensor | None, grad_share_sums: Tensor | None, logits: Tensor | None,
    scores: Tensor, *_: Any,
) -> Tensor:  # fmt: skip
    return torch.empty_like(scores)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, mask, score, _, _, normalise, scale, _, _, _, first_zero, n_zero = inputs
    scores, selected, _, counts, _ = output
    ctx.mark_non_differentiable(selected, counts)
    ctx.set_materialize_grads(False)
    # The other score functions have a slope that follows from the score.
    ctx.save_for_backward(logits if score == "sqrt_softplus" else None, scores, selected, mask)
    ctx.settings = (score, normalise, scale, first_zero, n_zero)


def _differentiate(
    ctx: Any,
    grad_scores: Tensor | None,
    _selected: None,
    grad_weights: Tensor | None,
    _counts: None,
    grad_share_sums: Tensor | None,
) -> tuple[Tensor | None, ...]:
    grads = (grad_scores, grad_weights, grad_share_sums)
    grad_logits = None
    if any(grad is not None for grad in grads):
        grad_logits = _route_backward(*grads, *ctx.saved_tensors, *ctx.settings)
    return grad_logits, *[None] * 12


_route.register_autograd(_differentiate, setup_context=_keep)


def _tokens_of_a_tile(columns: int) -> int:
    return max(1, min(MOST_TOKENS, TILE // columns))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
