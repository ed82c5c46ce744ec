"""The next token of each sequence on a CPU, in as few calls as it takes.

A step of decoding multiplies a row or two by each matrix. The rest of its time is calls: an operator or a module takes
several microseconds where the weights have just swept the caches, and :meth:`Transformer.hidden` makes about a hundred
calls a block. Here the blocks are written out flat: queries, keys and values are one product, a norm is four operators,
routing is five, and what a step needs lies in tuples.

It computes what the model computes, up to rounding, and writes to the same cache, so that either may go on where the
other stopped. Interventions hook into modules, of which few are called here: :func:`can_read` says whether that, or
anything else, speaks against it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe.config import AttentionConfig
from moe.model.attention import Attention, visible_keys
from moe.model.cache import KVCache
from moe.model.experts import ExpertWeights
from moe.model.experts.few import MOST_ASSIGNMENTS, NOBODY, sum_of_selected
from moe.model.feed_forward import FeedForward
from moe.model.few_rows import attend_to_cache, product
from moe.model.moe_layer import MoELayer
from moe.model.rotation import rotation_of
from moe.model.router.logits import score_function
from moe.model.router.weights import combine_weights
from moe.model.transformer import Block, Transformer


def can_read(model: Transformer, n_sequences: int) -> bool:
    """Whether :class:`OneToken` can stand in for ``model`` in evaluation: on a CPU, where nothing hooks into a module.

    Not with layer norms, a bias on the logits, attention that is more than :func:`_is_plain_attention` says, or a
    router that sees the logits of the layer before; not for more sequences than :mod:`moe.model.experts.few` is for;
    not under autocast, nor where sums keep an order of their own (``model.deterministic``).
    """
    config = model.config
    return (
        config.norm == "rmsnorm"
        and not config.head_bias
        and config.positions == "rotary"
        and _is_plain_attention(config.attention)
        and not config.router.residual
        and not config.deterministic
        and n_sequences * config.router.top_k <= MOST_ASSIGNMENTS
        and all(parameter.device.type == "cpu" for parameter in model.parameters())
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        and not torch.is_autocast_enabled("cpu")
    )


class _Mixture(NamedTuple):
    """A mixture that is written out: the k largest scores of a linear projection, which weigh the outputs."""

    router: Float[Tensor, "D E"]
    """at least float32"""
    experts: ExpertWeights
    one_by_one: tuple[Sequence[Tensor], Sequence[Tensor]]
    """the matrices of ``experts``"""


class _Layer(NamedTuple):
    """One block."""

    attention_gain: Float[Tensor, " D"]
    """of the norm, times √D; at least float32"""
    projections: Float[Tensor, "P D"]
    """of queries, keys and values, one below the other"""
    output: Float[Tensor, "D Q"]
    feed_forward_gain: Float[Tensor, " D"]
    feed_forward: _Mixture | MoELayer | FeedForward
    """a module where it is not written out"""


class OneToken:
    """Reads one token more of each of the B sequences of ``cache``, with the weights that ``model`` has now."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        attention = model.config.attention
        self.model, self.cache = model, cache
        self.dtype = model.embedding.weight.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        """of norms, rotation and routing"""
        self.n_heads, self.n_rotated = attention.n_heads, attention.n_heads + attention.kv_heads
        self.layers = [self._lay_out(block) for block in model.blocks if isinstance(block, Block)]
        self.final_gain = self._gain(model.norm)
        self.floor = torch.tensor(math.sqrt(model.config.norm_eps * model.config.d_model), dtype=self.wide)
        positions = torch.arange(cache.capacity)[None]
        cosine, sine = rotation_of(positions, model.config)
        # (x_i, x_j) turns into (x_i cos - x_j sin, x_j cos + x_i sin): the other half comes with the sign of its sine.
        self.cosine, self.sine = torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)

    def read(self, tokens: Int[Tensor, " B"], going: Sequence[bool]) -> Float[Tensor, "B V"]:
        """The logits of what follows ``tokens``. A row that is not ``going`` is padding; its logits mean nothing."""
        if self.dtype == self.wide or len(tokens) > 1:
            return self._read(tokens, going)
        with without_onednn():
            return self._read(tokens, going)

    def _read(self, tokens: Int[Tensor, " B"], going: Sequence[bool]) -> Float[Tensor, "B V"]:
        model, cache, n_sequences = self.model, self.cache, len(tokens)
        mask = None if all(going) else torch.tensor(going)[:, None]
        real = cache.extend(1, mask)
        end = cache.length
        if real is None:
            positions, visible = torch.arange(end - 1, end)[None], None
            cosine, sine = self.cosine.narrow(2, end - 1, 1), self.sine.narrow(2, end - 1, 1)
        else:
            positions, visible = (real.sum(dim=1, keepdim=True) - 1).clamp(min=0), visible_keys(real, 1)
            cosine, sine = self.cosine[0, 0, positions][:, None], self.sine[0, 0, positions][:, None]
        assert cache.keys_and_values is not None  # keys are as wide as values where can_read says yes
        newest = cache.keys_and_values.narrow(3, end - 1, 1).unbind(0)
        keys, values = cache.keys.narrow(3, 0, end).unbind(0), cache.values.narrow(3, 0, end).unbind(0)
        head_dim, n_heads, n_rotated = cosine.shape[-1], self.n_heads, self.n_rotated

        x = model.embedding.weight.index_select(0, tokens)
        for number, layer in enumerate(self.layers):
            heads = product(self._normalise(x, layer.attention_gain), layer.projections)
            heads = heads.view(n_sequences, -1, 1, head_dim)
            to_rotate = heads[:, :n_rotated]
            swapped = to_rotate.roll(head_dim // 2, -1)
            torch.addcmul(to_rotate * cosine, swapped, sine, out=to_rotate)
            newest[number].copy_(heads[:, n_heads:])
            attended = attend_to_cache(heads[:, :n_heads], keys[number], values[number], visible)
            x = x + product(attended.reshape(n_sequences, -1), layer.output)

            normed = self._normalise(x, layer.feed_forward_gain)
            feed_forward = layer.feed_forward
            if isinstance(feed_forward, _Mixture):
                x = x + self._mix(normed, feed_forward, going)
            elif isinstance(feed_forward, MoELayer):
                y, _ = feed_forward(normed[:, None], mask, token_ids=tokens[:, None], positions=positions)
                x = x + y[:, 0]
            else:
                x = x + feed_forward(normed)
        return product(self._normalise(x, self.final_gain), model.head.weight)

    def _normalise(self, x: Float[Tensor, "B D"], gain: Float[Tensor, " D"]) -> Float[Tensor, "B D"]:
        """The RMSNorm x / √(‖x‖² / D + ε), times a gain that holds √D: hypot is √(‖x‖² + D ε)."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.wide)
        return (x / torch.hypot(length, self.floor) * gain).to(self.dtype)

    def _mix(self, x: Float[Tensor, "B D"], mixture: _Mixture, going: Sequence[bool]) -> Float[Tensor, "B D"]:
        router = self.model.config.router
        scores = score_function(torch.mm(x.to(self.wide), mixture.router), router.score)
        best, selected = scores.topk(router.top_k)
        weights = combine_weights(best, router.normalise, router.scale)
        if not all(going):
            selected = selected.where(torch.tensor(going)[:, None], NOBODY)
        return sum_of_selected(x, selected, weights, mixture.experts, mixture.one_by_one).to(self.dtype)

    def _gain(self, norm: nn.RMSNorm | nn.LayerNorm) -> Float[Tensor, " D"]:
        return norm.weight.to(self.wide) * math.sqrt(norm.weight.numel())

    def _lay_out(self, block: Block) -> _Layer:
        attention = block.attention
        assert isinstance(attention, Attention)
        feed_forward: _Mixture | MoELayer | FeedForward = block.feed_forward
        if isinstance(feed_forward, MoELayer) and _is_plain(feed_forward):
            assert feed_forward.router.weight is not None
            router, weights = feed_forward.router.weight.to(self.wide).t(), feed_forward.experts.weights
            feed_forward = _Mixture(router, weights, (weights.w_in.unbind(0), weights.w_out.unbind(0)))
        return _Layer(
            self._gain(block.attention_norm),
            torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]),
            attention.output.weight,
            self._gain(block.feed_forward_norm),
            feed_forward,
        )


def _is_plain_attention(attention: AttentionConfig) -> bool:
    """Whether a :class:`_Layer` is all that attention is: whole heads that turn, by whatever angles."""
    return (
        attention.qk_norm == "none"
        and not (attention.bias or attention.has_output_bias)
        and attention.clip is None
        and not attention.sinks
        and attention.window is None
        and attention.rope.fraction == 1
        and attention.rope.mscale_all_dim is None
        and not attention.is_latent
    )


def _is_plain(layer: MoELayer) -> bool:
    """Whether a :class:`_Mixture` is all that this layer is in evaluation."""
    router = layer.router.config
    return (
        (router.projection, router.selection, router.selection_bias) == ("linear", "top_k", "none")
        and not (router.bias or router.logit_norm)
        and (router.weights, router.apply) == ("scores", "after")
        and not (router.capacity.factor and router.capacity.in_evaluation)
        and layer.special is None
        and layer.shared is None
        and layer.experts.backend == "auto"
    )


@contextmanager
def without_onednn() -> Iterator[None]:
    """Products by torch's own code: for a single row in bfloat16 it takes a third to a half of oneDNN's time.

    256 x 256 took 7 us against 22, 1024 x 256 20 against 36 (two cores of a Xeon with AMX); of two rows on, oneDNN is
    the faster. It concerns the whole process, as long as it lasts.
    """
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before
