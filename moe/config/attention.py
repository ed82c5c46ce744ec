"""Settings of attention and of the positions that it knows."""

from dataclasses import dataclass, field
from typing import Literal

from moe.config.checks import at_least, in_unit_interval, is_default, require

QKNorm = Literal["none", "head", "full"]
RopeScaling = Literal["none", "linear", "ntk", "yarn", "llama3"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """What becomes of the rotary frequencies theta^(-2i / d), for part of a head or for longer texts."""

    fraction: float = 1.0
    """share of a head that turns, its first dimensions (GLM-4: 0.5)"""
    scaling: RopeScaling = "none"
    """how a longer context is reached: linear (slower positions), ntk (a larger base), yarn, or llama3 (Llama 3.1)"""
    factor: float = 1.0
    """how many times longer than the original context"""
    original_max_seq: int | None = None
    """context before scaling, in tokens; null: max_seq / factor"""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this in the original context stay as they are"""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are interpolated whole"""
    truncate: bool = True
    """yarn: whether the bounds between those are rounded to whole dimensions (GPT-OSS: false)"""
    attention_factor: float | None = None
    """yarn: factor on rotated queries and keys; null: 0.1 ln(factor) + 1 (YaRN, section 3.4)"""
    mscale: float | None = None
    """yarn: weight of that logarithm where the queries and keys are scaled (DeepSeek-V3: 1); null: 1"""
    mscale_all_dim: float | None = None
    """yarn: weight of it where the softmax is scaled instead, with all dimensions (DeepSeek-V3: 1); null: 0"""
    low_freq_factor: float = 1.0
    """llama3: dimensions that turn less often than this in the original context are interpolated whole"""
    high_freq_factor: float = 4.0
    """llama3: dimensions that turn more often than this stay as they are"""

    def __post_init__(self) -> None:
        in_unit_interval(self, "fraction")
        require(self.fraction > 0, "fraction", "is 0: nothing would turn; set model.positions to none")
        at_least(self, 1, "factor", "original_max_seq")
        for key in ("beta_fast", "beta_slow", "attention_factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, key)
            require(value is None or value > 0, key, f"is {value}, and must be positive")
        at_least(self, 0, "mscale", "mscale_all_dim")
        acts_with = {
            "factor": ("linear", "ntk", "yarn", "llama3"),
            "original_max_seq": ("yarn", "llama3"),
            **dict.fromkeys(("beta_fast", "beta_slow", "truncate"), ("yarn",)),
            **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), ("yarn",)),
            **dict.fromkeys(("low_freq_factor", "high_freq_factor"), ("llama3",)),
        }
        for key, scalings in acts_with.items():
            require(
                is_default(self, key) or self.scaling in scalings,
                key,
                f"is set, but acts only with scaling {' or '.join(scalings)}, and scaling is {self.scaling}",
            )
        require(self.scaling == "none" or self.factor > 1, "factor", "is 1, so that scaling does nothing")
        require(
            self.attention_factor is None or (self.mscale is None and self.mscale_all_dim is None),
            "attention_factor",
            "is set, and mscale would say it again: give one of them",
        )
        require(self.beta_fast > self.beta_slow, "beta_fast", f"is {self.beta_fast}, and must be above beta_slow")
        require(
            self.high_freq_factor > self.low_freq_factor,
            "high_freq_factor",
            f"is {self.high_freq_factor}, and must be above low_freq_factor",
        )


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2): keys and values are read out of one narrow vector a token."""

    rank: int | None = None
    """width of that vector, which is what the cache holds; null: keys and values of their own"""
    query_rank: int | None = None
    """width of a vector that the queries are read out of likewise; null: from the hidden state itself"""
    rotary_dim: int = 64
    """dimensions that turn with the position: more of each query, and one such key for all heads"""
    value_dim: int | None = None
    """width of a head's value; null: head_dim"""

    def __post_init__(self) -> None:
        at_least(self, 1, "rank", "query_rank", "rotary_dim", "value_dim")
        require(self.rotary_dim % 2 == 0, "rotary_dim", f"is {self.rotary_dim}, and pairs of dimensions turn")
        for key in ("query_rank", "rotary_dim", "value_dim"):
            require(
                self.rank is not None or is_default(self, key), key, "is set, but rank is null: there is nothing latent"
            )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal attention with multi-, grouped- or multi-query heads, or latent keys and values."""

    n_heads: int = 6
    """query heads"""
    n_kv_heads: int | None = None
    """key and value heads; null: as many as query heads, 1: multi-query"""
    head_dim: int = 32
    """width of one head (of its part without positions, if latent); n_heads x head_dim need not equal d_model"""
    qk_norm: QKNorm = "none"
    """RMSNorm on queries and keys: per head, or over all heads together (full)"""
    bias: bool = False
    """biases on the projections"""
    output_bias: bool | None = None
    """a bias on the output's projection; null: as `bias` says"""
    clip: float | None = None
    """queries, keys and values are cut off at plus and minus this (DBRX: 8); null: as they are"""
    sinks: bool = False
    """a learned logit a head that takes part in the softmax and holds nothing (GPT-OSS)"""
    window: int | None = None
    """tokens that a query sees, its own included, in the layers that have a window; null: all before it"""
    full_every: int | None = None
    """every n-th layer (the last of each n) has no window (GPT-OSS: 2); null: all have one"""
    first_full: int = 0
    """the first n layers have no window whatever `full_every` says"""
    rope_theta: float = 10_000.0
    """base of the rotary frequencies"""
    rope: RopeConfig = field(default_factory=RopeConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "n_heads", "n_kv_heads", "head_dim", "rope_theta", "window", "full_every")
        at_least(self, 0, "first_full")
        require(
            self.n_heads % self.kv_heads == 0,
            "n_kv_heads",
            f"is {self.kv_heads}, which does not divide n_heads = {self.n_heads}",
        )
        require(self.clip is None or self.clip > 0, "clip", f"is {self.clip}, and must be positive")
        for key in ("full_every", "first_full"):
            require(
                self.window is not None or is_default(self, key), key, "is set, but window is null: all layers see all"
            )
        if self.is_latent:
            for key in ("n_kv_heads", "qk_norm", "clip", "sinks", "window"):
                require(is_default(self, key), key, "is set, and latent attention (latent.rank) has no such thing")
            require(self.rope.fraction == 1, "rope.fraction", "is set, but latent.rotary_dim says what turns")

    @property
    def is_latent(self) -> bool:
        """Whether keys and values are read out of a latent vector."""
        return self.latent.rank is not None

    @property
    def kv_heads(self) -> int:
        """Key and value heads, with the default resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def has_output_bias(self) -> bool:
        """Whether the output's projection has a bias, with the default resolved."""
        return self.bias if self.output_bias is None else self.output_bias

    @property
    def rotated_dim(self) -> int:
        """Dimensions of a query or key that turn with the position."""
        return self.latent.rotary_dim if self.is_latent else int(self.head_dim * self.rope.fraction)

    @property
    def query_dim(self) -> int:
        """Width of one head's query and key."""
        return self.head_dim + self.latent.rotary_dim if self.is_latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of one head's value."""
        return self.latent.value_dim or self.head_dim

    @property
    def cached(self) -> tuple[int, int, int]:
        """What a cache holds of a token in a layer: heads, the width of each key, and the width of each value.

        Latent attention has one head, whose value is the latent vector and whose key is the part that turns.
        """
        if self.latent.rank is not None:
            return 1, self.latent.rotary_dim, self.latent.rank
        return self.kv_heads, self.head_dim, self.head_dim

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query sees in block ``layer`` (from 0), its own included; None: all before it."""
        last_of_n = self.full_every is not None and (layer + 1) % self.full_every == 0
        return None if layer < self.first_full or last_of_n else self.window
