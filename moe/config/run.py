"""Settings of the run's folder, and everything together."""

from dataclasses import dataclass, field, replace

from moe.config.checks import require
from moe.config.data import DataConfig
from moe.config.model import ModelConfig
from moe.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The folder of the run."""

    name: str | None = None
    """name of the run's folder; null: the configuration's name and the time"""
    folder: str = "runs"
    """where run folders are made"""

    def __post_init__(self) -> None:
        require(
            self.name is None or (self.name != "" and self.name not in (".", "..") and "/" not in self.name),
            "name",
            f"is {self.name!r}, and must be the name of one folder",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(
            self.data.sequence_length <= self.model.max_seq,
            "data.sequence_length",
            f"is {self.data.sequence_length}, but model.max_seq is {self.model.max_seq}",
        )

    def with_vocab(self, tokenizer_size: int) -> "Config":
        """This configuration with ``model.vocab_size`` filled in from a tokenizer of ``tokenizer_size`` ids.

        Raises ConfigError where the configured size is too small for the tokenizer.
        """
        if self.model.vocab_size is None:
            rounded = -(-tokenizer_size // 64) * 64
            return replace(self, model=replace(self.model, vocab_size=rounded))
        require(
            self.model.vocab_size >= tokenizer_size,
            "model.vocab_size",
            f"is {self.model.vocab_size}, but the tokenizer has {tokenizer_size} ids",
        )
        return self
