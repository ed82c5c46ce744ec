"""Attention sinks: a place for what a head does not want to give to any token (GPT-OSS; Miller 2023, "off by one").

A learned logit s_h a head takes part in the softmax, and no value belongs to it:
p_ij = exp(score_ij) / (exp(s_h) + Σ_j' exp(score_ij')). It is as if there were one key more, before all others, that
every query of the head meets with that score, and whose value is zero. So it is computed here, around an attention that
has nothing to know of it.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

ROOM = 8
"""dimensions that a head grows by, of which one is used: fast kernels want whole multiples"""


def with_sinks(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    queries: Float[Tensor, "B H S d"],
    keys: Float[Tensor, "B H_kv L d"],
    values: Float[Tensor, "B H_kv L d"],
    visible: Bool[Tensor, "#B 1 S L"] | None,
    sinks: Float[Tensor, " H"],
) -> Float[Tensor, "B H S d"]:
    """What ``attend`` makes of queries, keys and values beside the ``sinks``.

    In one dimension more, queries hold the sink's score and the sink's key holds 1; all other keys hold 0 there. The
    added dimensions change the 1 / √d by which ``attend`` divides, which the queries make up for. Where ``visible`` is
    None, which says that query i sees keys up to i, there is a query more as well, before the others, that sees the
    sink alone.
    """
    batch, n_heads, n_queries, width = queries.shape
    scores = (sinks * math.sqrt(width + ROOM)).to(queries.dtype)[:, None, None].expand(batch, n_heads, n_queries, 1)
    queries = torch.cat([queries * math.sqrt((width + ROOM) / width), F.pad(scores, (0, ROOM - 1))], dim=-1)
    sink = F.pad(keys.new_ones(batch, keys.shape[1], 1, 1), (width, ROOM - 1))
    keys = torch.cat([sink, F.pad(keys, (0, ROOM))], dim=2)
    values = F.pad(values, (0, ROOM, 1, 0))
    if visible is None:
        return attend(F.pad(queries, (0, 0, 1, 0)), keys, values, None)[:, :, 1:, :width]
    return attend(queries, keys, values, F.pad(visible, (1, 0), value=True))[..., :width]
