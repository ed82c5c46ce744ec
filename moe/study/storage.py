"""A routing record on disk: a folder of Parquet files, one row a token, that any tool reads in one line.

    pandas.read_parquet(folder)
    polars.read_parquet(folder + "/*.parquet")
    datasets.load_dataset("parquet", data_files=folder + "/*.parquet")

The schema, format 1, of N tokens and of each mixture block b with E experts and K places a token. Nothing is null.

==============  =======================  ===============================================================================
column          type                     meaning
==============  =======================  ===============================================================================
token_id        int32                    the token as the model read it
text            string                   its text; ``<id>`` where the vocabulary is unknown
target_id       int32                    the token that came after
predicted_id    int32                    the token that the model thought most likely to come after
loss            float32                  cross-entropy of the target, in nats
position        int32                    place in the sequence, from 0
sequence        int32                    number of the sequence, from 0; its rows lie together, in order
domain          string                   label of the sequence's text
selected_b      fixed list of K int16    chosen experts, best first; -1 for an empty place
weights_b       fixed list of K float32  what multiplied each expert's output; 0 for empty places and dropped ones
dropped_b       fixed list of K bool     whether the assignment was beyond its expert's capacity
scores_b        fixed list of E float16  score of every expert; optional
==============  =======================  ===============================================================================

Weights keep every bit, since replaying a record must give what was recorded; scores, of which there are E / K times as
many, keep three digits. Text and domain are dictionary-encoded in the file.

``shard-00000.parquet`` and so on hold the rows, in order. ``_record.json``, which readers of Parquet pass over by its
underscore, holds what is not of a token: ``format``, ``source``, ``step``, ``domains`` (in the order of the indices of
:class:`~moe.study.record.Record`), ``vocabulary`` (text of each id, or null), ``layers`` (``block``, ``n_experts``,
``top_k``, ``scores``) and ``shards`` (``name``, ``rows``). The schema metadata of each shard repeats it under the key
``routing_record``, without vocabulary and shards. A folder appears whole, by a rename, or not at all; every page has a
checksum.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moe.errors import UserError
from moe.study.record import Layer, Record

FORMAT = 1
"""raised whenever a reader of the old files would misread the new ones"""
HEADER = "_record.json"
METADATA_KEY = "routing_record"

ROW_GROUP_BYTES = 16 << 20
"""what the writer and the reader hold in memory at a time, before compression"""
ROW_GROUPS_A_SHARD = 16

MOST_EXPERTS = 32767
"""a layer may have: ids are int16 on disk"""

_INTS = ("token_id", "target_id", "predicted_id", "position", "sequence")


@dataclass(frozen=True)
class LayerShape:
    """What one mixture layer's columns hold."""

    block: int
    """number of the block, from 0"""
    n_experts: int
    """E"""
    top_k: int
    """K, the places of a token"""
    scores: bool
    """whether the scores of all experts are there"""


@dataclass(frozen=True)
class Header:
    """What is known of a record without reading its rows."""

    source: str
    step: int | None
    domains: tuple[str, ...]
    vocabulary: tuple[str, ...] | None
    layers: tuple[LayerShape, ...]
    shards: tuple[tuple[str, int], ...] = ()
    """name and rows of each file"""

    @property
    def n_tokens(self) -> int:
        """N."""
        return sum(rows for _, rows in self.shards)


# -------------------------------------------------------------------------------------------------------------- writing


