"""Published routers by name: what each sets, what its name stands for, and the table of all of them.

The routers are in ``presets.yaml`` beside this file, which is made to be read. A configuration names one with
``model.router.preset`` (:mod:`moe.config_file` lays its values under or over the others); in Python
:func:`model_config` does the same.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from moe.config import ACTS_WITH, ConfigError, ModelConfig, Preset, learn_presets, shown

Section = TypeVar("Section")

KEY = "router.preset"
"""where a model's configuration names its preset"""


@dataclass(frozen=True)
class Entry:
    """One published router. Keys are dotted names below ``model.``."""

    source: str
    """the paper or the code that it is from"""
    formula: str
    """its rule in a line, in the notation that presets.yaml explains"""
    when: str
    """when to use it, in a sentence or two"""
    set: Mapping[str, Any]
    """the value of each setting that makes it"""
    defining: Mapping[str, str]
    """why its name would be a lie if one of these settings had another value"""


@cache
def presets() -> dict[str, Entry]:
    """Every preset by its name, in the order of presets.yaml."""
    written = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
    return {name: Entry(**entry) for name, entry in written.items()}


def definition(preset: Preset) -> dict[str, tuple[object, str]]:
    """The settings that ``preset`` stands for: their values, and why. Raises ConfigError for a name that is none."""
    entry = _entry(preset)
    return {key: (entry.set[key], reason) for key, reason in entry.defining.items()}


def _entry(preset: str) -> Entry:
    if preset not in presets():
        raise ConfigError("preset", f"is {preset}, which is none{_did_you_mean(preset, presets())}")
    return presets()[preset]


learn_presets(definition)


def explain(preset: str, key: str, reason: str, overridden: Collection[str]) -> str:
    """The ``reason`` for which a configuration with ``preset`` refuses ``key``, with what came from the preset named.

    ``overridden`` are the keys that have a value of their own beside the preset.
    """
    entry = presets()[preset]
    if key in entry.set and key not in overridden:
        by_definition = ", by definition" if key in entry.defining else ""
        remedy = f"; {preset} means {key} {shown(entry.set[key])}, so change the other or the preset"
        return f"(from preset {preset}{by_definition}) {reason}{remedy if key in entry.defining else ''}"
    credited = []
    for other, setting in entry.set.items():
        section, _, name = other.rpartition(".")
        value = re.escape(shown(setting))
        # A reason speaks of a setting by its last name ("selection is top_k", "top_k = 2", "noise shazeer"), or by its
        # section and name; of another section's it speaks by that section.
        spoken_of = re.search(rf"(?<![.\w])({section}\.)?{name} (is |= )?{value}(?!\w)", reason)
        if spoken_of and other not in overridden:
            credited.append(f"{name} {value}")
    return f"{reason} (from preset {preset}: {', '.join(credited)})" if credited else reason


def settings_under(preset: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What ``preset`` sets beside the values ``chosen``, which win.

    A setting that acts only with an axis that ``chosen`` has turned elsewhere is left out: with plain top_k on top of
    deepseek_v3 there are no groups to number.
    """
    kept = {}
    for key, value in presets()[preset].set.items():
        axis, values = ACTS_WITH.get(key.removeprefix("router."), ("", ()))
        if key not in chosen and (not axis or chosen.get(f"router.{axis}", values[0]) in values):
            kept[key] = value
    return kept


# ------------------------------------------------------------------------------------------------------- in a notebook


def model_config(preset: str, **settings: Any) -> ModelConfig:
    """A model with the router ``preset``, and ``settings`` beside it, which win over what the preset sets.

    Sections are dictionaries: ``model_config("deepseek_v3", d_model=64, experts={"n_experts": 8, "d_ff": 128})``.
    Raises ConfigError for a name that is none, and for settings that cannot be used, with this preset or at all.
    """
    _entry(preset)
    chosen, known = _by_dotted_key(settings), list(_keys())
    for key in chosen:
        if key not in known:
            raise ConfigError(key, f"is no setting of a model{_did_you_mean(key, known)}")
    try:
        return build(ModelConfig, {**settings_under(preset, chosen), **chosen, KEY: preset})
    except ConfigError as error:
        raise ConfigError(error.key, explain(preset, error.key, error.reason, chosen)) from None


def _by_dotted_key(settings: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = section + name
        if is_dataclass(value):
            # All its fields have a value, so that none of the preset's would be left.
            raise ConfigError(key, f"is given as {type(value).__name__}; give a dictionary of settings")
        found |= _by_dotted_key(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return found


def _keys(section: type = ModelConfig, prefix: str = "") -> Iterator[str]:
    """Every setting of a model, by its dotted key."""
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def build(section: type[Section], values: Mapping[str, Any], prefix: str = "") -> Section:
    """The dataclass ``section`` from the ``values`` whose dotted keys begin with ``prefix``.

    Raises ConfigError for values that cannot be used, with the whole dotted key.
    """
    arguments: dict[str, Any] = {}
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint) and isinstance(hint, type):
            arguments[name] = build(hint, values, f"{prefix}{name}.")
        elif prefix + name in values:
            arguments[name] = values[prefix + name]
    try:
        return section(**arguments)
    except ConfigError as error:
        raise ConfigError(prefix + error.key, error.reason) from None


def _did_you_mean(word: str, candidates: Collection[str]) -> str:
    guesses = get_close_matches(word, candidates, n=1)
    return f"; did you mean {guesses[0]}?" if guesses else ""


# ------------------------------------------------------------------------------------------------------------ the table


def table() -> str:
    """All presets as a Markdown table: source, formula, what they declare (training / evaluation), when to use them."""
    heads = ("preset", "source", "rule", "causal", "batch-independent", "when to use it")
    rows = [heads, ("---",) * len(heads)]
    for name, entry in presets().items():
        router = model_config(name).router
        causal, independent = (
            " / ".join("yes" if declared(training=training) else "**no**" for training in (True, False))
            for declared in (router.is_causal, router.is_batch_independent)
        )
        rows.append((f"`{name}`", entry.source, entry.formula, causal, independent, entry.when))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
