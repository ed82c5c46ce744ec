"""AdamW with parameter groups that are decided, and checked, by name."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.config import OptimizerConfig

DECAYED = ("embedding.weight", "head.weight", ".w_in", ".w_out", ".w_in.weight", ".w_out.weight", ".gate.weight")
DECAYED_ATTENTION = (".query.weight", ".key.weight", ".value.weight", ".output.weight")
NEVER_DECAYED = ("norm.weight", ".bias", ".b_in", ".b_out", ".router.temperature", ".special.constant")
ROUTER = tuple(f".router.{name}" for name in ("weight", "inner_weight", "noise_weight", "residual_weight"))
ROUTER += (".special.mixing",)  # decides, token by token, what a constant expert returns: a gate like the router


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) over two groups, ``decay`` and ``no_decay``.

    An expert without tokens has a zero gradient, not none: its moments fade and its weights still decay, as those of
    any weight whose gradient happens to be zero.
    """
    groups = parameter_groups(model, config.decay_router)
    return torch.optim.AdamW(
        [
            {"params": list(groups["decay"].values()), "weight_decay": config.weight_decay, "name": "decay"},
            {"params": list(groups["no_decay"].values()), "weight_decay": 0.0, "name": "no_decay"},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def parameter_groups(model: nn.Module, decay_router: bool) -> dict[str, dict[str, nn.Parameter]]:
    """Every parameter's name and tensor under ``decay`` or ``no_decay``.

    The number of dimensions is no guide: the stacked biases of the experts have two. Raises ValueError for a parameter
    whose name no rule knows, so that a new one cannot slip into a group unseen.
    """
    decayed = DECAYED + DECAYED_ATTENTION + (ROUTER if decay_router else ())
    spared = NEVER_DECAYED + (() if decay_router else ROUTER)
    groups: dict[str, dict[str, nn.Parameter]] = {"decay": {}, "no_decay": {}}
    for name, parameter in model.named_parameters():
        if name.endswith(spared):
            groups["no_decay"][name] = parameter
        elif name.endswith(decayed):
            groups["decay"][name] = parameter
        else:
            raise ValueError(f"no rule says whether {name} takes weight decay")
    return groups


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """The norm of the gradients of all ``parameters`` together, in at least float32."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    precise = [gradient for gradient in gradients if gradient.dtype in (torch.float32, torch.float64)]
    rounded = [gradient for gradient in gradients if gradient.dtype not in (torch.float32, torch.float64)]
    norm = torch.nn.utils.get_total_norm(precise)
    if not rounded:
        return norm
    # torch would return, and add up, the norm of each bfloat16 gradient in bfloat16: two digits.
    norms = torch._foreach_norm(rounded, 2, torch.float32)
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]), *norms]))
    return total


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, norm: Float[Tensor, ""]) -> None:
    """Scale all gradients, whose ``norm`` this is, such that it is at most ``limit``; the host is not asked."""
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