class RecordWriter:
    """Writes a record part by part; what it holds in memory does not grow with the tokens.

    ``with RecordWriter(folder) as writer: writer.append(part)``. The folder appears when the block ends; if it ends by
    an exception nothing is left. Two writers must not write the same folder at once.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError where ``folder`` exists or cannot be made. What a killed writer left of it is removed."""
        self.folder = folder
        self._partial = folder.with_name(folder.name + ".partial")
        self._header: Header | None = None
        self._waiting: list[Record] = []
        self._shards: list[tuple[str, int]] = []
        self._file: Any = None
        self._groups_in_file = 0
        if folder.exists():
            raise UserError(f"{folder}: exists; remove it, or record into another folder")
        try:
            if self._partial.exists():
                shutil.rmtree(self._partial)
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def append(self, part: Record) -> None:
        """Add the rows of ``part``; the first part decides source, step, domains, vocabulary and the layers' shapes.

        Raises ValueError for a part that differs from the first in one of these, and UserError for a full disk.
        """
        if self._header is None:
            self._header = _header_of(part)
            self._schema = _schema_of(self._header)
            self._texts = None if part.vocabulary is None else pa.array(part.vocabulary, pa.string())
            self._group_rows = max(1, ROW_GROUP_BYTES // _row_bytes(self._header))
        else:
            _require_same(self._header, part)
        for start in range(0, part.n_tokens, self._group_rows):
            self._waiting.append(rows_of(part, start, start + self._group_rows))
            while sum(piece.n_tokens for piece in self._waiting) >= self._group_rows:
                whole = concatenate(self._waiting)
                self._waiting = [rows_of(whole, self._group_rows, whole.n_tokens)]
                self._write_group(rows_of(whole, 0, self._group_rows))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._close_file()
            shutil.rmtree(self._partial, ignore_errors=True)

    def _finish(self) -> None:
        """Write what is left and the header, then give the folder its name."""
        if self._header is None:
            raise ValueError(f"{self.folder}: a record of which not even the layers are known cannot be written")
        rest = concatenate(self._waiting) if self._waiting else None
        if rest is not None and (rest.n_tokens or not self._shards):
            self._write_group(rest)
        elif rest is None:
            self._write_group(None)
        self._close_file()
        shards = [{"name": name, "rows": rows} for name, rows in self._shards]
        header = {**_about(self._header), "vocabulary": self._header.vocabulary, "shards": shards}
        try:
            (self._partial / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
            for path in (*self._partial.iterdir(), self._partial):
                _to_disk(path)
            self._partial.rename(self.folder)
            _to_disk(self.folder.parent)
        except OSError as error:
            raise self._unwritable(error) from error

    def _write_group(self, part: Record | None) -> None:
        """Write one row group, in a new shard where the last is full; None: a shard without rows."""
        try:
            if self._file is None:
                name = f"shard-{len(self._shards):05d}.parquet"
                self._file = pq.ParquetWriter(
                    self._partial / name,
                    self._schema,
                    compression="zstd",
                    compression_level=1,
                    use_dictionary=[column for column in _leaves(self._schema) if _repeats_itself(column)],
                    write_page_checksum=True,
                )
                self._shards.append((name, 0))
                self._groups_in_file = 0
            if part is not None:
                self._file.write_table(_table_of(part, self._schema, self._texts), row_group_size=self._group_rows)
                name, rows = self._shards[-1]
                self._shards[-1] = (name, rows + part.n_tokens)
                self._groups_in_file += 1
                if self._groups_in_file == ROW_GROUPS_A_SHARD:
                    self._close_file()
        except OSError as error:
            raise self._unwritable(error) from error

    def _close_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.folder}: the record cannot be written ({error.strerror or error}); nothing is left")


def write_record(folder: Path, record: Record) -> None:
    """Write a record that is in memory; raises as :class:`RecordWriter` does."""
    with RecordWriter(folder) as writer:
        writer.append(record)


def _header_of(part: Record) -> Header:
    for layer in part.layers:
        if layer.n_experts > MOST_EXPERTS:
            raise ValueError(f"block {layer.block} has {layer.n_experts} experts, and a record holds {MOST_EXPERTS}")
    return Header(part.source, part.step, part.domains, part.vocabulary, tuple(map(_shape_of, part.layers)))


def _shape_of(layer: Layer) -> LayerShape:
    return LayerShape(layer.block, layer.n_experts, layer.top_k, layer.scores is not None)


def _require_same(header: Header, part: Record) -> None:
    for field in fields(Header):
        if field.name == "shards":
            continue
        first, now = getattr(header, field.name), getattr(_header_of(part), field.name)
        # The vocabulary is large, and in practice the same object.
        if first is not now and first != now:
            raise ValueError(f"the {field.name} of this part are not those of the first")


def _schema_of(header: Header) -> Any:
    def listed(kind: Any, length: int) -> Any:
        return pa.list_(pa.field("element", kind, nullable=False), length)

    columns = [
        ("token_id", pa.int32()),
        ("text", pa.string()),
        ("target_id", pa.int32()),
        ("predicted_id", pa.int32()),
        ("loss", pa.float32()),
        ("position", pa.int32()),
        ("sequence", pa.int32()),
        ("domain", pa.string()),
    ]
    for layer in header.layers:
        columns += [
            (f"selected_{layer.block}", listed(pa.int16(), layer.top_k)),
            (f"weights_{layer.block}", listed(pa.float32(), layer.top_k)),
            (f"dropped_{layer.block}", listed(pa.bool_(), layer.top_k)),
        ]
        if layer.scores:
            columns.append((f"scores_{layer.block}", listed(pa.float16(), layer.n_experts)))
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in columns],
        metadata={METADATA_KEY: json.dumps(_about(header))},
    )


def _about(header: Header) -> dict[str, Any]:
    """What both the header and the schema say."""
    return {
        "format": FORMAT,
        "source": header.source,
        "step": header.step,
        "domains": header.domains,
        "layers": [asdict(layer) for layer in header.layers],
    }


