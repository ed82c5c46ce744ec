"""Every setting, its default, its meaning and its check.

A setting is a field of a frozen dataclass; the string under it is what ``python train.py --help`` prints. Checks that
need one section live in that section's ``__post_init__``, checks across sections in the section that holds both. This
file needs nothing but the standard library, so that a layer can be built from a configuration in a unit test;
reading files and flags into these classes is the work of :mod:`moe.config_file`.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

NormKind = Literal["rmsnorm", "layernorm"]
Activation = Literal["swiglu", "gelu", "relu"]
QKNorm = Literal["none", "head", "full"]
ExpertBackend = Literal["auto", "reference", "grouped", "segments"]
BalanceScope = Literal["micro_batch", "global_batch"]
Precision = Literal["auto", "fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
ScheduleShape = Literal["cosine", "wsd", "constant"]


class ConfigError(ValueError):
    """A setting that cannot be used: ``key`` is its dotted name below the class that raised, ``reason`` says why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}" if key else reason)
        self.key = key
        self.reason = reason


def require(condition: bool, key: str, reason: str) -> None:
    """Raise :class:`ConfigError` for ``key`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(key, reason)


def _at_least(section: Any, minimum: int | float, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        require(value is None or value >= minimum, key, f"is {value}, and must be at least {minimum:g}")


def _in_unit_interval(section: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        require(0 <= value <= 1, key, f"is {value}, and must lie between 0 and 1")


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal attention with rotary positions and multi-, grouped- or multi-query heads."""

    n_heads: int = 6
    """query heads"""
    n_kv_heads: int | None = None
    """key and value heads; null: as many as query heads, 1: multi-query"""
    head_dim: int = 32
    """width of one head; n_heads x head_dim need not equal d_model"""
    qk_norm: QKNorm = "none"
    """RMSNorm on queries and keys: per head, or over all heads together (full)"""
    bias: bool = False
    """biases on the four projections"""
    rope_theta: float = 10_000.0
    """base of the rotary frequencies"""

    def __post_init__(self) -> None:
        _at_least(self, 1, "n_heads", "n_kv_heads", "head_dim", "rope_theta")
        require(self.head_dim % 2 == 0, "head_dim", f"is {self.head_dim}, and rotary positions need an even width")
        require(
            self.n_heads % self.kv_heads == 0,
            "n_kv_heads",
            f"is {self.kv_heads}, which does not divide n_heads = {self.n_heads}",
        )

    @property
    def kv_heads(self) -> int:
        """Key and value heads, with the default resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """What every feed-forward layer shares (dense, expert and shared expert), and the width of the dense ones."""

    activation: Activation = "swiglu"
    """swiglu (three matrices), or gelu / relu (two matrices)"""
    bias: bool = False
    """biases on both projections"""
    d_ff: int | None = None
    """hidden width of dense layers; null: the width that a token sees in an MoE layer (top_k + shared experts)"""

    def __post_init__(self) -> None:
        _at_least(self, 1, "d_ff")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The expert MLPs of a mixture-of-experts layer, and which layers are one."""

    n_experts: int = 16
    """experts a layer"""
    d_ff: int = 256
    """hidden width of one expert"""
    every: int = 1
    """an MoE layer in every n-th block (the last of each n), the others dense"""
    first_dense: int = 0
    """the first n blocks are dense whatever `every` says"""
    backend: ExpertBackend = "auto"
    """how experts are computed: auto (by device), reference (loop), grouped (torch grouped_mm), segments (CPU)"""

    def __post_init__(self) -> None:
        _at_least(self, 1, "n_experts", "d_ff", "every")
        _at_least(self, 0, "first_dense")


