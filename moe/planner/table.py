"""A plan as text for a terminal, and as JSON."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.planner.plan import Row, Section, Unit
from moe.planner.reported import Claim

LETTERS = {1e24: "Y", 1e21: "Z", 1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}
WORDS = {1e12: "T", 1e9: "B", 1e6: "M", 1e3: "k"}


def table(sections: Sequence[Section], claims: Sequence[Claim] = (), notes: Sequence[str] = ()) -> str:
    """Every section under its title, then what was reported with residuals, then the contradictions."""
    blocks = [_section(section) for section in sections]
    if claims:
        blocks.append(reported_table(claims))
    if notes:
        blocks.append("\n".join(["Where the reports contradict each other, or themselves", "", *map(_note, notes)]))
    return "\n\n".join(blocks)


def _section(section: Section) -> str:
    rows = [(row.label, shown(row.value, row.unit), row.note) for row in section.rows]
    label = max(len(row[0]) for row in rows)
    value = max(len(row[1]) for row in rows)
    lines = [f"  {name:{label}}  {number:>{value}}  {note}".rstrip() for name, number, note in rows]
    return "\n".join([section.title, "", *lines])


def reported_table(claims: Sequence[Claim]) -> str:
    """What was reported, what the configuration makes it, and how far apart they are."""
    head = ("", "reported", "computed", "residual", "source")
    rows = [
        (claim.what, _of_claim(claim.reported, claim), _of_claim(claim.computed, claim), f"{claim.residual:+.1%}")
        for claim in claims
    ]
    widths = [max(len(head[i]), *(len(row[i]) for row in rows)) for i in range(4)]
    lines = []
    for row, source in zip([head[:4], *rows], [head[4], *(claim.source for claim in claims)], strict=True):
        numbers = "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append(f"  {row[0]:{widths[0]}}  {numbers}  {source}".rstrip())
    return "\n".join(["What was reported of GPT-4, beside this configuration", "", *lines])


def _of_claim(value: float, claim: Claim) -> str:
    if claim.unit == "x":
        return f"{value:.3g} x"
    if claim.unit == "parameters":
        return scaled(value, WORDS)
    if claim.unit == "tokens":
        return scaled(value, WORDS)
    if claim.unit == "FLOP" and value >= 1e21:
        return f"{value:.3g} FLOP"
    return shown(value, claim.unit.lower())  # type: ignore[arg-type]


def _note(text: str, width: int = 118) -> str:
    lines, line = [], "  -"
    for word in text.split():
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = "   "
        line += f" {word}"
    return "\n".join([*lines, line])


def shown(value: float | int | str | None, unit: Unit) -> str:
    """A number as a table shows it."""
    if value is None:
        return "unknown"
    if isinstance(value, str):
        return value
    if unit == "parameters":
        return f"{int(value):,} ({scaled(value, WORDS)})" if value >= 1e6 else f"{int(value):,}"
    if unit == "flop":
        return f"{value:.4g} FLOP" if value >= 1e21 else f"{scaled(value, LETTERS)}FLOP"
    if unit == "bytes":
        return f"{scaled(value, LETTERS)}B"
    if unit == "seconds":
        return f"{value:.3g} s" if value < 100 else f"{value:,.0f} s"
    if unit == "days":
        return f"{value:.1f} days" if value >= 1 else f"{value * 24:.2g} hours"
    if unit == "device_days":
        return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
    if unit == "$":
        return f"${value / 1e6:,.2f}M" if abs(value) >= 1e6 else f"${value:,.0f}" if value >= 100 else f"${value:.4g}"
    if unit == "share":
        return f"{value:.1%}"
    if unit == "tokens":
        return scaled(value, WORDS)
    if unit == "tokens/s":
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def scaled(value: float, names: dict[float, str]) -> str:
    """``value`` with three or four digits and the letter of its thousands: 1.82T; a space before a unit's letter."""
    space = " " if names is LETTERS else ""
    for size, letter in names.items():
        if abs(value) >= size:
            number = value / size
            digits = max(0, 2 - int(math.log10(abs(number))))
            return f"{number:.{digits}f}{space}{letter}" if abs(number) < 1000 else f"{number:,.0f}{space}{letter}"
    return f"{value:.3g}{space}"


def as_json(
    asked: dict[str, Any], sections: Sequence[Section], claims: Sequence[Claim] = (), notes: Sequence[str] = ()
) -> str:
    """What was asked, then every number in full: bytes, FLOP, seconds, days, dollars, shares of 1."""
    content: dict[str, Any] = {"asked": asked}
    content |= {section.key: {row.key: _json_value(row) for row in section.rows} for section in sections}
    if claims:
        content["reported"] = {
            claim.key: {
                "what": claim.what,
                "reported": claim.reported,
                "computed": claim.computed,
                "residual": claim.residual,
                "source": claim.source,
            }
            for claim in claims
        }
    if notes:
        content["contradictions"] = list(notes)
    return json.dumps(content, indent=1) + "\n"


def _json_value(row: Row) -> Any:
    return {"layout": row.label, "tokens_per_second": row.value} if row.key.startswith("layout_") else row.value


def write(path: Path, text: str) -> None:
    """Write ``text``, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
