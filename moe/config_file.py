"""From one YAML file, and the flags that follow it, to a checked :class:`~moe.config.Config`; and back to YAML.

The file nests its keys as the dataclasses do (a dotted key, ``model.router.top_k: 4``, is the same in short), and a
flag names the same key: ``--model.router.top_k 4``. Flags replace what the file says. A preset that the file names
lies under the file's other keys; one that a flag names replaces what the file says of the keys it sets, and the file's
own preset altogether. Only then is everything checked, once: names first, then types (by pydantic, strictly: an int is
neither ``true`` nor ``1.0`` nor ``"4"``), then the checks of :mod:`moe.config`. Every problem becomes one line that
names its file and line, or its flag.

Scalars follow YAML 1.2, so ``3e-4`` is a number and ``yes`` is text, in files and in flags alike. A setting whose
value is text takes what is written, whatever it looks like: ``--run.name 3`` is the name "3".
"""

import ast
import inspect
import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

import moe.config
from moe import presets
from moe.config import Config, ConfigError
from moe.errors import UserError

Scalar = str | int | float | bool | None

MODEL = "model."
"""the section whose keys presets set"""
PRESET = MODEL + presets.KEY
ROUTING = (f"{MODEL}router.", f"{MODEL}special.", f"{MODEL}balance.")
"""the sections that together choose a router"""

OLDER_VALUES = {"training.activation_checkpointing": {"false": "none", "true": "block"}}
"""what files say, those of earlier runs among them, of a setting that has become a choice since"""

NOTHING: Mapping[str, str] = MappingProxyType({})

# ----------------------------------------------------------------------------------------------------- reading, writing


def load(path: Path, overrides: Mapping[str, str] = NOTHING) -> Config:
    """The configuration in the file ``path``, with ``overrides`` (dotted key -> text of the value) over it.

    Raises UserError, one line a problem, where the file cannot be read or a setting cannot be used.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        siblings = [str(sibling) for sibling in sorted(path.parent.glob("*.yaml"))]
        guesses = [f"--{PRESET} {path}"] if str(path) in presets.presets() else _nearest(str(path), siblings)
        raise UserError(f"{path}: there is no such file{_did_you_mean(guesses)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, and must be a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8 text (byte 0x{raw[error.start]:02x}); save it as UTF-8") from None
    return parse(text, str(path), overrides)


def parse(text: str, name: str = "configuration", overrides: Mapping[str, str] = NOTHING) -> Config:
    """The configuration that the YAML ``text`` holds, with ``overrides`` over it; errors call the text ``name``.

    Raises UserError as :func:`load` does.
    """
    reading = _Reading(name)
    reading.file(_compose(text, name))
    reading.flags(overrides)
    return reading.check()


def dump(config: Config) -> str:
    """``config`` as YAML, every setting written out, so that ``parse(dump(config)) == config``."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=math.inf)


# ------------------------------------------------------------------------------------------------------- every setting


@dataclass(frozen=True)
class Setting:
    """One field of the configuration, as help and error messages speak of it."""

    key: str
    """dotted name: model.router.top_k"""
    kind: str
    """what its value must be, in words: 'a whole number or null'"""
    choices: tuple[str, ...]
    """the values it can take, where it is a choice"""
    is_text: bool
    """whether a value is text (free, or a choice), so that it is taken as it is written"""
    default: Scalar
    """its value where neither the file nor a flag sets it"""
    meaning: str
    """the string under the field in moe/config.py"""

    @property
    def section(self) -> str:
        """Dotted name of the section it belongs to."""
        return self.key.rpartition(".")[0]


@cache
def sections() -> dict[str, type]:
    """Every section's dataclass by its dotted name, in the order of the file; the whole configuration is ``""``."""
    found: dict[str, type] = {"": Config}

    def descend(prefix: str, section: type) -> None:
        for name, hint in get_type_hints(section).items():
            if is_dataclass(hint) and isinstance(hint, type):
                found[prefix + name] = hint
                descend(f"{prefix}{name}.", hint)

    descend("", Config)
    return found


