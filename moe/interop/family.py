"""A family: one architecture of another library, as a table of settings and a table of tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe import presets
from moe.config import ModelConfig
from moe.interop import links
from moe.interop.links import Link, Piece
from moe.interop.settings import Row, Theirs


@dataclass(frozen=True)
class Family:
    """An architecture that models of ours may be, and be made of."""

    name: str
    """what the library calls it"""
    settings: tuple[Row, ...]
    tensors: tuple[Link, ...]
    tied_copy: str | None = None
    """name of the head, which files may hold beside the embedding although the two are one; None: files need it"""
    derived: tuple[str, ...] = ()
    """names, with ``{layer}``, of tensors that follow from the settings, and that old files hold"""
    architecture: str = ""
    """the class in transformers"""

    def model_config(self, theirs: Theirs) -> ModelConfig:
        """Our model of their settings; raises ConfigError, with their key or ours, for what our model cannot be."""
        values: dict[str, Any] = {}
        for row in self.settings:
            values |= row.read(theirs)
        return presets.build(ModelConfig, values)

    def settings_of(self, config: ModelConfig) -> dict[str, Any]:
        """Their settings of a model of ours, true if :func:`~moe.interop.representation.obstacles` finds none."""
        written: dict[str, Any] = {}
        for row in self.settings:
            written |= row.write(config)
        return written

    def unread(self, theirs: Theirs, harmless: frozenset[str]) -> list[str]:
        """Their settings that no row looks at, but for those that are known to be ``harmless``."""
        read = {key for row in self.settings for key in row.keys}
        return sorted(theirs.keys() - read - harmless)

    def pieces(self, config: ModelConfig) -> list[Piece]:
        """Every tensor of theirs in a model of ``config``, and what it is of ours."""
        return links.pieces(self.tensors, config)

    def homeless(self, config: ModelConfig, ignored: tuple[str, ...] = ()) -> list[str]:
        """Why our tensors do not all find a place in theirs: one line each, but for names that end in ``ignored``."""
        names = [name for name in links.homeless(self.tensors, config) if not name.endswith(ignored)]
        return [f"{self.name} has no tensor for {names[0]}{_and_more(names)}"] if names else []

    def derived_names(self, n_layers: int) -> set[str]:
        """All of :attr:`derived`, for so many layers."""
        return {name.format(layer=layer) for name in self.derived for layer in range(n_layers)}


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


Families = Mapping[str, Family]
