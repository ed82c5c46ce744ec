"""The blocks of a model over several ranks, through which a step's micro-batches pass like goods through a factory.

torch's schedules say who computes what when: 1F1B (Narayanan et al. 2019, PipeDream-Flush), which keeps as many
micro-batches in flight as there are stages still to come, and interleaved 1F1B (Narayanan et al. 2021, section 2.2),
where a rank has several stages and the bubble shrinks by their number.

Only the residual stream travels, forward, and its gradient, backward. Every rank has the tokens of its micro-batches at
hand, so positions and masks need not travel, and each adds the auxiliary losses of its own layers to the backward pass
(:func:`with_loss`). Of tied embeddings the first and the last stage have a copy each, whose gradients are added up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from moe.config import Config
from moe.errors import UserError
from moe.model.transformer import Block, Transformer
from moe.parallel.mesh import Mesh

# -------------------------------------------------------------------------------------------------------------- the cut


@dataclass(frozen=True)
class Span:
    """Consecutive blocks, which are a stage: those from ``first`` on and before ``end``."""

    stage: int
    first: int
    end: int
    n_stages: int

    @property
    def is_first(self) -> bool:
        """Whether the embedding is before it."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether norm and head are after it."""
        return self.stage == self.n_stages - 1


def spans(n_layers: int, n_stages: int) -> list[Span]:
    """The stages of so many blocks, as even as can be; what is left over goes to the second and the next ones.

    The first has the most micro-batches in flight, so the most activations, and it has the embedding.
    """
    base, rest = divmod(n_layers, n_stages)
    sizes = [base + (1 <= stage <= rest) for stage in range(n_stages)]
    ends = [sum(sizes[: stage + 1]) for stage in range(n_stages)]
    return [Span(stage, end - size, end, n_stages) for stage, (size, end) in enumerate(zip(sizes, ends, strict=True))]


def spans_here(config: Config, pipeline_rank: int) -> list[Span]:
    """The stages of one rank: the one of its number, and every ``parallel.pipeline``-th after it."""
    parallel = config.parallel
    return spans(config.model.n_layers, parallel.pipeline * parallel.stages)[pipeline_rank :: parallel.pipeline]


def cut(model: Transformer, config: Config, pipeline_rank: int) -> None:
    """Leave of ``model`` what the stages of one rank need. What stays keeps its names.

    That is its blocks, the embedding for the first stage, norm and head for the last, which with tied embeddings has
    the embedding too, being its head. What is gone is None, or missing among the blocks.
    """
    here = spans_here(config, pipeline_rank)
    kept = {str(block) for span in here for block in range(span.first, span.end)}
    blocks = model.blocks._modules
    for name in list(blocks):
        if name not in kept:
            del blocks[name]
    first, last = any(span.is_first for span in here), any(span.is_last for span in here)
    if not first and not (last and config.model.tie_embeddings):
        model.embedding = None  # type: ignore[assignment]
    if not last:
        model.norm = model.head = None  # type: ignore[assignment]


