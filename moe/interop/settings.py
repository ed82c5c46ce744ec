"""How one of their settings, or a few that belong together, says what settings of ours say: read and written.

A family's table of settings is a list of rows. A row reads what it knows of a ``config.json`` (or of the metadata of a
GGUF file) into our dotted keys below ``model.``, and writes the same of a configuration of ours. What it reads and our
model cannot be is refused by name, with ConfigError. What it writes need not be true: :mod:`.representation` reads it
back and compares.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

from moe.config import ModelConfig, require, shown
from moe.model.rope_scaling import original_context

Theirs = Mapping[str, Any]
Ours = Mapping[str, Any]
REQUIRED = object()
"""in place of a default: there is none"""


class Row(Protocol):
    """Settings of theirs that say what settings of ours say."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Their settings that the row looks at."""

    def read(self, theirs: Theirs) -> Ours:
        """What they say, by our dotted keys; raises ConfigError, with their key, for what our model cannot be."""

    def write(self, config: ModelConfig) -> Theirs:
        """What they say of a model of ours."""


def take(theirs: Theirs, key: str, default: Any = REQUIRED, *also: str) -> Any:
    """The value of ``key``, under that name or one of ``also``; ``default`` where it is absent or null.

    Raises ConfigError where it is absent without a default, or where two names have two values.
    """
    found = {name: theirs[name] for name in (key, *also) if theirs.get(name) is not None}
    if not found:
        require(default is not REQUIRED, key, "is not given")
        return default
    (name, value), *others = found.items()
    for other, contradiction in others:
        require(contradiction == value, other, f"is {shown(contradiction)}, but {name} is {shown(value)}")
    return value


