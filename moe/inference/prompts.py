"""Files of prompts, and of what became of them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from moe.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and what else was said in its line, which is handed on."""

    text: str
    also: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(path: Path) -> list[Prompt]:
    """One prompt a line: as it is, or in a ``.jsonl`` file a string or an object with the key ``prompt``.

    Raises UserError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as prompts: {error}") from None
    if path.suffix == ".jsonl":
        prompts = [_of_json(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    else:
        prompts = [Prompt(line) for line in lines]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return prompts


def _of_json(line: str, place: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: is no JSON ({error})") from None
    if isinstance(value, str):
        return Prompt(value)
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise UserError(f'{place}: must be a string, or an object with a text as its "prompt"')
    return Prompt(value["prompt"], {key: kept for key, kept in value.items() if key != "prompt"})


@contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """A file that is there under its name only once all of it is written; raises UserError where one is there already.

    What was written before a failure stays beside it, as ``.partial-NAME``.
    """
    if path.exists():
        raise UserError(f"{path}: exists; choose another --out")
    partial = path.with_name(f".partial-{path.name}")
    try:
        stream = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    with stream:
        yield stream
    partial.replace(path)
