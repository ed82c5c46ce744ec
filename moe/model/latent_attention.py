"""Multi-head latent attention (DeepSeek-V2, section 2.1): a token's keys and values are read out of one narrow vector.

The cache holds that vector and one rotated key for all heads, a fraction of the keys and values of all heads. Each head
h of H has a query and a key of two parts, one without positions and one that turns:

    score = (q_h · k_h + turned q'_h · turned k') · m / √(n + r),   k_h = W_h c,   v_h = U_h c,   c = norm(W_c x)
"""

import math

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.attention import Attend, attend, normalise_wide
from moe.model.cache import Cache
from moe.model.rope_scaling import softmax_factor
from moe.model.rotation import rotate


class LatentAttention(nn.Module):
    """What :class:`~moe.model.attention.Attention` is to a block, with n head_dim dimensions a head that do not turn,
    r ``rotary_dim`` that do, and values of their own width.

    Like the keys and values, queries may be read out of a narrow vector (``query_rank``).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        attention, latent = config.attention, config.attention.latent
        assert latent.rank is not None
        heads, bias = attention.n_heads, attention.bias
        self.layer = layer
        self.head_dim, self.rotary_dim, self.value_dim = attention.head_dim, latent.rotary_dim, attention.value_dim
        if latent.query_rank is None:
            self.query_down, self.query_norm = None, None
            self.query = nn.Linear(config.d_model, heads * attention.query_dim, bias=bias)
        else:
            self.query_down = nn.Linear(config.d_model, latent.query_rank, bias=bias)
            self.query_norm = nn.RMSNorm(latent.query_rank, eps=config.norm_eps)
            self.query = nn.Linear(latent.query_rank, heads * attention.query_dim, bias=False)
        self.latent = nn.Linear(config.d_model, latent.rank, bias=bias)
        self.latent_norm = nn.RMSNorm(latent.rank, eps=config.norm_eps)
        self.rotary_key = nn.Linear(config.d_model, latent.rotary_dim, bias=bias)
        self.key = nn.Linear(latent.rank, heads * self.head_dim, bias=False)
        self.value = nn.Linear(latent.rank, heads * self.value_dim, bias=False)
        self.output = nn.Linear(heads * self.value_dim, config.d_model, bias=attention.has_output_bias)
        self.softmax_factor = softmax_factor(attention.rope)
        self.attend: Attend = attend
        self.may_stay_in_the_latent = not config.deterministic  # the two ways round differently

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rotation: tuple[Tensor, Tensor],
        visible: Bool[Tensor, "#B 1 S L"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Attend to the tokens before; ``visible`` says which of L keys a query may see, None: plainly causal."""
        narrow = x
        if self.query_down is not None and self.query_norm is not None:
            narrow = normalise_wide(self.query_norm, self.query_down(x))
        queries = rearrange(self.query(narrow), "b s (h d) -> b h s d", d=self.head_dim + self.rotary_dim)
        if self.softmax_factor != 1:
            queries = queries * self.softmax_factor
        still, turning = queries.split([self.head_dim, self.rotary_dim], dim=-1)
        turning = rotate(turning, rotation)
        latents = normalise_wide(self.latent_norm, self.latent(x))[:, None]
        turned_keys = rotate(self.rotary_key(x)[:, None], rotation)
        if cache is not None:
            turned_keys, latents = cache.store(self.layer, turned_keys, latents)
            turned_keys, latents = turned_keys.to(queries.dtype), latents.to(queries.dtype)
        cached = cache is not None and self.may_stay_in_the_latent
        if cached and self._is_cheaper_in_the_latent(x.shape[1], latents.shape[2], visible):
            heads = self._attend_in_the_latent(still, turning, latents[:, 0], turned_keys[:, 0], visible)
        else:
            heads = self._attend(still, turning, latents, turned_keys, visible)
        output: Tensor = self.output(rearrange(heads, "b h s d -> b s (h d)"))
        return output

    def _attend(
        self,
        still: Float[Tensor, "B H S n"],
        turning: Float[Tensor, "B H S r"],
        latents: Float[Tensor, "B 1 L R"],
        turned_keys: Float[Tensor, "B 1 L r"],
        visible: Bool[Tensor, "#B 1 S L"] | None,
    ) -> Float[Tensor, "B H S v"]:
        """Read every head's keys and values out of the latent vectors, and attend as always."""
        keys = rearrange(self.key(latents), "b 1 l (h n) -> b h l n", n=self.head_dim)
        values = rearrange(self.value(latents), "b 1 l (h v) -> b h l v", v=self.value_dim)
        keys = torch.cat([keys, turned_keys.expand(-1, keys.shape[1], -1, -1)], dim=-1)
        return self.attend(torch.cat([still, turning], dim=-1), keys, values, visible, None)

    def _attend_in_the_latent(
        self,
        still: Float[Tensor, "B H S n"],
        turning: Float[Tensor, "B H S r"],
        latents: Float[Tensor, "B L R"],
        turned_keys: Float[Tensor, "B L r"],
        visible: Bool[Tensor, "#B 1 S L"] | None,
    ) -> Float[Tensor, "B H S v"]:
        """The same without any head's keys and values: q · W c = Wᵀ q · c, and Σ p U c = U Σ p c."""
        in_latent = einsum(still, _per_head(self.key, self.head_dim), "b h s n, h n r -> b h s r")
        scores = einsum(in_latent, latents, "b h s r, b l r -> b h s l")
        scores = scores + einsum(turning, turned_keys, "b h s r, b l r -> b h s l")
        scores = scores / math.sqrt(self.head_dim + self.rotary_dim)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        shares = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(latents.dtype)
        mixed = einsum(shares, latents, "b h s l, b l r -> b h s r")
        return einsum(mixed, _per_head(self.value, self.value_dim), "b h s r, h v r -> b h s v")

    def _is_cheaper_in_the_latent(self, n_queries: int, n_keys: int, visible: Tensor | None) -> bool:
        """Whether that takes fewer multiplications for S queries over L cached tokens: as a rule, where S is small.

        A head reads L keys and values out of the latent vectors and compares n + r + v dimensions, or takes S queries
        there and mixed vectors back, and compares 2 R + r.
        """
        if visible is None and n_queries > 1:
            return False  # plainly causal, which only the other way knows to do
        rank, width = self.latent.out_features, self.head_dim + self.value_dim
        read_out = n_keys * rank * width + n_queries * n_keys * (width + self.rotary_dim)
        return n_queries * rank * width + n_queries * n_keys * (2 * rank + self.rotary_dim) < read_out


def _per_head(projection: nn.Linear, width: int) -> Float[Tensor, "H w R"]:
    return rearrange(projection.weight, "(h w) r -> h w r", w=width)
