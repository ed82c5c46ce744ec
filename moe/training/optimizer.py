"""AdamW, alone or beside Muon, with parameter groups that are decided, and checked, by name."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.config import OptimizerConfig
from moe.model.feed_forward import GATED
from moe.model.transformer import Transformer
from moe.training.mixed_optimizer import MixedOptimizer

MLP_IN, MLP_OUT = (".w_in", ".w_in.weight"), (".w_out", ".w_out.weight")
DECAYED = ("embedding.weight", "head.weight", ".gate.weight", *MLP_IN, *MLP_OUT)
LATENT_ATTENTION = (".query_down.weight", ".latent.weight", ".rotary_key.weight")
DECAYED_ATTENTION = (".query.weight", ".key.weight", ".value.weight", ".output.weight", *LATENT_ATTENTION)
NEVER_DECAYED = ("norm.weight", ".bias", ".b_in", ".b_out", ".sinks", ".router.temperature", ".special.constant")
ROUTER = tuple(f".router.{name}" for name in ("weight", "inner_weight", "noise_weight", "residual_weight"))
ROUTER += (".special.mixing",)  # decides, token by token, what a constant expert returns: a gate like the router


def build_optimizer(
    model: Transformer, config: OptimizerConfig, parameters: Mapping[str, nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """The configured optimizer over the groups ``decay`` and ``no_decay``, for Muon also ``matrices`` and ``gated``.

    AdamW is Loshchilov & Hutter 2019, algorithm 2: torch's fused form, or where weights are bfloat16 our own, which
    rounds by chance (:mod:`.adamw`). Muon takes the matrices of attention, MLPs and experts; embedding, head, gates and
    routers stay with AdamW. All take ``found_inf`` (:class:`~moe.training.step.TrainingStep`). ``parameters`` by name
    are what is here of the model's (None: all of them).

    An expert without tokens has a zero gradient, not none: its moments fade and its weights still decay, as those of
    any weight whose gradient happens to be zero.
    """
    parameters = dict(model.named_parameters()) if parameters is None else parameters
    groups = parameter_groups(parameters, config.decay_router)
    moments: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "muon":
        return MixedOptimizer(_groups_with_muon(model, groups, config, moments))
    adamw = [
        {"params": list(groups["decay"].values()), "weight_decay": config.weight_decay, "name": "decay"},
        {"params": list(groups["no_decay"].values()), "weight_decay": 0.0, "name": "no_decay"},
    ]
    if any(parameter.dtype == torch.bfloat16 for parameter in parameters.values()):
        return MixedOptimizer([group | moments for group in adamw])
    return torch.optim.AdamW(adamw, **moments, fused=True)


def _groups_with_muon(
    model: Transformer, groups: dict[str, dict[str, nn.Parameter]], config: OptimizerConfig, moments: dict[str, Any]
) -> list[dict[str, Any]]:
    gated_in = MLP_IN if model.config.feed_forward.activation in GATED else ()
    matrices, gated, rest = [], [], []
    for name, parameter in groups["decay"].items():
        if name.endswith(gated_in):
            gated.append(parameter)
        elif name.endswith((*MLP_IN, *MLP_OUT, *DECAYED_ATTENTION)):
            matrices.append(parameter)
        else:
            rest.append(parameter)
    muon = config.muon
    by_muon = {
        "rule": "muon",
        "weight_decay": config.weight_decay,
        "momentum": muon.momentum,
        "iterations": muon.iterations,
        "step_size": muon.step_size,
        # The schedule gives the rate of AdamW, which this follows in proportion.
        "relative_lr": 1.0 if muon.rate is None else muon.rate / config.lr,
    }
    return [
        {"params": matrices, "name": "matrices", "halves": 1} | by_muon,
        *([{"params": gated, "name": "gated", "halves": 2} | by_muon] if gated else []),
        {"params": rest, "name": "decay", "weight_decay": config.weight_decay, "relative_lr": 1.0} | moments,
        {
            "params": list(groups["no_decay"].values()),
            "name": "no_decay",
            "weight_decay": 0.0,
            "relative_lr": 1.0,
        }
        | moments,
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its learning rate where that of AdamW is ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("relative_lr", 1.0)


def parameter_groups(parameters: Mapping[str, nn.Parameter], decay_router: bool) -> dict[str, dict[str, nn.Parameter]]:
    """Every parameter's name and tensor under ``decay`` or ``no_decay``.

    The number of dimensions is no guide: the stacked biases of the experts have two. Raises ValueError for a parameter
    whose name no rule knows, so that a new one cannot slip into a group unseen.
    """
    decayed = DECAYED + DECAYED_ATTENTION + (ROUTER if decay_router else ())
    spared = NEVER_DECAYED + (() if decay_router else ROUTER)
    groups: dict[str, dict[str, nn.Parameter]] = {"decay": {}, "no_decay": {}}
    for name, parameter in parameters.items():
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


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float | None, norm: Float[Tensor, ""]) -> None:
    """Scale all gradients, whose ``norm`` this is, such that it is at most ``limit``; the host is not asked.

    A :class:`MixedOptimizer` is told the factor instead, which saves a pass over the gradients.
    """
    if isinstance(optimizer, MixedOptimizer):
        optimizer.factor = None if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
    elif limit is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