def typed(key: str, value: Any, kind: type) -> Any:
    """``value``, an int as a float where one is wanted; raises ConfigError for another type, or no finite number."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    words = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
    right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    require(right and (kind is not float or math.isfinite(value)), key, f"is {value!r}, and must be {words}")
    return value


@dataclass(frozen=True)
class Key:
    """A setting of theirs that is one of ours under another name."""

    theirs: str
    ours: str
    kind: type = int
    default: Any = REQUIRED
    """what the absence of theirs means"""
    also: tuple[str, ...] = ()
    """other names that theirs goes by: one is enough to read, all are written"""
    resolved: str | None = None
    """where ours is found with its default resolved, if ours may be null"""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs, *self.also)

    def read(self, theirs: Theirs) -> Ours:
        value = take(theirs, self.theirs, self.default, *self.also)
        return {} if value is None else {self.ours: typed(self.theirs, value, self.kind)}

    def write(self, config: ModelConfig) -> Theirs:
        return dict.fromkeys(self.keys, attrgetter(self.resolved or self.ours)(config))


@dataclass(frozen=True)
class Only:
    """A setting of theirs of which our model knows one value."""

    theirs: str
    value: Any
    absent: Any = None
    """what its absence means"""
    reason: str = "which our model has not"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Theirs) -> Ours:
        value = theirs.get(self.theirs, self.absent)
        require(value == self.value, self.theirs, f"is {shown(value)}, {self.reason}")
        return {}

    def write(self, config: ModelConfig) -> Theirs:
        return {self.theirs: self.value}


@dataclass(frozen=True)
class Always:
    """A setting of ours that every model of the family has alike, so that theirs do not speak of it."""

    ours: Mapping[str, Any]
    keys: tuple[str, ...] = ()

    def read(self, theirs: Theirs) -> Ours:
        return self.ours

    def write(self, config: ModelConfig) -> Theirs:
        return {}


@dataclass(frozen=True)
class Choice:
    """A setting of theirs each of whose values is one of ours."""

    theirs: str
    ours: str
    values: Mapping[Any, Any]
    """by theirs"""
    default: Any = REQUIRED

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Theirs) -> Ours:
        value = take(theirs, self.theirs, self.default)
        known = ", ".join(map(shown, self.values))
        require(value in self.values, self.theirs, f"is {shown(value)}, and our model has what is called {known}")
        return {self.ours: self.values[value]}

    def write(self, config: ModelConfig) -> Theirs:
        ours = attrgetter(self.ours)(config)
        # Another value than those has no name there; the first that there is reads back as what it is.
        named = [name for name, value in self.values.items() if value == ours]
        return {self.theirs: (named or list(self.values))[0]}


_LONGER = {"factor": ("factor", float), "original_max_position_embeddings": ("original_max_seq", int)}
SCALINGS: Mapping[str, Mapping[str, tuple[str, type]]] = {
    "linear": {"factor": ("factor", float)},
    "llama3": {
        **_LONGER,
        "low_freq_factor": ("low_freq_factor", float),
        "high_freq_factor": ("high_freq_factor", float),
    },
    "yarn": {
        **_LONGER,
        "beta_fast": ("beta_fast", float),
        "beta_slow": ("beta_slow", float),
        "attention_factor": ("attention_factor", float),
        "truncate": ("truncate", bool),
    },
}
"""scalings of the rotary frequencies that both have: their names of the settings, and ours below ``attention.rope``"""


@dataclass(frozen=True)
class Rotary:
    """The rotary frequencies: ``rope_theta``, ``rope_scaling`` up to transformers 4, ``rope_parameters`` from 5 on."""

    default_theta: float
    default_partial: float = 1.0
    """share of a head that is rotated where nothing says so"""
    scales_softmax: bool = False
    """whether ``mscale_all_dim`` acts on the softmax as well (DeepSeek)"""
    keys: tuple[str, ...] = ("rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor")

    def read(self, theirs: Theirs) -> Ours:
        name = "rope_parameters" if theirs.get("rope_parameters") else "rope_scaling"
        parameters = theirs.get(name) or {}
        require(isinstance(parameters, Mapping), name, f"is {parameters!r}, and must be a section")
        require(
            not any(isinstance(value, Mapping) for value in parameters.values()),
            name,
            "differs between kinds of layers, and in our model all are alike",
        )
        partial = take(parameters, "partial_rotary_factor", take(theirs, "partial_rotary_factor", self.default_partial))
        theta = take(parameters, "rope_theta", take(theirs, "rope_theta", self.default_theta))
        return {
            "attention.rope_theta": typed("rope_theta", theta, float),
            **({} if partial == 1 else {"attention.rope.fraction": typed("partial_rotary_factor", partial, float)}),
            **self._scaling(name, parameters),
        }

    def _scaling(self, name: str, parameters: Theirs) -> Ours:
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind == "default":
            return {}
        require(kind in SCALINGS, f"{name}.rope_type", f"is {kind}, a scaling that our model has not")
        found = {"attention.rope.scaling": kind}
        for key in SCALINGS[kind].keys() & _LONGER.keys():
            require(parameters.get(key) is not None, f"{name}.{key}", f"is not given, and {kind} needs it")
        for theirs, (ours, cast) in SCALINGS[kind].items():
            if parameters.get(theirs) is not None:
                found[f"attention.rope.{ours}"] = typed(f"{name}.{theirs}", parameters[theirs], cast)
        mscale, whole = parameters.get("mscale"), parameters.get("mscale_all_dim")
        require(
            (not mscale and not whole) or (bool(mscale and whole) and self.scales_softmax),
            f"{name}.mscale",
            f"is {shown(mscale)} and mscale_all_dim {shown(whole)}, which together our model has in latent attention",
        )
        if mscale and whole:
            found |= {"attention.rope.mscale": float(mscale), "attention.rope.mscale_all_dim": float(whole)}
        return found

    def write(self, config: ModelConfig) -> Theirs:
        theta, rope = config.attention.rope_theta, config.attention.rope
        # Where ours says nothing of a fraction, neither do theirs, unless its absence would mean another one.
        partial = {} if self.default_partial == rope.fraction else {"partial_rotary_factor": rope.fraction}
        if rope.scaling not in SCALINGS:
            scaling: dict[str, Any] = {"rope_type": "default" if rope.scaling == "none" else rope.scaling}
        else:
            known = {theirs: getattr(rope, ours) for theirs, (ours, _) in SCALINGS[rope.scaling].items()}
            known |= {key: getattr(rope, key) for key in ("mscale", "mscale_all_dim")}
            scaling = {"rope_type": rope.scaling} | {key: value for key, value in known.items() if value is not None}
            if "original_max_position_embeddings" in SCALINGS[rope.scaling]:
                scaling["original_max_position_embeddings"] = int(original_context(config))
        legacy = {} if rope.scaling == "none" else {"rope_scaling": scaling | {"type": scaling["rope_type"]}}
        return {
            "rope_theta": theta,
            "rope_parameters": {**scaling, "rope_theta": theta, **partial},
            **legacy,
            **partial,
        }


@dataclass(frozen=True)
class HeadWidth:
    """The width of a head; where it is absent, ``default``, or by default that of the model over its query heads."""

    default: int | None = None
    written: bool = True
    """whether every version of the family reads it; else it must be what its absence means"""
    theirs: str = "head_dim"
    width: str = "hidden_size"
    heads: str = "num_attention_heads"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Theirs) -> Ours:
        width, heads = (typed(key, take(theirs, key), int) for key in (self.width, self.heads))
        given = theirs.get(self.theirs)
        if given is None and self.default is None:
            divides = heads > 0 and width % heads == 0
            require(divides, self.heads, f"is {heads}, which does not divide {self.width} = {width}")
        usual = width // heads if self.default is None else self.default
        head_dim = typed(self.theirs, usual if given is None else given, int)
        require(
            self.written or head_dim == usual,
            self.theirs,
            f"is {head_dim}, and must be {self.width} over {self.heads}, {usual}, in this family",
        )
        return {"attention.head_dim": head_dim}

    def write(self, config: ModelConfig) -> Theirs:
        return {self.theirs: config.attention.head_dim} if self.written else {}


@dataclass(frozen=True)
class DenseModel:
    """A model without mixtures, which ours is as a dense twin: one expert's width is that of every layer."""

    theirs: str = "intermediate_size"
    four_times: str | None = None
    """the setting of theirs whose fourfold is meant where that is null"""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Theirs) -> Ours:
        if self.four_times is not None and theirs.get(self.theirs) is None:
            width = 4 * int(typed(self.four_times, take(theirs, self.four_times), int))
        else:
            width = typed(self.theirs, take(theirs, self.theirs), int)
        return {
            "dense_twin": True,
            "experts.n_experts": 1,
            "experts.d_ff": width,
            "router.top_k": 1,
            "router.normalise": False,
            "balance.load_balance": 0.0,
        }

    def write(self, config: ModelConfig) -> Theirs:
        return {self.theirs: config.dense_width(0)}