def _leaves(schema: Any) -> list[str]:
    """The columns as Parquet names them, where a list is a tree."""
    return [field.name + (".list.element" if pa.types.is_fixed_size_list(field.type) else "") for field in schema]


def _repeats_itself(leaf: str) -> bool:
    return not leaf.startswith(("loss", "weights_", "scores_", "dropped_"))


def _row_bytes(header: Header) -> int:
    return 64 + sum(7 * layer.top_k + 2 * layer.n_experts * layer.scores for layer in header.layers)


def _table_of(part: Record, schema: Any, texts: Any) -> Any:
    """The rows of ``part`` as an Arrow table; ``texts`` is the vocabulary, None where it is unknown."""
    columns: dict[str, Any] = {name: pa.array(getattr(part, name), pa.int32()) for name in _INTS}
    columns["loss"] = pa.array(part.loss, pa.float32())
    if texts is None:
        ids, places = np.unique(part.token_id, return_inverse=True)
        columns["text"] = pa.array([part.text_of(token_id) for token_id in ids.tolist()], pa.string()).take(
            pa.array(places)
        )
    else:
        columns["text"] = texts.take(columns["token_id"])
    columns["domain"] = pa.array(part.domains, pa.string()).take(pa.array(part.domain))
    for layer in part.layers:
        block = layer.block
        columns[f"selected_{block}"] = layer.selected.astype(np.int16)
        columns[f"weights_{block}"] = layer.weights.astype(np.float32)
        columns[f"dropped_{block}"] = layer.dropped
        if layer.scores is not None:
            columns[f"scores_{block}"] = layer.scores.astype(np.float16)
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(columns[field.name].reshape(-1)), type=field.type)
        if pa.types.is_fixed_size_list(field.type)
        else columns[field.name]
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _to_disk(path: Path) -> None:
    """Wait until the file or folder is on the disk and not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------------------------- reading


def read_header(folder: Path) -> Header:
    """What is known of the record in ``folder`` without its rows.

    Raises UserError where there is no record, a damaged one or one of another format.
    """
    path = folder / HEADER
    if not path.is_file():
        raise UserError(f"{folder}: is no routing record: it has no {HEADER}")
    try:
        header: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise UserError(
                f"{folder}: is a record of format {header['format']}, not {FORMAT}: remove it and record it again"
            )
        vocabulary = header["vocabulary"]
        return Header(
            source=str(header["source"]),
            step=None if header["step"] is None else int(header["step"]),
            domains=tuple(header["domains"]),
            vocabulary=None if vocabulary is None else tuple(vocabulary),
            layers=tuple(_shape_from(layer) for layer in header["layers"]),
            shards=tuple((str(shard["name"]), int(shard["rows"])) for shard in header["shards"]),
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(folder, f"{HEADER}: {error!r}") from error


def _shape_from(layer: dict[str, Any]) -> LayerShape:
    return LayerShape(int(layer["block"]), int(layer["n_experts"]), int(layer["top_k"]), bool(layer["scores"]))


def read_record(folder: Path, blocks: Collection[int] | None = None, *, scores: bool = True) -> Record:
    """The record in ``folder``, as it was written, with the layers of ``blocks`` alone if given.

    ``scores`` False leaves the scores on the disk, which are most of it. Raises UserError where there is no record, a
    damaged one, one of another format, or a block that it has not.
    """
    header = read_header(folder)
    missing = sorted(set(blocks or ()) - {layer.block for layer in header.layers})
    if missing:
        known = ", ".join(str(layer.block) for layer in header.layers)
        raise UserError(f"{folder}: block {missing[0]} has no mixture in it; those that have: {known}")
    shapes = [
        LayerShape(layer.block, layer.n_experts, layer.top_k, layer.scores and scores)
        for layer in header.layers
        if blocks is None or layer.block in blocks
    ]
    row = 0
    try:
        _require_sound(folder, header)
        columns = _empty_columns(header.n_tokens, shapes)
        for group in _row_groups(folder, header, list(columns)):
            for name, column in columns.items():
                column[row : row + group.num_rows] = _values_of(group[name], column, header.domains)
            row += group.num_rows
    # Arrow's own errors derive from these.
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:
        raise _damaged(folder, str(error)) from error
    layers = tuple(
        Layer(
            block=shape.block,
            n_experts=shape.n_experts,
            selected=columns[f"selected_{shape.block}"],
            weights=columns[f"weights_{shape.block}"],
            dropped=columns[f"dropped_{shape.block}"],
            scores=columns.get(f"scores_{shape.block}"),
        )
        for shape in shapes
    )
    return Record(
        **{name: columns[name] for name in (*_INTS, "loss", "domain")},
        domains=header.domains,
        layers=layers,
        vocabulary=header.vocabulary,
        source=header.source,
        step=header.step,
    )


def _empty_columns(n_tokens: int, shapes: Sequence[LayerShape]) -> dict[str, npt.NDArray[Any]]:
    columns: dict[str, npt.NDArray[Any]] = {name: np.empty(n_tokens, np.int32) for name in (*_INTS, "domain")}
    columns["loss"] = np.empty(n_tokens, np.float32)
    for shape in shapes:
        columns[f"selected_{shape.block}"] = np.empty((n_tokens, shape.top_k), np.int32)
        columns[f"weights_{shape.block}"] = np.empty((n_tokens, shape.top_k), np.float32)
        columns[f"dropped_{shape.block}"] = np.empty((n_tokens, shape.top_k), np.bool_)
        if shape.scores:
            columns[f"scores_{shape.block}"] = np.empty((n_tokens, shape.n_experts), np.float16)
    return columns


def _require_sound(folder: Path, header: Header) -> None:
    """Raise ValueError unless the shards are as long as the header says, and say of their columns what it says.

    Before a row is read, or room made for it: a damaged header may speak of 10^15.
    """
    if not header.shards:
        raise ValueError("it has no shards")
    for name, rows in header.shards:
        with pq.ParquetFile(folder / name) as file:
            if file.metadata.num_rows != rows:
                raise ValueError(f"{name} has {file.metadata.num_rows} rows, and should have {rows}")
            about = (file.schema_arrow.metadata or {}).get(METADATA_KEY.encode())
            if about is None or json.loads(about) != json.loads(json.dumps(_about(header))):
                raise ValueError(f"{name} is of another record than {HEADER}")


def _row_groups(folder: Path, header: Header, columns: list[str]) -> Iterator[Any]:
    """Each row group of each shard as a table."""
    for name, _ in header.shards:
        with pq.ParquetFile(folder / name, page_checksum_verification=True) as file:
            for index in range(file.num_row_groups):
                yield file.read_row_group(index, columns=columns)


def _values_of(column: Any, like: npt.NDArray[Any], domains: Sequence[str]) -> npt.NDArray[Any]:
    """A column of Arrow as numpy, in the shape of the rows of ``like``."""
    array = column.combine_chunks()
    if pa.types.is_string(array.type):
        array = array.dictionary_encode()
        place = np.array([domains.index(label) for label in array.dictionary.to_pylist()], np.int32)
        values: npt.NDArray[Any] = place[array.indices.to_numpy(zero_copy_only=False)]
        return values
    flat = array.flatten() if pa.types.is_fixed_size_list(array.type) else array
    values = flat.to_numpy(zero_copy_only=False)
    return values.reshape(-1, *like.shape[1:])


def _damaged(folder: Path, reason: str) -> UserError:
    return UserError(
        f"{folder}: the routing record is damaged ({' '.join(reason.split())}): remove it and record it again"
    )


# ---------------------------------------------------------------------------------------------------- parts of a record


def rows_of(record: Record, start: int, stop: int) -> Record:
    """The rows from ``start`` to ``stop``, without a copy."""
    part = slice(start, stop)
    layers = [
        Layer(
            layer.block,
            layer.n_experts,
            layer.selected[part],
            layer.weights[part],
            layer.dropped[part],
            None if layer.scores is None else layer.scores[part],
        )
        for layer in record.layers
    ]
    return _with(record, {name: getattr(record, name)[part] for name in (*_INTS, "loss", "domain")}, layers)


def concatenate(parts: Sequence[Record]) -> Record:
    """The rows of all ``parts``, which have the same layers, one after the other."""
    layers = [
        Layer(
            same[0].block,
            same[0].n_experts,
            np.concatenate([layer.selected for layer in same]),
            np.concatenate([layer.weights for layer in same]),
            np.concatenate([layer.dropped for layer in same]),
            None if same[0].scores is None else np.concatenate([_present(layer.scores) for layer in same]),
        )
        for same in zip(*(part.layers for part in parts), strict=True)
    ]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in (*_INTS, "loss", "domain")}
    return _with(parts[0], columns, layers)


def _present(scores: npt.NDArray[np.float16] | None) -> npt.NDArray[np.float16]:
    assert scores is not None
    return scores


def _with(record: Record, columns: dict[str, npt.NDArray[Any]], layers: Sequence[Layer]) -> Record:
    return Record(
        **columns,
        domains=record.domains,
        layers=tuple(layers),
        vocabulary=record.vocabulary,
        source=record.source,
        step=record.step,
    )
