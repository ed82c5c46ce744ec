"""Every setting, its default, its meaning and its check.

A setting is a field of a frozen dataclass; the string under it is what ``python train.py --help`` prints. Checks that
need one section live in that section's ``__post_init__``, checks across sections in the section that holds both. This
file needs nothing but the standard library, so that a layer can be built from a configuration in a unit test;
reading files and flags into these classes is the work of :mod:`moe.config_file`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal

NormKind = Literal["rmsnorm", "layernorm"]
Activation = Literal["swiglu", "swiglu_clamped", "gelu", "relu"]
QKNorm = Literal["none", "head", "full"]
ExpertBackend = Literal["auto", "reference", "grouped", "segments", "fused"]
Preset = Literal[
    "shazeer",
    "gshard",
    "switch",
    "st_moe",
    "base",
    "sinkhorn",
    "hash",
    "expert_choice",
    "mixtral",
    "deepseek_moe",
    "deepseek_v2",
    "deepseek_v3",
    "loss_free",
    "quantile",
    "olmoe",
    "qwen2",
    "qwen3",
    "llama4",
    "gpt_oss",
    "dbrx",
    "grin",
    "remoe",
    "moe_plus_plus",
    "longcat",
    "top_p",
    "dense_mixer",
    "cosine",
    "random",
    "dense",
]
Projection = Literal["linear", "cosine", "two_layer"]
Score = Literal["softmax", "sigmoid", "sqrt_softplus", "relu"]
Noise = Literal["none", "shazeer", "gumbel"]
Selection = Literal[
    "top_k",
    "group_limited",
    "top_p",
    "positive",
    "all",
    "sampled",
    "expert_choice",
    "sinkhorn",
    "base",
    "hash",
    "random",
]
GroupScore = Literal["max", "top_two"]
SelectionBias = Literal["none", "sign", "proportional", "quantile"]
WeightSource = Literal["scores", "equal"]
WeightPosition = Literal["after", "before"]
RouterGradient = Literal["selected", "all_experts", "heun"]
CapacityOrder = Literal["position", "choice", "score"]
CapacityScope = Literal["micro_batch", "sequence"]
BalanceScope = Literal["sequence", "micro_batch", "global_batch"]
BalancedChoices = Literal["all", "first"]
Precision = Literal["auto", "fp32", "bf16"]
WeightDtype = Literal["fp32", "bf16"]
Checkpointing = Literal["none", "attention", "experts", "block"]
Device = Literal["auto", "cpu", "cuda"]
OptimizerName = Literal["adamw", "muon"]
StepSize = Literal["adamw", "spectral"]
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


def _is_default(section: Any, key: str) -> bool:
    return bool(getattr(section, key) == type(section).__dataclass_fields__[key].default)


def shown(value: object) -> str:
    """``value`` as a configuration writes it: true, null, 0.5, top_k."""
    return value if isinstance(value, str) else json.dumps(value)


Definition = Callable[[Preset], Mapping[str, tuple[object, str]]]
_definition: Definition | None = None


def learn_presets(definition: Definition) -> None:
    """Let configurations know what a preset's name stands for: dotted key below ``model.`` -> value and reason.

    :mod:`moe.presets` calls this when it is imported, because this file reads no YAML.
    """
    global _definition
    _definition = definition


def _require_what_the_name_means(preset: Preset | None, section: Any, prefix: str) -> None:
    """Refuse a ``section`` of the model that bears the name of a preset without being one."""
    if preset is None:
        return
    if _definition is None:
        raise ConfigError("preset", f"is {preset}, but nothing has filled it in: use moe.presets.model_config")
    for key, (value, reason) in _definition(preset).items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            actual = attrgetter(name)(section)
            require(
                actual == value,
                name,
                f"is {shown(actual)}, but preset {preset} means {shown(value)}: {reason}; "
                "leave it out, or set the preset to null and every axis yourself",
            )


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
    """swiglu (three matrices; swiglu_clamped is that of GPT-OSS), or gelu / relu (two matrices)"""
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
    """how experts are computed: auto (the fastest here), reference (loop), grouped, segments (CPU), fused (Triton)"""

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
class SpecialExpertsConfig:
    """Experts without an MLP, routed to like the others (MoE++, LongCat); they come after the MLPs, in this order."""

    zero: int = 0
    """experts whose output is 0: a token that chooses one does less"""
    copy: int = 0
    """experts whose output is their input"""
    constant: int = 0
    """experts that mix their input with a learned vector"""

    def __post_init__(self) -> None:
        _at_least(self, 0, "zero", "copy", "constant")

    @property
    def total(self) -> int:
        """All special experts of a layer."""
        return self.zero + self.copy + self.constant


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """How many assignments an expert takes in training, and which are dropped beyond that; dropless without a factor.

    With k experts a token, E experts and T real tokens, an expert takes ceil(factor k T / E) assignments.
    """

    factor: float | None = None
    """capacity over the fair share; null: dropless"""
    order: CapacityOrder = "position"
    """who is dropped last: earlier tokens (position), all first choices (choice, GShard), higher scores (score)"""
    scope: CapacityScope = "micro_batch"
    """tokens that share a capacity: those of a rank's micro-batch, or of one sequence"""
    in_evaluation: bool = False
    """whether evaluation and generation drop tokens too"""

    def __post_init__(self) -> None:
        require(self.factor is None or self.factor > 0, "factor", f"is {self.factor}; null makes the layer dropless")
        for key in ("order", "scope", "in_evaluation"):
            require(
                self.factor is not None or _is_default(self, key),
                key,
                "is set, but factor is null: nothing is ever dropped",
            )


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Which experts a token goes to, and with what weight: one choice on each axis, in the order of the computation.

    Logits (projection, bias, logit_norm, residual, noise) -> scores (score) -> selected experts (selection,
    selection_bias) -> weights (weights, normalise, scale, apply), and what gradient the router gets (gradient).
    """

    preset: Preset | None = None
    """a published router (moe/presets.yaml): beside it a file's own keys win; as a flag it replaces the file's own"""
    top_k: int = 2
    """experts per token; a mean for positive and expert_choice, a guess for top_p, nothing to all"""
    projection: Projection = "linear"
    """logits from hidden states: a matrix, cosine with a temperature (X-MoE), or two layers with tanh (MoE++)"""
    projection_width: int | None = None
    """inner width of cosine (null: 16) and two_layer (null: 8 x experts)"""
    temperature: float | None = None
    """initial temperature of cosine, learned from there (null: 0.5)"""
    bias: bool = False
    """a bias on the logits (GPT-OSS)"""
    logit_norm: float | None = None
    """standardise each token's logits and multiply them by this (Skywork-MoE); null: as they are"""
    residual: bool = False
    """add a learned matrix times the logits of the previous mixture layer (MoE++)"""
    jitter: float = 0.0
    """in training, multiply the router's input (never the experts') by uniform noise in 1 +- this (Switch: 0.01)"""
    noise: Noise = "none"
    """in training, noise on the logits: of a learned scale (shazeer), or on the choice alone (gumbel)"""
    score: Score = "softmax"
    """score function"""
    selection: Selection = "top_k"
    """rule that picks the experts: moe/model/router/selection.py and assignment.py have one function for each"""
    n_groups: int | None = None
    """groups of experts for group_limited"""
    top_groups: int | None = None
    """groups that one token may use"""
    group_score: GroupScore = "top_two"
    """what ranks the groups: their best expert (DeepSeek-V2) or the sum of their best two (DeepSeek-V3)"""
    threshold: float | None = None
    """total probability that top_p gathers (null: 0.4)"""
    sampling_margin: float | None = None
    """sampled: experts further than twice this below the best, relatively, are never drawn (null: 0.01)"""
    second_choice: float | None = None
    """in training, keep a choice after the first with probability weight / this (GShard: 0.5, ST-MoE: 0.2)"""
    selection_bias: SelectionBias = "none"
    """a bias in the choice, never in the weights, that evens the load after each step"""
    bias_rate: float | None = None
    """step of the sign and proportional updates (null: 0.001); quantile has none"""
    weights: WeightSource = "scores"
    """what multiplies an expert's output: its score, or 1 (equal)"""
    normalise: bool = True
    """divide a token's weights by their sum (Mixtral); false keeps the raw scores (OLMoE, Switch)"""
    scale: float = 1.0
    """factor on the weights, applied once, after normalisation"""
    apply: WeightPosition = "after"
    """multiply an expert's output by the weight (after), or its input (before, Llama-4)"""
    gradient: RouterGradient = "selected"
    """what trains the router: the selected experts, all experts (DenseMixer), or Heun's rule (SparseMixer-v2)"""
    capacity: CapacityConfig = field(default_factory=CapacityConfig)

    def __post_init__(self) -> None:
        _require_what_the_name_means(self.preset, self, "router.")
        _at_least(self, 1, "top_k", "projection_width", "n_groups", "top_groups")
        _at_least(self, 0, "jitter")
        require(self.jitter < 1, "jitter", f"is {self.jitter}, and must be below 1")
        require(self.scale > 0, "scale", f"is {self.scale}, and must be positive")
        for key in ("temperature", "logit_norm", "threshold", "sampling_margin", "second_choice", "bias_rate"):
            value = getattr(self, key)
            require(value is None or value > 0, key, f"is {value}, and must be positive")
        for key in ("threshold", "second_choice"):
            value = getattr(self, key)
            require(value is None or value <= 1, key, f"is {value}, and must be at most 1")
        self._require_that_every_key_acts()
        self._require_weights_that_fit()
        self._require_a_choice_that_fits()
        self._require_a_gradient_that_fits()

    def _require_that_every_key_acts(self) -> None:
        for key, (axis, values) in ACTS_WITH.items():
            require(
                _is_default(self, key) or getattr(self, axis) in values,
                key,
                f"is set, but acts only with {axis} {' or '.join(values)}, and {axis} is {getattr(self, axis)}",
            )
        if self.selection == "group_limited":
            for key in ("n_groups", "top_groups"):
                require(getattr(self, key) is not None, key, "is null, and selection group_limited needs it")
            assert self.n_groups is not None
            assert self.top_groups is not None
            require(self.top_groups <= self.n_groups, "top_groups", f"is more than n_groups = {self.n_groups}")
        if not self.has_logits:
            for key in ("bias", "residual", "jitter", "logit_norm", "projection", "score"):
                require(
                    _is_default(self, key),
                    key,
                    f"is set, but selection {self.selection} with equal weights computes no logits",
                )

    def _require_weights_that_fit(self) -> None:
        chosen = self.selection
        require(
            not (self.normalise and self.top_k == 1 and self.weights == "scores" and chosen not in _SEVERAL_EXPERTS),
            "normalise",
            "is true with top_k 1: the single weight would always be 1 and the router would get no gradient "
            "from the language-model loss; set normalise to false",
        )
        require(
            not (self.normalise and self.score == "relu"),
            "normalise",
            "is true with score relu: the scores of a token may all be 0; set normalise to false",
        )
        require(
            chosen != "positive" or self.score == "relu",
            "score",
            f"is {self.score}, but selection positive takes every expert whose score is above 0: only relu gives zeros",
        )
        require(
            chosen not in ("top_p", "expert_choice", "sampled") or self.score == "softmax",
            "score",
            f"is {self.score}, but selection {chosen} needs probabilities: set it to softmax",
        )
        require(
            self.weights == "scores" or self.gradient == "selected",
            "weights",
            f"is equal: the router has no weight to train by gradient {self.gradient}",
        )
        require(
            self.weights == "scores" or chosen in ("hash", "random", "all"),
            "weights",
            f"is equal, so that nothing would train the router of {chosen}; it goes with hash, random and all",
        )

    def _require_a_choice_that_fits(self) -> None:
        chosen = self.selection
        require(
            self.selection_bias == "none" or chosen in _FIXED_NUMBER,
            "selection_bias",
            f"is {self.selection_bias}, but selection {chosen} does not rank experts by a score plus a bias; "
            "it goes with top_k and group_limited",
        )
        require(
            self.selection_bias != "quantile" or chosen == "top_k",
            "selection_bias",
            "is quantile, whose update solves for plain top_k; use sign with group_limited",
        )
        require(
            self.noise == "none" or chosen in (*_FIXED_NUMBER, "top_p", "positive"),
            "noise",
            f"is {self.noise}, but selection {chosen} brings its own randomness or needs none",
        )
        require(
            self.noise != "gumbel" or (chosen in _FIXED_NUMBER and self.selection_bias == "none"),
            "noise",
            "is gumbel, which draws experts without replacement by their logits: it goes with selection top_k or "
            "group_limited, without a selection bias",
        )
        require(
            self.second_choice is None or (self.top_k > 1 and chosen in _FIXED_NUMBER),
            "second_choice",
            "is set, but there is no second choice: it goes with selection top_k or group_limited and top_k above 1",
        )
        require(
            self.capacity.factor is None or chosen not in ("expert_choice", "base", "all"),
            "capacity.factor",
            f"is {self.capacity.factor}, but selection {chosen} gives every expert its exact share",
        )
        require(
            chosen != "base" or self.top_k == 1,
            "top_k",
            f"is {self.top_k}, but selection base assigns each token to one expert",
        )

    def _require_a_gradient_that_fits(self) -> None:
        chosen = self.selection
        require(
            self.gradient != "heun" or chosen == "sampled",
            "gradient",
            f"is heun, which estimates the gradient of a sampled choice, but selection is {chosen}; set it to sampled",
        )
        require(
            self.gradient != "heun" or not self.normalise,
            "normalise",
            "is true with gradient heun, whose estimate scales the weights one by one: set normalise to false",
        )
        require(
            self.gradient != "heun" or self.apply == "after",
            "apply",
            "is before, but gradient heun takes the output to be linear in the weight: set apply to after",
        )
        require(
            self.gradient != "all_experts"
            or (
                chosen in _FIXED_NUMBER
                and self.apply == "after"
                and self.capacity.factor is None
                and self.second_choice is None
            ),
            "gradient",
            "is all_experts, which goes with selection top_k or group_limited, apply after, no capacity and "
            "second_choice null",
        )

    def inner_width(self, n_experts: int) -> int | None:
        """Width between the projection's two matrices for E experts, with the default resolved; None for linear."""
        default = {"linear": None, "cosine": 16, "two_layer": 8 * n_experts}[self.projection]
        return default if self.projection_width is None else self.projection_width

    @property
    def initial_temperature(self) -> float:
        """Where the cosine's temperature starts, with the default resolved."""
        return 0.5 if self.temperature is None else self.temperature

    @property
    def probability_mass(self) -> float:
        """What top_p gathers, with the default resolved."""
        return 0.4 if self.threshold is None else self.threshold

    @property
    def margin(self) -> float:
        """Half of the relative distance from the best at which sampling stops, with the default resolved."""
        return 0.01 if self.sampling_margin is None else self.sampling_margin

    @property
    def bias_step(self) -> float:
        """Rate of the sign and proportional updates, with the default resolved."""
        return 0.001 if self.bias_rate is None else self.bias_rate

    @property
    def has_logits(self) -> bool:
        """Whether the router computes anything from hidden states; not where choice and weights are both fixed."""
        return self.weights == "scores"

    @property
    def balances_itself(self) -> bool:
        """Whether the choice is not the scores' own, so that a load-balancing loss would train nothing executed."""
        return self.selection in ("expert_choice", "sinkhorn", "base", "hash", "random", "all")

    def is_causal(self, *, training: bool) -> bool:
        """Whether what a token is given depends on itself and earlier tokens of its sequence alone.

        Expert choice compares tokens of the whole batch; Sinkhorn and BASE do in training; a capacity by choice lets a
        later token's first choice evict an earlier token's second (a lone choice cannot be), and one by score any.
        That a capacity grows with the number of tokens, later ones included, is left out of account: in training all
        sequences are equally long.
        """
        if self.selection == "expert_choice" or (training and self.selection in ("sinkhorn", "base")):
            return False
        if self.capacity.factor is None or not (training or self.capacity.in_evaluation):
            return True
        one_choice = self.top_k == 1 and self.selection not in _SEVERAL_EXPERTS
        return self.capacity.order == "position" or (self.capacity.order == "choice" and one_choice)

    def is_batch_independent(self, *, training: bool) -> bool:
        """Whether what a token is given depends on its own sequence alone, not on others in the batch."""
        if self.selection == "expert_choice" or (training and self.selection in ("sinkhorn", "base")):
            return False
        drops = self.capacity.factor is not None and (training or self.capacity.in_evaluation)
        return not drops or self.capacity.scope == "sequence"


