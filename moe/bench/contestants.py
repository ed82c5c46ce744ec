"""Who takes part: each implementation under a name, the package it needs, and how it is built."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal, get_args

from moe.bench import layers, models, sonic
from moe.config import Checkpointing, ExpertBackend

Bench = Literal["layer", "step", "decode"]
Settings = Literal["users", "ours"]
"""of the process: as its users run it, or what train.py sets before it trains"""


@dataclass(frozen=True)
class Package:
    """An optional package: what is imported, what its distribution is called, and how to get it."""

    module: str
    distribution: str
    install: str = "pip install 'moe-lab[bench]'"

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return find_spec(self.module) is not None

    @property
    def version(self) -> str:
        """Its version, empty where it was not installed as a distribution."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return ""


TRANSFORMERS = Package("transformers", "transformers")
TORCHTITAN = Package(
    "torchtitan", "torchtitan", "pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3; pip install tyro"
)
SONIC = Package(
    "sonicmoe",
    "sonic-moe",
    "on Python 3.12: pip install --no-deps sonic-moe==0.1.2 quack-kernels==0.3.11; "
    "pip install nvidia-cutlass-dsl==4.4.2 apache-tvm-ffi torch-c-dlpack-ext",
)
LIGER = Package("liger_kernel", "liger-kernel")
MOE_OPS = Package("moe_ops", "moe-ops")
MIXTURE_OF_EXPERTS = Package("mixture_of_experts", "mixture-of-experts")
ST_MOE = Package("st_moe_pytorch", "st-moe-pytorch")


@dataclass(frozen=True)
class Contestant:
    """One implementation with its options."""

    name: str
    build: Callable[..., Any]
    """makes what the bench's task runs"""
    package: Package | None = None
    """what it needs beside this codebase"""
    ours: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    usual: tuple[str, ...] = ("cpu", "cuda")
    """the devices on which it takes part unless others are asked for by name"""
    drops: bool = False
    """whether it leaves out assignments, so that it does less"""
    dense_twin: bool = False
    low_precision: bool = False
    """whether it computes in bf16 where float32 is asked for"""
    bound: bool = False
    """whether it is what shares are taken of"""
    warm: Callable[[], AbstractContextManager[None]] | None = None
    """a context in which its kernels may be compiled while others compile, because nothing is tuned by timing"""


ON_ANY_DEVICE = ("grouped_mm", "batched_mm", "eager")
"""transformers' experts implementations that need nothing but torch"""
COMPILES: tuple[ExpertBackend, ...] = ("grouped", "fused")
"""our back-ends that torch.compile sees into"""
BACKENDS: tuple[ExpertBackend, ...] = tuple(backend for backend in get_args(ExpertBackend) if backend != "auto")


def layer_contestants() -> list[Contestant]:
    """Of one layer of experts."""
    transformers = [
        Contestant(
            f"transformers {implementation}{' compiled' * compiled}",
            partial(layers.transformers_experts, implementation=implementation, compiled=compiled),
            TRANSFORMERS,
            devices=("cpu", "cuda") if implementation in ON_ANY_DEVICE else ("cuda",),
            usual=("cpu", "cuda") if implementation in ("grouped_mm", "eager") and not compiled else (),
            warm=nullcontext if compiled else None,
        )
        for implementation in (*ON_ANY_DEVICE, "deepgemm", "sonicmoe")
        for compiled in (False, True)
        if implementation == "grouped_mm" or not compiled
    ]
    return [
        Contestant("dense", layers.DenseBound, bound=True),
        *(
            Contestant(
                f"ours {backend}{' compiled' * compiled}",
                partial(layers.ours, backend=backend, compiled=compiled),
                ours=True,
                usual=() if compiled else ("cpu", "cuda"),
                warm=nullcontext if compiled and backend == "grouped" else None,
            )
            for backend in BACKENDS
            for compiled in (False, True)
            if not compiled or backend in COMPILES
        ),
        Contestant("plain loop", layers.plain_loop),
        *transformers,
        Contestant("liger-kernel", layers.liger_experts, LIGER, devices=("cuda",)),
        Contestant("moe-ops", layers.moe_ops_experts, MOE_OPS, devices=("cuda",)),
        *(
            Contestant(
                f"torchtitan's layer{' compiled' * compiled}",
                partial(layers.torchtitan_experts, compiled=compiled),
                TORCHTITAN,
                low_precision=True,
                warm=nullcontext if compiled else None,
            )
            for compiled in (False, True)
        ),
        Contestant("mixture-of-experts", layers.mixture_of_experts, MIXTURE_OF_EXPERTS, devices=("cpu",), drops=True),
        Contestant("st-moe-pytorch", layers.st_moe, ST_MOE, devices=("cpu",), drops=True),
        Contestant("sonic-moe", sonic.sonic_experts, SONIC, devices=("cuda",), warm=sonic.untuned),
    ]