@cache
def settings() -> dict[str, Setting]:
    """Every setting by its dotted key, section after section."""
    found: dict[str, Setting] = {}
    documentation = _field_docstrings()
    for section_key, section in sections().items():
        hints = get_type_hints(section)
        for entry in fields(section):
            key = _join(section_key, entry.name)
            if key in sections():
                continue
            kind, choices, is_text = _describe_type(hints[entry.name])
            meaning = documentation.get((section.__name__, entry.name), "")
            default: Any = entry.default
            found[key] = Setting(key, kind, choices, is_text, default, meaning)
    return found


def _describe_type(hint: Any) -> tuple[str, tuple[str, ...], bool]:
    """A field's type in words, its choices, and whether its values are text."""
    parts = get_args(hint) if get_origin(hint) not in (None, Literal) else (hint,)
    [value_type] = [part for part in parts if part is not NoneType]
    choices = get_args(value_type) if get_origin(value_type) is Literal else ()
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    alternatives = list(choices or [names[value_type]]) + ["null"] * (NoneType in parts)
    return _either(alternatives), choices, bool(choices) or value_type is str


def _field_docstrings() -> dict[tuple[str, str], str]:
    """The string under each setting, by class and field; Python keeps none, so the source is read."""
    found = {}
    for section in sections().values():
        [node] = ast.parse(inspect.getsource(section)).body
        assert isinstance(node, ast.ClassDef)
        for statement, following in zip(node.body, node.body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                    found[node.name, name] = " ".join(meaning.split())
    return found


# ------------------------------------------------------------------------------------------------ names, values, checks


@dataclass
class _Reading:
    """What has been read so far: the values, where each one stands, and what is wrong with them."""

    name: str
    """what messages call the file"""
    values: dict[str, object] = field(default_factory=dict)
    """by dotted key; nothing is checked before :meth:`check`, so that a flag can replace what is wrong in the file"""
    lines: dict[str, int] = field(default_factory=dict)
    """line of the file on which a setting or a section stands, by dotted key"""
    flagged: list[str] = field(default_factory=list)
    """the dotted keys that flags set"""
    file_preset: object = None
    """what the file names as its preset"""
    preset: str | None = None
    """the preset in force"""
    preset_keys: set[str] = field(default_factory=set)
    """the dotted keys whose value is the preset's"""
    problems: list[tuple[float, int, str]] = field(default_factory=list)
    """line of the file (infinity without one), position of the flag (0 without one), and message"""

    def file(self, document: yaml.Node) -> None:
        """Read the whole file."""
        if not isinstance(document, yaml.MappingNode):
            names = ", ".join(key for key in sections() if key and "." not in key)
            raise UserError(
                f"{self.name}:{_line(document)}: must hold sections ({names}), not {_show(_value(document))}"
            )
        self._mapping(document, "")

    def _mapping(self, node: yaml.MappingNode, section: str) -> None:
        for key_node, value_node in node.value:
            line = _line(key_node)
            if not (isinstance(key_node, yaml.ScalarNode) and key_node.value and key_node.value.isprintable()):
                place = section or "the file"
                self._at_line(line, f"{place} has {_show(_value(key_node))} where a key belongs")
                continue
            key = _join(section, key_node.value)
            if key in self.lines:
                self._at_line(line, f"{key} is set twice (first on line {self.lines[key]}); keep one of them")
                continue
            self.lines[key] = line
            if key in sections():
                self._section(value_node, key)
            elif key in settings():
                self.values[key] = _value(value_node, settings()[key].is_text)
            else:
                self._at_line(line, f"{key} {_unknown(key)}")

    def _section(self, node: yaml.Node, section: str) -> None:
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, section)
        elif _value(node) is not None:  # a section whose keys are all commented out is left at its defaults
            inside = (setting for setting in settings().values() if setting.section == section)
            example = next(setting for setting in inside if setting.default is not None)
            name = example.key.rpartition(".")[2]
            shown = f"{name}: {_show(example.default)}"
            self._problem(section, f"is a section, and must hold keys (such as `{shown}`), not {_show(_value(node))}")

    def flags(self, overrides: Mapping[str, str]) -> None:
        """Lay the flags over the file."""
        self.file_preset = self.values.get(PRESET)
        for key, text in overrides.items():
            self.flagged.append(key)
            if key not in settings():
                self._problem(key, _unknown(key, dashes="--"))
            elif text == "null":
                self.values[key] = None
            else:
                self.values[key] = text if settings()[key].is_text else _scalar(text)

    def _lay_preset(self) -> None:
        """Fill in what the preset sets: under the file's keys if the file names it, instead of them if a flag does.

        A preset by flag replaces the file's whole choice of a router, so that what it means does not depend on what
        the file had chosen: only the file's number of experts a token stays, where the preset has none of its own.
        """
        name = self.values.get(PRESET)
        if not isinstance(name, str) or name not in presets.presets():
            return  # none; or no preset, which the check of types will say
        self.preset = name
        stronger = set(self.values)
        if PRESET in self.flagged:
            stronger = set(self.flagged)
            for key in self._choice_of_the_file() - stronger:
                del self.values[key]
        chosen = {key.removeprefix(MODEL): self.values[key] for key in stronger & self.values.keys()}
        for key, value in presets.settings_under(name, chosen).items():
            self.values[MODEL + key] = value
            self.preset_keys.add(MODEL + key)

    def _choice_of_the_file(self) -> set[str]:
        """The file's keys that make its router: those of the router but top_k, of special experts and of balance, and
        what the preset that the file names would have set elsewhere (shared experts)."""
        named = self.file_preset
        theirs = presets.presets()[named].set if isinstance(named, str) and named in presets.presets() else {}
        repeated = {MODEL + key for key, value in theirs.items() if self.values.get(MODEL + key) == value}
        own = {key for key in self.values if key.startswith(ROUTING) and key != f"{MODEL}router.top_k"}
        return own | repeated - {f"{MODEL}router.top_k"}

    def check(self) -> Config:
        """The configuration, or every problem at once."""
        self._lay_preset()
        for key, newer in OLDER_VALUES.items():
            if isinstance(value := self.values.get(key), str):
                self.values[key] = newer.get(value, value)
        for key, value in list(self.values.items()):
            if isinstance(value, str) and not value.isprintable():  # a line break or NUL in a path, a lone surrogate
                self._problem(key, f"is {json.dumps(value)}, which holds a character that cannot be printed")
                del self.values[key]
        try:
            config = _adapter().validate_json(json.dumps(_nest(self.values)), strict=True)
        except ValidationError as invalid:
            for error in invalid.errors():
                self._explain(".".join(map(str, error["loc"])), error.get("ctx", {}).get("error"))
        if self.problems:
            raise UserError("\n".join(message for _, _, message in sorted(self.problems)))
        return config

    def _explain(self, key: str, conflict: object) -> None:
        """Note what pydantic refused: a ``conflict`` that the section ``key`` found, or the type of the setting."""
        if isinstance(conflict, ConfigError):
            blamed, reason = _join(key, conflict.key), conflict.reason
            if self.preset is not None and blamed.startswith(MODEL):
                overridden = {key.removeprefix(MODEL) for key in self.values.keys() - self.preset_keys}
                has_no_effect = blamed in self.preset_keys and reason.startswith("is set, but")
                reason = presets.explain(self.preset, blamed.removeprefix(MODEL), reason, overridden)
                if has_no_effect:  # another setting took away what it acted on
                    reason += f"; set it to {moe.config.shown(settings()[blamed].default)} as well"
            self._problem(blamed, reason)
            return
        setting, value = settings()[key], self.values[key]
        guess = _nearest(str(value), setting.choices)
        self._problem(key, f"must be {setting.kind}, not {_show(value)}{_did_you_mean(guess)}")

    def _problem(self, key: str, what: str) -> None:
        """Note a problem where ``key`` was set: by a flag, on a line, by a preset (then: where that was named), or
        nowhere (then: where it could be set)."""
        if key in self.preset_keys and PRESET in self.flagged:
            self.problems.append((math.inf, 1 + self.flagged.index(PRESET), f"--{PRESET} {self.preset}: {key} {what}"))
        elif key in self.preset_keys:
            self._at_line(self.lines[PRESET], f"{key} {what}")
        elif key in self.flagged:
            self.problems.append((math.inf, 1 + self.flagged.index(key), f"--{key} {what}"))
        elif key in self.lines:
            self._at_line(self.lines[key], f"{key} {what}")
        else:
            section = key.rpartition(".")[0]
            self._at_line(self.lines.get(section), f"{key} (left at its default) {what}")

    def _at_line(self, line: int | None, message: str) -> None:
        place = self.name if line is None else f"{self.name}:{line}"
        self.problems.append((math.inf if line is None else line, 0, f"{place}: {message}"))


@cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def _nest(values: Mapping[str, object]) -> dict[str, Any]:
    """Dotted keys as dictionaries in dictionaries."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *path, name = key.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[name] = value
    return tree


# ----------------------------------------------------------------------------------------------------------------- YAML


def _compose(text: str, name: str) -> yaml.Node:
    """The tree of the one document in ``text``: nodes with their lines, scalars still as text.

    Raises UserError where there is none, or where it is no YAML.
    """
    try:
        document = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        tab = mark is not None and mark.buffer is not None and mark.buffer[mark.pointer : mark.pointer + 1] == "\t"
        said = ", ".join(part for part in (error.context, error.problem) if part)
        reason = "a tab stands where YAML wants spaces" if tab else f"is not valid YAML ({said})"
        raise UserError(f"{name}{line}: {reason}") from None
    except yaml.reader.ReaderError as error:
        line_number = text.count("\n", 0, error.position) + 1
        raise UserError(f"{name}:{line_number}: is not valid YAML (the character {error.character:#x})") from None
    if document is None:
        raise UserError(f"{name}: is empty; write {{}} to take every default")
    return document


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _value(node: yaml.Node, is_text: bool = False) -> object:
    """What ``node`` holds: a scalar (the text itself where ``is_text``); of a list or mapping only that it is one."""
    if not isinstance(node, yaml.ScalarNode):
        return [] if isinstance(node, yaml.SequenceNode) else {}
    if node.style is not None:  # quoted, or a block of text
        return node.value
    if node.value in ("", "~", "null", "Null", "NULL"):
        return None
    return node.value if is_text else _scalar(node.value)


_WHOLE_NUMBER = re.compile(r"[-+]?[0-9]{1,18}|[-+]?[0-9]{1,3}(_[0-9]{3}){1,5}")  # 64 bits hold 18 digits
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NAMED = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def _scalar(text: str) -> Scalar:
    """What ``text`` means by the core schema of YAML 1.2, with 98_304 for long numbers and without infinities."""
    if text in _NAMED:
        return _NAMED[text]
    if _WHOLE_NUMBER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def _show(value: object) -> str:
    """A value as one would write it: true, null, 3, "text"; or the kind of what is no single value."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a section"
    written = json.dumps(value, ensure_ascii=False)
    return written if len(written) <= 60 else f"{written[:56]}..."


