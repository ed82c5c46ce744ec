"""What one block, and what stands around the blocks, holds of a micro-batch, module by module as moe/model computes.

Each function says which tensors of which layer it means. `dtype` is the number of bytes of a matrix product's operands
(2 for bfloat16), `stream` that of the residual stream, which is that of the weights: under autocast over float32
weights it is 4.
"""

from dataclasses import dataclass, replace

from moe.config import ModelConfig
from moe.config.parameters import attention_parameters, hidden_rows
from moe.planner.layout import Layout, share_of_block
from moe.planner.step import Step

HEAD_BLOCK = 1 << 30
"""largest block of logits on a GPU, counted as float32: BLOCK_BYTES of moe/training/head_loss.py"""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One moment of a block's backward pass, in bytes."""

    buffers: float
    """what the pass has in hand"""
    gone: float = 0.0
    """of what was kept or computed again"""
    gradients: float = 0.0
    """of the experts, as they will stay; or to be added to those that are there"""
    passing: float = 0.0
    """of the experts, in the products' dtype, on the way to float32"""


@dataclass(frozen=True, kw_only=True)
class BlockBytes:
    """One block's bytes on one device for one micro-batch."""

    kept: float
    """from forward to backward"""
    forward: float
    """on top of that before its MLPs' output is there"""
    again: float
    """what the backward pass computes again"""
    backward: tuple[Moment, ...]


def block_bytes(model: ModelConfig, layout: Layout, step: Step, layer: int) -> BlockBytes:
    """What block ``layer`` keeps, and needs on the way back, under the checkpointing policy.

    A bfloat16 stream is not kept by what reads it, since norms have a float32 copy of it; a checkpoint keeps it. On the
    way back there are the shared experts first, then the routed ones (or a dense MLP), then attention.
    """
    tokens, t = step.tokens, layout.tensor
    width = tokens * model.d_model / t
    stream = width * step.stream
    beside = gradient_beside(model, layout, step)
    attention_copies, mlp_copies = _weight_copies(model, layout, step, layer)
    attention = tokens * attention_kept(model, layout, step) + attention_copies
    mixture = layer in model.moe_layers
    mlp_input = tokens * norm_and_input_kept(model, layout, step, is_mixture=mixture)
    routing = tokens * routing_kept(model) if mixture else 0.0
    shared = tokens * mlp_kept(model, model.shared_width, step) / t if mixture else 0.0
    moments: list[Moment] = []
    if mixture:
        mlp = tokens * experts_kept(model, layout, step) + mlp_copies
        forward = tokens * experts_forward(model, layout, step)
        moments += [Moment(buffers=beside + tokens * mlp_backward(model, model.shared_width, step) / t)] * (shared > 0)
        moments += experts_moments(model, layout, step, layer, mlp, shared)
    else:
        mlp = tokens * mlp_kept(model, model.dense_width(layer), step) / t + mlp_copies
        forward = width * step.dtype
        moments.append(Moment(buffers=beside + tokens * mlp_backward(model, model.dense_width(layer), step) / t))
    before_attention = mlp + shared + mlp_input
    moments.append(
        Moment(
            buffers=beside + tokens * attention_backward(model, layout, step),
            gone=before_attention,
            gradients=step.dtype * share_of_block(model, layout, layer).experts * (not _casts(layout, step)),
            passing=4.0 * share_of_block(model, layout, layer).experts * _casts(layout, step),
        )
    )
    everything = attention + mlp_input + mlp + shared + routing
    kept, again = everything, 0.0
    if step.checkpointing == "block":
        # Where the stream is float32, the first norm reads what the checkpoint kept.
        kept, again = stream + routing, everything - stream * (step.stream == 4)
    elif step.checkpointing == "experts":
        kept, again = (everything - mlp, mlp)
    elif step.checkpointing == "attention":
        kept = everything - attention + stream
        moments[-1] = replace(moments[-1], gone=before_attention - attention)
    forward += 3 * stream  # what came in, what attention added to it, and the sum
    if again:
        moments.insert(0, Moment(buffers=stream + forward + (4 * tokens * model.d_model if layout.expert > 1 else 0)))
    return BlockBytes(kept=kept, forward=forward + everything - kept, again=again, backward=tuple(moments))


def gradient_beside(model: ModelConfig, layout: Layout, step: Step) -> float:
    """The gradient of the residual stream that goes by; with tensor parallelism, that of the whole sequence as well."""
    part = step.tokens * model.d_model * step.stream / layout.tensor
    return part + (step.tokens * model.d_model * step.stream if layout.tensor > 1 else 0)


