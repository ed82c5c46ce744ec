"""Tokens -> logits, and the routing of every mixture layer on the way.

Shapes: B batch, S sequence, T = B·S tokens, D model width, F expert hidden width, E experts, K experts per token,
N = T·K assignments, H heads, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import ActiveConvention, Checkpointing, ModelConfig, require
from moe.model.attention import Attention, visible_keys
from moe.model.cache import Cache
from moe.model.feed_forward import FeedForward
from moe.model.initialise import initialise
from moe.model.invariant import make_invariant
from moe.model.latent_attention import LatentAttention
from moe.model.moe_layer import MoELayer
from moe.model.rotation import rotation_of
from moe.model.routing import Routing


class Transformer(nn.Module):
    """A decoder-only transformer with pre-norm blocks whose feed-forward is dense or a mixture of experts.

    ``seed`` decides every initial weight, each from its own name, so that two models that share a parameter (a mixture
    and its dense twin, or two routers) start from the same value of it. Raises ConfigError without a vocabulary size.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        require(config.vocab_size is not None, "model.vocab_size", "is null: give it, or fill it in from a tokenizer")
        assert config.vocab_size is not None
        self.config = config
        self.activation_checkpointing: Checkpointing = "none"
        """what the backward pass of training computes again; kept inside blocks only where it is not the whole block"""
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = (
            nn.Embedding(config.max_seq, config.d_model) if config.positions == "learned" else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        initialise(self, config.init_std, config.n_layers, seed)
        if config.deterministic:
            make_invariant(self, config)

    def forward(
        self, tokens: Int[Tensor, "B S"], mask: Bool[Tensor, "B S"] | None = None, cache: Cache | None = None
    ) -> tuple[Float[Tensor, "B S V"], list[Routing]]:
        """Return next-token logits and one :class:`Routing` for each mixture layer, first layer first.

        ``mask`` is False for padding, on either side, which changes nothing for the other tokens: it is not attended
        to, routed or counted, and positions count real tokens only. With ``cache``, ``tokens`` continue what the cache
        holds. Raises ValueError for a sequence longer than ``max_seq``.
        """
        hidden, routings = self.hidden(tokens, mask, cache)
        return self.head(hidden), routings

    def hidden(
        self, tokens: Int[Tensor, "B S"], mask: Bool[Tensor, "B S"] | None = None, cache: Cache | None = None
    ) -> tuple[Float[Tensor, "B S D"], list[Routing]]:
        """:meth:`forward` without the head: what the head multiplies, for a loss that never holds all logits."""
        return self.part(tokens, mask, cache)

    def part(
        self,
        tokens: Int[Tensor, "B S"],
        mask: Bool[Tensor, "B S"] | None = None,
        cache: Cache | None = None,
        *,
        x: Float[Tensor, "B S D"] | None = None,
        blocks: Sequence["Block"] | None = None,
        to_end: bool = True,
    ) -> tuple[Float[Tensor, "B S D"], list[Routing]]:
        """Some of :meth:`hidden`, the rest being elsewhere: the ``blocks`` (None: all), and with ``to_end`` the norm.

        It begins with the residual stream ``x`` that the blocks before left (None: with the embedding), and returns its
        own.
        """
        positions, visible, visible_in_window = self._positions_and_visibility(tokens, mask, cache)
        rotation = rotation_of(positions, self.config) if self.config.positions == "rotary" else None
        batch = Batch(tokens, mask, positions, rotation, visible, visible_in_window)
        x = self.dropout(self._embed(tokens, positions)) if x is None else x
        routings: list[Routing] = []
        recompute: Checkpointing = self.activation_checkpointing if self.training and cache is None else "none"
        for block in self.blocks if blocks is None else blocks:
            previous_logits = routings[-1].logits if routings and self.config.router.residual else None
            if recompute == "block":
                x, routing = checkpoint(block, x, batch, previous_logits, use_reentrant=False)
            else:
                x, routing = block(x, batch, previous_logits, cache, recompute)
            if routing is not None:
                routings.append(routing)
        return normalise(self.norm, x) if to_end else x, routings

    def num_params(self) -> int:
        """All parameters; a tied embedding counts once."""
        return self.config.num_params()

    def num_active_params(self, convention: ActiveConvention = "all") -> int:
        """Parameters that one token uses: of E routed experts, K (:func:`moe.config.parameters.count_parameters`)."""
        return self.config.num_active_params(convention)

    def _embed(self, tokens: Int[Tensor, "B S"], positions: Int[Tensor, "#B S"]) -> Float[Tensor, "B S D"]:
        embedded: Tensor = self.embedding(tokens)
        return embedded if self.position_embedding is None else embedded + self.position_embedding(positions)

    def _positions_and_visibility(
        self, tokens: Int[Tensor, "B S"], mask: Bool[Tensor, "B S"] | None, cache: Cache | None
    ) -> tuple[Int[Tensor, "#B S"], Bool[Tensor, "#B 1 S L"] | None, Bool[Tensor, "#B 1 S L"] | None]:
        """Where the new tokens stand, and the keys that they may see without a window and with it."""
        length = tokens.shape[1] + (cache.length if cache is not None else 0)
        if length > self.config.max_seq:
            raise ValueError(f"a sequence of {length} tokens is longer than model.max_seq = {self.config.max_seq}")
        n_tokens = tokens.shape[1]
        real = mask if cache is None else cache.extend(n_tokens, mask)
        if real is None:
            positions = torch.arange(length - n_tokens, length, device=tokens.device)[None]
            real = torch.ones(1, length, dtype=torch.bool, device=tokens.device)
            visible = None if n_tokens == length else visible_keys(real, n_tokens)
        else:
            positions = (real.cumsum(dim=1) - 1).clamp(min=0)[:, -n_tokens:]
            visible = visible_keys(real, n_tokens)
        window = self.config.attention.window
        if window is None or window >= length:
            return positions, visible, visible
        return positions, visible, visible_keys(real, n_tokens, window)


class Batch(NamedTuple):
    """What every block needs to know of the tokens beside their hidden states."""

    tokens: Int[Tensor, "B S"]
    mask: Bool[Tensor, "B S"] | None
    """False for padding"""
    positions: Int[Tensor, "#B S"]
    rotation: tuple[Tensor, Tensor] | None
    """of queries and keys at these positions; None where positions are not rotary"""
    visible: Bool[Tensor, "#B 1 S L"] | None
    """the keys that a query may see; None: plainly causal"""
    visible_in_window: Bool[Tensor, "#B 1 S L"] | None
    """those of a layer that has a window (``attention.window``)"""


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention: Attention | LatentAttention = (
            LatentAttention(config, layer) if config.attention.is_latent else Attention(config, layer)
        )
        self.has_window = config.attention.window_of(layer) is not None
        self.feed_forward_norm = norm(config)
        self.feed_forward: MoELayer | FeedForward = (
            MoELayer(config, layer)
            if layer in config.moe_layers
            else FeedForward(config.feed_forward, config.d_model, config.dense_width(layer))
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        batch: Batch,
        previous_logits: Float[Tensor, "T E"] | None = None,
        cache: Cache | None = None,
        recompute: Checkpointing = "none",
    ) -> tuple[Float[Tensor, "B S D"], Routing | None]:
        """Return the new residual stream, and the routing where the feed-forward is a mixture.

        ``previous_logits`` are those of the mixture before, for a router that builds on them. ``recompute`` is the part
        of this block (attention or experts) that keeps nothing for the backward pass, which runs it again.
        """
        if recompute == "attention":
            attended = checkpoint(self._attend, x, batch, use_reentrant=False)
        else:
            attended = self._attend(x, batch, cache)
        x = x + self.dropout(attended)
        normed = normalise(self.feed_forward_norm, x)
        if isinstance(self.feed_forward, MoELayer):
            y, routing = self.feed_forward(
                normed,
                batch.mask,
                token_ids=batch.tokens,
                positions=batch.positions,
                previous_logits=previous_logits,
                recompute=recompute == "experts",
            )
        elif recompute == "experts":
            y, routing = checkpoint(self.feed_forward, normed, use_reentrant=False), None
        else:
            y, routing = self.feed_forward(normed), None
        return x + self.dropout(y), routing

    def _attend(self, x: Float[Tensor, "B S D"], batch: Batch, cache: Cache | None = None) -> Float[Tensor, "B S D"]:
        visible = batch.visible_in_window if self.has_window else batch.visible
        attended: Tensor = self.attention(normalise(self.attention_norm, x), batch.rotation, visible, cache)
        return attended


def norm(config: ModelConfig) -> nn.RMSNorm | nn.LayerNorm:
    """The configured normalisation of the residual stream."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.norm_bias)


def normalise(norm: nn.RMSNorm | nn.LayerNorm, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
    """``norm(x)`` in the dtype of its gain, float32 beside weights that are bfloat16, and back to that of ``x``."""
    normed: Tensor = norm(x.to(norm.weight.dtype))
    return normed.to(x.dtype)