# --------------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class CommandLine:
    """The arguments of a command, sorted."""

    positional: list[str]
    """what is no flag, in order"""
    overrides: dict[str, str]
    """text of each setting that a flag sets, by dotted key"""
    options: dict[str, str]
    """text of the command's own flags, by name (``--resume``); empty for one that takes no value"""


def parse_flags(arguments: Sequence[str], also: Mapping[str, str] = NOTHING) -> CommandLine:
    """Sort ``arguments`` into positional ones, settings (``--key value``, ``--key=value``) and the command's flags.

    ``also`` has the command's own flags, as help shows them, and their meaning: ``--resume`` takes no value,
    ``--out FOLDER`` does. Where it has ``--help``, ``-h`` is the same. Values are checked when they meet the file, in
    :func:`load`. Raises UserError for a flag that is unknown, comes twice, or lacks a value or has one too many.
    """
    takes_value = {flag.split()[0]: " " in flag for flag in also} | {f"--{key}": True for key in settings()}
    positional: list[str] = []
    given: dict[str, str] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "-h" and "--help" in takes_value:
            argument = "--help"
        if not argument.startswith("-") or argument == "-":
            positional.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        if flag not in takes_value:
            raise UserError(f"{flag} {_unknown(flag.lstrip('-'), dashes='--', others=list(also))}")
        if flag in given:
            raise UserError(f"{flag} is given twice; keep one of them")
        if takes_value[flag] and not equals:
            if not remaining or remaining[0].startswith("--"):
                raise UserError(f"{flag} needs a value{_example(flag)}")
            value = remaining.pop(0)
        if equals and not takes_value[flag]:
            raise UserError(f"{flag} takes no value, and is given {value!r}")
        given[flag] = value
    overrides = {flag[2:]: value for flag, value in given.items() if flag[2:] in settings()}
    options = {flag: value for flag, value in given.items() if flag[2:] not in overrides}
    return CommandLine(positional, overrides, options)


def _example(flag: str) -> str:
    setting = settings().get(flag[2:])
    return f": {setting.kind}" if setting else ""


