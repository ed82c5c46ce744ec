"""Keys and values in blocks that sequences of any length share, so that memory is held by tokens that there are.

Each sequence has a table of blocks (Kwon et al. 2023, section 4.1). Sequences that begin alike share the blocks of
what they begin with, and one that writes into a block that another holds too gets a copy first. Layers with a sliding
window have blocks of their own, of which a sequence gives back those that it sees no more.

The model is handed :class:`Rows`, which answers as :class:`~moe.model.cache.KVCache` does: each row's keys and values
are gathered from its blocks and stand side by side, to the right, after the padding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.config import ModelConfig
from moe.inference.block_pool import BlockPool

RELEASED = -1
"""in a table, in place of a block that lies before the window"""


@dataclass(eq=False)
class Table:
    """Where the tokens of one sequence lie."""

    blocks: list[list[int]]
    """of each group of layers: the block of tokens 0 to n - 1, of n to 2 n - 1, ..."""
    length: int = 0
    """tokens written"""
    names: list[bytes] = field(default_factory=list)
    """of the full blocks, each after all text up to its end"""


class _Group:
    """Layers that see equally far, and the blocks that hold their keys and values."""

    def __init__(
        self, config: ModelConfig, layers: list[int], window: int | None, n_blocks: int, block_size: int
    ) -> None:
        self.window = window
        self.pool = BlockPool(n_blocks)
        self.place = {layer: place for place, layer in enumerate(layers)}
        heads, key_width, value_width = config.attention.cached
        self.shapes = [(len(layers), n_blocks * block_size, heads, width) for width in (key_width, value_width)]

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for shape in self.shapes)

    def first_seen(self, length: int) -> int:
        """The first token that the query after ``length`` tokens, or any later one, attends to."""
        return 0 if self.window is None else max(0, length - self.window + 1)


class PagedCache:
    """``n_blocks`` blocks of ``block_size`` tokens for the layers that see everything.

    Where layers have a sliding window, they get ``n_window_blocks`` blocks (by default as many).
    """

    def __init__(
        self,
        config: ModelConfig,
        n_blocks: int,
        block_size: int = 16,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        n_window_blocks: int | None = None,
    ) -> None:
        self.block_size = block_size
        self.device = device or torch.device("cpu")
        by_window: dict[int | None, list[int]] = {}
        for layer in range(config.n_layers):
            by_window.setdefault(config.attention.window_of(layer), []).append(layer)
        self.groups = [
            _Group(config, layers, window, n_blocks if window is None else n_window_blocks or n_blocks, self.block_size)
            for window, layers in by_window.items()
        ]
        self.group_of = {layer: group for group in self.groups for layer in group.place}
        for group in self.groups:
            group.allocate(self.device, dtype)

    @property
    def n_bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(tensor.nbytes for group in self.groups for tensor in (group.keys, group.values))

    # ---------------------------------------------------------------------------------------------------------- tables

    def open(self, tokens: Sequence[int] = (), *, share: bool = True) -> Table:
        """A table for a sequence that begins with ``tokens``; with ``share``, of as many of them as are held already.

        The last token is never among those: it has to be read, for what follows it.
        """
        table = Table([[] for _ in self.groups])
        if not share:
            return table
        names = self._names(tokens, len(tokens) - 1)
        for count in range(len(names), 0, -1):
            found = [self._held(group, names[:count]) for group in self.groups]
            if all(blocks is not None for blocks in found):
                table.blocks = [list(blocks) for blocks in found if blocks is not None]
                table.length, table.names = count * self.block_size, names[:count]
                self._share(table)
                break
        return table

    def fork(self, table: Table) -> Table:
        """Another sequence with the same text so far, in the same blocks."""
        copy = Table([list(blocks) for blocks in table.blocks], table.length, list(table.names))
        self._share(copy)
        return copy

    def close(self, table: Table) -> None:
        """Give back what the sequence holds. Its last blocks are taken for others before its first ones."""
        for group, blocks in zip(self.groups, table.blocks, strict=True):
            for block in reversed(blocks):
                if block != RELEASED:
                    group.pool.release(block)
        table.blocks, table.length, table.names = [[] for _ in self.groups], 0, []

    def cut(self, table: Table, length: int) -> None:
        """Forget the tokens from ``length`` on, which may not lie before what windows have given back."""
        kept = -(-length // self.block_size)
        for group, blocks in zip(self.groups, table.blocks, strict=True):
            for block in blocks[kept:]:
                group.pool.release(block)
            del blocks[kept:]
        table.length = length
        del table.names[length // self.block_size :]

    def settle(self, table: Table, tokens: Sequence[int]) -> None:
        """Say that the tokens written are these and stay: full blocks are named, and what no query sees is given back.

        ``tokens`` are all of the sequence, of which the first ``table.length`` are meant.
        """
        known = len(table.names)
        table.names += self._names(tokens, table.length, table.names)
        for group, blocks in zip(self.groups, table.blocks, strict=True):
            for number in range(known, len(table.names)):
                if blocks[number] != RELEASED:
                    group.pool.name(blocks[number], table.names[number])
            for number in range(group.first_seen(table.length) // self.block_size):
                if blocks[number] != RELEASED:
                    group.pool.release(blocks[number])
                    blocks[number] = RELEASED

    # ------------------------------------------------------------------------------------------------------------ room

    def blocks_for(self, table: Table, n_tokens: int) -> list[int]:
        """Blocks of each group that ``n_tokens`` more tokens would take, a copy of a shared one among them."""
        needs = []
        for group, blocks in zip(self.groups, table.blocks, strict=True):
            need = -(-(table.length + n_tokens) // self.block_size) - len(blocks)
            if n_tokens and table.length % self.block_size and group.pool.holders[blocks[-1]] > 1:
                need += 1
            needs.append(need)
        return needs

    def most_blocks(self, n_tokens: int, at_once: int) -> list[int]:
        """Blocks of each group that a sequence of ``n_tokens`` holds at most, read up to ``at_once`` tokens a step."""
        needs = []
        for group in self.groups:
            seen = n_tokens if group.window is None else min(n_tokens, group.window - 1 + at_once)
            part_blocks = 0 if seen == n_tokens else 1  # a window need not begin where a block does
            needs.append(-(-seen // self.block_size) + part_blocks)
        return needs

    def has_room(self, needs: Sequence[int]) -> bool:
        """Whether so many blocks of each group can be taken."""
        return all(need <= group.pool.n_free for need, group in zip(needs, self.groups, strict=True))

    def make_room(self, table: Table, n_tokens: int) -> None:
        """Take the blocks that ``n_tokens`` more tokens need. Raises OutOfBlocksError where there are too few."""
        for group, blocks in zip(self.groups, table.blocks, strict=True):
            if n_tokens and table.length % self.block_size and group.pool.holders[blocks[-1]] > 1:
                self._copy_last(group, blocks)
            while len(blocks) * self.block_size < table.length + n_tokens:
                blocks.append(group.pool.take())

    def rows(self, tables: Sequence[Table], counts: Sequence[int]) -> "Rows":
        """Make room for ``counts`` more tokens of each sequence, and return what the model reads and writes them with.

        Raises OutOfBlocksError where blocks do not suffice; then some of the room may have been made.
        """
        for table, count in zip(tables, counts, strict=True):
            self.make_room(table, count)
        rows = Rows(self, tables, counts)
        for table, count in zip(tables, counts, strict=True):
            table.length += count
        return rows

    def _copy_last(self, group: _Group, blocks: list[int]) -> None:
        shared, own = blocks[-1], group.pool.take()
        source, target = (slice(b * self.block_size, (b + 1) * self.block_size) for b in (shared, own))
        for tensor in (group.keys, group.values):
            tensor[:, target] = tensor[:, source]
        group.pool.release(shared)
        blocks[-1] = own

    def _share(self, table: Table) -> None:
        for group, blocks in zip(self.groups, table.blocks, strict=True):
            for block in blocks:
                if block != RELEASED:
                    group.pool.share(block)

    def _held(self, group: _Group, names: list[bytes]) -> list[int] | None:
        """The blocks of these names, as far as a query after them sees; None where one is missing."""
        first = group.first_seen(len(names) * self.block_size) // self.block_size
        found = [group.pool.find(name) for name in names[first:]]
        if any(block is None for block in found):
            return None
        return [RELEASED] * first + [block for block in found if block is not None]

    def _names(self, tokens: Sequence[int], length: int, known: Sequence[bytes] = ()) -> list[bytes]:
        """Names of the full blocks among the first ``length`` tokens that come after the ``known`` ones."""
        names = []
        name = known[-1] if known else b""
        edges = range(len(known) * self.block_size, max(length, 0) + 1, self.block_size)
        for start, end in pairwise(edges):
            text = ",".join(map(str, tokens[start:end]))
            name = hashlib.sha256(name + text.encode()).digest()
            names.append(name)
        return names


class Rows:
    """A few sequences of a cache, as the model reads them: B rows, each with its own number of new tokens.

    Row b has ``counts[b]`` new tokens at the right of the S columns that the model is given, and all its L tokens at
    the right of those that it attends to.
    """

    def __init__(self, cache: PagedCache, tables: Sequence[Table], counts: Sequence[int]) -> None:
        self._cache = cache
        before = [table.length for table in tables]
        totals = [old + new for old, new in zip(before, counts, strict=True)]
        self._n_new = max(counts)
        self._columns = max(totals)
        self.length = self._columns - self._n_new
        """columns before the new ones"""
        self._even = min(totals) == self._columns and min(counts) == self._n_new
        size, device = cache.block_size, cache.device
        # Column c of row b is its token c - (L - total); before the first there is padding.
        totals_of = torch.tensor(totals, device=device)[:, None]
        position = torch.arange(self._columns, device=device)[None] - (self._columns - totals_of)
        self._real = position >= 0
        block, within = position.clamp(min=0) // size, position.clamp(min=0) % size
        # The new tokens among the B·S that the model computes, as a list, which no device has to be asked for.
        new_rows = [
            row * self._n_new + column
            for row, count in enumerate(counts)
            for column in range(self._n_new - count, self._n_new)
        ]
        self._new = torch.tensor(new_rows, dtype=torch.int64, device=device)
        self._read: list[Int[Tensor, " B_times_L"]] = []
        self._write: list[Int[Tensor, " N"]] = []
        most = -(-self._columns // size)
        for number, group in enumerate(cache.groups):
            # What has been given back is not seen either; the last block stands for it, so that nobody reads another's.
            padded = [
                [block if block != RELEASED else table.blocks[number][-1] for block in table.blocks[number][:most]]
                for table in tables
            ]
            padded = [blocks + [blocks[-1]] * (most - len(blocks)) for blocks in padded]
            slots = torch.tensor(padded, device=device).gather(1, block) * size + within
            self._write.append(slots[:, self.length :].flatten()[self._new])
            seen = self._columns if group.window is None else min(self._columns, group.window - 1 + self._n_new)
            self._read.append(slots[:, self._columns - seen :].flatten())

    @property
    def mask(self) -> Bool[Tensor, "B S"] | None:
        """Which of the new columns hold a token of their row; None: all. What the model takes as its mask."""
        if len(self._new) == len(self._real) * self._n_new:
            return None
        mask = torch.zeros(len(self._real) * self._n_new, dtype=torch.bool, device=self._cache.device)
        mask[self._new] = True
        return mask.view(-1, self._n_new)

    def extend(self, n_tokens: int, real: Bool[Tensor, "B S"] | None = None) -> Bool[Tensor, "B L"] | None:
        """Which of all L columns hold a token; None: all. Room was made before."""
        if n_tokens != self._n_new:
            raise ValueError(f"room was made for {self._n_new} tokens a row, and {n_tokens} came")
        self.length = self._columns
        return None if self._even else self._real

    def store(
        self, layer: int, keys: Float[Tensor, "B H S k"], values: Float[Tensor, "B H S v"]
    ) -> tuple[Float[Tensor, "B H W k"], Float[Tensor, "B H W v"]]:
        """Write the new keys and values of a layer, and return all W = L of them, or the last that its window sees."""
        group = self._cache.group_of[layer]
        number, place = self._cache.groups.index(group), group.place[layer]
        returned = []
        for kept, new in ((group.keys[place], keys), (group.values[place], values)):
            rows = new.transpose(1, 2).flatten(0, 1)
            if len(rows) > len(self._new):
                rows = rows.index_select(0, self._new)
            kept.index_copy_(0, self._write[number], rows.to(kept.dtype))
            gathered = kept.index_select(0, self._read[number])
            returned.append(gathered.view(len(new), -1, *gathered.shape[1:]).transpose(1, 2))
        return returned[0], returned[1]
