"""What is timed: the shapes of layers and of models, and the arithmetic in them."""

from dataclasses import dataclass, replace

from moe.config import AttentionConfig, ExpertBackend, ExpertsConfig, ModelConfig, RouterConfig


@dataclass(frozen=True)
class Work:
    """What one repetition does."""

    tokens: int
    flops: int | None


@dataclass(frozen=True)
class LayerShape:
    """One mixture layer with SwiGLU experts, without its router."""

    tokens: int
    d_model: int
    d_ff: int
    n_experts: int
    top_k: int

    @property
    def assignments(self) -> int:
        """N = T · K."""
        return self.tokens * self.top_k

    @property
    def parameters(self) -> int:
        """Weights of all experts: three matrices each."""
        return 3 * self.n_experts * self.d_model * self.d_ff

    def flops(self, backward: bool = True) -> int:
        """Of the experts' matrix products: 2 · N · 3 · D · F forward, and twice that again backward."""
        return (3 if backward else 1) * 2 * self.assignments * 3 * self.d_model * self.d_ff


LAYERS = {
    "toy": LayerShape(16384, 1024, 4096, 16, 2),
    "gpt4s": LayerShape(32768, 2048, 8192, 16, 2),
    "mixtral": LayerShape(16384, 4096, 14336, 8, 2),
    "olmoe": LayerShape(32768, 2048, 1024, 64, 8),
    "qwen3": LayerShape(32768, 2048, 768, 128, 8),
    "tiny": LayerShape(4096, 128, 256, 16, 2),
    "small": LayerShape(4096, 256, 512, 16, 2),
    "wide": LayerShape(4096, 512, 1024, 16, 2),
    "mini": LayerShape(512, 32, 64, 4, 2),
}
"""the first five fill a large GPU, three are for a CPU, and with the last one sees that everything runs"""


@dataclass(frozen=True)
class ModelShape:
    """A whole transformer and the batch it trains on; every layer is a mixture, embedding and head are apart."""

    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    n_experts: int
    top_k: int
    vocabulary: int
    sequence: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch * self.sequence

    @property
    def flops_per_token(self) -> int:
        """Of forward and backward: 6 for each active weight that multiplies, and causal attention (half of S · S).

        The embedding is looked up and does not count; the head does. Equal for a mixture and its dense twin, but for
        the router.
        """
        layer = 4 * self.d_model**2 + 3 * self.top_k * self.d_model * self.d_ff
        attention = 6 * self.sequence * self.d_model
        return 6 * (self.n_layers * layer + self.d_model * self.vocabulary) + self.n_layers * attention

    def config(self, backend: ExpertBackend = "auto", *, dense_twin: bool = False) -> ModelConfig:
        """The same model in this codebase: Mixtral's router, RMSNorm, rotary positions, nothing tied."""
        return ModelConfig(
            vocab_size=self.vocabulary,
            n_layers=self.n_layers,
            d_model=self.d_model,
            max_seq=self.sequence,
            tie_embeddings=False,
            dense_twin=dense_twin,
            attention=AttentionConfig(n_heads=self.n_heads, head_dim=self.d_model // self.n_heads),
            experts=ExpertsConfig(n_experts=self.n_experts, d_ff=self.d_ff, backend=backend),
            router=RouterConfig(top_k=self.top_k),
        )

    def with_batch(self, batch: int) -> "ModelShape":
        """The same model on another number of sequences."""
        return replace(self, batch=batch)


MODELS = {
    "tiny": ModelShape(4, 128, 8, 256, 16, 2, vocabulary=512, sequence=128, batch=32),
    "small": ModelShape(6, 256, 8, 512, 16, 2, vocabulary=4096, sequence=256, batch=16),
    "mini": ModelShape(2, 32, 2, 64, 4, 2, vocabulary=64, sequence=64, batch=2),
    "1b": ModelShape(16, 2048, 16, 4096, 16, 2, vocabulary=32768, sequence=4096, batch=8),
}
"""two for a CPU, one to see that everything runs, and 6.85B parameters of which a token uses 1.21B"""
