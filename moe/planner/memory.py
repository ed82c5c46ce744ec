"""What a device holds at the peak of a training step, from what our modules keep on a GPU.

Weights, gradients and the optimizer's state are counted; :mod:`.activations` adds up what autograd keeps of a
micro-batch; here are what layouts add to that, and the moment at which all of it together is most.
:mod:`moe.rehearsal` follows the same step tensor by tensor; tests hold one against the other.
"""

from dataclasses import dataclass

from moe.config import ModelConfig
from moe.planner.activations import block_bytes, ends_kept, head_loss_bytes, last_norm_kept, w_in_share
from moe.planner.layout import (
    Layout,
    Share,
    layers_of,
    share_of,
    share_of_block,
    share_of_embedding,
    share_of_head,
)
from moe.planner.step import RECIPES, Step

BUCKET = 1 << 26
"""numbers that replicas sum at once, where one parameter has no more: BUCKET of moe/parallel/gradients.py"""


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


def memory_of(model: ModelConfig, layout: Layout, step: Step, rank: int = 0) -> Memory:
    """The peak of pipeline rank ``rank``.

    The peak is the largest of these moments: the loss, when all activations are there; the experts' gradients of each
    block on the way back, which takes activations away and brings gradients; the gradient of the embedding.
    """
    layers = layers_of(model, layout, rank)
    weights, gradients, optimizer = persistent(share_of(model, layout, rank), layout, step)
    # Blocks of one kind are alike: mixtures, and dense ones.
    alike = {model.is_moe_layer(layer): layer for layer in layers}
    of_kind = {kind: share_of_block(model, layout, layer) for kind, layer in alike.items()}
    bytes_of_kind = {kind: block_bytes(model, layout, step, layer) for kind, layer in alike.items()}
    shares = {layer: of_kind[model.is_moe_layer(layer)] for layer in layers}
    blocks = {layer: bytes_of_kind[model.is_moe_layer(layer)] for layer in layers}
    head, embedding = share_of_head(model, layout, rank), share_of_embedding(model, layout, rank)
    head_gradients = persistent(head, layout, step)[1]
    accumulates = step.n_micro_batches > 1

    sent, received = pipeline_buffers(model, layout, step, rank)
    kept = sum(block.kept for block in blocks.values()) + ends_kept(model, step) + sent
    # Of the pipeline's other micro-batches, and the last one's hidden states, which the step has a name for.
    waiting = (micro_batches_in_flight(layout, step, rank) - 1) * kept
    hidden = step.tokens * model.d_model * step.stream if head.total else 0.0
    shards = layout.zero == 3 and layout.sharing > 1
    # The root of FSDP, embedding and head, stays gathered; it is not cast.
    ends = received + ((embedding.total + head.total - head.precise) * step.stream if shards else 0.0)

    moments: list[tuple[float, float, float]] = []
    before = gradients if accumulates else 0.0
    if layers:
        whole = fsdp_buffers(shares[layers[-1]], layout, step, is_last=True).whole if shards else 0.0
        moments.append((before, waiting + kept, ends + whole + blocks[layers[-1]].forward))
    if head.total:
        activations = waiting + kept + hidden + last_norm_kept(model, layout, step)
        moments.append((before, activations, ends + head_loss_bytes(model, layout, step)))
    left, so_far = kept, head_gradients
    # Whole gradients of the head wait for the end, where FSDP sums them.
    ends += (head.total - head.precise) * step.stream if shards else 0.0
    for layer in reversed(layers):
        own = persistent(shares[layer], layout, step)[1]
        held = ends + blocks[layer].again
        if shards:
            sharding = fsdp_buffers(shares[layer], layout, step, is_last=layer == layers[-1])
            held += sharding.computing
            there = gradients if accumulates else so_far
            moments.append((there, waiting + hidden + left - blocks[layer].kept, ends + sharding.reducing))
        for moment in blocks[layer].backward:
            there = gradients if accumulates else so_far + moment.gradients * (layout.zero < 2)
            passing = moment.passing + moment.gradients * (accumulates or layout.zero >= 2)
            # What is gone was kept, or computed again.
            moments.append((there, waiting + hidden + left, held + moment.buffers + passing - moment.gone))
        so_far += own
        left -= blocks[layer].kept
    table = persistent(embedding, layout, step)[1] if embedding.total else 0.0
    again = table if accumulates or (model.tie_embeddings and head.total) else 0.0
    moments.append((gradients, waiting + hidden + left, ends + step.tokens * model.d_model * step.stream + again))
    if layout.data > 1 and layout.zero < 2:
        moments.append((gradients, hidden, received + added_at_once(model, layout, step, rank)))
    peak = max(moments, key=sum)
    return Memory(weights=weights, optimizer=optimizer, gradients=peak[0], activations=peak[1], buffers=peak[2])


