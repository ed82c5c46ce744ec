"""Kernels in C++ for a CPU, built at first use: attention, what experts do between products, and decoding.

They are compiled once a machine, which takes a few seconds; the library stays in the user's folder for caches. Where
there is no compiler, or it fails, :func:`kernels` is None, and everything is computed by torch.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

SOURCES = ("attention.cpp", "few.cpp", "rows.cpp")
HEADERS = ("activations.h", "heads.h", "vectors.h")
OPTIMISED = ("-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
FLAGS = (*OPTIMISED, "-fPIC", "-shared")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""what the kernels read and write, by the names that end theirs"""


def computes(*tensors: Tensor) -> bool:
    """Whether the kernels can be used on these: in float32 or bfloat16 in the memory of this process.

    What only stands for a tensor has none: one that is still on its way from other ranks, or a fake one.
    """
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    return plain and all(tensor.device.type == "cpu" and tensor.dtype in DTYPES for tensor in tensors) and _built()


# What torch.compile must not look into.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _built() -> bool:
    return kernels() is not None


def call(name: str, *arguments: Any) -> None:
    """Run the kernel ``name`` on tensors, integers and structures, and on as many threads as torch has.

    Tensors are passed by their address alone, None as none.
    """
    loaded = kernels()
    assert loaded is not None
    getattr(loaded, name)(*(_passed(argument) for argument in (*arguments, torch.get_num_threads())))


class Sizes(ctypes.Structure):
    """``Sizes`` of heads.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "key_heads", "repeats", "length", "width")]

    @classmethod
    def of(cls, queries: Float[Tensor, "B H S d"], keys: Float[Tensor, "B H_kv L d"]) -> "Sizes":
        """Of attention of these."""
        batch, n_key_heads, length, width = keys.shape
        return cls(batch, n_key_heads, queries.shape[1] // n_key_heads, length, width)


class Strides(ctypes.Structure):
    """``Strides`` of heads.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "token")]


def heads(*tensors: Float[Tensor, "B _ _ d"]) -> list[Tensor | Strides]:
    """Each tensor and its strides, as the kernels of attention take them; with whole rows, as a copy if need be."""
    whole = [tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in tensors]
    return [part for tensor in whole for part in (tensor, Strides(*tensor.stride()[:3]))]


def _passed(argument: Any) -> Any:
    if argument is None:
        return None
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument


@cache
def kernels() -> ctypes.CDLL | None:
    """The kernels, built where they have not been; None where that is not possible."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if platform.system() != "Linux" or compiler is None:
        return None
    folder = Path(__file__).parent
    text = "".join((folder / name).read_text() for name in (*SOURCES, *HEADERS))
    key = hashlib.sha256("|".join((text, compiler, *FLAGS, _processor())).encode()).hexdigest()[:16]
    try:
        path = _cache_folder() / f"kernels-{key}.so"
        if not path.exists():
            _build(compiler, [folder / name for name in SOURCES], path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        warnings.warn(f"the CPU kernels cannot be built, so torch's operators are used: {reason}", stacklevel=2)
        return None


def _build(compiler: str, sources: list[Path], path: Path) -> None:
    # Another process may build the same: each into a file of its own, and the last one stays.
    descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(descriptor)
    try:
        command = [compiler, *FLAGS, "-o", partial, *map(str, sources)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _cache_folder() -> Path:
    """The user's folder for caches, or, where it cannot be written, one that ends with this process."""
    with suppress(OSError, RuntimeError):  # the second where there is no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moe-lab"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    passing = tempfile.mkdtemp(prefix="moe-lab-")
    atexit.register(shutil.rmtree, passing, ignore_errors=True)
    return Path(passing)


def _processor() -> str:
    """What ``-march=native`` depends on."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "|".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor()