@dataclass(frozen=True, kw_only=True)
class SharedExpertsConfig:
    """Experts that every token passes through, beside the routed ones."""

    n_experts: int = 0
    """shared experts (one MLP of n_experts x d_ff)"""
    d_ff: int | None = None
    """hidden width of one shared expert; null: that of a routed expert"""
    gated: bool = False
    """weigh the shared output with a sigmoid gate per token (Qwen2-MoE)"""

    def __post_init__(self) -> None:
        _at_least(self, 0, "n_experts")
        _at_least(self, 1, "d_ff")
        require(not self.gated or self.n_experts > 0, "gated", "is true, but n_experts is 0: there is nothing to gate")
        require(
            self.d_ff is None or self.n_experts > 0, "d_ff", "is given, but n_experts is 0: there is no shared expert"
        )


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Which experts a token goes to, and with what weight: softmax over all experts, then the top k."""

    top_k: int = 2
    """experts per token"""
    normalise: bool = True
    """divide the k weights by their sum (Mixtral); false keeps the raw probabilities (OLMoE, Switch)"""
    scale: float = 1.0
    """factor on the weights, applied once, after normalisation"""

    def __post_init__(self) -> None:
        _at_least(self, 1, "top_k")
        require(self.scale > 0, "scale", f"is {self.scale}, and must be positive")
        require(
            not (self.normalise and self.top_k == 1),
            "normalise",
            "is true with top_k 1: the single weight would always be 1 and the router would get no gradient "
            "from the language-model loss; set normalise to false",
        )


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Auxiliary losses that keep the experts evenly used; each is taken per layer and summed over the MoE layers."""

    load_balance: float = 0.01
    """coefficient of the load-balancing loss (Switch Transformers, eq. 4-6), which is 1 at perfect balance"""
    scope: BalanceScope = "micro_batch"
    """tokens over which the load is counted: a rank's micro-batch, or the step's micro-batches so far on all ranks"""
    z_loss: float = 0.0
    """coefficient of the router z-loss (ST-MoE, eq. 5); 0.001 is the published choice"""

    def __post_init__(self) -> None:
        _at_least(self, 0, "load_balance", "z_loss")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer whose feed-forward layers are mixtures of experts."""

    vocab_size: int | None = None
    """size of the embedding; null: that of the tokenizer, rounded up to a multiple of 64"""
    n_layers: int = 4
    """transformer blocks"""
    d_model: int = 192
    """width of the residual stream"""
    max_seq: int = 1024
    """longest sequence that the model accepts, in tokens"""
    norm: NormKind = "rmsnorm"
    """normalisation before each sub-layer and before the head"""
    norm_eps: float = 1e-6
    """epsilon of the norms"""
    dropout: float = 0.0
    """dropout on the embedding and on both residual branches, in training"""
    tie_embeddings: bool = True
    """one matrix for the embedding and the head"""
    init_std: float = 0.02
    """standard deviation of the initial weights; residual outputs are scaled by 1 / sqrt(2 n_layers)"""
    dense_twin: bool = False
    """replace each mixture by the dense layer of the same active parameters and FLOPs, for comparison"""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    feed_forward: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    shared: SharedExpertsConfig = field(default_factory=SharedExpertsConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)

    def __post_init__(self) -> None:
        _at_least(self, 1, "vocab_size", "n_layers", "d_model", "max_seq")
        _in_unit_interval(self, "dropout")
        require(self.dropout < 1, "dropout", "is 1: nothing would be left")
        require(self.norm_eps > 0, "norm_eps", f"is {self.norm_eps}, and must be positive")
        require(self.init_std > 0, "init_std", f"is {self.init_std}: a zero router would send every token one way")
        require(
            self.router.top_k <= self.experts.n_experts,
            "router.top_k",
            f"is {self.router.top_k}, but experts.n_experts is {self.experts.n_experts}",
        )

        mixtures = sum(self.is_moe_layer(layer) for layer in range(self.n_layers))
        require(
            mixtures > 0,
            "experts.every" if self.experts.every > self.n_layers else "experts.first_dense",
            f"leaves none of the {self.n_layers} layers a mixture; for a dense model set dense_twin",
        )
        require(
            self.feed_forward.d_ff is None or mixtures < self.n_layers,
            "feed_forward.d_ff",
            f"is {self.feed_forward.d_ff}, but no layer is dense: experts.d_ff is the width of an expert",
        )

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts of a layer together."""
        return self.shared.n_experts * (self.shared.d_ff or self.experts.d_ff)

    def dense_width(self, layer: int) -> int:
        """Hidden width of block ``layer`` as a dense layer: what a token sees in the mixture that it is the twin of,
        or the configured width where there is no mixture."""
        if self.is_moe_layer(layer) or self.feed_forward.d_ff is None:
            return self.active_width
        return self.feed_forward.d_ff

    @property
    def active_width(self) -> int:
        """Hidden width that one token passes through in a mixture: k routed experts and the shared ones."""
        return self.router.top_k * self.experts.d_ff + self.shared_width

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) is a mixture: the last of every ``every``, none of ``first_dense``."""
        return layer >= self.experts.first_dense and (layer + 1) % self.experts.every == 0

    @property
    def moe_layers(self) -> list[int]:
        """The blocks that route; none in the dense twin."""
        return [] if self.dense_twin else [layer for layer in range(self.n_layers) if self.is_moe_layer(layer)]


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, and how it becomes batches."""

    corpus: str = "corpora/default.yaml"
    """the file that lists the sources, relative to the configuration file, else to the working directory"""
    tokenizer: str = "bpe"
    """bpe (trained on the corpus), gpt2, cl100k, or the path of a tokenizer.json"""
    vocab_size: int = 4096
    """size of the vocabulary that bpe trains; other tokenizers have their own"""
    sequence_length: int = 256
    """tokens a training sequence predicts"""
    validation_bytes: int = 98_304
    """held-out text per domain, in bytes of whole documents; never more than a tenth of the domain"""
    validation_stride: int | None = None
    """tokens between validation windows, so that each token has at least the rest as context; null: half a window"""
    max_bytes: int | None = None
    """at most so much training text per domain, in bytes of whole documents; null: all"""
    cache: str = "~/.cache/moe-lab"
    """folder in which tokenized corpora are kept"""

    def __post_init__(self) -> None:
        _at_least(self, 1, "sequence_length", "validation_bytes", "max_bytes")
        require(
            1 <= self.stride <= self.sequence_length,
            "validation_stride",
            f"is {self.stride}, and must be from 1 to sequence_length = {self.sequence_length}",
        )
        require(self.vocab_size >= 257, "vocab_size", f"is {self.vocab_size}; 256 bytes and an end of text need 257")

    @property
    def stride(self) -> int:
        """Tokens between validation windows, with the default resolved."""
        return max(1, self.sequence_length // 2) if self.validation_stride is None else self.validation_stride


# ------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW."""

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

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", f"is {self.lr}, and must be positive")
        require(self.eps > 0, "eps", f"is {self.eps}, and must be positive")
        require(0 <= self.beta1 < 1, "beta1", f"is {self.beta1}, and must lie in [0, 1)")
        require(0 <= self.beta2 < 1, "beta2", f"is {self.beta2}, and must lie in [0, 1)")
        require(self.clip is None or self.clip > 0, "clip", f"is {self.clip}; null turns clipping off")
        _at_least(self, 0, "weight_decay")


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
        _at_least(self, 0, "warmup_steps")
        _in_unit_interval(self, "decay_fraction", "final_fraction")


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
    compile: bool = False
    """compile each block with torch.compile"""
    activation_checkpointing: bool = False
    """recompute each block in the backward pass, to save memory"""
    evaluate_every: int = 250
    """steps between validations; there is always one at the end"""
    checkpoint_every: int = 250
    """steps between checkpoints; there is always one at the end"""
    keep_checkpoints: int = 2
    """checkpoints kept, the newest"""
    log_every: int = 10
    """steps between lines on a screen that is no terminal"""
    tensorboard: bool = False
    """also write TensorBoard events (needs the extra `tensorboard`)"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch_size", "accumulation", "evaluate_every", "checkpoint_every")
        _at_least(self, 1, "keep_checkpoints", "log_every")
        _at_least(self, 0, "seed")
        require(
            self.batch_size % self.accumulation == 0,
            "accumulation",
            f"is {self.accumulation}, which does not divide batch_size = {self.batch_size}",
        )


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
