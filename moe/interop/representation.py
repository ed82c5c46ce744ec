"""Which of a model's settings decide what it computes, and so what a family of another library must be able to say.

Nobody lists what a family cannot represent: the settings are translated there and back, and what comes back different
is named. A setting that the model gains later is refused everywhere until a table carries it.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moe.config import CapacityConfig, ConfigError, ModelConfig, shown
from moe.interop.family import Family
from moe.model.rope_scaling import original_context

ONLY_IN_TRAINING = (
    "max_seq",  # a bound on what is accepted; it changes no number
    "dropout",
    "init_std",
    "balance",
    "experts.backend",
    "router.preset",
    "router.jitter",
    "router.noise",
    "router.second_choice",
    "router.bias_rate",
    "router.gradient",
    # Whether there is one shows in the tensors, and one of zeros is none.
    "router.selection_bias",
)
"""settings, or whole sections, without effect on a model in evaluation"""

TENSORS_ONLY_IN_TRAINING = ("router.noise_weight",)
"""ends of names of tensors that a model in evaluation does not read"""


MIXTURES = "experts.every"
"""under this key :func:`decisive` has the layers that are mixtures"""


def decisive(config: ModelConfig) -> dict[str, Any]:
    """The settings by which ``config`` decides what a model computes in evaluation, by dotted key, defaults resolved.

    Two configurations of which this is equal compute the same from the same weights.
    """
    found = _dotted(asdict(config))
    if not config.router.capacity.in_evaluation:
        found |= _dotted(asdict(CapacityConfig()), "router.capacity.")
    found = {key: value for key, value in found.items() if not _begins(key, ONLY_IN_TRAINING)}
    found["attention.n_kv_heads"] = config.attention.kv_heads
    found["attention.output_bias"] = config.attention.has_output_bias
    found["attention.latent.value_dim"] = config.attention.value_dim
    if config.attention.rope.scaling in ("yarn", "llama3"):
        found["attention.rope.original_max_seq"] = original_context(config)
    if config.attention.window is None or all(config.attention.window_of(n) is None for n in range(config.n_layers)):
        found |= {"attention.window": None, "attention.full_every": None, "attention.first_full": 0}
    dense = [layer for layer in range(config.n_layers) if layer not in config.moe_layers]
    del found["experts.first_dense"], found["dense_twin"]
    found[MIXTURES] = config.moe_layers
    found["feed_forward.d_ff"] = tuple(sorted({config.dense_width(layer) for layer in dense}))
    del found["shared.n_experts"]
    found["shared.d_ff"] = config.shared_width
    if not config.moe_layers:
        found = {
            key: value
            for key, value in found.items()
            if key == MIXTURES or not _begins(key, ("experts", "shared", "special", "router"))
        }
    return found


def obstacles(config: ModelConfig, family: Family) -> list[str]:
    """Why ``family`` cannot represent a model of ``config``: one line a setting or tensor; empty where it can."""
    ours = decisive(config)
    try:
        theirs = decisive(family.model_config(family.settings_of(config)))
    except ConfigError as error:
        return [f"{error.key} {error.reason}, as {family.name} would read it"]
    return differences(ours, theirs, family.name) or family.homeless(config, TENSORS_ONLY_IN_TRAINING)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> list[str]:
    """Which of the decisive settings of ours differ from ``theirs``, those of the model that ``name`` can have."""
    found = [
        f"model.{key} is {_plain(value)}, and {name} has {_plain(theirs[key]) if key in theirs else 'no such thing'}"
        for key, value in ours.items()
        if key != MIXTURES and (key not in theirs or theirs[key] != value)
    ]
    if ours[MIXTURES] == theirs[MIXTURES]:
        return found
    where = f"the model has {_layers(ours[MIXTURES])}, and {name} {_layers(theirs[MIXTURES])}"
    # Between a mixture and a dense model everything differs, and which layers are dense decides how wide they are.
    both = ours[MIXTURES] and theirs[MIXTURES]
    return [where, *(line for line in found if both and not line.startswith("model.feed_forward.d_ff "))]


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _begins(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return " and ".join(map(str, value)) or "none"
    return shown(value)


def _layers(layers: list[int]) -> str:
    """mixtures in layers 0 to 3, 5."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][-1] == layer - 1:
            spans[-1] = [spans[-1][0], layer]
        else:
            spans.append([layer])
    named = ", ".join(" to ".join(map(str, dict.fromkeys(span))) for span in spans)
    return f"mixtures in layers {named}" if named else "no mixtures"
