"""From a corpus file to token streams on disk, once: read, hold out, train the tokenizer, encode, cache.

The cache folder holds one folder per fingerprint, the digest of everything that decides the tokens. Shares decide only
the order of the batches, so changing them prepares nothing anew. A folder appears whole, by a rename, or not at all.
"""

import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tqdm import tqdm

from moe.config import DataConfig
from moe.data.corpus import Corpus, Document, Listing, read_corpus
from moe.data.overlap import repeated_shares
from moe.data.tokenizer import (
    PUBLISHED,
    Tokenizer,
    load_tokenizer,
    tokenizer_file,
    tokenizer_identity,
    train_bpe,
)
from moe.errors import UserError

FORMAT = 3
"""Raised whenever the same settings would give other files."""

BPE_SAMPLE_BYTES = 2_000_000
"""Training text per domain that the tokenizer is trained on: every domain has the same say in the vocabulary."""

ENCODED_AT_ONCE = 2_000_000
"""Bytes of text handed to the tokenizer together: enough for all cores, little enough to show progress."""

MOST_REPEATED = 0.2
"""Share of a held-out document that other documents may have too."""

TokenStream = npt.NDArray[np.unsignedinteger[Any]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class HeldOut:
    """The validation documents of a domain."""

    names: tuple[str, ...]
    documents: tuple[bytes, ...]
    """the text of each, as UTF-8"""
    stream: TokenStream
    """their tokens, end of text before each: ``<eot> first document <eot> second document``"""

    @property
    def text(self) -> bytes:
        """All documents, one after the other: what a compressor is given, and what bits per byte divide by."""
        return b"".join(self.documents)

    @property
    def n_bytes(self) -> int:
        """Bytes of text that scoring every text token once accounts for."""
        return sum(map(len, self.documents))


@dataclass(frozen=True)
class PreparedCorpus:
    """Everything that training and evaluation read."""

    folder: Path
    """where it is cached"""
    shares: Mapping[str, Fraction]
    """each domain's exact part of the training tokens; they sum to 1"""
    tokenizer: Tokenizer
    train: Mapping[str, TokenStream]
    """per domain the tokens of its documents in a fixed shuffled order, each followed by end of text; memory-mapped"""
    validation: Mapping[str, HeldOut]
    manifest: Mapping[str, Any]
    """versions of everything that was read, counts per domain, digests of the files, shares"""

    @property
    def domains(self) -> tuple[str, ...]:
        """The labels, in the order of the corpus file; a batch's ``domain`` is an index into them."""
        return tuple(self.shares)


def prepare(config: DataConfig, base: Path, say: Say = lambda line: print(line, file=sys.stderr)) -> PreparedCorpus:
    """The corpus of ``config`` as token streams: out of the cache, or built and then cached.

    ``base`` is the folder of the configuration file, to which ``corpus`` and ``tokenizer`` are relative where they are
    found there, and to the working directory otherwise. ``say`` takes one line about each source that is missing and
    each stage of building. Raises UserError, with the place and the remedy, for anything that cannot be used.
    """
    corpus = read_corpus(find_corpus(config, base))
    tokenizer_name = tokenizer_identity(config.tokenizer, config.vocab_size, base)
    listings, missing = corpus.find()
    for line in missing:
        say(f"left out: {line}")
    fingerprint = _fingerprint(config, tokenizer_name, listings)
    cache = Path(config.cache).expanduser()
    folder = cache / fingerprint
    try:
        if folder.exists():
            damage = _damage(folder)
            if damage is None:
                return _load(folder, corpus)
            say(f"the cached corpus {folder} is damaged ({damage}): building it again")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=cache, ignore_cleanup_errors=True) as building:
            target = Path(building) / fingerprint
            target.mkdir()
            _build(config, base, corpus, listings, tokenizer_name, target, say)
            _publish(target, folder)
    except OSError as error:
        raise UserError(f"data.cache: {error.filename or cache}: {error.strerror or error}") from error
    return _load(folder, corpus)


def find_corpus(config: DataConfig, base: Path) -> Path:
    """The corpus file of ``config``: relative to ``base`` where there is one, to the working directory otherwise.

    Raises UserError if there is neither.
    """
    name = Path(config.corpus).expanduser()
    candidates = list(dict.fromkeys([base / name, name]))
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"data.corpus: there is no file {' nor '.join(map(str, candidates))}; name one, such as "
        "configs/corpora/default.yaml of the repository (looked for in the configuration's folder, then from here)"
    )


