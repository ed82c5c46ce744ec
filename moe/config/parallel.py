"""How a run is spread over processes: the sizes of the layout, and the words that name one in short."""

import re
from dataclasses import dataclass, replace
from typing import Literal

from moe.config.checks import ConfigError, at_least, require

Shard = Literal["replicate", "full", "hybrid"]
PipelineSchedule = Literal["1f1b", "interleaved"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Processes = pipeline x data x tensor; the experts are spread within the data ranks, so they count once.

    Rank r is tensor rank r mod tensor, then data rank, then pipeline rank: those that talk most are neighbours.
    """

    data: int | None = None
    """ranks that share each batch; null: as many as pipeline and tensor leave"""
    shard: Shard = "replicate"
    """what data ranks keep: replicate (everything), full (a slice: FSDP), hybrid (a slice within groups of ranks)"""
    shard_group: int | None = None
    """data ranks that keep a slice each, for hybrid; groups of so many repeat the whole"""
    reshard: bool = True
    """with full or hybrid: drop a layer's gathered weights after its forward pass, and gather them again for the
    backward pass (less memory, half as much communication again)"""
    expert: int = 1
    """ranks that each keep a part of the experts, consecutive data ranks; must divide them"""
    tensor: int = 1
    """ranks that each keep a part of every matrix, and of the sequence between them"""
    pipeline: int = 1
    """ranks that each keep some of the blocks; a step's training.accumulation micro-batches pass through them"""
    schedule: PipelineSchedule = "1f1b"
    """order of a pipeline's passes: 1f1b, or interleaved (several stages a rank, a smaller bubble)"""
    stages: int = 1
    """stages a pipeline rank has, each of consecutive blocks; more than one with interleaved"""

    def __post_init__(self) -> None:
        at_least(self, 1, "data", "shard_group", "expert", "tensor", "pipeline", "stages")
        require(
            (self.shard == "hybrid") == (self.shard_group is not None),
            "shard_group",
            "is null, and hybrid needs the size of its groups"
            if self.shard == "hybrid"
            else f"is {self.shard_group}, but shard is {self.shard}, not hybrid",
        )
        require(
            self.reshard or self.shard != "replicate",
            "reshard",
            "is false, but shard is replicate: nothing is gathered",
        )
        require(self.schedule == "1f1b" or self.pipeline > 1, "schedule", f"is {self.schedule}, but pipeline is 1")
        require(
            (self.stages > 1) == (self.schedule == "interleaved"),
            "stages",
            f"is {self.stages}, and must be {'1 with 1f1b' if self.schedule == '1f1b' else 'above 1 with interleaved'}",
        )
        if self.data is not None:
            self._require_groups_that_fit(self.data)

    @property
    def is_single(self) -> bool:
        """Whether this asks for nothing but the ranks that there are, each with the whole model."""
        return (self.expert, self.tensor, self.pipeline, self.shard) == (1, 1, 1, "replicate")

    def over(self, processes: int) -> "ParallelConfig":
        """This layout with ``data`` filled in for so many processes; raises ConfigError where they do not divide."""
        others = self.pipeline * self.tensor
        names = f"pipeline {self.pipeline} x tensor {self.tensor}"
        if self.data is not None:
            require(
                self.data * others == processes,
                "data",
                f"is {self.data}, and {names} x data {self.data} is {self.data * others}, but there are {processes} "
                "processes; give torchrun as many (--nproc-per-node), or leave data null",
            )
            return self
        require(
            processes % others == 0,
            "tensor" if self.tensor > 1 else "pipeline",
            f"is {self.tensor if self.tensor > 1 else self.pipeline}: {names} is {others}, which does not divide the "
            f"{processes} processes",
        )
        return replace(self, data=processes // others)

    def _require_groups_that_fit(self, data: int) -> None:
        group = self.shard_group or 1
        require(
            data % self.expert == 0,
            "expert",
            f"is {self.expert}, and must divide the {data} data ranks",
        )
        require(data % group == 0, "shard_group", f"is {group}, and must divide the {data} data ranks")
        require(
            group % self.expert == 0 or self.expert % group == 0,
            "shard_group",
            f"is {group}, and must divide expert = {self.expert}, or be a multiple of it",
        )


# ---------------------------------------------------------------------------------------------------------------- words

_SIZES = {"tp": "tensor", "pp": "pipeline", "dp": "data", "ep": "expert", "vp": "stages"}
_WORD = re.compile(r"(?P<size>tp|pp|dp|ep|vp)(?P<n>[0-9]+)|(?P<shard>full|replicate)|hybrid(?P<group>[0-9]+)|keep")


def parse_layout(text: str, base: ParallelConfig | None = None) -> ParallelConfig:
    """The layout that words such as ``tp8,pp15,dp208,ep16`` name, over ``base``.

    ``tp``, ``pp``, ``dp``, ``ep``: sizes of tensor, pipeline, data, expert. ``vp2``: two stages a pipeline rank,
    interleaved. ``full``, ``replicate``, ``hybrid8``: what data ranks keep. ``keep``: gathered weights are not dropped
    after the forward pass. Raises ConfigError for other words, and for sizes that do not go together.
    """
    base = ParallelConfig() if base is None else base
    changes: dict[str, object] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = _WORD.fullmatch(word)
        if match is None:
            raise ConfigError(
                "",
                f"the layout {text} has the word {word!r}; known are tpN, ppN, dpN, epN, vpN, full, hybridN, "
                "replicate and keep, such as tp8,pp15,dp208,ep16",
            )
        if match["size"]:
            key, value = _SIZES[match["size"]], int(match["n"])
            changes[key] = value
            if key == "stages":
                changes["schedule"] = "interleaved" if value > 1 else "1f1b"
        elif match["shard"]:
            changes |= {"shard": match["shard"], "shard_group": None}
            if match["shard"] == "replicate":
                changes["reshard"] = True
        elif match["group"]:
            changes |= {"shard": "hybrid", "shard_group": int(match["group"])}
        else:
            changes["reshard"] = False
    return replace(base, **changes)  # type: ignore[arg-type]


def format_layout(parallel: ParallelConfig) -> str:
    """The words of a layout; :func:`parse_layout` takes them back. One process, which has none, is ``dp1``."""
    words = [
        f"{short}{size}" for short, name in _SIZES.items() if (size := getattr(parallel, name)) is not None and size > 1
    ]
    if parallel.shard != "replicate":
        words.append("full" if parallel.shard == "full" else f"hybrid{parallel.shard_group}")
    if not parallel.reshard:
        words.append("keep")
    return ",".join(words) or "dp1"
