"""Initial weights: one rule, applied by name, the same for a stacked expert as for the dense layer it replaces."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.model.router import Router

RESIDUAL_OUTPUTS = ("attention.output.weight", "w_out", "w_out.weight")


def initialise(model: nn.Module, init_std: float, n_layers: int, seed: int) -> None:
    """Draw every matrix from a normal of ``init_std``, cut at three standard deviations; biases 0, norms 1.

    The matrices that write into the residual stream are smaller by √(2 · layers) (Radford et al. 2019, section 2.3).
    Each parameter has a generator of its own, seeded by ``seed`` and its name: its values do not depend on what else
    the model holds, or on the order in which it is built. A stacked 3-D weight needs no fan-in here; initialisers that
    compute one from its shape are wrong by the root of its rows.

    A router with learned noise starts from zeros, so that its noise spreads the tokens evenly (Shazeer et al. 2017,
    appendix A); the vectors of constant experts from a standard normal (MoE++), a temperature where it is configured.
    """
    draw = initial_values(model, init_std, n_layers, seed)
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            draw(name, parameter)


def initial_values(model: nn.Module, init_std: float, n_layers: int, seed: int) -> Callable[[str, Tensor], None]:
    """What fills a tensor with the initial values of the parameter of that name, as :func:`initialise` does.

    ``model`` may have no memory, or be cut since: a parameter's values come from its name and its whole shape.
    """
    residual_std = init_std / math.sqrt(2 * n_layers)
    routers = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, Router)}
    temperatures = {f"{name}temperature": router.config.initial_temperature for name, router in routers.items()}
    noisy = {
        f"{name}{own}"
        for name, router in routers.items()
        if router.noise_weight is not None
        for own in ("weight", "noise_weight")
    }

    def draw(name: str, tensor: Tensor) -> None:
        if name.endswith("norm.weight"):
            nn.init.ones_(tensor)
        elif name.rsplit(".", 1)[-1] in ("bias", "b_in", "b_out") or name in noisy:
            nn.init.zeros_(tensor)
        elif name.endswith("special.constant"):
            _normal_(tensor, 1.0, seed, name)
        elif name in temperatures:
            nn.init.constant_(tensor, temperatures[name])
        else:
            std = residual_std if name.endswith(RESIDUAL_OUTPUTS) else init_std
            _normal_(tensor, std, seed, name)

    return draw


def _normal_(parameter: Tensor, std: float, seed: int, name: str) -> None:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    drawn = torch.empty(parameter.shape, dtype=torch.float32)
    nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std, generator=generator)
    with torch.no_grad():
        parameter.copy_(drawn)