OURS_IN_A_STEP: dict[bool, dict[ExpertBackend, tuple[str, ...]]] = {
    False: {"reference": ("cpu",), "grouped": ("cpu",), "segments": ("cpu",), "fused": ("cpu", "cuda")},
    True: {"segments": ("cpu",), "grouped": ("cuda",), "fused": ("cuda",)},
}
"""whether compiled -> our back-ends, and where they take part in a whole step without being asked for"""
PLAIN = ("eager", "sdpa", False)
"""transformers' Mixtral with its loop over experts"""


def step_contestants() -> list[Contestant]:
    """Of the whole training step."""
    mixtral = [
        Contestant(
            f"mixtral {experts}{' compiled' * compiled}{' attn-eager' * (attention == 'eager')}",
            partial(models.mixtral, experts=experts, attention=attention, compiled=compiled),
            TRANSFORMERS,
            devices=("cpu", "cuda") if attention == "sdpa" else ("cpu",),
            usual=("cpu", "cuda") if experts == "grouped_mm" or (experts, attention, compiled) == PLAIN else (),
        )
        for experts in ON_ANY_DEVICE
        for compiled in (False, True)
        for attention in ("sdpa", "eager")
        if not (experts == "batched_mm" and (compiled or attention == "eager"))
    ]
    return [
        Contestant("dense twin", partial(models.ours, dense_twin=True), ours=True, dense_twin=True, usual=()),
        Contestant(
            "dense twin compiled",
            partial(models.ours, dense_twin=True, compiled=True),
            ours=True,
            dense_twin=True,
            bound=True,
        ),
        Contestant("llama", models.llama, TRANSFORMERS, dense_twin=True, usual=()),
        Contestant(
            "llama compiled", partial(models.llama, compiled=True), TRANSFORMERS, dense_twin=True, usual=("cuda",)
        ),
        *(
            Contestant(
                f"ours {backend}{' compiled' * compiled}",
                partial(models.ours, backend=backend, compiled=compiled),
                ours=True,
                usual=OURS_IN_A_STEP[compiled].get(backend, ()),
            )
            for backend in BACKENDS
            for compiled in (False, True)
        ),
        *(
            Contestant(
                f"ours fused compiled {part}-recomputed",
                partial(models.ours, backend="fused", compiled=True, checkpointing=part),
                ours=True,
                devices=("cuda",),
                usual=(),
            )
            for part in get_args(Checkpointing)
            if part != "none"
        ),
        *mixtral,
        Contestant(
            "torchtitan's layer",
            partial(models.grafted, layer=models.torchtitan_layer, feed_forward=models.TORCHTITAN_NAMES),
            TORCHTITAN,
            usual=("cpu",),
            low_precision=True,
        ),
        Contestant(
            "mixture-of-experts",
            partial(models.grafted, layer=models.mixture_of_experts_layer),
            MIXTURE_OF_EXPERTS,
            usual=("cpu",),
            drops=True,
        ),
        Contestant(
            "st-moe-pytorch",
            partial(models.grafted, layer=models.st_moe_layer),
            ST_MOE,
            usual=("cpu",),
            drops=True,
        ),
    ]


def decode_contestants() -> list[Contestant]:
    """Of greedy decoding."""
    return [
        Contestant("ours", models.ours, ours=True),
        *(Contestant(f"ours {backend}", partial(models.ours, backend=backend), ours=True) for backend in BACKENDS),
        *(
            Contestant(
                f"mixtral {experts}{' attn-eager' * (attention == 'eager')}",
                partial(models.mixtral, experts=experts, attention=attention, decoding=True),
                TRANSFORMERS,
            )
            for experts in ON_ANY_DEVICE
            for attention in ("sdpa", "eager")
        ),
    ]


def contestants(bench: Bench) -> Sequence[Contestant]:
    """All of one bench, installed or not."""
    return {"layer": layer_contestants, "step": step_contestants, "decode": decode_contestants}[bench]()


@dataclass(frozen=True)
class Entry:
    """A contestant with the settings of its process: one row of the table."""

    contestant: Contestant
    settings: Settings

    @property
    def name(self) -> str:
        """As in the table; a peer under our settings says so."""
        is_foreign = self.settings == "ours" and not self.contestant.ours
        return self.contestant.name + (" + our settings" if is_foreign else "")


def entries(bench: Bench, device: str, settings: Sequence[Settings]) -> list[Entry]:
    """Everyone on ``device``, usual or not: ours with the settings of train.py, peers with each of ``settings``.

    Process-wide settings change nothing on CUDA, so there everyone has those of its users.
    """
    of_peers: Sequence[Settings] = settings if device == "cpu" else ("users",)
    return [
        Entry(contestant, how)
        for contestant in contestants(bench)
        if device in contestant.devices
        for how in (("ours",) if contestant.ours else of_peers)
    ]