def with_enough_micro_batches(config: Config, processes: int) -> Config:
    """``config`` with as many micro-batches as a pipeline needs: one for each rank of it, whole rounds for interleaved.

    The least number that is not below ``training.accumulation``. Raises UserError where no number of them divides the
    batch.
    """
    settings, parallel = config.training, config.parallel
    ranks = parallel.pipeline
    if ranks == 1:
        return config
    data = parallel.data or max(1, processes // (ranks * parallel.tensor))
    for n in range(max(settings.accumulation, ranks), settings.batch_size // data + 1):
        if settings.batch_size % (n * data) == 0 and (parallel.stages == 1 or n % ranks == 0):
            return replace(config, training=replace(settings, accumulation=n))
    rounds = f", in multiples of {ranks}," if parallel.stages > 1 else ""
    raise UserError(
        f"training.batch_size: {settings.batch_size} sequences cannot be divided among {data} data ranks into at least "
        f"{max(settings.accumulation, ranks)} micro-batches{rounds} that parallel.pipeline {ranks} needs"
    )


# ----------------------------------------------------------------------------------------------------------- the passes

Compute = Callable[[Span, int, Tensor | None], Tensor]
"""From a stage, the number of a micro-batch and the residual stream (None: the stage begins with the embedding) to the
residual stream after it, or, of the last stage, to what its backward pass begins with: the loss"""


class Pipeline:
    """This rank's stages of ``model``, which was cut by :func:`cut`, and its neighbours.

    ``dtype`` is that of the residual stream.
    """

    def __init__(
        self, model: Transformer, config: Config, mesh: Mesh, device: torch.device, dtype: torch.dtype
    ) -> None:
        group = mesh.pipeline_group
        assert group is not None
        self.group, self.device, self.dtype = group, device, dtype
        self.rank, self.size = group.rank(), group.size()
        self.model_config, self.interleaved = config.model, config.parallel.stages > 1
        self.tensor_ranks = config.parallel.tensor
        self.spans = spans_here(config, self.rank)
        self.is_last = any(span.is_last for span in self.spans)
        names = iter(model.blocks.children())
        self.blocks = {span: [cast(Block, next(names)) for _ in range(span.first, span.end)] for span in self.spans}
        self.mixtures = [
            place
            for place, layer in enumerate(config.model.moe_layers)
            if any(span.first <= layer < span.end for span in self.spans)
        ]
        """which of the model's mixture layers are here, counted from 0"""
        self._tied = config.model.tie_embeddings
        self._schedule: Schedule1F1B | ScheduleInterleaved1F1B | None = None
        self._shape: tuple[int, ...] = ()
        self._stages: list[_Stage] = []

    def run(self, tokens: Sequence[Tensor], compute: Compute) -> None:
        """Forward and backward of all micro-batches, whose ``tokens`` [B, S] are of one shape.

        ``compute`` is called for each stage with the micro-batches in order.
        """
        shape = (len(tokens), *tokens[0].shape)
        if self._schedule is None or shape != self._shape:
            self._schedule, self._shape = self._build(shape), shape
        for stage in self._stages:
            stage.compute, stage.number = compute, 0
        first = (torch.cat(list(tokens)),) if self.spans[0].is_first else ()
        target = torch.zeros(len(tokens), device=self.device) if self.is_last else None
        self._schedule.step(*first, target=target, return_outputs=False)

    def forward(self, model: Transformer, tokens: Tensor) -> tuple[Tensor | None, list[Any]]:
        """A forward pass alone, without a gradient: the hidden states where the last stage is, else None; routings."""
        x: Tensor | None = None
        routings = []
        for span in self.spans:
            if not span.is_first:
                x = torch.empty(self._boundary(tokens.shape), dtype=self.dtype, device=self.device)
                dist.recv(x, group=self.group, group_src=(self.rank - 1) % self.size)
            out, routed = model.part(tokens, x=x, blocks=self.blocks[span], to_end=span.is_last)
            routings += routed
            if not span.is_last:
                dist.send(out.contiguous(), group=self.group, group_dst=(self.rank + 1) % self.size)
            x = out
        return (x if self.is_last else None), routings

    def _boundary(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The shape of the residual stream for tokens of ``shape``: with tensor parallelism, a part of the sequence."""
        return shape[0], shape[1] // self.tensor_ranks, self.model_config.d_model

    def _build(self, shape: tuple[int, ...]) -> Schedule1F1B | ScheduleInterleaved1F1B:
        n_micro_batches, *of_one = shape
        tokens = torch.empty(of_one, dtype=torch.int64, device="meta")
        stream = torch.empty(self._boundary(of_one), dtype=self.dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        self._stages = [_Stage(span) for span in self.spans]
        stages = [
            PipelineStage(
                stage,
                stage.span.stage,
                stage.span.n_stages,
                self.device,
                input_args=tokens if stage.span.is_first else stream,
                output_args=loss if stage.span.is_last else stream,
                group=self.group,
            )
            for stage in self._stages
        ]
        settings: dict[str, Any] = {"loss_fn": lambda loss, target: loss, "scale_grads": False}
        if self.interleaved:
            return ScheduleInterleaved1F1B(list(stages), n_micro_batches, **settings)
        return Schedule1F1B(stages[0], n_micro_batches, **settings)

    # -------------------------------------------------------------------------------------------- what all must know

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over the ranks of the pipeline, on each; the argument is left alone."""
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def of_all_mixtures(self, here: Tensor) -> Tensor:
        """One row for each of the model's mixture layers, from the rows of those that are here."""
        whole = here.new_zeros(len(self.model_config.moe_layers), *here.shape[1:])
        if self.mixtures:
            whole[self.mixtures] = here
        return self.sum(whole)

    def to_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What all ranks of the pipeline have, by name, on the first of them; elsewhere what this one has. All ask."""
        told: list[Any] = [None] * self.size
        mine = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        dist.all_gather_object(told, mine, group=self.group)
        found = {name: tensor.detach() for name, tensor in tensors.items()}
        for rank, names in enumerate(told):
            for name, shape, dtype in names if rank else ():
                if self.rank == rank:
                    dist.send(found[name].contiguous(), group=self.group, group_dst=0)
                elif self.rank == 0:
                    found[name] = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(found[name], group=self.group, group_src=rank)
        return found

    def add_tied_gradients(self, embedding: nn.Parameter | None) -> None:
        """Give both copies of a tied embedding the sum of their gradients; nothing where there is one, or none here."""
        if not self._tied or embedding is None:
            return
        assert embedding.grad is not None
        other = self.size - 1 if self.rank == 0 else 0
        arrived = torch.empty_like(embedding.grad)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, embedding.grad, group=self.group, group_peer=other),
                dist.P2POp(dist.irecv, arrived, group=self.group, group_peer=other),
            ]
        )
        for work in works:
            work.wait()
        embedding.grad += arrived

    def norm(self, here: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The norm of the whole gradient, from that of what is here."""
        return self.sum(here.square()).sqrt()


class _Stage(nn.Module):
    """What torch's stage calls: it counts the micro-batches, which come in order."""

    def __init__(self, span: Span) -> None:
        super().__init__()
        self.span, self.number = span, 0
        self.compute: Compute | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The next micro-batch."""
        assert self.compute is not None
        number, self.number = self.number, self.number + 1
        return self.compute(self.span, number, None if self.span.is_first else x)


def with_loss(x: Tensor, loss: Float[Tensor, ""]) -> Tensor:
    """``x``, whose backward pass is also that of ``loss``: for a loss in the middle of a pipeline."""
    same: Tensor = _WithLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return same


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)
