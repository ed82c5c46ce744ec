"""An optimizer whose groups each have a rule, AdamW or Muon, over weights in float32 or bfloat16."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moe.training.adamw import adamw_in_bf16, move_in_bf16, put_unless_bad
from moe.training.muon import matrices_of, of_one_shape, orthogonalise, scale_of


class MixedOptimizer(torch.optim.Optimizer):
    """AdamW for the groups whose ``rule`` is adamw, Muon (:mod:`.muon`) for those whose rule is muon.

    Every group has ``lr`` and ``weight_decay``, which is decoupled. Those of AdamW have ``betas`` and ``eps``; those of
    Muon ``momentum`` (Nesterov's), ``iterations``, ``step_size`` (see :func:`~moe.training.muon.scale_of`) and
    ``halves``: how many matrices lie one above the other in each (2 where a gate lies above a value).

    States have the dtype of their weight. In bfloat16 weights are rounded by chance (:mod:`.rounding`). The host is
    asked for nothing: where the attribute ``found_inf`` is a tensor that is not 0, a step changes nothing, and where
    ``factor`` is a tensor, the gradients count so many times.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        defaults: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "rule": "adamw", "betas": (0.9, 0.95), "eps": 1e-8}
        defaults |= {"momentum": 0.95, "iterations": 5, "step_size": "adamw", "halves": 1}
        # By this the base class knows, on loading, that counts of steps are float32 and on the parameters' device.
        super().__init__(groups, defaults | {"fused": True})
        self.found_inf: Tensor | None = None
        self.factor: Tensor | None = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        salts = {parameter: salt for salt, parameter in enumerate(p for g in self.param_groups for p in g["params"])}
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            if group["rule"] == "muon":
                self._count_steps(parameters, ["momentum"])
                for batch in of_one_shape(parameters):
                    self._muon(batch, group, salts)
            else:
                # In float32 torch's fused form counts the steps itself.
                rounded = [parameter for parameter in parameters if parameter.dtype == torch.bfloat16]
                self._count_steps(rounded, ["exp_avg", "exp_avg_sq"])
                for parameter in rounded:
                    self._adamw_in_bf16(parameter, group, salts[parameter])
                self._adamw([parameter for parameter in parameters if parameter.dtype != torch.bfloat16], group)
        return loss

    def _count_steps(self, parameters: list[Tensor], kinds: list[str]) -> None:
        """One step more for each parameter, unless it is a bad one; the first makes the state."""
        self._make_states(parameters, kinds)
        if parameters:
            steps = [self.state[parameter]["step"] for parameter in parameters]
            if self.found_inf is None:
                torch._foreach_add_(steps, 1.0)
            else:  # by a list: of a single tensor this reads the number, and waits for it
                torch._foreach_add_(steps, [1 - self.found_inf] * len(steps))

    def _make_states(self, parameters: list[Tensor], kinds: list[str]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                self.state[parameter] |= {kind: torch.zeros_like(parameter) for kind in kinds}

    def _adamw_in_bf16(self, parameter: Tensor, group: dict[str, Any], salt: int) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None
        adamw_in_bf16(
            parameter,
            parameter.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            salt=salt,
            factor=self.factor,
            found_inf=self.found_inf,
        )

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        self._make_states(parameters, ["exp_avg", "exp_avg_sq"])
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [self._gradient(parameter) for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, parameters: list[Tensor], group: dict[str, Any], salts: dict[Tensor, int]) -> None:
        """One step of parameters that have one shape."""
        ahead = []
        working = torch.float64 if parameters[0].dtype == torch.float64 else torch.bfloat16
        for parameter in parameters:
            momentum, gradient = self.state[parameter]["momentum"], self._gradient(parameter)
            moved = torch.lerp(momentum, gradient, 1 - group["momentum"])
            # Nesterov: the gradient counts once more, as if it were already the next.
            looked = torch.lerp(gradient, moved, group["momentum"])
            ahead.append(matrices_of(looked, group["halves"]).to(working))
            put_unless_bad(momentum, moved, self.found_inf)
        together = ahead[0] if len(ahead) == 1 else torch.cat(ahead)
        directions = torch.split(orthogonalise(together, group["iterations"]), ahead[0].shape[0])
        rate = group["lr"] * scale_of(group["step_size"], together.shape[-2], together.shape[-1])
        decay = 1 - group["lr"] * group["weight_decay"]
        for parameter, matrices in zip(parameters, directions, strict=True):
            direction = matrices.reshape(parameter.shape)
            if parameter.dtype == torch.bfloat16:
                move_in_bf16(
                    parameter,
                    direction,
                    self.state[parameter]["step"],
                    decay=decay,
                    rate=rate,
                    salt=salts[parameter],
                    found_inf=self.found_inf,
                )
            else:
                put_unless_bad(parameter, parameter * decay - rate * direction.to(parameter.dtype), self.found_inf)

    def _gradient(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad if self.factor is None else parameter.grad * self.factor.to(parameter.grad.dtype)
