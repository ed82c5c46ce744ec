"""What a device holds at the peak of a training step, from what our modules keep.

Weights, gradients and the optimizer's state are counted. What autograd keeps is added up module by module, in the order
of moe/model: each function below says which tensors of which layer it means. `dtype` is the number of bytes of a matrix
product's operands (2 for bfloat16), `stream` that of the residual stream: under autocast over float32 weights it is 4.
"""

from dataclasses import dataclass
from typing import Literal

from moe.config import Checkpointing, ModelConfig, TrainingConfig, WeightDtype
from moe.config.parameters import hidden_rows
from moe.planner.layout import Layout, Slice, layers_of, slice_of

Recipe = Literal["fp32", "bf16", "mixed", "mixed_fp32_gradients"]

HEAD_BLOCK = 1 << 30
"""largest block of logits on a GPU, counted as float32: BLOCK_BYTES of moe/training/head_loss.py"""


@dataclass(frozen=True, kw_only=True)
class BytesPerParameter:
    """What a parameter takes: its weight, its gradient, and what the optimizer keeps of it."""

    weight: int
    gradient: int
    optimizer: int


RECIPES: dict[Recipe, BytesPerParameter] = {
    "fp32": BytesPerParameter(weight=4, gradient=4, optimizer=8),
    "bf16": BytesPerParameter(weight=2, gradient=2, optimizer=4),
    "mixed": BytesPerParameter(weight=2, gradient=2, optimizer=12),
    "mixed_fp32_gradients": BytesPerParameter(weight=2, gradient=4, optimizer=12),
}
"""fp32 and bf16 are ours (training.weight_dtype) with AdamW's two moments. mixed is what large models are trained with
elsewhere: bfloat16 weights, and in the optimizer a float32 copy and float32 moments (Megatron-LM has float32 gradients
as well)"""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one device holds at the peak of a step, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """what the forward pass keeps for the backward pass"""
    buffers: float
    """what lives for a moment: a block of logits, one layer's backward pass, gathered weights"""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True, kw_only=True)
class Step:
    """What decides the memory of a training step beside the model and its layout."""

    sequence: int
    """tokens of a sequence"""
    micro_batch: int
    """sequences that a replica computes at once"""
    n_micro_batches: int
    """of a step, on each replica"""
    recipe: Recipe = "bf16"
    checkpointing: Checkpointing = "none"
    bf16: bool = True
    """whether matrix products are in bfloat16"""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.sequence * self.micro_batch

    @property
    def dtype(self) -> int:
        """Bytes of an operand of a product."""
        return 2 if self.bf16 else 4

    @property
    def stream(self) -> int:
        """Bytes of a number in the residual stream: that of the weights."""
        return RECIPES[self.recipe].weight

    @property
    def casts_weights(self) -> bool:
        """Whether products take copies of the weights in their own dtype, which autograd keeps."""
        return self.bf16 and self.stream == 4


def recipe_of(dtype: WeightDtype) -> Recipe:
    """What :mod:`moe.training` keeps of a parameter of such weights."""
    return "fp32" if dtype == "fp32" else "bf16"


