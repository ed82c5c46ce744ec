"""Settings of the router."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from moe.config.checks import at_least, is_default, require
from moe.config.presets import Preset, require_what_the_name_means

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
                self.factor is not None or is_default(self, key),
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
        require_what_the_name_means(self.preset, self, "router.")
        at_least(self, 1, "top_k", "projection_width", "n_groups", "top_groups")
        at_least(self, 0, "jitter")
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
                is_default(self, key) or getattr(self, axis) in values,
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
                    is_default(self, key),
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
