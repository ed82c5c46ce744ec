"""What every check of a setting is made of: an error that names the key, and the conditions that many share."""

import json
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be used: ``key`` is its dotted name below the class that raised, ``reason`` says why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}" if key else reason)
        self.key = key
        self.reason = reason


def require(condition: bool, key: str, reason: str) -> None:
    """Raise :class:`ConfigError` for ``key`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(key, reason)


def at_least(section: Any, minimum: int | float, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        require(value is None or value >= minimum, key, f"is {value}, and must be at least {minimum:g}")


def in_unit_interval(section: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        require(0 <= value <= 1, key, f"is {value}, and must lie between 0 and 1")


def is_default(section: Any, key: str) -> bool:
    return bool(getattr(section, key) == type(section).__dataclass_fields__[key].default)


def shown(value: object) -> str:
    """``value`` as a configuration writes it: true, null, 0.5, top_k."""
    return value if isinstance(value, str) else json.dumps(value)
