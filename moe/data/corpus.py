"""A corpus: a YAML file that lists labelled sources of text, and the documents that they hold on this machine.

Each source is a mapping with these keys:

``domain``
    the label of its text; several sources may share one
``share``
    the domain's part of the training tokens, relative to the other domains'; written at one of its sources (default 1)
``kind``
    where the text is: ``package`` (files of an installed distribution, never imported), ``stdlib`` (the Python standard
    library), ``files`` (on disk, relative to the corpus file) or ``hub`` (a data set on the Hugging Face hub)
``extract``
    how documents come out of a file: one of :data:`moe.data.extract.EXTRACTORS` (default ``text``: the whole file)
``include``, ``exclude``
    globs of the files to take and to leave: ``*`` stays inside a folder, ``**`` goes through folders

and those of its kind, the fields of the classes below. A source that is not there is named, and the others go on.
"""

import codecs
import difflib
import glob
import os
import re
import socket
import sys
import sysconfig
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from fractions import Fraction
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from math import gcd, lcm
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import yaml

from moe.data.extract import EXTRACTORS
from moe.errors import UserError

RECORD_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Files of records, and the builder of ``datasets`` that reads them."""

NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
"""Folders below the standard library's that hold installed packages, caches or tests."""

LONGEST_PERIOD = 1_000_000
"""Sequences after which the order of the domains repeats; shares with very many digits would need more."""

PROBE_SECONDS = 3.0
"""How long the hub may take to accept a connection before it counts as out of reach."""


@dataclass(frozen=True)
class Document:
    """A piece of text with a name that stays the same wherever and whenever it is read."""

    name: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    """A file of a source; ``stamp`` changes with its content: the size and, for a user's files, the time of change."""

    name: str
    path: Path
    stamp: tuple[int, ...]


@dataclass(frozen=True)
class Listing:
    """A source as it is on this machine: what it comes from, by version, and its files (none for a data set)."""

    source: "Source"
    origin: str
    files: tuple[SourceFile, ...] = ()


class MissingSourceError(Exception):
    """A source is not on this machine; the message says what is missing and how to get it."""


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """What every kind of source has."""

    kind: ClassVar[str]
    domain: str
    share: Fraction | None = None
    extract: str = "text"

    @abstractmethod
    def find(self, folder: Path) -> Listing:
        """The source as it is now; ``folder`` is where the corpus file lies. Raises MissingSourceError."""

    def read(self, listing: Listing, left_out: list[str]) -> Iterator[Document]:
        """Its documents; names of files that cannot be read that way are appended to ``left_out``."""
        for file in listing.files:
            try:
                content = file.path.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
                texts = EXTRACTORS[self.extract](content.replace("\r\n", "\n"))
                "".join(texts).encode()  # a literal may spell half a surrogate pair
            except (ValueError, SyntaxError):  # not Unicode, or not what the extractor expects
                left_out.append(file.name)
                continue
            except OSError as error:
                raise UserError(f"{file.path}: cannot be read: {error.strerror}") from error
            yield from _named(file.name, texts)


@dataclass(frozen=True, kw_only=True)
class Package(Source):
    """Files of installed distributions, by globs over the paths that they list."""

    kind = "package"
    distribution: str
    """name of the distribution; "*" for all that are installed"""
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    extra: str | None = None
    """the extra of this project that installs it"""

    def find(self, folder: Path) -> Listing:
        """The files on disk; raises MissingSourceError if the distribution is not installed or holds none."""
        try:
            chosen = _every_distribution() if self.distribution == "*" else [distribution(self.distribution)]
        except PackageNotFoundError:
            remedy = f"pip install -e '.[{self.extra}]'" if self.extra else f"pip install {self.distribution}"
            raise MissingSourceError(f"the package {self.distribution} is not installed: {remedy}") from None
        wanted = _matcher(self.include, self.exclude)
        files, origins = list[tuple[str, Path]](), list[str]()
        for found in chosen:
            metadata = found.metadata  # parsed anew whenever it is asked for
            owner, version, root = metadata["Name"], metadata["Version"], Path(str(found.locate_file("")))
            origins.append(f"{owner} {version}")
            files += [(f"{owner}:{name}", root / name) for name in _listed_files(owner, version, root) if wanted(name)]
        return Listing(
            self, ", ".join(origins), _present(files, f"{self.distribution} holds no file like", self.include)
        )


