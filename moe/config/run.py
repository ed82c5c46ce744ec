"""Settings of the run's folder, and everything together."""

from dataclasses import dataclass, field, replace

from moe.config.checks import require
from moe.config.data import DataConfig
from moe.config.model import ModelConfig
from moe.config.parallel import ParallelConfig
from moe.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The folder of the run."""

    name: str | None = None
    """name of the run's folder; null: the configuration's name and the time"""
    folder: str = "runs"
    """where run folders are made"""
    start_from: str | None = None
    """a run, or one of its checkpoints, whose weights training begins with; null: new ones"""

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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(
            self.data.sequence_length <= self.model.max_seq,
            "data.sequence_length",
            f"is {self.data.sequence_length}, but model.max_seq is {self.model.max_seq}",
        )
        require(
            not (self.model.deterministic and self.training.compile),
            "training.compile",
            "is true, but model.deterministic promises bits that what is compiled for one size may not have",
        )
        require(
            not (self.model.deterministic and self.parallel.tensor > 1),
            "parallel.tensor",
            f"is {self.parallel.tensor}, but model.deterministic wants the whole of every sum on one rank",
        )
        self._require_a_model_that_divides()

    def _require_a_model_that_divides(self) -> None:
        model, parallel, attention = self.model, self.parallel, self.model.attention
        experts, tensor = parallel.expert, parallel.tensor
        blocks, parts = model.n_layers, parallel.pipeline * parallel.stages
        require(parts <= blocks, "parallel.pipeline", f"makes {parts} stages, and there are {blocks} blocks")
        if experts > 1:
            n = model.experts.n_experts
            require(bool(model.moe_layers), "parallel.expert", f"is {experts}, but the model has no mixture")
            require(n % experts == 0, "parallel.expert", f"is {experts}, and must divide the {n} experts of a layer")
        require(
            parallel.pipeline == 1 or not model.router.residual,
            "model.router.residual",
            f"is true, but the mixture before may be on another rank (parallel.pipeline is {parallel.pipeline})",
        )
        if max(experts, tensor) > 1:
            require(
                model.router.gradient != "all_experts",
                "model.router.gradient",
                f"is {model.router.gradient}, which asks every expert about every token, where no rank has them all",
            )
        if tensor == 1:
            return
        sizes = {
            "data.sequence_length": self.data.sequence_length,
            "model.attention.n_heads": attention.n_heads,
            "model.vocab_size": model.vocab_size or tensor,
            "model.experts.d_ff": model.experts.d_ff,
        } | {f"the width of block {layer}": model.dense_width(layer) for layer in range(blocks)}
        if attention.kv_heads > 1:
            sizes["model.attention.n_kv_heads"] = attention.kv_heads
        if model.shared_width:
            sizes["model.shared.d_ff x n_experts"] = model.shared_width
        for name, size in sizes.items():
            require(size % tensor == 0, "parallel.tensor", f"is {tensor}, and does not divide {name} = {size}")
        for key, bad, why in (
            ("attention.qk_norm", attention.qk_norm == "full", "is full: a norm over all heads, which are apart"),
            ("attention.latent.rank", attention.is_latent, "is set: latent attention is not cut into heads here"),
            ("attention.sinks", attention.sinks, "is true: each head has its own, and heads are apart"),
            ("dropout", model.dropout > 0, f"is {model.dropout}: ranks that share a sequence would drop alike"),
            ("positions", model.positions == "learned", "is learned: ranks have parts of the sequence"),
            ("router.apply", model.router.apply == "before", "is before: a part of an expert cannot see the weight"),
            ("head_bias", model.head_bias, "is true: the vocabulary is divided, and its bias is not"),
        ):
            require(not bad, f"model.{key}", f"{why} (parallel.tensor is {tensor})")

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
