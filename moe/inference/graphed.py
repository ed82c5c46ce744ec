"""Decoding on a GPU by replaying a CUDA graph: one launch a step, where each of a thousand kernels would need its own.

A graph is recorded for fixed shapes and addresses, and a text grows. So the newest token stands in the last of a fixed
number of columns, and is written to its own place as well, for the steps after it: what changes from step to step is
numbers on the device alone. When the text has outgrown the columns, a graph with twice as many is recorded.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.model.cache import KVCache
from moe.model.transformer import Transformer

FEWEST_COLUMNS = 256
WARM_UP = 3
"""steps before a recording, in which kernels are chosen and compiled"""


def can_graph(model: Transformer) -> bool:
    """Whether every step of decoding ``model`` launches the same kernels: on a GPU, with a router that does not wait.

    Not under ``model.deterministic``, whose experts in float32 ask how many rows there are.

    Not with hooks on modules, which a replay would not call, nor under autocast.
    """
    config, router = model.config, model.config.router
    return (
        model.embedding.weight.is_cuda
        and config.experts.backend in ("auto", "fused")
        and (router.selection in ("top_k", "group_limited") or not config.moe_layers)
        and not (router.capacity.factor and router.capacity.in_evaluation)
        and not config.special.total
        and not config.deterministic
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        and not torch.is_autocast_enabled("cuda")
    )


class NewestLast:
    """A contiguous cache for steps of one token, whose number is not in any shape: ``place``, on the device.

    The model sees ``columns`` columns, of which the last is the newest token's.
    """

    def __init__(self, cache: KVCache, columns: int) -> None:
        self._cache, self._columns = cache, columns
        self.length = columns - 1
        device = cache.real.device
        self.place = torch.tensor([cache.length], device=device)
        self._column = torch.arange(columns, device=device)[None]

    def extend(self, n_tokens: int, real: Bool[Tensor, "B S"] | None = None) -> Bool[Tensor, "B L"]:
        """Which columns hold a token: real ones before ``place``, and the newest."""
        if n_tokens != 1:
            raise ValueError(f"a step reads one token, and {n_tokens} came")
        before = self._cache.real[:, : self._columns] & (self._column < self.place)
        return before | (self._column == self._columns - 1)

    def store(
        self, layer: int, keys: Float[Tensor, "B H S k"], values: Float[Tensor, "B H S v"]
    ) -> tuple[Float[Tensor, "B H L k"], Float[Tensor, "B H L v"]]:
        """Write the newest key and value of a layer to both their places, and return all columns."""
        returned = []
        for kept, new in ((self._cache.keys[layer], keys), (self._cache.values[layer], values)):
            new = new.to(kept.dtype)
            kept.index_copy_(2, self.place, new)
            kept[:, :, self._columns - 1 : self._columns] = new
            returned.append(kept[:, :, : self._columns])
        return returned[0], returned[1]


class GraphedSteps:
    """Reads one token more of each of the B sequences of ``cache``, up to its last column, which stays the newest's.

    Every row goes on until all are done: what a row that has ended reads concerns no other.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._tokens = torch.zeros(len(cache.real), 1, dtype=torch.int64, device=cache.real.device)
        self._columns = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def read(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """The logits of what follows ``tokens``; they are overwritten by the next call."""
        cache = self._cache
        # The newest token's column must lie behind all places.
        if cache.length + 1 >= self._columns:
            self._record(max(2 * (cache.length + 1), FEWEST_COLUMNS))
        assert self._graph is not None
        self._tokens.copy_(tokens[:, None])
        self._graph.replay()
        cache.length += 1
        return self._logits

    def _record(self, columns: int) -> None:
        self._columns = min(columns, self._cache.capacity)
        self._steps = NewestLast(self._cache, self._columns)
        # What a warm-up writes, it writes to the place of the token that is read next.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step()
            self._steps.place += 1

    def _step(self) -> Float[Tensor, "B V"]:
        hidden, _ = self._model.hidden(self._tokens, None, self._steps)
        logits: Tensor = self._model.head(hidden[:, 0])
        return logits