_FIXED_NUMBER = ("top_k", "group_limited")
"""selections of the top_k experts of largest preference, each token for itself"""

ACTS_WITH: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "projection_width": ("projection", ("cosine", "two_layer")),
    "temperature": ("projection", ("cosine",)),
    "n_groups": ("selection", ("group_limited",)),
    "top_groups": ("selection", ("group_limited",)),
    "group_score": ("selection", ("group_limited",)),
    "threshold": ("selection", ("top_p",)),
    "sampling_margin": ("selection", ("sampled",)),
    "bias_rate": ("selection_bias", ("sign", "proportional")),
}
"""keys of the router that act only where an axis has one of some values"""

_SEVERAL_EXPERTS = ("top_p", "positive", "expert_choice", "all")
"""selections in which top_k 1 does not mean that each token has one weight"""


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
        _at_least(self, 0, "load_balance", "z_loss", "importance", "noisy_load", "device", "sparsity", "entropy")
        _at_least(self, 0, "orthogonality", "special_weight")
        _at_least(self, 2, "n_devices")
        require(self.sparsity_rate > 1, "sparsity_rate", f"is {self.sparsity_rate}, and must be above 1")
        require(
            self.sparsity > 0 or _is_default(self, "sparsity_rate"),
            "sparsity_rate",
            "is set, but sparsity is 0: there is no coefficient to steer",
        )
        require(
            (self.n_devices is None) == (self.device == 0),
            "n_devices",
            "and device go together: a coefficient above 0 and the number of groups",
        )


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
    special: SpecialExpertsConfig = field(default_factory=SpecialExpertsConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)

    def __post_init__(self) -> None:
        _at_least(self, 1, "vocab_size", "n_layers", "d_model", "max_seq")
        _in_unit_interval(self, "dropout")
        require(self.dropout < 1, "dropout", "is 1: nothing would be left")
        require(self.norm_eps > 0, "norm_eps", f"is {self.norm_eps}, and must be positive")
        require(self.init_std > 0, "init_std", f"is {self.init_std}: a zero router would send every token one way")
        _require_what_the_name_means(self.router.preset, self, "")
        self._require_a_router_that_fits()
        self._require_losses_that_act()
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

    def _require_a_router_that_fits(self) -> None:
        router, routed = self.router, self.routed_experts
        special = f" and {self.special.total} special ones" if self.special.total else ""
        require(
            router.top_k <= routed,
            "router.top_k",
            f"is {router.top_k}, but experts.n_experts is {self.experts.n_experts}{special}",
        )
        if router.n_groups is not None:
            assert router.top_groups is not None
            size, rest = divmod(routed, router.n_groups)
            require(rest == 0, "router.n_groups", f"is {router.n_groups}, and must divide the {routed} experts")
            require(
                router.top_k <= router.top_groups * size,
                "router.top_groups",
                f"is {router.top_groups}, which leaves {router.top_groups * size} experts for top_k = {router.top_k}",
            )
            require(
                router.group_score == "max" or size >= 2,
                "router.group_score",
                f"is top_two, but with n_groups = {router.n_groups} a group has one expert; take fewer groups, or max",
            )
        if self.special.total:
            require(
                router.selection in ("top_k", "group_limited", "top_p", "positive") and router.gradient == "selected",
                "special.zero" if self.special.zero else "special.copy" if self.special.copy else "special.constant",
                f"is set, but router.selection {router.selection} with gradient {router.gradient} knows only MLPs",
            )
            require(
                router.apply == "after",
                "router.apply",
                "is before, but special experts are weighted after they are computed",
            )
            require(
                router.second_choice is None or not self.special.zero,
                "router.second_choice",
                "goes by a choice's weight, and a zero expert (special.zero) has none",
            )
        else:
            require(
                self.balance.special_weight == 1,
                "balance.special_weight",
                "is set, but there are no special experts",
            )

    def _require_losses_that_act(self) -> None:
        router, balance = self.router, self.balance
        for key in ("load_balance", "importance", "device"):
            require(
                not (getattr(balance, key) and router.balances_itself),
                f"balance.{key}",
                f"is {getattr(balance, key)}, but router.selection {router.selection} does not choose by the scores "
                "that this loss would train; set it to 0",
            )
        for key in ("z_loss", "entropy", "orthogonality"):
            require(
                router.has_logits or not getattr(balance, key),
                f"balance.{key}",
                f"is {getattr(balance, key)}, but router.selection {router.selection} computes no logits; set it to 0",
            )
        require(
            not balance.importance or not self.special.zero,
            "balance.importance",
            f"is {balance.importance}, but it evens out weights, and a zero expert (special.zero) has none",
        )
        require(
            not balance.noisy_load or router.noise == "shazeer",
            "balance.noisy_load",
            f"is {balance.noisy_load}, but it needs router.noise shazeer",
        )
        require(
            not balance.noisy_load or router.selection == "top_k",
            "balance.noisy_load",
            f"is {balance.noisy_load}, but it is defined for router.selection top_k",
        )
        require(
            not balance.sparsity or router.selection == "positive",
            "balance.sparsity",
            f"is {balance.sparsity}, but it needs router.selection positive",
        )
        require(
            not balance.entropy or router.score == "softmax",
            "balance.entropy",
            f"is {balance.entropy}, but router.score {router.score} gives no probabilities",
        )
        require(
            not balance.orthogonality or router.projection == "linear",
            "balance.orthogonality",
            f"is {balance.orthogonality}, but router.projection {router.projection} is no single matrix",
        )
        require(
            balance.n_devices is None or self.routed_experts % balance.n_devices == 0,
            "balance.n_devices",
            f"is {balance.n_devices}, which does not divide {self.routed_experts} experts",
        )

    @property
    def routed_experts(self) -> int:
        """Experts that the router chooses from: the MLPs and the special ones."""
        return self.experts.n_experts + self.special.total

    @property
    def experts_per_token(self) -> int:
        """Experts that a token uses (on average, where the number varies)."""
        return self.routed_experts if self.router.selection == "all" else self.router.top_k

    @property
    def mlps_per_token(self) -> int:
        """Of :attr:`experts_per_token` those with an MLP, at most: special experts count as such, up to all MLPs."""
        return min(self.experts_per_token, self.experts.n_experts)

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
        return self.mlps_per_token * self.experts.d_ff + self.shared_width

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
        _at_least(self, 1, "iterations")


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
        _at_least(self, 1, "steps", "batch_size", "accumulation", "evaluate_every", "checkpoint_every")
        _at_least(self, 1, "keep_checkpoints", "log_every", "record_every")
        _at_least(self, 0, "seed")
        require(
            self.batch_size % self.accumulation == 0,
            "accumulation",
            f"is {self.accumulation}, which does not divide batch_size = {self.batch_size}",
        )
        if self.weight_dtype == "bf16":
            require(
                self.precision != "fp32", "precision", "is fp32, but with training.weight_dtype bf16 there is only bf16"
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