def experts_moments(
    model: ModelConfig, layout: Layout, step: Step, layer: int, kept: float, gone: float
) -> list[Moment]:
    """The backward pass of the routed experts, which ``kept`` so many bytes; ``gone`` is what was gone before.

    Kernels return gradients in the products' dtype. Where weights are of that dtype these are the gradients; where they
    are float32, they are cast one after the other, W_in's last, when what the experts kept is gone.
    """
    tokens, k, d_model = step.tokens, model.mlps_per_token, model.d_model
    experts = share_of_block(model, layout, layer).experts
    returned = float(step.dtype * experts)
    stays = not _casts(layout, step)
    beside = gradient_beside(model, layout, step)
    if layout.expert > 1:  # the gradient of the whole sequence has become rows
        beside = tokens * d_model * step.stream / layout.tensor
    if _grouped(model, step):
        rows = tokens * k / layout.tensor
        hidden = hidden_rows(model.feed_forward, model.experts.d_ff)
        moments = [
            # The combine's: the output's gradient in float32, and what gives that of the weights.
            Moment(buffers=beside + 8 * rows * d_model, gone=gone),
            # W_in's: only the sorted input is left.
            Moment(
                buffers=beside + step.dtype * rows * (hidden + 2 * d_model),
                gone=gone + kept,
                gradients=returned * stays,
                passing=returned * (not stays),
            ),
        ]
    else:
        moments = [
            Moment(
                buffers=beside + tokens * experts_backward(model, layout, step),
                # Outputs that came back are used up first.
                gone=gone + (tokens * step.dtype * k * d_model if layout.expert > 1 else 0),
                gradients=returned * stays,
                passing=returned * (not stays),
            )
        ]
    if _casts(layout, step):
        w_in, many = w_in_share(model), step.n_micro_batches > 1
        cast = returned * w_in + 4 * experts * (w_in if many else 1)
        after = beside + tokens * d_model * step.dtype
        moments.append(Moment(buffers=after, gone=gone + kept, passing=cast))
    return moments