@dataclass(frozen=True)
class SparseSteps:
    """Which layers are mixtures, and how wide the others are, in Qwen's words: every n-th, without some by number."""

    keys: tuple[str, ...] = ("decoder_sparse_step", "mlp_only_layers", "intermediate_size")

    def read(self, theirs: Theirs) -> Ours:
        layers = typed("num_hidden_layers", take(theirs, "num_hidden_layers"), int)
        step = typed("decoder_sparse_step", take(theirs, "decoder_sparse_step", 1), int)
        require(step > 0, "decoder_sparse_step", f"is {step}, and must be at least 1")
        dense = take(theirs, "mlp_only_layers", [])
        require(isinstance(dense, list), "mlp_only_layers", f"is {dense!r}, and must be a list of layers")
        mixtures = [layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0]
        require(
            bool(mixtures),
            "decoder_sparse_step" if not dense else "mlp_only_layers",
            "leaves no layer a mixture; the family without mixtures is another one",
        )
        first = 0 if mixtures[0] == step - 1 else mixtures[0]
        require(
            mixtures == [layer for layer in range(first, layers) if (layer + 1) % step == 0],
            "mlp_only_layers",
            f"is {dense}, and our model has dense layers at the start, or between every n-th",
        )
        return {
            "experts.every": step,
            "experts.first_dense": first,
            **_dense_width(theirs, layers - len(mixtures)),
        }

    def write(self, config: ModelConfig) -> Theirs:
        return {
            "decoder_sparse_step": config.experts.every,
            "mlp_only_layers": list(range(config.experts.first_dense)),
            "intermediate_size": _width_of_dense(config),
        }


@dataclass(frozen=True)
class LeadingDense:
    """The number of layers at the start that are no mixtures, and how wide they are."""

    theirs: str = "first_k_dense_replace"
    layers: str = "num_hidden_layers"
    width: str = "intermediate_size"
    default: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs, self.width)

    def read(self, theirs: Theirs) -> Ours:
        first = typed(self.theirs, take(theirs, self.theirs, self.default), int)
        return {"experts.first_dense": first, **_dense_width(theirs, first, self.width)}

    def write(self, config: ModelConfig) -> Theirs:
        return {self.theirs: config.experts.first_dense, self.width: _width_of_dense(config)}


