"""One forward over the next tokens of several sequences in a paged cache."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moe.inference.paged_cache import PagedCache, Table
from moe.model.routing import Routing
from moe.model.transformer import Transformer


def read(
    model: Transformer, cache: PagedCache, tables: Sequence[Table], new: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "B S D"], list[Routing]]:
    """Read the ``new`` tokens of each sequence: what the head multiplies, and the routing of each mixture layer.

    Row b has its tokens at the right of the S = max(len(new)) columns; what stands before them is padding and means
    nothing. Raises OutOfBlocksError where the cache has no room.
    """
    counts = [len(tokens) for tokens in new]
    rows = cache.rows(tables, counts)
    columns = max(counts)
    tokens = torch.tensor([[0] * (columns - len(own)) + list(own) for own in new], device=cache.device)
    return model.hidden(tokens, rows.mask, rows)
