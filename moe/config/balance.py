"""Settings of the losses that balance the load."""

from dataclasses import dataclass
from typing import Literal

from moe.config.checks import at_least, is_default, require

BalanceScope = Literal["sequence", "micro_batch", "global_batch"]
BalancedChoices = Literal["all", "first"]


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Auxiliary losses on the routing; each is taken per layer and summed over the MoE layers.

    Coefficients multiply the losses of moe/model/balance.py, whose docstring converts those of other codebases.
    """

    load_balance: float = 0.01
    """coefficient of the load-balancing loss (Switch Transformers, eq. 4-6), which is 1 at perfect balance"""
    scope: BalanceScope = "micro_batch"
    """tokens over which that load is counted: each sequence, a rank's micro-batch, or the step's so far on all ranks"""
    choices: BalancedChoices = "all"
    """assignments that count as load: all of them, or each token's first choice (GShard)"""
    special_weight: float = 1.0
    """weight of zero, copy and constant experts in the load-balancing loss (MoE++: 0.75)"""
    z_loss: float = 0.0
    """coefficient of the router z-loss (ST-MoE, eq. 5); 0.001 is the published choice"""
    importance: float = 0.0
    """coefficient of the squared variation of the experts' total weight (Shazeer et al. 2017; 0.1)"""
    noisy_load: float = 0.0
    """coefficient of the squared variation of a smooth load, which needs noise shazeer (Shazeer et al. 2017; 0.1)"""
    device: float = 0.0
    """coefficient of the load-balancing loss over groups of experts that share a device (DeepSeekMoE; 0.05)"""
    n_devices: int | None = None
    """groups of consecutive experts for `device`"""
    sparsity: float = 0.0
    """initial coefficient of ReMoE's L1 loss, which steers itself to top_k experts a token (ReMoE: 1e-8)"""
    sparsity_rate: float = 1.2
    """factor by which that coefficient grows or shrinks each step"""
    entropy: float = 0.0
    """coefficient of the router's entropy, which sharpens it (top-p routing; 1e-4)"""
    orthogonality: float = 0.0
    """coefficient of the distance of the router's rows from orthonormal (SimBal)"""

    def __post_init__(self) -> None:
        at_least(self, 0, "load_balance", "z_loss", "importance", "noisy_load", "device", "sparsity", "entropy")
        at_least(self, 0, "orthogonality", "special_weight")
        at_least(self, 2, "n_devices")
        require(self.sparsity_rate > 1, "sparsity_rate", f"is {self.sparsity_rate}, and must be above 1")
        require(
            self.sparsity > 0 or is_default(self, "sparsity_rate"),
            "sparsity_rate",
            "is set, but sparsity is 0: there is no coefficient to steer",
        )
        require(
            (self.n_devices is None) == (self.device == 0),
            "n_devices",
            "and device go together: a coefficient above 0 and the number of groups",
        )
