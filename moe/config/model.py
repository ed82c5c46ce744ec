"""Settings of the model, and what follows from them."""

from dataclasses import dataclass, field
from typing import Literal

from moe.config.attention import AttentionConfig, RopeConfig
from moe.config.balance import BalanceConfig
from moe.config.checks import at_least, in_unit_interval, require
from moe.config.experts import ExpertsConfig, FeedForwardConfig, SharedExpertsConfig, SpecialExpertsConfig
from moe.config.parameters import ActiveConvention, Parameters, count_parameters
from moe.config.presets import require_what_the_name_means
from moe.config.router import RouterConfig

NormKind = Literal["rmsnorm", "layernorm"]
Positions = Literal["rotary", "learned", "none"]


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
    positions: Positions = "rotary"
    """how the model knows where a token stands: rotary, learned (a vector for each position, GPT-2), or none"""
    norm: NormKind = "rmsnorm"
    """normalisation before each sub-layer and before the head"""
    norm_bias: bool = True
    """biases of layer norms (DBRX: false); rmsnorm has none"""
    norm_eps: float = 1e-6
    """epsilon of the norms"""
    dropout: float = 0.0
    """dropout on the embedding and on both residual branches, in training"""
    tie_embeddings: bool = True
    """one matrix for the embedding and the head"""
    head_bias: bool = False
    """a bias on the logits of the vocabulary (Phi-3.5-MoE)"""
    init_std: float = 0.02
    """standard deviation of the initial weights; residual outputs are scaled by 1 / sqrt(2 n_layers)"""
    deterministic: bool = False
    """the same bits for a text whatever else is computed beside it, by sums of one order, at a cost in speed"""
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
        at_least(self, 1, "vocab_size", "n_layers", "d_model", "max_seq")
        in_unit_interval(self, "dropout")
        require(self.dropout < 1, "dropout", "is 1: nothing would be left")
        require(self.norm_eps > 0, "norm_eps", f"is {self.norm_eps}, and must be positive")
        require(self.init_std > 0, "init_std", f"is {self.init_std}: a zero router would send every token one way")
        require_what_the_name_means(self.router.preset, self, "")
        require(
            self.norm_bias or self.norm == "layernorm",
            "norm_bias",
            "is false, but rmsnorm has none",
        )
        require(
            not (self.deterministic and self.special.constant),
            "deterministic",
            "is true, but the products of constant experts (special.constant) depend on the batch",
        )
        self._require_positions_that_fit()
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

    def _require_positions_that_fit(self) -> None:
        attention = self.attention
        if self.positions == "rotary":
            width = attention.head_dim * attention.rope.fraction
            require(
                attention.is_latent or (width % 2 == 0),
                "attention.rope.fraction" if attention.rope.fraction < 1 else "attention.head_dim",
                f"makes {width:g} dimensions turn, and rotary positions turn pairs of them",
            )
        else:
            require(
                attention.rope == RopeConfig(),
                "attention.rope",
                f"is set, but model.positions is {self.positions}: nothing turns",
            )
            require(
                not attention.is_latent,
                "positions",
                f"is {self.positions}, but latent attention (attention.latent.rank) has dimensions that turn",
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

    def parameters(self) -> Parameters:
        """The parameters by what they belong to. Raises ConfigError without a vocabulary size."""
        return count_parameters(self)

    def num_params(self) -> int:
        """All parameters; a tied embedding counts once."""
        return self.parameters().total

    def num_active_params(self, convention: ActiveConvention = "all") -> int:
        """Parameters that one token uses, with or without the input embedding and the head."""
        return self.parameters().active(convention)