def step_of(training: TrainingConfig, sequence: int, layout: Layout) -> Step:
    """The step that a configuration describes under ``layout``: its batch divided among the replicas."""
    per_replica = max(1, training.batch_size // layout.data)
    n_micro_batches = min(training.accumulation, per_replica)
    return Step(
        sequence=sequence,
        micro_batch=max(1, per_replica // n_micro_batches),
        n_micro_batches=n_micro_batches,
        recipe=recipe_of(training.weight_dtype),
        checkpointing=training.activation_checkpointing,
        bf16=training.precision != "fp32",
    )


# ----------------------------------------------------------------------------------------------------- a whole device


def memory_of(model: ModelConfig, layout: Layout, step: Step, stage: int = 0) -> Memory:
    """The peak of pipeline rank ``stage``.

    The peak is the largest of three moments: the loss, when all activations are there; the backward pass of each block,
    which gives gradients and takes activations; the optimizer.
    """
    part = slice_of(model, layout, stage)
    weights, gradients, optimizer = persistent(part, layout, step)
    blocks = [layer_bytes(model, layout, step, layer) for layer in layers_of(model, layout, stage)]
    in_flight = micro_batches_in_flight(layout, step, stage)
    kept = sum(block.kept for block in blocks) + ends(model, layout, step, part)
    gathered = gathered_weights(part, layout, step)
    waiting = (in_flight - 1) * kept  # of other micro-batches of the pipeline
    accumulated = gradients if step.n_micro_batches > 1 else 0.0

    head_gradient = head_loss_kept(model, layout, step) if part.has_head else 0.0
    moments = [
        (accumulated, waiting + kept, gathered + (head_loss_buffers(model, layout, step) if part.has_head else 0.0))
    ]
    share = gradients / max(1, len(blocks))
    left = kept
    for number, block in enumerate(reversed(blocks)):
        so_far = accumulated or share * number
        moments.append((so_far, waiting + left, gathered + head_gradient * (number == 0) + block.backward))
        left -= block.kept
    moments.append((gradients, waiting, 0.0))
    peak = max(moments, key=sum)
    return Memory(weights=weights, optimizer=optimizer, gradients=peak[0], activations=peak[1], buffers=peak[2])


def largest(model: ModelConfig, layout: Layout, step: Step) -> tuple[int, Memory]:
    """The pipeline rank that holds most, and what it holds."""
    stages = {0, layout.pipeline // 2, layout.pipeline - 1}
    return max(((stage, memory_of(model, layout, step, stage)) for stage in stages), key=lambda one: one[1].total)


def persistent(part: Slice, layout: Layout, step: Step) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state: what stays from step to step, and gradients at their fullest."""
    narrow = RECIPES[step.recipe]
    wide = RECIPES["fp32"] if step.recipe == "bf16" else narrow

    def of(narrow: int, wide: int, shared: bool) -> float:
        dense = narrow * (part.dense - part.precise) + wide * part.precise
        experts = narrow * part.experts
        if shared:
            return dense / layout.sharing + experts / layout.sharing_experts()
        return float(dense + experts)

    return (
        of(narrow.weight, wide.weight, layout.zero >= 3),
        of(narrow.gradient, wide.gradient, layout.zero >= 2),
        of(narrow.optimizer, wide.optimizer, layout.zero >= 1),
    )


def micro_batches_in_flight(layout: Layout, step: Step, stage: int) -> float:
    """Micro-batches whose activations a pipeline rank holds (Narayanan et al. 2021, section 2.2).

    1F1B: as many as ranks follow, itself included. With v stages a rank: 1 + (p - 1) / (p v) times p at the first.
    """
    if layout.pipeline == 1:
        return 1
    warm_up: float = layout.pipeline - stage
    if layout.stages > 1:
        warm_up = (2 * (layout.pipeline - stage - 1) + (layout.stages - 1) * layout.pipeline + 1) / layout.stages
    return float(min(step.n_micro_batches, warm_up))


def gathered_weights(part: Slice, layout: Layout, step: Step) -> float:
    """With ZeRO-3: the whole weights of two blocks, one that computes and one that is fetched, and one's gradients."""
    return 3.0 * part.largest_block * step.dtype if layout.zero == 3 and layout.sharing > 1 else 0.0


# ------------------------------------------------------------------------------------------------------------ a block


@dataclass(frozen=True)
class BlockBytes:
    """One block's bytes on one device for one micro-batch."""

    kept: float
    """from forward to backward"""
    backward: float
    """on top of that while its backward pass runs, what is computed again included"""


def layer_bytes(model: ModelConfig, layout: Layout, step: Step, layer: int) -> BlockBytes:
    """What block ``layer`` keeps, and needs on the way back, under the checkpointing policy."""
    tokens = step.tokens
    attention = tokens * attention_kept(model, layout, step) + _cast_weights(model, layout, step, "attention")
    stream = tokens * model.d_model * step.stream / layout.tensor
    if layer in model.moe_layers:
        routing = tokens * routing_kept(model)
        mlp_input = tokens * norm_and_input_kept(model, layout, step, is_mixture=True)
        mlp = tokens * experts_kept(model, layout, step) + _cast_weights(model, layout, step, "experts")
        transient = tokens * experts_backward(model, layout, step)
    else:
        width = model.dense_width(layer)
        routing, mlp_input = 0.0, tokens * norm_and_input_kept(model, layout, step, is_mixture=False)
        mlp = tokens * mlp_kept(model, width, step) / layout.tensor
        transient = tokens * mlp_backward(model, width, step) / layout.tensor
    # A bfloat16 stream is not kept by what reads it: norms keep their float32 copy of it.
    everything = attention + mlp_input + mlp + routing
    if step.checkpointing == "block":
        return BlockBytes(stream + routing, everything + transient)
    if step.checkpointing == "experts":
        return BlockBytes(everything - mlp, mlp + transient)
    if step.checkpointing == "attention":
        return BlockBytes(everything - attention + stream, max(attention, transient))
    return BlockBytes(everything, transient)


def attention_kept(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Bytes a token: the norm's float32 input, the projections' input, queries, keys, values, output, log-sums.

    Under tensor parallelism the projections' input is the whole sequence, gathered; with one key head all ranks have
    it.
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
    """Bytes a token: the float32 input of the norm before the MLPs, and what it gives them.

    Under autocast over float32 weights a router reads that in float32, beside the experts' copy in bfloat16.
    """
    copies = step.dtype + (4 if is_mixture and step.casts_weights else 0)
    return (4 * (model.d_model + 1) + copies * model.d_model) / layout.tensor


def routing_kept(model: ModelConfig) -> float:
    """Bytes a token of a :class:`~moe.model.routing.Routing` and its sorting, which lives until the step's end.

    Logits and scores in float32, the losses' softmax among them; of each choice the expert (int64), the weight
    (float32), and its row in the sorted order and back (int32).
    """
    return 8 * model.routed_experts + (8 + 4 + 4 + 4) * model.experts_per_token


def experts_kept(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Bytes a token: the fused kernels keep the pre-activation of each assignment, and nothing else but their input.

    With biases the experts fall back to grouped products, which keep their sorted input, the pre-activation, the
    activation and its factor, and the output once more in float32 for its weight. With expert parallelism the rows that
    arrived are kept as well: as many as were sent, where the load is even.
    """
    k, d_model, f = model.mlps_per_token, model.d_model, model.experts.d_ff
    rows = hidden_rows(model.feed_forward, f) / layout.tensor
    kept = step.dtype * k * rows
    if model.feed_forward.bias:
        gate = f / layout.tensor if rows > f / layout.tensor else 0
        kept += step.dtype * k * (d_model + f / layout.tensor + gate) + 4 * k * d_model
    if layout.expert > 1:
        kept += 2 * step.dtype * k * d_model / layout.tensor
    if model.shared.n_experts:
        kept += mlp_kept(model, model.shared_width, step) / layout.tensor
    return kept


def experts_backward(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Bytes a token while the experts' backward pass runs: the activation again, the gradient of the pre-activation,
    a row of the model's width for each assignment, and gradients of the layer's input and output."""
    k, d_model, f = model.mlps_per_token, model.d_model, model.experts.d_ff
    rows = (hidden_rows(model.feed_forward, f) + f) / layout.tensor
    return step.dtype * (k * rows + k * d_model + 3 * d_model)


def mlp_kept(model: ModelConfig, width: int, step: Step) -> float:
    """Bytes a token of one dense MLP: the pre-activation, the activation, and the gate's own activation."""
    rows = hidden_rows(model.feed_forward, width)
    gate = width if rows > width else 0
    return float(step.dtype * (rows + width + gate))


def mlp_backward(model: ModelConfig, width: int, step: Step) -> float:
    """Bytes a token while a dense MLP's backward pass runs: gradients of activation and pre-activation."""
    return float(step.dtype * (hidden_rows(model.feed_forward, width) + width + 2 * model.d_model))


def _cast_weights(model: ModelConfig, layout: Layout, step: Step, part: Literal["attention", "experts"]) -> float:
    """Bytes of one block's weights in bfloat16, which autograd keeps where they are float32."""
    if not step.casts_weights:
        return 0.0
    counted = model.parameters()
    if part == "attention":
        return step.dtype * counted.attention / model.n_layers / layout.tensor
    return step.dtype * model.experts.n_experts * counted.per_expert / layout.tensor / layout.expert


# --------------------------------------------------------------------------------------------- embedding, head and loss


def ends(model: ModelConfig, layout: Layout, step: Step, part: Slice) -> float:
    """What is kept outside the blocks: token ids, the rotation, and before the head the norm's float32 input."""
    kept = 8.0 * 2 * step.tokens + 8.0 * step.sequence * model.attention.rotated_dim / 2
    if part.has_head:
        kept += step.tokens * 4 * (model.d_model + 1) / layout.tensor
        kept += head_loss_kept(model, layout, step)
    return kept


def head_loss_kept(model: ModelConfig, layout: Layout, step: Step) -> float:
    """The gradients that moe/training/head_loss.py has ready: of the hidden states, and of the head's matrix."""
    vocabulary = (model.vocab_size or 0) / layout.tensor
    return step.tokens * model.d_model * step.stream + vocabulary * model.d_model * RECIPES[step.recipe].weight


def head_loss_buffers(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Until they are ready: a block of logits, the matrix's gradient in float32, and rows in the products' dtype."""
    vocabulary = (model.vocab_size or 0) / layout.tensor
    rows = min(step.tokens, HEAD_BLOCK / (4 * vocabulary))
    block = rows * vocabulary * step.dtype
    return block + 4 * vocabulary * model.d_model + step.tokens * model.d_model * step.dtype
