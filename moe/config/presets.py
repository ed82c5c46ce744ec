"""What the name of a published router stands for, as far as a configuration has to know."""

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Literal

from moe.config.checks import ConfigError, require, shown

Preset = Literal[
    "shazeer",
    "gshard",
    "switch",
    "st_moe",
    "base",
    "sinkhorn",
    "hash",
    "expert_choice",
    "mixtral",
    "deepseek_moe",
    "deepseek_v2",
    "deepseek_v3",
    "loss_free",
    "quantile",
    "olmoe",
    "qwen2",
    "qwen3",
    "llama4",
    "gpt_oss",
    "dbrx",
    "grin",
    "remoe",
    "moe_plus_plus",
    "longcat",
    "top_p",
    "dense_mixer",
    "cosine",
    "random",
    "dense",
]
Definition = Callable[[Preset], Mapping[str, tuple[object, str]]]
_definition: Definition | None = None


def learn_presets(definition: Definition) -> None:
    """Let configurations know what a preset's name stands for: dotted key below ``model.`` -> value and reason.

    :mod:`moe.presets` calls this when it is imported, because this file reads no YAML.
    """
    global _definition
    _definition = definition


def require_what_the_name_means(preset: Preset | None, section: Any, prefix: str) -> None:
    """Refuse a ``section`` of the model that bears the name of a preset without being one."""
    if preset is None:
        return
    if _definition is None:
        raise ConfigError("preset", f"is {preset}, but nothing has filled it in: use moe.presets.model_config")
    for key, (value, reason) in _definition(preset).items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            actual = attrgetter(name)(section)
            require(
                actual == value,
                name,
                f"is {shown(actual)}, but preset {preset} means {shown(value)}: {reason}; "
                "leave it out, or set the preset to null and every axis yourself",
            )