def resolve_paths(config: DataConfig, base: Path) -> DataConfig:
    """``config`` with its corpus, its tokenizer (if that is a file) and its cache as absolute paths."""
    tokenizer = config.tokenizer
    if tokenizer not in ("bpe", *PUBLISHED):
        tokenizer = str(tokenizer_file(tokenizer, base).resolve())
    return replace(
        config,
        corpus=str(find_corpus(config, base).resolve()),
        tokenizer=tokenizer,
        cache=str(Path(config.cache).expanduser().resolve()),
    )


def reopen(config: DataConfig, manifest: Mapping[str, Any], base: Path, say: Say) -> PreparedCorpus:
    """The corpus that ``manifest`` describes, to go on with a run: from the cache, else prepared again.

    Packages may have come and gone since, which would give the same sources another fingerprint; the cached tokens are
    still the run's own. Raises UserError where they are gone from the cache and cannot be made again the same.
    """
    cached = Path(config.cache).expanduser() / str(manifest["fingerprint"])
    if cached.is_dir() and _damage(cached) is None:
        corpus = _load(cached, read_corpus(find_corpus(config, base)))
    else:
        corpus = prepare(config, base, say)
    if corpus.manifest["files"] != manifest["files"] or corpus.manifest["shares"] != manifest["shares"]:
        raise UserError(
            f"data.corpus: {config.corpus} gives other tokens or shares than the run was trained on, and the cache "
            f"{cached} no longer holds those; install the versions that the run's corpus.json names"
        )
    return corpus


def _fingerprint(config: DataConfig, tokenizer_name: str, listings: Sequence[Listing]) -> str:
    """Twenty hexadecimal digits of a digest of all that decides the cached files; not the shares."""
    decides = {
        "format": FORMAT,
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "tokenizer": tokenizer_name,
        "validation_bytes": config.validation_bytes,
        "max_bytes": config.max_bytes,
        "sources": [
            (repr(replace(found.source, share=None)), found.origin, [(file.name, file.stamp) for file in found.files])
            for found in listings
        ],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:20]


# -------------------------------------------------------------------------------------------------------------- build


@dataclass(frozen=True)
class Split:
    """The documents of a domain on both sides, each in its fixed shuffled order."""

    train: list[Document]
    validation: list[Document]


