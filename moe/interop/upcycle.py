"""Experts out of a dense model: every expert begins as its MLP, or as a part of it, under a new router.

Sparse upcycling is Komatsuzaki et al. 2023 (arXiv 2212.05055): each expert is a copy of the MLP, the router is drawn
anew, and normalised weights, which sum to 1 over equal experts, leave the function as it was. For finer experts the
hidden units are cut into G parts, and E experts are E / G virtual groups that hold each part once (He et al. 2024,
arXiv 2410.07524): the router starts with one row a group, repeated, so that a token takes whole groups, and the weights
are scaled, since each part has the G-th part of a group's weight: here W_out by G, which is exact for a power of two.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config import Activation, ModelConfig, require
from moe.model.feed_forward import GATED

AT_ZERO = {"softmax": None, "sigmoid": 0.5, "sqrt_softplus": 0.6931471805599453**0.5}
"""score of an expert whose logit is 0, by score function; None: one over the number of experts"""


@dataclass(frozen=True)
class Upcycling:
    """How experts are made of the MLPs of a dense model."""

    n_experts: int
    """E, experts a layer"""
    granularity: int = 1
    """G, parts that an MLP is cut into"""
    noise: float = 0.0
    """standard deviation of the noise on each expert's matrices, over that of the matrix"""

    def __post_init__(self) -> None:
        require(self.n_experts >= 2, "--upcycle", f"is {self.n_experts}, and must be at least 2")
        require(self.granularity >= 1, "--granularity", f"is {self.granularity}, and must be at least 1")
        require(
            self.n_experts % self.granularity == 0,
            "--granularity",
            f"is {self.granularity}, and must divide the {self.n_experts} experts of --upcycle",
        )
        require(0 <= self.noise <= 1, "--noise", f"is {self.noise}, and must lie between 0 and 1")

    def settings(self, dense: ModelConfig) -> dict[str, object]:
        """What becomes of the settings of ``dense``, by dotted key below ``model.``: the shape of the experts.

        The number of experts a token takes starts as two copies of the MLP, where there are two.
        """
        width = dense.active_width
        require(
            width % self.granularity == 0,
            "--granularity",
            f"is {self.granularity}, and must divide the {width} hidden units of the MLP",
        )
        return {
            "dense_twin": False,
            "experts.n_experts": self.n_experts,
            "experts.d_ff": width // self.granularity,
            "router.top_k": min(2 * self.granularity, self.n_experts),
            "router.normalise": True,
        }

    def require_possible(self, dense: ModelConfig, mixture: ModelConfig) -> None:
        """Raise ConfigError, with the key, where ``mixture`` is nothing that experts of ``dense`` can begin as."""
        router, experts = mixture.router, mixture.experts
        require(not mixture.dense_twin, "dense_twin", "is true: there would be no experts")
        require(
            experts.n_experts == self.n_experts,
            "experts.n_experts",
            f"is {experts.n_experts}, and --upcycle makes {self.n_experts}",
        )
        require(
            experts.d_ff * self.granularity == dense.active_width,
            "experts.d_ff",
            f"is {experts.d_ff}, and a part of the MLP has {dense.active_width // self.granularity}",
        )
        dense_layers = [layer for layer in range(mixture.n_layers) if layer not in mixture.moe_layers]
        widths = {mixture.dense_width(layer) for layer in dense_layers}
        require(
            widths <= {dense.active_width},
            "feed_forward.d_ff",
            f"is {sorted(widths)}, and the MLP that stays in the dense layers has {dense.active_width}",
        )
        require(
            router.selection == "top_k",
            "router.selection",
            f"is {router.selection}; experts are made for top_k, whose tokens all have as many",
        )
        require(
            router.top_k % self.granularity == 0,
            "router.top_k",
            f"is {router.top_k}, and must be a multiple of --granularity {self.granularity}: a token takes whole MLPs",
        )
        require(router.score in AT_ZERO, "router.score", f"is {router.score}: a new router would give no expert weight")
        require(not router.residual, "router.residual", "is true: a dense model has no logits of an earlier layer")
        require(router.apply == "after", "router.apply", "is before: the weight would change what the MLP computes")
        for section in ("shared.n_experts", "special.zero", "special.copy", "special.constant"):
            first, _, name = section.partition(".")
            require(not getattr(getattr(mixture, first), name), section, "is set, and a dense model has nothing for it")

    def output_scale(self, mixture: ModelConfig) -> float:
        """What W_out is multiplied by, so that the weights of a new router give an MLP once.

        With K experts a token, the parts of K / G groups, each weighing w0, add up to the MLP times K w0 / G. For
        normalised weights K w0 is their sum, exact for every router; otherwise w0 is the score of a logit of 0, which a
        new router's are near, and the function is kept as nearly.
        """
        router = mixture.router
        if router.normalise:
            total = router.scale
        else:
            at_zero = AT_ZERO[router.score]
            total = router.scale * router.top_k * (1 / self.n_experts if at_zero is None else at_zero)
        return self.granularity / total

    def mixture_tensors(
        self, dense: Mapping[str, Tensor], mixture: ModelConfig, seed: int
    ) -> Iterator[tuple[str, int | None, Tensor]]:
        """Every tensor of the mixture but those of routers: name, expert (None: the whole tensor) and value.

        One is in memory at a time. ``seed`` and the name decide the noise.
        """
        scale = self.output_scale(mixture)
        for name, tensor in dense.items():
            layer = _layer_of_mlp(name)
            if layer is None or layer not in mixture.moe_layers:
                yield name, None, tensor
                continue
            stack = _STACKS[name.split("feed_forward.")[1]]
            for expert in range(self.n_experts):
                part = self._part(stack, tensor, expert % self.granularity, scale, mixture.feed_forward.activation)
                yield (
                    f"blocks.{layer}.feed_forward.experts.{stack}",
                    expert,
                    self._noisy(part, f"{name}/{expert}", seed),
                )

    def _part(self, stack: str, tensor: Tensor, number: int, scale: float, activation: Activation) -> Tensor:
        """Part ``number`` of a tensor of the dense MLP, by the name of the stack that it becomes an expert of."""
        if stack in ("w_in", "b_in"):
            # Gate over value: a part has its units of both.
            halves = tensor.chunk(2 if activation in GATED else 1)
            return torch.cat([half.chunk(self.granularity)[number] for half in halves])
        if stack == "w_out":
            return tensor.chunk(self.granularity, dim=1)[number] * scale
        # Each part has an equal share of the bias on the output.
        return tensor * (scale / self.granularity)

    def _noisy(self, part: Tensor, name: str, seed: int) -> Tensor:
        if not self.noise or part.dim() < 2:
            return part
        digest = hashlib.sha256(f"{seed}/upcycle/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        drawn = torch.randn(part.shape, generator=generator, dtype=torch.float32)
        return part + self.noise * part.float().std() * drawn

    def share_rows(self, tensor: Tensor) -> None:
        """Give all rows of a group the first one's, in a tensor of a router with a row an expert, in place."""
        groups = tensor.view(-1, self.granularity, *tensor.shape[1:])
        groups.copy_(groups[:, :1].clone().expand_as(groups))


_STACKS = {"w_in.weight": "w_in", "w_in.bias": "b_in", "w_out.weight": "w_out", "w_out.bias": "b_out"}


def _layer_of_mlp(name: str) -> int | None:
    """The block of a tensor of an MLP; None for any other tensor."""
    parts = name.split(".")
    return int(parts[1]) if len(parts) > 3 and parts[2] == "feed_forward" else None
