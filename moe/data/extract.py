"""How documents come out of the text of one file.

An extractor is a function from the text of a file to its documents, an empty list where the file holds none. It raises
``ValueError`` or ``SyntaxError`` on a file that is not what it expects. Nothing is ever imported or executed.
"""

import ast
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping

import yaml

JOINED_BYTES = 1024
"""Short strings (interface messages, exchanges of a dialogue) are joined into documents of about this size."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def text(content: str) -> list[str]:
    """The file as it is."""
    return [content] if content.strip() else []


def code(source: str) -> list[str]:
    """Python source without its docstrings, which :func:`docstrings` takes; still valid, comments and layout kept."""
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in bytes
    for owner in reversed(_documented(source)):
        docstring = owner.body[0]
        first, last = docstring.lineno - 1, (docstring.end_lineno or docstring.lineno) - 1
        before, after = lines[first][: docstring.col_offset], lines[last][docstring.end_col_offset :]
        empties_body = len(owner.body) == 1 and not isinstance(owner, ast.Module)
        if before.strip() or after.strip() or empties_body:
            lines[first : last + 1] = [before + b"pass" + after]
        else:
            blank_after = last + 1 < len(lines) and not lines[last + 1].strip()
            lines[first : last + 1 + blank_after] = []
    return text(b"".join(lines).decode().lstrip("\n"))


def docstrings(source: str) -> list[str]:
    """The docstrings of a Python module, its classes and functions, in order, as one document."""
    found = [inspect.cleandoc(_docstring(owner) or "") for owner in _documented(source)]
    return text("\n\n".join(docstring for docstring in found if docstring))


def python_strings(source: str) -> list[str]:
    """Every string of more than one line in the literals that a Python module assigns at its top level.

    A literal is a constant or nested tuples, lists and dictionaries of constants; of a dictionary, the values count.
    """
    return [string for value in _assigned_literals(source) for string in _strings(value) if "\n" in string.strip()]


def dialogue(content: str) -> list[str]:
    """The conversations of a YAML file (``conversations``: a list of lists of lines), a blank line between them."""
    try:
        # The base loader keeps every scalar a string: an answer "Yes" is not the boolean.
        loaded = yaml.load(content, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    conversations = loaded.get("conversations") if isinstance(loaded, dict) else None
    if not isinstance(conversations, list):
        raise ValueError("no list of conversations")
    return _joined(
        "\n".join(line.strip() for line in conversation if isinstance(line, str))
        for conversation in conversations
        if isinstance(conversation, list)
    )


def gettext(content: str) -> list[str]:
    """The translations of a gettext ``.po`` file: every filled ``msgstr``, but not the header nor fuzzy entries."""
    return _joined(
        string
        for fuzzy, fields in _gettext_entries(content)
        if not fuzzy and fields.get("msgid")
        for keyword, string in fields.items()
        if keyword.startswith("msgstr")
    )


EXTRACTORS: Mapping[str, Callable[[str], list[str]]] = {
    "text": text,
    "code": code,
    "docstrings": docstrings,
    "python_strings": python_strings,
    "dialogue": dialogue,
    "gettext": gettext,
}
"""The names that a corpus file may use."""


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
        return ast.parse(source)


def _documented(source: str) -> list[Documented]:
    """Everything in the module that has a docstring, in the order of the docstrings."""
    owners: list[Documented] = []
    pending: list[ast.AST] = [_parse(source)]
    while pending:  # through statements alone, a tenth of what ast.walk goes through
        node = pending.pop()
        if isinstance(node, Documented) and _docstring(node) is not None:
            owners.append(node)
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            pending += getattr(node, block, ())
    return sorted(owners, key=lambda owner: (owner.body[0].lineno, owner.body[0].col_offset))


def _docstring(owner: Documented) -> str | None:
    first = owner.body[0] if owner.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.value.value
    return None


def _assigned_literals(source: str) -> Iterator[object]:
    for statement in _parse(source).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            try:
                yield ast.literal_eval(statement.value)
            except ValueError:
                continue  # a call or a name: no literal


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (string for item in value.values() for string in _strings(item))
    elif isinstance(value, tuple | list):
        yield from (string for item in value for string in _strings(item))


def _gettext_entries(content: str) -> Iterator[tuple[bool, dict[str, str]]]:
    """(fuzzy, {keyword: string}) for each entry; an entry ends where the next one's comment, context or id begins."""
    fuzzy, fields, keyword = False, dict[str, str](), ""
    for line in content.splitlines():
        match = re.match(r'(?:(msgctxt|msgid_plural|msgid|msgstr(?:\[\d+\])?)\s+)?(".*")\s*$', line)
        starts_entry = line.startswith("#") or (match and match[1] in ("msgctxt", "msgid"))
        if starts_entry and any(name.startswith("msgstr") for name in fields):
            yield fuzzy, fields
            fuzzy, fields = False, {}
        if line.startswith("#,"):
            fuzzy = fuzzy or "fuzzy" in line
        elif match:
            keyword = match[1] or keyword
            fields[keyword] = fields.get(keyword, "") + ast.literal_eval(match[2])
    yield fuzzy, fields


def _joined(strings: Iterator[str]) -> list[str]:
    """Documents of at least ``JOINED_BYTES`` (the last may be shorter), a blank line between the strings.

    Length in characters decides nothing: a message of three Chinese characters counts like any other.
    """
    documents: list[str] = []
    pending: list[str] = []
    for string in strings:
        if string.strip():
            pending.append(string.strip())
        if sum(len(piece.encode()) for piece in pending) >= JOINED_BYTES:
            documents.append("\n\n".join(pending) + "\n")
            pending = []
    return [*documents, "\n\n".join(pending) + "\n"] if pending else documents
