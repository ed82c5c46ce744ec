"""What a plan can run on: the table of ``devices.yaml`` and what a user adds to it."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from moe.errors import UserError

OWN = Path(__file__).with_name("devices.yaml")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator and the links it has."""

    name: str
    flops: float
    """FLOP/s of dense bfloat16 products"""
    memory: float
    """bytes"""
    bandwidth: float
    """bytes/s of the memory"""
    node: int
    """devices that share fast links"""
    link: float
    """bytes/s that a device sends to others of its node"""
    network: float
    """bytes/s that a device sends beyond"""
    hourly: float | None
    """dollars an hour; None where there is no source"""
    source: str

    def link_over(self, span: int) -> float:
        """Bytes/s between the ends of ``span`` consecutive devices: the node's links, where all fit into one."""
        return self.link if span <= self.node else self.network


def device(name: str, extra: Path | None = None) -> Device:
    """The device called ``name``, of ``extra`` first and then of our table. Raises UserError where there is none."""
    table = read_devices(OWN) | ({} if extra is None else read_devices(extra))
    if name not in table:
        near = get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(table)}"
        raise UserError(f"--gpu {name}: no such device; {hint} (--hardware FILE adds devices)")
    return table[name]


def read_devices(path: Path) -> dict[str, Device]:
    """The devices of a YAML file of the form of ``devices.yaml``. Raises UserError, naming what is wrong with it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a table of devices: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(row, dict) for row in content.values()):
        raise UserError(f"{path}: must map each device's name to its numbers, as moe/planner/devices.yaml does")
    return {str(name): _device(f"{path}: {name}", str(name), row) for name, row in content.items()}


def _device(place: str, name: str, row: dict[str, Any]) -> Device:
    known = [field.name for field in fields(Device) if field.name != "name"]
    for key in row:
        if key not in known:
            raise UserError(f"{place} has {key}, which is none of {', '.join(known)}")
    for key in known:
        if key not in row:
            raise UserError(f"{place} lacks {key}")
    numbers = {key: _number(place, key, row[key]) for key in known if key not in ("source", "hourly", "node")}
    node = _number(place, "node", row["node"])
    if node != int(node):
        raise UserError(f"{place}.node is {row['node']!r}, and must be a whole number")
    hourly = None if row["hourly"] is None else _number(place, "hourly", row["hourly"])
    return Device(name=name, **numbers, node=int(node), hourly=hourly, source=str(row["source"]))


def _number(place: str, key: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # YAML 1.1 reads 312e12 as text
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0 < number < float("inf"):
        raise UserError(f"{place}.{key} is {value!r}, and must be a positive number")
    return number
