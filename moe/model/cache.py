"""Keys and values of the tokens read so far, so that decoding reads each token once."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe.config import ModelConfig


class KVCache:
    """Room for ``capacity`` tokens of B sequences in every layer.

    Sequences of different lengths share one length here: shorter prompts are padded on the left, and ``real`` says
    which of the columns hold a token.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        shape = (config.n_layers, batch, config.attention.kv_heads, capacity, config.attention.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.real = torch.zeros(batch, capacity, device=device, dtype=torch.bool)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens a sequence can hold."""
        return self.real.shape[1]

    def extend(self, real: Bool[Tensor, "B S"]) -> Bool[Tensor, "B L"]:
        """Make room for S more tokens and return which of all L columns so far are real.

        Raises ValueError where the capacity is exceeded.
        """
        end = self.length + real.shape[1]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, and {end} were wanted")
        self.real[:, self.length : end] = real
        self.length = end
        return self.real[:, :end]

    def store(
        self, layer: int, keys: Float[Tensor, "B H S d"], values: Float[Tensor, "B H S d"]
    ) -> tuple[Float[Tensor, "B H L d"], Float[Tensor, "B H L d"]]:
        """Write the newest S keys and values of a layer (after :meth:`extend`) and return all L of them."""
        start = self.length - keys.shape[2]
        self.keys[layer, :, :, start : self.length] = keys
        self.values[layer, :, :, start : self.length] = values
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]