def _dense_width(theirs: Theirs, dense_layers: int, key: str = "intermediate_size") -> Ours:
    return {"feed_forward.d_ff": typed(key, take(theirs, key), int)} if dense_layers else {}


def _width_of_dense(config: ModelConfig) -> int:
    """The width of the first layer that is dense, or what one would have."""
    dense = [layer for layer in range(config.n_layers) if layer not in config.moe_layers]
    return config.dense_width(dense[0]) if dense else config.active_width


@dataclass(frozen=True)
class Groups:
    """Groups of experts: one is none."""

    groups: str = "n_group"
    used: str = "topk_group"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.groups, self.used)

    def read(self, theirs: Theirs) -> Ours:
        groups = typed(self.groups, take(theirs, self.groups, 1), int)
        if groups == 1:
            return {"router.selection": "top_k"}
        return {
            "router.selection": "group_limited",
            "router.n_groups": groups,
            "router.top_groups": typed(self.used, take(theirs, self.used), int),
            "router.group_score": "top_two",
        }

    def write(self, config: ModelConfig) -> Theirs:
        router = config.router
        return {self.groups: router.n_groups or 1, self.used: router.top_groups or 1}


@dataclass(frozen=True)
class SharedWidth:
    """The width of all shared experts together; 0: there is none."""

    theirs: str = "shared_expert_intermediate_size"
    gated: bool = True

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Theirs) -> Ours:
        width = typed(self.theirs, take(theirs, self.theirs), int)
        return {"shared.n_experts": 1, "shared.d_ff": width, "shared.gated": self.gated} if width else {}

    def write(self, config: ModelConfig) -> Theirs:
        return {self.theirs: config.shared_width}


@dataclass(frozen=True)
class SharedCount:
    """The number of shared experts, each as wide as a routed one; 0: there is none."""

    theirs: str = "n_shared_experts"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Theirs) -> Ours:
        return {"shared.n_experts": typed(self.theirs, take(theirs, self.theirs), int)}

    def write(self, config: ModelConfig) -> Theirs:
        return {self.theirs: config.shared_width // config.experts.d_ff}


@dataclass(frozen=True)
class Windows:
    """A window of the text that layers see: all of them, or of every n the first n - 1, as ``layer_types`` says."""

    alternate: bool = False
    """whether a list of ``layer_types`` is written, and its absence means every second layer"""

    @property
    def keys(self) -> tuple[str, ...]:
        return ("sliding_window", "layer_types") if self.alternate else ("sliding_window",)

    def read(self, theirs: Theirs) -> Ours:
        window = take(theirs, "sliding_window") if self.alternate else theirs.get("sliding_window")
        if window is None:
            return {}
        found = {"attention.window": typed("sliding_window", window, int)}
        if not self.alternate:
            return found
        layers = typed("num_hidden_layers", take(theirs, "num_hidden_layers"), int)
        kinds = take(theirs, "layer_types", self._kinds(layers, 2))
        whole = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        every = whole[0] + 1 if whole else None
        require(
            kinds == self._kinds(layers, every),
            "layer_types",
            f"is {kinds}, and in our model every n-th layer has full attention, the others a window",
        )
        return found if every is None else found | {"attention.full_every": every}

    def write(self, config: ModelConfig) -> Theirs:
        attention = config.attention
        if not self.alternate:
            return {"sliding_window": attention.window}
        kinds = self._kinds(config.n_layers, attention.full_every if attention.window is not None else 1)
        # A window that no layer has must be a number all the same.
        return {"sliding_window": attention.window or config.max_seq, "layer_types": kinds}

    @staticmethod
    def _kinds(layers: int, every: int | None) -> list[str]:
        whole = [every is not None and (layer + 1) % every == 0 for layer in range(layers)]
        return ["full_attention" if full else "sliding_attention" for full in whole]


@dataclass(frozen=True)
class FullAttention:
    """What makes some layers see a window of the text instead of all of it: refused where it takes effect."""

    keys: tuple[str, ...] = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def read(self, theirs: Theirs) -> Ours:
        require(
            not theirs.get("use_sliding_window", False), "use_sliding_window", "is true, and our model has no windows"
        )
        kinds = sorted(set(theirs.get("layer_types") or ["full_attention"]) - {"full_attention"})
        require(not kinds, "layer_types", f"has {', '.join(kinds)}, and our model has full attention alone")
        return {}

    def write(self, config: ModelConfig) -> Theirs:
        return {"use_sliding_window": False}
