"""How a product is cut into tiles: the candidates, and the choice among them by timing each once.

No choice changes a result: every candidate sums over the inner dimension in steps of the same length, in one order.
What is chosen is remembered for the process, and in a file where :func:`remember_in` names one (a run's folder), so
that a resumed run starts at once.
"""

import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

ROUNDS = 3
"""times that each candidate is timed; the fastest counts"""


class Product(NamedTuple):
    """What decides the choice of tiles: which product, of which sizes. The number of rows changes from step to step."""

    kind: str
    inner_width: int
    out_width: int
    n_experts: int
    dtype: torch.dtype

    def key(self, device: torch.device) -> str:
        """A name for a file."""
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{where} | {self.kind} | {self.n_experts} x {self.inner_width} -> {self.out_width} | {dtype}"


@dataclass(frozen=True)
class Tiles:
    """Sizes of a tile, and how a program goes through its tiles."""

    block_m: int
    """rows"""
    block_n: int
    """columns"""
    block_k: int
    """of the inner dimension, at a time"""
    warps: int
    stages: int
    """blocks of the inner dimension that are in flight"""
    group: int = 8
    """tiles of rows that are done before the next column"""
    flatten: bool = False
    """go on to load the next tile while this one is written: pays where the inner dimension is short"""

    specialised: bool = False
    """by warps with different tasks, the kernels of :mod:`.hopper`, whose sizes are these"""
    gather: bool = False
    """of a weight's gradient: gather rows on the way, not before"""

    def constants(self, block_n: int | None = None) -> dict[str, Any]:
        """The launch arguments; ``block_n`` where it is not that of the tile."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": block_n or self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP": self.group,
            "FLATTEN": self.flatten,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


_chosen: dict[str, Tiles] = {}
_file: Path | None = None
_writes = True


def choose_tiles(product: Product, device: torch.device, run: Callable[[Tiles], None]) -> Tiles:
    """The fastest of the candidates for ``product``, by running each; ``run`` may be called several times.

    While a CUDA graph is recorded nothing can be timed: then the first candidate is taken, for this time.
    Raises RuntimeError where no candidate fits the device.
    """
    tried = candidates(product, device)
    if device.type != "cuda":
        return tried[0]
    key = product.key(device)
    if _chosen.get(key) in tried:  # what a file of another version says may be none of them
        return _chosen[key]
    if torch.cuda.is_current_stream_capturing():
        return tried[0]
    best, best_time = None, float("inf")
    for tiles in tried:
        seconds = _time(run, tiles)
        if seconds is not None and seconds < best_time:
            best, best_time = tiles, seconds
    if best is None:
        raise RuntimeError(f"no tiling of the fused experts fits this device: {key}; use another experts.backend")
    _chosen[key] = best
    _write()
    return best


def candidates(product: Product, device: torch.device) -> list[Tiles]:
    """What to try, the most likely first."""
    if device.type != "cuda":
        return [Tiles(16, 32, 16, 4, 2)]  # small, so that the interpreter sees tiles that are cut off, and several
    if torch.cuda.get_device_capability(device)[0] not in (9, 10, 11):
        # No descriptors in hardware (before 9), or less shared memory (12).
        return [Tiles(128, 128, 32, 8, 3), Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 32, 4, 3), Tiles(64, 64, 32, 4, 2)]
    small = Tiles(128, 128, 64, 8, 3)
    specialised = Tiles(128, 256, 64, 12, 3, specialised=True)
    if product.kind.startswith("weight gradient"):
        others = [Tiles(128, 256, 64, 8, 4), Tiles(128, 256, 64, 8, 3), small]
        if not speaks_gluon(device):
            return others
        mine = [specialised, *others[:1], small]
        if product.kind.endswith("gathered") and product.inner_width % 64 == 0:
            mine = [replace(specialised, gather=True), *mine]
        return mine
    # The first product also has its results in shared memory: as much again as a stage, or twice that without a gate.
    stages = {"hidden": 3, "hidden, no gate": 2}.get(product.kind, 4)
    plain, flat = Tiles(128, 256, 64, 8, stages), Tiles(128, 256, 64, 8, stages, flatten=True)
    both = [flat, plain] if product.inner_width <= 2048 else [plain, flat]
    if product.kind in ("plain", "transposed") and product.inner_width % 64 == 0 and speaks_gluon(device):
        return [specialised, *both, small]
    return [*both, small]


def speaks_gluon(device: torch.device) -> bool:
    """Whether the kernels of :mod:`.hopper` run: on that generation, and with a Triton that they were tried with.

    Gluon is experimental, and its names change.
    """
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and (3, 6) <= version < (3, 8)


def remember_in(path: Path, *, write: bool = True) -> None:
    """Read the choices that ``path`` holds, and, if ``write``, add new ones. A file that is damaged is made anew.

    Of several ranks one writes.
    """
    global _file, _writes
    _file, _writes = path, write
    with suppress(OSError, ValueError, TypeError, AttributeError):
        for key, fields in json.loads(path.read_text()).items():
            _chosen.setdefault(key, Tiles(**fields))


def _write() -> None:
    if _file is None or not _writes:
        return
    text = json.dumps({key: asdict(tiles) for key, tiles in sorted(_chosen.items())}, indent=1)
    try:
        partial = _file.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(_file)
    except OSError as error:
        warnings.warn(f"{_file}: the tiles that were chosen cannot be written: {error.strerror}", stacklevel=2)


def _time(run: Callable[[Tiles], None], tiles: Tiles) -> float | None:
    """Milliseconds of the fastest of a few runs; None for tiles that do not fit the device."""
    try:
        run(tiles)
    except (OutOfResources, CompilationError, PTXASError):
        return None
    except RuntimeError as error:
        if str(error) != "PassManager::run failed":  # all that Triton says where a kernel cannot be lowered
            raise
        return None
    times: list[float] = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run(tiles)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
