"""Settings of the text and its batches."""

from dataclasses import dataclass

from moe.config.checks import at_least, require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, and how it becomes batches."""

    corpus: str = "corpora/default.yaml"
    """the file that lists the sources, relative to the configuration file, else to the working directory"""
    tokenizer: str = "bpe"
    """bpe (trained on the corpus), gpt2, cl100k, or the path of a tokenizer.json"""
    vocab_size: int = 4096
    """size of the vocabulary that bpe trains; other tokenizers have their own"""
    sequence_length: int = 256
    """tokens a training sequence predicts"""
    validation_bytes: int = 98_304
    """held-out text per domain, in bytes of whole documents; never more than a tenth of the domain"""
    validation_stride: int | None = None
    """tokens between validation windows, so that each token has at least the rest as context; null: half a window"""
    max_bytes: int | None = None
    """at most so much training text per domain, in bytes of whole documents; null: all"""
    cache: str = "~/.cache/moe-lab"
    """folder in which tokenized corpora are kept"""

    def __post_init__(self) -> None:
        at_least(self, 1, "sequence_length", "validation_bytes", "max_bytes")
        require(
            1 <= self.stride <= self.sequence_length,
            "validation_stride",
            f"is {self.stride}, and must be from 1 to sequence_length = {self.sequence_length}",
        )
        require(self.vocab_size >= 257, "vocab_size", f"is {self.vocab_size}; 256 bytes and an end of text need 257")

    @property
    def stride(self) -> int:
        """Tokens between validation windows, with the default resolved."""
        return max(1, self.sequence_length // 2) if self.validation_stride is None else self.validation_stride