def largest(model: ModelConfig, layout: Layout, step: Step) -> tuple[int, Memory]:
    """The pipeline rank that holds most, and what it holds."""
    ranks = {0, layout.pipeline // 2, layout.pipeline - 1}
    return max(((rank, memory_of(model, layout, step, rank)) for rank in ranks), key=lambda one: one[1].total)


def persistent(share: Share, layout: Layout, step: Step) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state: what stays from step to step, and gradients at their fullest."""
    narrow = RECIPES[step.recipe]
    wide = RECIPES["fp32"] if step.recipe == "bf16" else narrow

    def of(narrow: int, wide: int, shared: bool) -> float:
        dense = narrow * (share.dense - share.precise) + wide * share.precise
        experts = narrow * share.experts
        if shared:
            return dense / layout.sharing + experts / layout.sharing_experts()
        return float(dense + experts)

    return (
        of(narrow.weight, wide.weight, layout.zero >= 3),
        of(narrow.gradient, wide.gradient, layout.zero >= 2),
        of(narrow.optimizer, wide.optimizer, layout.zero >= 1),
    )


def micro_batches_in_flight(layout: Layout, step: Step, rank: int) -> float:
    """Micro-batches whose activations a pipeline rank holds (Narayanan et al. 2021, section 2.2).

    1F1B: as many as ranks follow, itself included. With v stages a rank: 1 + (p - 1) / (p v) times p at the first.
    """
    if layout.pipeline == 1:
        return 1
    warm_up: float = layout.pipeline - rank
    if layout.stages > 1:
        warm_up = (2 * (layout.pipeline - rank - 1) + (layout.stages - 1) * layout.pipeline + 1) / layout.stages
    return float(min(step.n_micro_batches, warm_up))


def pipeline_buffers(model: ModelConfig, layout: Layout, step: Step, rank: int) -> tuple[float, float]:
    """Bytes of what a pipeline rank has sent on of one micro-batch, which waits for its gradient, and of the buffers in
    which torch's schedules receive: one for each micro-batch of a step, on every side that has a neighbour."""
    width = step.tokens * model.d_model * step.stream / layout.tensor
    parts = layout.pipeline * layout.stages
    stages = range(rank, parts, layout.pipeline)
    forward = sum(stage > 0 for stage in stages)
    backward = sum(stage < parts - 1 for stage in stages)
    return width * backward, step.n_micro_batches * width * (forward + backward)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What FSDP holds of one block beside its shards, in bytes."""

    whole: float
    """its weights, gathered"""
    computing: float
    """while the block's backward pass runs"""
    reducing: float
    """when that is over and the gradients are summed"""


def fsdp_buffers(share: Share, layout: Layout, step: Step, *, is_last: bool) -> Sharding:
    """Whole weights of a block and, flat, of the one that is fetched; the gradients of the one before, flat in float32,
    until its own are summed.

    Routers and norms are whole anyway. Experts that are spread over ranks are a unit of their own: with them only the
    rest of the next block is fetched.
    """
    dense, apart = share.dense - share.precise, layout.expert > 1
    experts = share.experts if layout.sharing_experts() > 1 or not apart else 0
    fetched = step.dtype * float(dense if apart else dense + experts)
    before = 4.0 * (dense if apart else dense + experts)
    own = 4.0 * (max(dense, experts) if apart else dense + experts)
    whole = step.dtype * (dense + experts)
    computing = whole + fetched + before * (not is_last)
    return Sharding(whole=whole, computing=computing, reducing=fetched + whole + own * (1 + 1 / layout.sharing))


def added_at_once(model: ModelConfig, layout: Layout, step: Step, rank: int) -> float:
    """Bytes of the copy in which replicas sum their gradients: many small ones together, or a large one."""
    share = share_of(model, layout, rank)
    blocks = [share_of_block(model, layout, layer) for layer in layers_of(model, layout, rank)[-1:]]
    w_in = max((block.experts * w_in_share(model) for block in blocks), default=0.0)
    table = max(share_of_embedding(model, layout, rank).total, share_of_head(model, layout, rank).total)
    return RECIPES[step.recipe].gradient * max(w_in, table, min(BUCKET, share.total))
