"""The blocks of a paged cache, counted: who holds which, which are free, and what free ones still hold.

A block is room for the keys and values of a few consecutive tokens (Kwon et al. 2023, section 4). Nothing here knows
of tensors: a block is a number.
"""

from collections import OrderedDict


class OutOfBlocksError(Exception):
    """More blocks are needed than are free."""


class BlockPool:
    """``n_blocks`` blocks, each with the number of its holders.

    A block that is full can be named after the text up to its end. It is found by that name as long as it holds it:
    once nobody holds the block, until it is taken for something else, which happens to those first that were let go
    first.
    """

    def __init__(self, n_blocks: int) -> None:
        self.holders = [0] * n_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(n_blocks))
        self._name: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def n_blocks(self) -> int:
        """Blocks, free or not."""
        return len(self.holders)

    @property
    def n_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    def take(self) -> int:
        """A block for one holder, whatever it held is forgotten; raises OutOfBlocksError where all are held."""
        if not self._free:
            raise OutOfBlocksError(f"all {self.n_blocks} blocks are held")
        block, _ = self._free.popitem(last=False)
        name = self._name.pop(block, None)
        if name is not None:
            del self._named[name]
        self.holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One holder more; the block may be free, if it was just found."""
        self._free.pop(block, None)
        self.holders[block] += 1

    def release(self, block: int) -> None:
        """One holder less; without any the block is free, and still found by its name. Raises ValueError if it was."""
        if self.holders[block] == 0:
            raise ValueError(f"block {block} is released, and nobody holds it")
        self.holders[block] -= 1
        if self.holders[block] == 0:
            self._free[block] = None
            if block not in self._name:
                self._free.move_to_end(block, last=False)  # what cannot be found is no loss

    def name(self, block: int, name: bytes) -> None:
        """Let a full block be found by ``name``, unless another is already."""
        if name not in self._named and block not in self._name:
            self._named[name], self._name[block] = block, name

    def find(self, name: bytes) -> int | None:
        """The block of that name, held or free."""
        return self._named.get(name)
