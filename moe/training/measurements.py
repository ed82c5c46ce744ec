"""Answers that were found by measuring this machine, kept in a file so that each is measured once.

A question is asked of a machine: of its processor, the number of threads and torch's version, by which answers differ.
"""

import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name")
"""what Linux tells of a processor; a virtual machine's name alone may be that of several generations"""


def measured_once(question: str, answers: Sequence[str], measure: Callable[[], str]) -> str:
    """The remembered answer to ``question``, one of ``answers``; else what ``measure`` finds, which is remembered.

    A file that is damaged is made anew; where none can be written, the next process measures again.
    """
    path, key = file(), f"{machine()} | {question}"
    known = _read(path)
    if known.get(key) in answers:
        return known[key]
    answer = measure()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_read(path) | {key: answer}, indent=1, sort_keys=True) + "\n")
        partial.replace(path)
    return answer


def file() -> Path:
    """Where answers are kept: in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moe-lab" / "machine.json"


def machine() -> str:
    """What answers depend on."""
    names = []
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        fields = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
        stripped = {name.strip(): value.strip() for name, value in fields.items()}
        names = [stripped[name] for name in CPU_FIELDS if name in stripped]
    cpu = " ".join(names) or platform.processor() or platform.machine()
    return f"{cpu} | {torch.get_num_threads()} threads | torch {torch.__version__}"


def _read(path: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    return {}
