"""Keys and values of the tokens read so far, so that decoding reads each token once.

What a layer stores of a token is its attention's own affair: grouped-query attention the keys and values of its key
heads, latent attention (:mod:`.latent_attention`) one rotated key and one latent vector.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe.config import ModelConfig


@runtime_checkable
class Cache(Protocol):
    """What attention needs of a cache, wherever that keeps its keys and values."""

    length: int
    """columns before those that the next tokens get"""

    def extend(self, n_tokens: int, real: Bool[Tensor, "B S"] | None = None) -> Bool[Tensor, "B L"] | None:
        """Make room for S = ``n_tokens`` more and return which of all L columns are real; None: all."""

    def store(
        self, layer: int, keys: Float[Tensor, "B H S k"], values: Float[Tensor, "B H S v"]
    ) -> tuple[Float[Tensor, "B H L k"], Float[Tensor, "B H L v"]]:
        """Write the newest S keys and values of a layer, and return those of all columns that it needs."""


class KVCache:
    """Room for ``capacity`` tokens of B sequences in every layer.

    Sequences of different lengths share one length here: shorter prompts are padded on the left, and ``real`` says
    which of the columns hold a token. As long as all of them do, nobody has to look at it.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        heads, key_width, value_width = config.attention.cached

        def room(heads: int, width: int) -> Tensor:
            return torch.zeros(config.n_layers, batch, heads, capacity, width, device=device, dtype=dtype)

        self.keys_and_values = room(2 * heads, key_width) if key_width == value_width else None
        """of each layer: all heads of keys, then all of values, so that a new token's can be written at once; None
        where they differ in width"""
        if self.keys_and_values is not None:
            self.keys, self.values = self.keys_and_values[:, :, :heads], self.keys_and_values[:, :, heads:]
        else:
            self.keys, self.values = room(heads, key_width), room(heads, value_width)
        self.real = torch.ones(batch, capacity, device=device, dtype=torch.bool)
        self.padded = False
        """whether some column so far may be padding"""
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens a sequence can hold."""
        return self.real.shape[1]

    def extend(self, n_tokens: int, real: Bool[Tensor, "B S"] | None = None) -> Bool[Tensor, "B L"] | None:
        """Make room for S = ``n_tokens`` more tokens and return which of all L columns so far are real; None: all.

        ``real`` is False for those of the new tokens that are padding; None where none is. Raises ValueError where the
        capacity is exceeded.
        """
        end = self.length + n_tokens
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, and {end} were wanted")
        if real is not None:
            self.padded = True
            self.real[:, self.length : end] = real
        self.length = end
        return self.real[:, :end] if self.padded else None

    def store(
        self, layer: int, keys: Float[Tensor, "B H S d"], values: Float[Tensor, "B H S d_v"]
    ) -> tuple[Float[Tensor, "B H L d"], Float[Tensor, "B H L d_v"]]:
        """Write the newest S keys and values of a layer (after :meth:`extend`) and return all L of them."""
        start = self.length - keys.shape[2]
        self.keys[layer, :, :, start : self.length] = keys
        self.values[layer, :, :, start : self.length] = values
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]