def _build(
    config: DataConfig,
    base: Path,
    corpus: Corpus,
    listings: Sequence[Listing],
    tokenizer_name: str,
    target: Path,
    say: Say,
) -> None:
    """Write the whole folder ``target``, the manifest last."""
    by_domain, sources, duplicates = _read(listings, say)
    repeats = _repeats(by_domain.values())
    splits = {
        domain: split_documents(domain, documents, config.validation_bytes, config.max_bytes, repeats)
        for domain, documents in by_domain.items()
    }
    if not splits:
        raise UserError(f"{corpus.path}: no source holds a document")
    if config.tokenizer == "bpe":
        say(f"training a tokenizer of {config.vocab_size} tokens")
        tokenizer = train_bpe(_tokenizer_sample(splits.values()), config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer, base)
    tokenizer.save(target / "tokenizer.json")
    say(f"encoding {len(splits)} domains")
    total = sum(_size(document) for split in splits.values() for document in (*split.train, *split.validation))
    counts = {}
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False, desc="encoding") as progress:
        for domain, split in splits.items():
            counts[domain] = _write_domain(domain, split, tokenizer, target, progress.update)
    manifest = {
        "format": FORMAT,
        "fingerprint": target.name,
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "tokenizer": {"from": tokenizer_name, "size": tokenizer.size, "end_of_text": tokenizer.end_of_text},
        "sources": sources,
        "duplicates_removed": duplicates,
        "domains": counts,
        "files": {path.name: _digest(path) for path in sorted(target.iterdir())},
    }
    (target / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _read(listings: Sequence[Listing], say: Say) -> tuple[dict[str, list[Document]], list[dict[str, Any]], int]:
    """The distinct documents per domain, what the manifest says of each source, and how many repeats were left out.

    Two documents are the same if they differ in white space alone; the first in the order of the corpus file stays,
    so that no text is both trained on and held out, in this domain or another.
    """
    by_domain, sources, seen, duplicates = dict[str, list[Document]](), list[dict[str, Any]](), set[bytes](), 0
    for listing in listings:
        source, left_out, kept = listing.source, list[str](), list[Document]()
        for document in source.read(listing, left_out):
            digest = hashlib.blake2b(" ".join(document.text.split()).encode(), digest_size=16).digest()
            if digest in seen:
                duplicates += 1
            elif document.text.strip():
                seen.add(digest)
                kept.append(document)
        size = sum(map(_size, kept))
        say(f"read {source.domain}: {len(kept)} documents, {size / 1e6:.2f} MB from {_shortened(listing.origin)}")
        if left_out:
            say(f"left out: {len(left_out)} files that cannot be read as {source.extract}, the first {left_out[0]}")
        sources.append(
            {
                "domain": source.domain,
                "kind": source.kind,
                "from": listing.origin,
                "extract": source.extract,
                "files": len(listing.files),
                "files_left_out": len(left_out),
                "documents": len(kept),
                "bytes": size,
            }
        )
        if kept:
            by_domain.setdefault(source.domain, []).extend(kept)
    return by_domain, sources, duplicates


def _repeats(domains: Iterable[Sequence[Document]]) -> dict[Document, float]:
    """The share of each document that other documents have too."""
    documents = [document for domain in domains for document in domain]
    shares = repeated_shares([document.text for document in documents])
    return dict(zip(documents, shares, strict=True))


def split_documents(
    domain: str,
    documents: Sequence[Document],
    validation_bytes: int,
    max_bytes: int | None,
    repeats: Mapping[Document, float] = MappingProxyType({}),
) -> Split:
    """Whole documents for validation until there are ``validation_bytes``, the others for training up to ``max_bytes``.

    Documents are taken in the order of a hash of their names, so each keeps its place when others are added, and two
    that come out of one file (its code and its docstrings) go the same way. One of which more than a fifth stands in
    other documents (``repeats``) is left to training, where its like are. No more than a tenth of the domain is held
    out, nor more than twice ``validation_bytes``: a document that would exceed that is passed over. If all would, the
    tenth alone counts; and where every document is longer than it (one long text, say), the end of the first is held
    out, cut at a line. Likewise the start of the first is trained on where every document is longer than ``max_bytes``.
    Raises UserError for a text too short to be divided.
    """
    shuffled = sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())
    tenth = sum(map(_size, shuffled)) // 10
    own = [document for document in shuffled if repeats.get(document, 0.0) <= MOST_REPEATED]
    validation, _ = _take(own, until=validation_bytes, at_most=min(tenth, 2 * validation_bytes))
    if not validation:
        validation, _ = _take(own, until=1, at_most=tenth)
    held_out = set(validation)
    rest = [document for document in shuffled if document not in held_out]
    if not validation:
        start, end = _cut(rest[0], _size(rest[0]) - min(validation_bytes, tenth), later=True)
        validation, rest = [end], [start, *rest[1:]]
    train = rest
    if max_bytes is not None:
        train, _ = _take(rest, until=max_bytes, at_most=max_bytes)
        train = train or [_cut(rest[0], max_bytes, later=False)[0]]
    if not all(document.text for document in (*train, *validation)):
        raise UserError(f"domain {domain}: its text is too short to be divided into training and validation")
    return Split(train, validation)


def _take(documents: Sequence[Document], until: int, at_most: int) -> tuple[list[Document], list[Document]]:
    """(taken, left): in order, the documents that fit into ``at_most`` bytes, until there are ``until``."""
    taken, left, size = list[Document](), list[Document](), 0
    for document in documents:
        if size < until and size + _size(document) <= at_most:
            taken.append(document)
            size += _size(document)
        else:
            left.append(document)
    return taken, left


def _cut(document: Document, at: int, later: bool) -> tuple[Document, Document]:
    """Two documents out of one, divided after the line that ends next to byte ``at``, before it or ``later``.

    Where there is no such line, after a word; where there is none either, after a character.
    """
    text, here = document.text, len(document.text.encode()[:at].decode(errors="ignore"))
    breaks = [text.find(mark, here) if later else text.rfind(mark, 0, here) for mark in "\n "]
    length = next((found + 1 for found in breaks if 0 < found < len(text) - 1), here)
    return Document(f"{document.name} (start)", text[:length]), Document(f"{document.name} (end)", text[length:])


