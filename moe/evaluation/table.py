"""Tables and JSON of what was measured on held-out text."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe.evaluation.metrics import Bin, Summary

LEGEND = """\
± is half of the 95 % interval over documents (jackknife, Student's t). Chance knows only how often a token is in the
training text. ECE is the expected calibration error in 15 bins; null is that of a calibrated model."""


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], *, last_apart: bool = False) -> str:
    """Lines of aligned columns, the first to the left, the others to the right; a rule below the header.

    ``last_apart`` draws another one above the last row.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))]
        ).rstrip()
        for first, *others in (header, *rows)
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:-1], *([rule] if last_apart and len(rows) > 1 else []), lines[-1]])


def held_out_tables(domains: Sequence[Summary], pooled: Summary) -> str:
    """What each domain comes to, with the interval over documents; loss by context and by frequency over all text."""
    rows = [
        [
            summary.name,
            f"{summary.documents:,}",
            f"{summary.tokens:,}",
            str(summary.cross_entropy),
            str(summary.bits_per_byte),
            f"{summary.unigram_bits_per_byte:.3f}",
            str(summary.accuracy),
            f"{summary.unigram_accuracy:.3f}",
            str(summary.calibration_error),
            f"{summary.calibrated:.3f}",
        ]
        for summary in (*domains, pooled)
    ]
    header = ["domain", "documents", "tokens", "nats/token", "bits/byte", "chance", "top-1", "chance", "ECE", "null"]
    lines = [columns(header, rows, last_apart=True)]
    if any(summary.documents == 1 for summary in domains):
        lines.append("a domain of one document has no interval, and counts as certain in that of all text")
    context = [[bin.label, f"{bin.tokens:,}", str(bin.cross_entropy)] for bin in filled(pooled.by_context)]
    lines.append("\n" + columns(["tokens of context", "tokens", "nats/token"], context))
    frequency = [
        [bin.label, f"{bin.tokens:,}", str(bin.cross_entropy), f"{bin.unigram:.3f}"]
        for bin in filled(pooled.by_frequency)
    ]
    header = ["in a million training tokens", "tokens", "nats/token", "chance"]
    lines.append("\n" + columns(header, frequency))
    lines.append(f"\n{LEGEND}")
    return "\n".join(lines)


def as_json(value: Any) -> Any:
    """A dataclass as JSON holds it; what is not finite is null."""
    return finite(asdict(value))


def finite(value: Any) -> Any:
    """Numbers, text, lists and dicts of them, with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def filled(bins: Sequence[Bin]) -> list[Bin]:
    """The bins that hold a token."""
    return [bin for bin in bins if bin.tokens]
