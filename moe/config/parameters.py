"""How many parameters a model has, and how many of them a token uses, from the configuration alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moe.config.checks import require

if TYPE_CHECKING:
    from moe.config.attention import AttentionConfig
    from moe.config.experts import FeedForwardConfig
    from moe.config.model import ModelConfig
    from moe.config.router import RouterConfig

ActiveConvention = Literal["all", "without_embedding", "without_embedding_and_head"]
"""which parameters count as used by a token. Publications differ: Mixtral's 12.9B are all of them, gpt-oss's 3.6B are
without the input embedding (a table of vectors that is looked up), Kaplan et al. 2020 leave the head out as well"""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters by what they belong to, over all layers; each is in one part, and :attr:`total` is their sum."""

    embedding: int
    """vectors of the vocabulary; with a tied head, the head's matrix as well"""
    positions: int
    """vectors of learned positions"""
    attention: int
    """projections, their biases, norms of queries and keys, sinks"""
    dense: int
    """feed-forward layers that are no mixture"""
    experts: int
    """all routed experts that have an MLP"""
    shared: int
    """shared experts, with their gate"""
    special: int
    """experts without an MLP"""
    router: int
    norms: int
    """of the residual stream"""
    head: int
    """what only the head has: its bias, and its matrix unless it is tied"""
    per_expert: int
    """one expert's MLP in one layer"""
    idle_experts: int
    """of `experts`, what a token passes by"""
    tied: bool

    @property
    def total(self) -> int:
        """All of them; a tied embedding counts once."""
        return (
            self.embedding
            + self.positions
            + self.attention
            + self.dense
            + self.experts
            + self.shared
            + self.special
            + self.router
            + self.norms
            + self.head
        )

    def active(self, convention: ActiveConvention = "all") -> int:
        """What one token uses. A tied matrix is looked up and multiplied by: it goes where the head goes."""
        active = self.total - self.idle_experts
        if convention == "all":
            return active
        active -= self.positions
        if convention == "without_embedding":
            return active if self.tied else active - self.embedding
        return active - self.embedding - self.head


def count_parameters(config: "ModelConfig") -> Parameters:
    """The parameters of the model that ``config`` describes.

    Buffers (a selection bias) are no parameters. Where the number of experts a token varies, what counts as used is
    what it is steered to; a special expert counts as an MLP, as far as there are MLPs. Raises ConfigError without a
    vocabulary size.
    """
    require(config.vocab_size is not None, "vocab_size", "is null: give it, or fill it in from a tokenizer")
    assert config.vocab_size is not None
    moe_layers, d_model = frozenset(config.moe_layers), config.d_model
    mixtures = len(moe_layers)
    per_expert = mlp_parameters(config.feed_forward, d_model, config.experts.d_ff)
    shared = 0
    if config.shared.n_experts:
        shared = mlp_parameters(config.feed_forward, d_model, config.shared_width) + config.shared.gated * d_model
    residual_routers = max(0, mixtures - 1)  # the first has no mixture before it
    return Parameters(
        embedding=config.vocab_size * d_model,
        positions=config.max_seq * d_model if config.positions == "learned" else 0,
        attention=config.n_layers * attention_parameters(config.attention, d_model),
        dense=sum(
            mlp_parameters(config.feed_forward, d_model, config.dense_width(layer))
            for layer in range(config.n_layers)
            if layer not in moe_layers
        ),
        experts=mixtures * config.experts.n_experts * per_expert,
        shared=mixtures * shared,
        # A constant expert is a vector, and two that weigh it against its input.
        special=mixtures * 3 * config.special.constant * d_model,
        router=mixtures * router_parameters(config.router, d_model, config.routed_experts)
        + residual_routers * config.router.residual * config.routed_experts**2,
        norms=(2 * config.n_layers + 1) * d_model * (2 if config.norm == "layernorm" and config.norm_bias else 1),
        head=config.vocab_size * ((0 if config.tie_embeddings else d_model) + config.head_bias),
        per_expert=per_expert,
        idle_experts=mixtures * (config.experts.n_experts - config.mlps_per_token) * per_expert,
        tied=config.tie_embeddings,
    )


def attention_parameters(attention: "AttentionConfig", d_model: int) -> int:
    """Of one layer's attention: projections of queries, keys, values and output, and what is learned beside them."""
    heads, latent = attention.n_heads, attention.latent
    output = heads * attention.value_dim * d_model + attention.has_output_bias * d_model
    if latent.rank is not None:
        # DeepSeek-V2, eq. 9-17: each latent vector is normalised; one key of `rotary_dim` serves all heads.
        query_width = heads * attention.query_dim
        if latent.query_rank is None:
            query = (d_model + attention.bias) * query_width
        else:
            query = (d_model + attention.bias + 1) * latent.query_rank + latent.query_rank * query_width
        down = (d_model + attention.bias) * (latent.rank + latent.rotary_dim) + latent.rank
        up = latent.rank * heads * (attention.head_dim + attention.value_dim)
        return query + down + up + output
    query_width, key_width = heads * attention.head_dim, attention.kv_heads * attention.head_dim
    norms = {"none": 0, "head": 2 * attention.head_dim, "full": query_width + key_width}[attention.qk_norm]
    return (d_model + attention.bias) * (query_width + 2 * key_width) + norms + attention.sinks * heads + output


def mlp_parameters(feed_forward: "FeedForwardConfig", d_model: int, d_ff: int) -> int:
    """Of one MLP of hidden width ``d_ff``: three matrices where the activation has a gate, else two."""
    inner = hidden_rows(feed_forward, d_ff)
    return d_model * inner + d_ff * d_model + feed_forward.bias * (inner + d_model)


def hidden_rows(feed_forward: "FeedForwardConfig", d_ff: int) -> int:
    """Rows of an MLP's first matrix: gate and value of each hidden unit, or one."""
    return 2 * d_ff if feed_forward.activation in ("swiglu", "swiglu_clamped") else d_ff


def router_parameters(router: "RouterConfig", d_model: int, n_experts: int) -> int:
    """Of one router over ``n_experts``, without what makes it build on the router before."""
    if not router.has_logits:
        return 0
    width = router.inner_width(n_experts)
    matrices = n_experts * d_model if width is None else n_experts * width + width * d_model
    noise = n_experts * d_model if router.noise == "shazeer" else 0
    return matrices + noise + router.bias * n_experts + (router.projection == "cosine")
