"""A folder of safetensors, one file or several, read and written tensor by tensor; nothing else is ever opened."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""largest file that is written, unless one tensor is larger; transformers' own limit"""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""what weights may be stored as, by safetensors' names"""


@dataclass(frozen=True)
class Entry:
    """What the header of a file says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """as safetensors calls it"""


@dataclass(frozen=True)
class Shards:
    """The tensors of a folder by name, known from the headers of its files."""

    folder: Path
    entries: Mapping[str, Entry]

    @classmethod
    def open(cls, folder: Path) -> "Shards":
        """The tensors below ``folder``.

        Raises UserError, with the place, where there are none, a file is missing or damaged, or the index is not true.
        """
        index = folder / INDEX
        if not index.is_file():
            if (folder / SINGLE).is_file():
                return cls(folder, _header(folder / SINGLE))
            if any(next(folder.glob(pattern), None) for pattern in PICKLES):
                raise UserError(
                    f"{folder}: holds its weights as pickles, which can run code and are not opened; "
                    "have their author, or transformers in a sandbox, save them as safetensors"
                )
            raise UserError(f"{folder}: has no weights: neither {SINGLE} nor {INDEX}")
        listed = _weight_map(index)
        entries: dict[str, Entry] = {}
        for file in sorted({folder / name for name in listed.values()}):
            for name, entry in _header(file).items():
                if listed.get(name) != file.name:
                    raise UserError(f"{file}: holds {name}, which {INDEX} does not list there")
                entries[name] = entry
        if absent := sorted(listed.keys() - entries.keys()):
            raise UserError(f"{index}: lists {absent[0]}, which {listed[absent[0]]} does not hold")
        return cls(folder, entries)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, file after file; one is in memory at a time, if no more than one is kept."""
        for file in dict.fromkeys(entry.file for entry in self.entries.values()):
            names = [name for name, entry in self.entries.items() if entry.file == file]
            with _opened(file) as opened:
                for name in names:
                    yield name, opened.get_tensor(name)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with _opened(self.entries[name].file) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


def _weight_map(index: Path) -> dict[str, str]:
    """The name of the file of each tensor."""
    try:
        listed = json.loads(index.read_bytes())["weight_map"]
        files = set(listed.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is no index of safetensors ({error!r})") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index}: names {file!r}, which is no safetensors file of this folder")
    return dict(listed)


def _header(file: Path) -> dict[str, Entry]:
    with _opened(file) as opened:
        entries = {}
        for name in opened.keys():  # noqa: SIM118
            part = opened.get_slice(name)
            entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
    return entries


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file, and {INDEX} names it") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({error}); download it again") from None


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int], limit: int = SHARD_BYTES
) -> None:
    """Write ``tensors`` below ``folder`` as transformers lays them out: one file, or several of ``limit`` bytes.

    ``sizes`` has the bytes of each tensor, in the order in which they come; one file's are in memory at a time.
    """
    files: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if files[-1] and size > room:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= size
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        called = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        # Pieces of one tensor share its memory, and safetensors wants each to have its own.
        part = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in _next(stream, names)}
        save_file(part, folder / called, metadata={"format": "pt"})
        (folder / called).chmod(0o644)
        weight_map |= dict.fromkeys(names, called)
        del part
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _next(stream: Iterator[tuple[str, Tensor]], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for wanted in names:
        name, tensor = next(stream)
        assert name == wanted, f"{name} came where {wanted} was expected"
        yield name, tensor


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """What a tensor takes on disk."""
    return math.prod(shape) * dtype.itemsize