@dataclass(frozen=True, kw_only=True)
class StandardLibrary(Source):
    """Files of the Python standard library, without its tests and without installed packages."""

    kind = "stdlib"
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    def find(self, folder: Path) -> Listing:
        """The files on disk; raises MissingSourceError if none is like ``include``."""
        root = Path(sysconfig.get_path("stdlib"))
        wanted = _matcher(self.include, self.exclude)
        files = [(f"stdlib:{name}", root / name) for name in _library_files(root) if wanted(name)]
        origin = f"Python {'.'.join(map(str, sys.version_info[:3]))}"
        return Listing(self, origin, _present(files, "the standard library holds no file like", self.include))


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """Files on disk: text, or records (.jsonl, .json, .parquet) of which one field is the text."""

    kind = "files"
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    field: str = "text"
    """the field of a record that holds the text"""

    def find(self, folder: Path) -> Listing:
        """The files on disk; raises MissingSourceError if none is like ``include``."""
        unwanted = _matcher(self.exclude, ())
        names = {
            name.replace(os.sep, "/")
            for pattern in self.include
            for name in glob.glob(str(Path(pattern).expanduser()), root_dir=folder, recursive=True)  # noqa: PTH207
        }
        files = [(name, folder / name) for name in sorted(names) if not unwanted(name)]
        present = _present(files, f"below {folder} is no file like", self.include)
        stamped = (SourceFile(f.name, f.path, (*f.stamp, f.path.stat().st_mtime_ns)) for f in present)
        return Listing(self, "files", tuple(stamped))

    def read(self, listing: Listing, left_out: list[str]) -> Iterator[Document]:
        """The documents, file by file; raises UserError for records that cannot be read or lack the field."""
        for file in listing.files:
            if file.path.suffix not in RECORD_SUFFIXES:
                yield from super().read(Listing(self, listing.origin, (file,)), left_out)
                continue
            import datasets  # takes seconds, and most corpora need none of it

            try:
                builder = RECORD_SUFFIXES[file.path.suffix]
                records = datasets.load_dataset(builder, data_files=str(file.path), split="train", streaming=True)
                yield from self._documents(file.name, records)
            except UserError:
                raise
            except Exception as error:  # any of a dozen libraries' classes
                raise UserError(f"{file.path}: cannot be read as {builder}: {_first_line(error)}") from error

    def _documents(self, name: str, records: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
        for index, record in enumerate(records):
            content = _text_field(record, self.field, name)
            yield from _named(f"{name}#{index}", EXTRACTORS[self.extract](content))


@dataclass(frozen=True, kw_only=True)
class Hub(Source):
    """A data set on the Hugging Face hub, streamed from its beginning up to a number of bytes."""

    kind = "hub"
    dataset: str
    max_bytes: int
    """bytes of text to take, in whole documents"""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    """branch, tag or commit; a commit makes the text the same for ever"""
    field: str = "text"

    def find(self, folder: Path) -> Listing:
        """The data set, unseen: a network is needed only to read it."""
        parts = (self.dataset, self.config, self.split, self.revision, self.field, self.max_bytes)
        return Listing(self, f"hub {' '.join(str(part) for part in parts if part is not None)}")

    def read(self, listing: Listing, left_out: list[str]) -> Iterator[Document]:
        """Stream the documents; raises UserError, within seconds, if the hub or the data set cannot be reached."""
        _require_hub(self.dataset)
        import datasets  # takes seconds, and most corpora need none of it

        taken = 0
        try:
            records = datasets.load_dataset(
                self.dataset, self.config, split=self.split, revision=self.revision, streaming=True
            )
            for index, record in enumerate(records):
                content = _text_field(record, self.field, self.dataset)
                for document in _named(f"{self.dataset}#{index}", EXTRACTORS[self.extract](content)):
                    taken += len(document.text.encode())
                    if taken > self.max_bytes:
                        return
                    yield document
        except UserError:
            raise
        except Exception as error:  # any of a dozen libraries' classes
            raise UserError(f"data set {self.dataset}: cannot be streamed: {_first_line(error)}") from error


KINDS: Mapping[str, type[Source]] = {kind.kind: kind for kind in (Package, StandardLibrary, Files, Hub)}


@dataclass(frozen=True)
class Corpus:
    """The sources of one corpus file."""

    path: Path
    sources: tuple[Source, ...]

    def find(self) -> tuple[list[Listing], list[str]]:
        """The sources that are on this machine, and one line for each that is not; raises UserError if none is."""
        found, missing = list[Listing](), list[str]()
        for source in self.sources:
            try:
                found.append(source.find(self.path.parent))
            except MissingSourceError as error:
                missing.append(f"{source.domain}: {error}")
        if not found:
            raise UserError(f"{self.path}: none of its sources is there; {'; '.join(dict.fromkeys(missing))}")
        return found, missing

    def shares(self, domains: Sequence[str]) -> dict[str, Fraction]:
        """The exact part of the training tokens that each of ``domains`` gets; they sum to 1."""
        weights = {
            domain: next((s.share for s in self.sources if s.domain == domain and s.share is not None), Fraction(1))
            for domain in domains
        }
        return {domain: weight / sum(weights.values()) for domain, weight in weights.items()}


def whole_shares(shares: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in the ratio of ``shares``; their sum is the period in which shares can be exact."""
    scaled = [int(share * lcm(*(share.denominator for share in shares))) for share in shares]
    return [weight // gcd(*scaled) for weight in scaled]


# -------------------------------------------------------------------------------------------------- the corpus file


def read_corpus(path: Path) -> Corpus:
    """Read a corpus file; raises UserError with the file, the line and the nearest valid name."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: the corpus file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the corpus file is not UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise UserError(f"{path}: a corpus is a list of sources, each a mapping with domain, kind and more")
    sources, share_line = list[Source](), dict[str, int]()
    for node in root.value:
        source = _source(node, path)
        if source.share is not None:
            line = node.start_mark.line + 1
            if source.domain in share_line:
                raise _fault(
                    path, line, f"share of {source.domain}: already written at line {share_line[source.domain]}"
                )
            share_line[source.domain] = line
        sources.append(source)
    corpus = Corpus(path, tuple(sources))
    needed = sum(whole_shares([*corpus.shares([source.domain for source in sources]).values()]))
    if needed > LONGEST_PERIOD:
        raise UserError(f"{path}: the shares repeat only after {needed} sequences; write them with fewer digits")
    return corpus


def _source(node: yaml.Node, path: Path) -> Source:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        raise _fault(path, line, "a source is a mapping with domain, kind and more")
    entries: dict[str, tuple[int, yaml.Node]] = {}
    for key_node, value in node.value:
        key = str(key_node.value)
        if key in entries:
            raise _fault(path, key_node.start_mark.line + 1, f"{key}: written twice")
        entries[key] = (key_node.start_mark.line + 1, value)
    if "kind" not in entries:
        raise _fault(path, line, f"the source has no kind: {', '.join(KINDS)}")
    kind_line, kind_node = entries.pop("kind")
    kind = KINDS.get(str(kind_node.value))
    if kind is None:
        raise _fault(path, kind_line, f"kind: {_not_one_of(str(kind_node.value), KINDS)}")
    allowed = {entry.name: entry for entry in fields(kind)}
    values: dict[str, Any] = {}
    for key, (key_line, value) in entries.items():
        if key not in allowed:
            raise _fault(path, key_line, f"a {kind.kind} source has no such key: {_not_one_of(key, allowed)}")
        try:
            values[key] = _value(key, value)
        except ValueError as error:
            raise _fault(path, key_line, f"{key}: {error}") from error
    for name, entry in allowed.items():
        if entry.default is MISSING and name not in values:
            raise _fault(path, line, f"a {kind.kind} source needs {name}")
    return kind(**values)


def _value(key: str, node: yaml.Node) -> Any:
    """The checked value of ``key``; raises ValueError with what is wrong with it."""
    scalar = node.value if isinstance(node, yaml.ScalarNode) else None
    if key in ("include", "exclude"):
        items = [node] if scalar is not None else node.value if isinstance(node, yaml.SequenceNode) else []
        if not items or not all(isinstance(item, yaml.ScalarNode) and item.value for item in items):
            raise ValueError("must be a glob or a list of globs")
        return tuple(str(item.value) for item in items)
    if not scalar:
        raise ValueError("must be a single value")
    if key == "share":
        try:
            share = Fraction(scalar)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if share <= 0:
            raise ValueError(f"is {scalar}, and must be a positive number")
        return share
    if key == "max_bytes":
        digits = scalar.replace("_", "")
        if not digits.isdecimal() or int(digits) < 1:
            raise ValueError(f"is {scalar}, and must be a positive whole number")
        return int(digits)
    if key == "domain" and not re.fullmatch(r"\w[\w.-]*", scalar):
        raise ValueError(f"is {scalar!r}, and must be a name of letters, digits, '-', '_' and '.': it names files")
    if key == "extract" and scalar not in EXTRACTORS:
        raise ValueError(_not_one_of(scalar, EXTRACTORS))
    return str(scalar)


def _fault(path: Path, line: int, reason: str) -> UserError:
    return UserError(f"{path}:{line}: {reason}")


def _not_one_of(given: str, valid: Mapping[str, object]) -> str:
    nearest = difflib.get_close_matches(given, valid, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{given!r} is none of {', '.join(valid)}{hint}"


# ------------------------------------------------------------------------------------------------------ files on disk


def _matcher(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """A predicate on paths with forward slashes: like one of ``include`` and none of ``exclude``."""
    wanted = re.compile("|".join(map(_glob_expression, include)) or r"(?!)")
    unwanted = re.compile("|".join(map(_glob_expression, exclude)) or r"(?!)")
    return lambda name: bool(wanted.fullmatch(name)) and not unwanted.fullmatch(name)


def _glob_expression(pattern: str) -> str:
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(pieces.get(piece, re.escape(piece)) for piece in re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", pattern))


def _present(files: Sequence[tuple[str, Path]], complaint: str, patterns: Sequence[str]) -> tuple[SourceFile, ...]:
    found = tuple(SourceFile(name, path, (path.stat().st_size,)) for name, path in files if path.is_file())
    if not found:
        raise MissingSourceError(f"{complaint} {', '.join(patterns)}")
    return found


@cache
def _library_files(root: Path) -> tuple[str, ...]:
    names = list[str]()
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_LIBRARY]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    return tuple(sorted(names))


def _every_distribution() -> list[Distribution]:
    """All that are installed, by name; of two with one name, the first on the import path."""
    found = dict[str, Distribution]()
    for candidate in distributions():
        found.setdefault(re.sub(r"[-_.]+", "-", candidate.metadata["Name"] or "").lower(), candidate)
    return [found[name] for name in sorted(found) if name]


@cache
def _listed_files(name: str, version: str, root: Path) -> tuple[str, ...]:
    """The paths that a distribution lists; cached, because 26 languages come out of one with thousands."""
    return tuple(sorted(str(file) for file in distribution(name).files or []))


def _named(name: str, texts: Sequence[str]) -> Iterator[Document]:
    for index, content in enumerate(texts):
        yield Document(name if len(texts) == 1 else f"{name}#{index}", content)


# ------------------------------------------------------------------------------------------------- records and the hub


def _text_field(record: Mapping[str, Any], name: str, where: str) -> str:
    content = record.get(name)
    if isinstance(content, str):
        return content
    texts = {key: value for key, value in record.items() if isinstance(value, str)}
    raise UserError(f"{where}: field: {_not_one_of(name, texts)}" if texts else f"{where}: no field of it is text")


def _require_hub(dataset: str) -> None:
    """Raise UserError at once if the hub is switched off or does not answer; its client would retry for long."""
    from huggingface_hub import constants  # comes with datasets

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"data set {dataset}: HF_HUB_OFFLINE is set; unset it, or remove the source from the corpus")
    endpoint = urlsplit(constants.ENDPOINT)
    proxy = getproxies().get(endpoint.scheme)
    address = urlsplit(proxy if proxy and "//" in proxy else f"//{proxy}") if proxy else endpoint
    port = address.port or (443 if address.scheme == "https" else 80)
    if not _answers(address.hostname or "", port):
        raise UserError(
            f"data set {dataset}: {address.hostname} does not answer within {PROBE_SECONDS:g} s; "
            "connect to a network, or remove the source from the corpus"
        )


def _answers(host: str, port: int) -> bool:
    """Whether a connection is accepted in time; in a thread, because looking up the name has no time-out of its own."""
    accepted = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
            accepted.set()
        except OSError:
            return

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(PROBE_SECONDS)
    return accepted.is_set()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
