"""Settings of training."""

from dataclasses import dataclass, field
from typing import Literal

from moe.config.checks import at_least, in_unit_interval, require

Precision = Literal["auto", "fp32", "bf16"]
WeightDtype = Literal["fp32", "bf16"]
Checkpointing = Literal["none", "attention", "experts", "block"]
Device = Literal["auto", "cpu", "cuda"]
OptimizerName = Literal["adamw", "muon"]
StepSize = Literal["adamw", "spectral"]
ScheduleShape = Literal["cosine", "wsd", "constant"]


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """What Muon adds to the settings of AdamW."""

    rate: float | None = None
    """peak learning rate of the matrices; null: that of AdamW, which suits the step size adamw"""
    momentum: float = 0.95
    """decay of the momentum, which is Nesterov's"""
    iterations: int = 5
    """Newton-Schulz iterations"""
    step_size: StepSize = "adamw"
    """size of a step: adamw (root mean square 0.2 rate, Liu et al. 2025), or spectral (Jordan's: rate near 0.02)"""

    def __post_init__(self) -> None:
        require(self.rate is None or self.rate > 0, "rate", f"is {self.rate}, and must be positive")
        require(0 <= self.momentum < 1, "momentum", f"is {self.momentum}, and must lie in [0, 1)")
        at_least(self, 1, "iterations")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, alone or beside Muon."""

    name: OptimizerName = "adamw"
    """adamw, or muon for the matrices of attention, MLPs and experts (each its own) and AdamW for all else"""
    lr: float = 3e-3
    """peak learning rate"""
    beta1: float = 0.9
    """decay of the first moment"""
    beta2: float = 0.95
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.1
    """decoupled weight decay on matrices; never on norms, biases or gains"""
    decay_router: bool = False
    """whether the router's matrix decays too"""
    clip: float | None = 1.0
    """largest norm of the whole gradient; null: no clipping"""
    muon: MuonConfig = field(default_factory=MuonConfig)

    def __post_init__(self) -> None:
        require(
            self.name == "muon" or self.muon == MuonConfig(),
            "name",
            f"is {self.name}, but training.optimizer.muon is set; choose muon, or leave that section out",
        )
        require(self.lr > 0, "lr", f"is {self.lr}, and must be positive")
        require(self.eps > 0, "eps", f"is {self.eps}, and must be positive")
        require(0 <= self.beta1 < 1, "beta1", f"is {self.beta1}, and must lie in [0, 1)")
        require(0 <= self.beta2 < 1, "beta2", f"is {self.beta2}, and must lie in [0, 1)")
        require(self.clip is None or self.clip > 0, "clip", f"is {self.clip}; null turns clipping off")
        at_least(self, 0, "weight_decay")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run: a linear warm-up, then a shape."""

    shape: ScheduleShape = "wsd"
    """cosine, wsd (constant, then a linear decay), or constant"""
    warmup_steps: int = 50
    """steps of linear warm-up"""
    decay_fraction: float = 0.5
    """share of the run that wsd spends decaying"""
    final_fraction: float = 0.0
    """learning rate at the end over the peak, for cosine and wsd"""

    def __post_init__(self) -> None:
        at_least(self, 0, "warmup_steps")
        in_unit_interval(self, "decay_fraction", "final_fraction")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One run: how long, how large a step, in what precision, and what it writes."""

    steps: int = 1000
    """optimizer steps"""
    batch_size: int = 16
    """sequences per optimizer step, over all ranks and micro-batches"""
    accumulation: int = 1
    """micro-batches per optimizer step"""
    seed: int = 0
    """seed of the initial weights, the order of the data and the dropout"""
    device: Device = "auto"
    """auto takes a GPU if there is one"""
    precision: Precision = "auto"
    """fp32, bf16 (autocast over float32 weights; router, losses and combine stay float32), or auto: the faster here"""
    weight_dtype: WeightDtype = "fp32"
    """dtype of parameters and optimizer states; bf16 is half the memory, rounded by chance (router, norms stay fp32)"""
    compile: bool = False
    """compile each block with torch.compile"""
    activation_checkpointing: Checkpointing = "none"
    """what the backward pass computes again, to save memory: none, attention, experts (a dense layer's MLP), block"""
    evaluate_every: int = 250
    """steps between validations; there is always one at the end"""
    checkpoint_every: int = 250
    """steps between checkpoints; there is always one at the end"""
    record_every: int | None = None
    """steps between routing records of a small sample of held-out text, for the study; null: none"""
    keep_checkpoints: int = 2
    """checkpoints kept, the newest"""
    log_every: int = 10
    """steps between lines on a screen that is no terminal"""
    tensorboard: bool = False
    """also write TensorBoard events (needs the extra `tensorboard`)"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_size", "accumulation", "evaluate_every", "checkpoint_every")
        at_least(self, 1, "keep_checkpoints", "log_every", "record_every")
        at_least(self, 0, "seed")
        require(
            self.batch_size % self.accumulation == 0,
            "accumulation",
            f"is {self.accumulation}, which does not divide batch_size = {self.batch_size}",
        )
        if self.weight_dtype == "bf16":
            require(
                self.precision != "fp32", "precision", "is fp32, but with training.weight_dtype bf16 there is only bf16"
            )
