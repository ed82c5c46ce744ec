"""What it takes to generate text: memory for keys and values, and the two bounds on speed."""

from dataclasses import dataclass

from moe.config import ModelConfig
from moe.planner.devices import Device
from moe.planner.flops import count_flops


def kv_bytes_per_token(model: ModelConfig, dtype: float = 2) -> float:
    """Bytes of keys and values, or of the latent vector and its key, that a cache holds of one token in all layers."""
    heads, key, value = model.attention.cached
    return model.n_layers * heads * (key + value) * dtype


def kv_bytes_of_sequence(model: ModelConfig, length: int, dtype: float = 2) -> float:
    """The same of a sequence of ``length`` tokens; a layer with a window keeps no more than that."""
    heads, key, value = model.attention.cached
    windows = [model.attention.window_of(layer) for layer in range(model.n_layers)]
    return sum(min(length, window or length) for window in windows) * heads * (key + value) * dtype


def distinct_experts(n_experts: int, top_k: int, tokens: float) -> float:
    """Experts of a layer that ``tokens`` tokens hit, if each chooses as by chance: E (1 - (1 - k / E)^b)."""
    missed: float = (1 - top_k / n_experts) ** tokens
    return n_experts * (1 - missed)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A model spread over ``tensor`` x ``pipeline`` devices."""

    model: ModelConfig
    device: Device
    tensor: int = 1
    pipeline: int = 1
    weight_bytes: float = 2
    """of a weight: 2 for bfloat16, 1 for int8 and fp8"""
    cache_bytes: float = 2
    """of a number in the cache"""
    usable: float = 0.9
    """share of a device's memory to be filled"""
    share_batch: bool = False
    """whether tensor ranks share out the sequences of a cache whose heads they cannot share out (Pope et al. 2022,
    section 3.3); else each holds what its heads need, and a single key head is on all"""

    @property
    def devices(self) -> int:
        """How many it takes."""
        return self.tensor * self.pipeline

    @property
    def weights(self) -> float:
        """Bytes of weights on each device, in the mean."""
        return self.model.num_params() * self.weight_bytes / self.devices

    @property
    def free(self) -> float:
        """Bytes that are left for the cache on each device; negative where the model does not fit."""
        return self.usable * self.device.memory - self.weights

    def cache_of(self, length: int) -> float:
        """Bytes that a sequence of ``length`` tokens takes on each device that holds a part of it."""
        heads = self.tensor if self.share_batch else min(self.tensor, self.model.attention.cached[0])
        return kv_bytes_of_sequence(self.model, length, self.cache_bytes) / self.pipeline / heads

    def concurrent(self, length: int) -> int:
        """Sequences of ``length`` tokens that fit at once."""
        return max(0, int(self.free // self.cache_of(length)))

    def context_at(self, sequences: int) -> int:
        """Tokens that each of ``sequences`` can have in the mean."""
        return max(0, int(self.free * self._spread / sequences / kv_bytes_per_token(self.model, self.cache_bytes)))

    def bytes_read(self, batch: float, length: int = 0) -> float:
        """Bytes that one decoding step of ``batch`` sequences reads, on all devices: the weights that their tokens
        use, each once, and the cache of ``length`` tokens each."""
        parts, model = self.model.parameters(), self.model
        always = parts.active("without_embedding") - (parts.experts - parts.idle_experts)
        hit = distinct_experts(model.experts.n_experts, model.mlps_per_token, batch) if model.moe_layers else 0.0
        weights = always + hit * len(model.moe_layers) * parts.per_expert
        cache = batch * kv_bytes_of_sequence(model, length, self.cache_bytes) if length else 0.0
        return weights * self.weight_bytes + cache

    def tokens_per_user(self, batch: float, length: int = 0) -> float:
        """Tokens a second of each of the ``batch`` sequences of a micro-batch, by bandwidth: a token passes the stages
        one after the other, and each stage reads its weights with ``tensor`` devices."""
        return self.tensor * self.device.bandwidth / self.bytes_read(batch, length)

    def tokens_by_compute(self, efficiency: float = 1.0) -> float:
        """Tokens a second of the whole server, by arithmetic, scores not counted."""
        return self.devices * self.device.flops * efficiency / count_flops(self.model).forward("products")

    def tokens_by_bandwidth(self, batch: float, length: int = 0) -> float:
        """Tokens a second of the whole server with a micro-batch of ``batch`` sequences in each stage, by bandwidth."""
        return batch * self.pipeline * self.tokens_per_user(batch, length)

    def crossover(self) -> float:
        """Sequences of a micro-batch from which on arithmetic takes longer than reading all weights."""
        everything = self.bytes_read(float("inf")) if self.model.moe_layers else self.bytes_read(1)
        seconds_a_token = count_flops(self.model).forward("products") / self.device.flops
        return everything / self.device.bandwidth / seconds_a_token

    @property
    def _spread(self) -> float:
        heads = self.tensor if self.share_batch else min(self.tensor, self.model.attention.cached[0])
        return self.pipeline * heads


def cost_per_thousand(devices: float, hourly: float, tokens_per_second: float) -> float:
    """Dollars for a thousand tokens."""
    return devices * hourly / 3600 / tokens_per_second * 1000


def tokens_at_cost(devices: float, hourly: float, dollars: float) -> float:
    """Tokens a second at which a thousand of them cost ``dollars``."""
    return devices * hourly / 3600 / dollars * 1000