def help_text(usage: str, also: Mapping[str, str] = NOTHING, width: int = 100) -> str:
    """What ``--help`` prints: the ``usage``, the command's own flags and every setting, in lines up to ``width``."""
    rows = {key: [_help_row(s) for s in settings().values() if s.section == key] for key in sections()}
    column = 4 + max(len(left) for section in rows.values() for left, _ in section)
    blocks = [usage]
    if also:
        blocks.append(_table(also.items(), column, width))
    blocks.append(
        "Settings, with their defaults. A configuration file nests the same names: --model.d_model 64 is\n"
        "model: {d_model: 64}. A flag wins over the file, and so does all that a preset in a flag sets."
    )
    for key, section in sections().items():
        if rows[key]:
            title = textwrap.fill(f"{key}: {(section.__doc__ or '').splitlines()[0]}", width)
            blocks.append(title + "\n" + _table(rows[key], column, width))
    return "\n\n".join(blocks) + "\n"


def _help_row(setting: Setting) -> tuple[str, str]:
    default = setting.default if isinstance(setting.default, str) else _show(setting.default)
    return f"--{setting.key}={default}", f"{setting.meaning} [{setting.kind.removeprefix('a ')}]"


def _table(rows: Iterable[tuple[str, str]], column: int, width: int) -> str:
    """Two columns, the second wrapped, from ``column`` to ``width``; what stands in brackets stays on one line, if it
    fits on one."""
    wrapper = textwrap.TextWrapper(width, subsequent_indent=" " * column, break_on_hyphens=False)
    lines = []
    for left, right in rows:
        wrapper.initial_indent = f"  {left}".ljust(column)
        bracket = re.search(r"\[[^]]*\]$", right)
        if bracket and len(bracket[0]) <= width - column:
            right = right[: bracket.start()] + bracket[0].replace(" ", "\N{NO-BREAK SPACE}")
        lines.append(wrapper.fill(right).replace("\N{NO-BREAK SPACE}", " "))
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------- did you mean?


def _unknown(key: str, dashes: str = "", others: Sequence[str] = ()) -> str:
    """Why ``key``, which is no setting, is refused: its true section, the nearest name, or else all that there are.

    ``dashes`` is what a flag puts before a key; ``others`` are flags that may be meant as well.
    """
    known = [*settings(), *(section for section in sections() if section)]
    own = [flag.split()[0] for flag in others]
    key_in_style = key.replace("-", "_").lower()
    section, _, name = key_in_style.rpartition(".")
    if dashes and key and key in sections():
        inside = [dashes + setting for setting in settings() if setting.startswith(f"{key}.")]
        return f"is a section, not a setting; its settings are {', '.join(inside)}"
    if key_in_style in known:
        return f"is unknown{_did_you_mean([dashes + key_in_style])}"

    namesakes = [candidate for candidate in known if candidate.rpartition(".")[2] == name]
    if namesakes and not dashes:
        homes = [candidate.rpartition(".")[0] or "the top level" for candidate in namesakes]
        return f"is unknown; {name} belongs to {_either(homes)}"

    names = {candidate: candidate.rpartition(".")[2] for candidate in known}
    siblings = [names[candidate] for candidate in known if candidate.rpartition(".")[0] == section]
    guesses = [dashes + candidate for candidate in namesakes]
    guesses = guesses or [dashes + _join(section, sibling) for sibling in _nearest(name, siblings)]
    guesses = guesses or _nearest(f"--{key}", own)
    if not guesses:
        alike = _nearest(name, list(names.values()))
        guesses = [dashes + candidate for candidate in known if names[candidate] in alike]
    if guesses:
        return f"is unknown{_did_you_mean(guesses)}"
    if dashes:
        return "is unknown; --help lists every setting"
    return f"is unknown; {section or 'the top level'} has {', '.join(siblings)}"


def _nearest(word: str, candidates: Sequence[str]) -> list[str]:
    """The one of ``candidates`` most like ``word``, if one is alike at all."""
    return get_close_matches(word, candidates, n=1, cutoff=0.7)


def _did_you_mean(guesses: Sequence[str]) -> str:
    return f"; did you mean {_either(guesses)}?" if guesses else ""


def _either(words: Sequence[str]) -> str:
    """a; a or b; a, b or c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section and name else section or name