def _tokenizer_sample(splits: Iterable[Split]) -> Iterator[str]:
    """Training text, as much from each domain (as far as it reaches); the last document is cut to fit."""
    for split in splits:
        left = BPE_SAMPLE_BYTES
        for document in split.train:
            if left <= 0:
                break
            yield document.text.encode()[:left].decode(errors="ignore")
            left -= _size(document)


def _write_domain(
    domain: str, split: Split, tokenizer: Tokenizer, target: Path, advance: Callable[[int], object]
) -> dict[str, dict[str, int]]:
    """Write the files of one domain; return its documents, bytes and tokens on both sides.

    Training tokens count the end of text after each document, validation tokens are those of the text alone.
    """
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.uint32
    end = np.array([tokenizer.end_of_text], dtype)
    train = [piece for ids in _encode(split.train, tokenizer, advance) for piece in (np.array(ids, dtype), end)]
    stream = np.concatenate(train)
    np.save(target / f"{domain}.train.npy", stream)
    encoded = list(_encode(split.validation, tokenizer, advance))
    for document, ids in zip(split.validation, encoded, strict=True):
        if tokenizer.decode(ids) != document.text:
            raise UserError(
                f"data.tokenizer: it does not give back {document.name} as it was, so bits per byte would be wrong; "
                "choose a byte-level tokenizer"
            )
    np.save(
        target / f"{domain}.validation.npy",
        np.concatenate([piece for ids in encoded for piece in (end, np.array(ids, dtype))]),
    )
    (target / f"{domain}.validation.txt").write_bytes(b"".join(d.text.encode() for d in split.validation))
    table = [{"name": document.name, "bytes": _size(document)} for document in split.validation]
    (target / f"{domain}.validation.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    return {
        "train": {
            "documents": len(split.train),
            "bytes": sum(map(_size, split.train)),
            "tokens": len(stream),
        },
        "validation": {
            "documents": len(split.validation),
            "bytes": sum(map(_size, split.validation)),
            "tokens": sum(map(len, encoded)),
        },
    }


def _encode(
    documents: Sequence[Document], tokenizer: Tokenizer, advance: Callable[[int], object]
) -> Iterator[list[int]]:
    batch, size = list[str](), 0
    for index, document in enumerate(documents):
        batch.append(document.text)
        size += _size(document)
        if size >= ENCODED_AT_ONCE or index == len(documents) - 1:
            yield from tokenizer.encode_batch(batch)
            advance(size)
            batch, size = [], 0


def _size(document: Document) -> int:
    return len(document.text) if document.text.isascii() else len(document.text.encode())


def _shortened(origin: str) -> str:
    return origin if len(origin) <= 60 else f"{origin.count(',') + 1} packages"


# -------------------------------------------------------------------------------------------------------------- cache


def _publish(built: Path, folder: Path) -> None:
    """Give ``built`` its name, unless another process was first with a sound one; a damaged one makes way."""
    while True:
        try:
            built.rename(folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if _damage(folder) is None:
            return
        with tempfile.TemporaryDirectory(prefix=".damaged-", dir=folder.parent) as aside:
            try:
                folder.rename(Path(aside) / "corpus")
            except FileNotFoundError:
                continue  # another process moved it out of the way


def _damage(folder: Path) -> str | None:
    """What is wrong with a cached folder, or None: every file must have the size and digest of the manifest."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
            if _digest(path) != expected:
                return f"the digest of {name} differs"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is unreadable"
    return None


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _load(folder: Path, corpus: Corpus) -> PreparedCorpus:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    domains = list(manifest["domains"])
    shares = corpus.shares(domains)
    return PreparedCorpus(
        folder=folder,
        shares=shares,
        tokenizer=Tokenizer.load(folder / "tokenizer.json"),
        train={domain: np.load(folder / f"{domain}.train.npy", mmap_mode="r") for domain in domains},
        validation={domain: _load_held_out(folder, domain) for domain in domains},
        manifest=manifest | {"shares": {domain: str(share) for domain, share in shares.items()}},
    )


def _load_held_out(folder: Path, domain: str) -> HeldOut:
    table = json.loads((folder / f"{domain}.validation.json").read_text(encoding="utf-8"))
    text = (folder / f"{domain}.validation.txt").read_bytes()
    ends = np.cumsum([document["bytes"] for document in table])
    return HeldOut(
        names=tuple(document["name"] for document in table),
        documents=tuple(text[end - document["bytes"] : end] for end, document in zip(ends, table, strict=True)),
        stream=np.load(folder / f"{domain}.validation.npy", mmap_mode="r"),
    )