def attention_kept(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Bytes a token: the norm's float32 input, the projections' input, queries, keys, values, output, log-sums.

    Under autocast each projection has a cast of its input to itself. Under tensor parallelism that input is the whole
    sequence, gathered, and a lone key head is on all ranks.
    """
    a, t, d_model = model.attention, layout.tensor, model.d_model
    norm = 4 * (d_model + 1) / t
    inputs = d_model * step.dtype * (3 if step.casts_weights else 1)
    heads = a.n_heads / t
    queries, output = heads * a.query_dim, heads * a.value_dim
    if a.latent.rank is not None:
        keys, values = heads * a.query_dim, heads * a.value_dim
        narrow = a.latent.rank + (a.latent.query_rank or 0)
        latent = (4 + step.dtype) * narrow
        return norm + inputs + latent + step.dtype * (queries + keys + values + output) + 4 * heads
    kv_heads = max(1.0, a.kv_heads / t)
    keys = values = kv_heads * a.head_dim
    normed = 0.0 if a.qk_norm == "none" else 4 * (queries + keys)
    clipped = 0.0 if a.clip is None else step.dtype * (queries + keys + values)
    return norm + inputs + normed + clipped + step.dtype * (queries + keys + values + output) + 4 * heads


def norm_and_input_kept(model: ModelConfig, layout: Layout, step: Step, *, is_mixture: bool) -> float:
    """Bytes a token: the float32 input of the norm before the MLPs, and what it gives them: the whole sequence.

    Under autocast over float32 weights a router reads that in float32, beside the experts' copy in bfloat16.
    """
    copies = float(step.dtype)
    if is_mixture and step.casts_weights:
        copies = 4 + (step.dtype if layout.expert == 1 else 0)  # rows that are sent away are copies of their own
    return 4 * (model.d_model + 1) / layout.tensor + copies * model.d_model


def routing_kept(model: ModelConfig) -> float:
    """Bytes a token of a :class:`~moe.model.routing.Routing` and its sorting, which lives until the step's end.

    Logits and scores in float32; of each choice the expert (int64), the weight (float32), and its row in the sorted
    order and back (int32).
    """
    return 8 * model.routed_experts + (8 + 4 + 4 + 4) * model.experts_per_token


def experts_kept(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Bytes a token: the fused kernels keep the pre-activation of each assignment, and nothing else but their input.

    Grouped products keep their sorted input, the pre-activation, what the activation is made of, and the output once
    more in float32 for its weight. With expert parallelism the rows that arrived and the outputs that came back are
    kept as well: as many as were sent, where the load is even.
    """
    k, d_model, f = model.mlps_per_token, model.d_model, model.experts.d_ff
    rows = hidden_rows(model.feed_forward, f) / layout.tensor
    kept = step.dtype * k * rows
    if _grouped(model, step):
        kept += step.dtype * k * (d_model + _activation_parts(model) * f / layout.tensor) + 4 * k * d_model
    if layout.expert > 1:
        kept += 2 * step.dtype * k * d_model
    return kept


def experts_forward(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Bytes a token at the end of the experts' forward pass.

    The activation and the output of each assignment; for grouped products the output twice, once more in float32, and
    its sum. With expert parallelism rows that were sent, their outputs there and here, and sums in float32.
    """
    k, d_model, f = model.mlps_per_token, model.d_model, model.experts.d_ff
    if layout.expert > 1:
        return 3 * step.dtype * k * d_model + 3 * 4 * d_model
    if _grouped(model, step):
        return (2 * step.dtype + 4) * k * d_model + 4 * d_model
    return step.dtype * k * (f / layout.tensor + d_model) + step.stream * d_model


def experts_backward(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Bytes a token while the fused kernels' backward pass runs: the activation again, the gradient of the
    pre-activation, a row of the model's width for each assignment, and the input's gradient; where the stream is wider
    than the products, a cast of the gradient that comes in. With expert parallelism input and gradient are rows."""
    k, d_model, f = model.mlps_per_token, model.d_model, model.experts.d_ff
    rows = (hidden_rows(model.feed_forward, f) + f) / layout.tensor
    if layout.expert > 1:
        return step.dtype * k * (rows + 3 * d_model)
    cast = d_model * step.dtype if step.casts_weights else 0
    return step.dtype * (k * (rows + d_model) + d_model) + cast


def attention_backward(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Bytes a token while flash attention's backward pass runs: gradients of output, queries, keys and values, those of
    the queries in float32 as well, and of grouped heads those of keys and values for each query head."""
    a, t = model.attention, layout.tensor
    heads = a.n_heads / t
    queries, output = heads * a.query_dim, heads * a.value_dim
    repeated = a.kv_heads < a.n_heads and not a.is_latent
    keys = (queries + output) / (a.n_heads / max(1, a.kv_heads) if repeated else 1)
    return step.dtype * (queries + output + keys + (queries + output) * repeated) + 4 * queries


def _grouped(model: ModelConfig, step: Step) -> bool:
    """Whether the experts are grouped products: the fused kernels have no biases, and no float32."""
    return model.feed_forward.bias or not step.bf16


def _activation_parts(model: ModelConfig) -> int:
    """Tensors of an MLP's hidden width that its activation keeps, its result among them (moe.model.feed_forward)."""
    return {"swiglu": 2, "swiglu_clamped": 5}.get(model.feed_forward.activation, 1)


def mlp_kept(model: ModelConfig, width: int, step: Step) -> float:
    """Bytes a token of one dense MLP: the pre-activation and what the activation is made of."""
    return float(step.dtype * (hidden_rows(model.feed_forward, width) + _activation_parts(model) * width))


def mlp_backward(model: ModelConfig, width: int, step: Step) -> float:
    """Bytes a token on top of that while a dense MLP's backward pass runs: gradients of the activation and of the
    pre-activation, when the activation itself is gone."""
    return float(step.dtype * hidden_rows(model.feed_forward, width))


def _casts(layout: Layout, step: Step) -> bool:
    """Whether weights are cast for a product, and their gradients after it. FSDP gathers them in the right dtype."""
    return step.casts_weights and not (layout.zero == 3 and layout.sharing > 1)


def _weight_copies(model: ModelConfig, layout: Layout, step: Step, layer: int) -> tuple[float, float]:
    """Bytes of a block's weights in bfloat16, attention's and MLPs', which autograd keeps where they are float32."""
    if not _casts(layout, step):
        return 0.0, 0.0
    share = share_of_block(model, layout, layer)
    attention = attention_parameters(model.attention, model.d_model) / layout.tensor
    return step.dtype * attention, step.dtype * (share.total - share.precise - attention)


def w_in_share(model: ModelConfig) -> float:
    """What of an expert's parameters W_in is."""
    rows = hidden_rows(model.feed_forward, model.experts.d_ff)
    return rows / (rows + model.experts.d_ff)


# --------------------------------------------------------------------------------------------- embedding, head and loss


def ends_kept(model: ModelConfig, step: Step) -> float:
    """What is kept beside the blocks: token ids and targets, and cosine and sine of the rotation."""
    rotation = 4.0 * step.sequence * model.attention.rotated_dim if model.positions == "rotary" else 0.0
    return 8.0 * 2 * step.tokens + rotation


def last_norm_kept(model: ModelConfig, layout: Layout, step: Step) -> float:
    """The float32 input of the norm before the head."""
    return step.tokens * 4 * (model.d_model + 1) / layout.tensor


def head_loss_bytes(model: ModelConfig, layout: Layout, step: Step) -> float:
    """The most that moe/training/head_loss.py has in hand: the matrix's gradient in float32, that of the hidden states,
    and either two blocks of logits (one that is left and one that comes) or one and its product, as large as the matrix
    in float32; at the end the matrix's gradient in the weights' dtype. Copies in the products' dtype where weights are
    float32."""
    vocabulary = (model.vocab_size or 0) / layout.tensor
    hidden, matrix = step.tokens * model.d_model, vocabulary * model.d_model
    rows = max(1, HEAD_BLOCK // (4 * vocabulary))
    block = min(step.tokens, rows) * vocabulary * step.dtype
    product = 4 * matrix if step.dtype != 4 else 0
    copies = step.dtype * (hidden + matrix) if step.casts_weights else 0
    at_once = max(block + product, 2 * block if step.tokens > rows else 0)
    last = (step.tokens % rows or min(step.tokens, rows)) * vocabulary * step.dtype
    leaving = last + step.stream * hidden * (step.stream != step.dtype) + step.stream * matrix * (step.stream != 4)
    return copies + 4 * matrix + step.dtype * hidden + max(at_once, leaving)
