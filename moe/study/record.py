"""A routing record: what every token was, where it went in every mixture layer, and what it cost.

A row is a token as the model read it; its loss and prediction are about the token after it. In memory a record is
columns of numpy; on disk it is a folder of Parquet files (:mod:`.storage`).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

EMPTY = -1
"""in ``selected``: a place that holds no assignment (their number varies, or an expert was knocked out)"""


@dataclass(frozen=True)
class Layer:
    """Where N tokens went in one mixture layer, in K places each."""

    block: int
    """number of the block, from 0"""
    n_experts: int
    """E, special experts included"""
    selected: Ints
    """[N, K] chosen experts, best first; EMPTY for an empty place"""
    weights: Floats
    """[N, K] what multiplied each expert's output; 0 for empty places and dropped assignments"""
    dropped: Bools
    """[N, K] True for assignments beyond an expert's capacity"""
    scores: npt.NDArray[np.float16] | None = None
    """[N, E] score of every expert; None where they were not recorded"""

    @property
    def top_k(self) -> int:
        """K, the places of a token."""
        return int(self.selected.shape[1])

    @property
    def assigned(self) -> Bools:
        """[N, K] which places hold an assignment, dropped or not."""
        assigned: Bools = self.selected != EMPTY
        return assigned


@dataclass(frozen=True)
class Record:
    """N tokens, in the order in which they were read, and their routing in L mixture layers."""

    token_id: Ints
    """[N]"""
    target_id: Ints
    """[N] the token that came after"""
    predicted_id: Ints
    """[N] the token that the model thought most likely to come after"""
    loss: Floats
    """[N] cross-entropy of the target, in nats"""
    position: Ints
    """[N] place in the sequence, from 0"""
    sequence: Ints
    """[N] number of the sequence, from 0; the rows of a sequence lie together, in order"""
    domain: Ints
    """[N] index into ``domains``"""
    domains: tuple[str, ...]
    layers: tuple[Layer, ...]
    vocabulary: tuple[str, ...] | None = None
    """text of each id, for people: not every id is valid UTF-8 by itself; None: unknown"""
    source: str = ""
    """the run or model that it is of"""
    step: int | None = None
    """optimizer steps that the model had been trained for; None: unknown"""

    def __post_init__(self) -> None:
        n = len(self.token_id)
        columns = {
            name: getattr(self, name)
            for name in ("target_id", "predicted_id", "loss", "position", "sequence", "domain")
        }
        columns |= {f"selected of block {layer.block}": layer.selected for layer in self.layers}
        columns |= {f"weights of block {layer.block}": layer.weights for layer in self.layers}
        for name, column in columns.items():
            if len(column) != n:
                raise ValueError(f"{name} has {len(column)} rows, and token_id {n}")

    @property
    def n_tokens(self) -> int:
        """N."""
        return len(self.token_id)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The numbers of the mixture blocks, as labels of an axis."""
        return tuple(str(layer.block) for layer in self.layers)

    def text_of(self, token_id: int) -> str:
        """A token's text, or its id in brackets where the vocabulary is unknown."""
        return f"<{token_id}>" if self.vocabulary is None else self.vocabulary[token_id]
