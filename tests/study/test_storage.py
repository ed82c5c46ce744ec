"""Records on disk: written in any parts and read back the same, by us and by others; whole or not there at all."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe.errors import UserError
from moe.study import storage
from moe.study.record import EMPTY, Layer, Record
from moe.study.storage import LayerShape, RecordWriter, read_header, read_record, write_record


def by_hand() -> Record:
    """Three tokens of two sequences; two choices of four experts in block 1, one of two without scores in block 3."""
    first = Layer(
        block=1,
        n_experts=4,
        selected=np.array([[2, 0], [3, EMPTY], [1, 2]], np.int32),
        weights=np.array([[0.7, 0.3], [1.0, 0.0], [0.1, 0.0]], np.float32),
        dropped=np.array([[False, False], [False, False], [False, True]]),
        scores=np.array([[0.25, 0, 0.5, 0.25], [0, 0, 0, 1], [0, 0.5, 0.5, 0]], np.float16),
    )
    second = Layer(
        block=3,
        n_experts=2,
        selected=np.array([[0], [1], [1]], np.int32),
        weights=np.ones((3, 1), np.float32),
        dropped=np.zeros((3, 1), bool),
    )
    return Record(
        token_id=np.array([1, 0, 2], np.int32),
        target_id=np.array([0, 2, 2], np.int32),
        predicted_id=np.array([0, 1, 3], np.int32),
        loss=np.array([0.5, 1.25, 3.1], np.float32),
        position=np.array([0, 1, 0], np.int32),
        sequence=np.array([0, 0, 1], np.int32),
        domain=np.array([1, 1, 0], np.int32),
        domains=("prose", "code", "never seen"),
        layers=(first, second),
        vocabulary=("a", " naïve", '"\n', "\N{REPLACEMENT CHARACTER}"),
        source="a run",
        step=40,
    )


def random_record(n_tokens: int, seed: int = 0, *, experts: int = 5, scores: bool = True, top_k: int = 2) -> Record:
    generator = np.random.default_rng(seed)

    def ids(below: int, *shape: int) -> np.ndarray:
        return generator.integers(0, below, (n_tokens, *shape), dtype=np.int32)

    layers = [
        Layer(
            block,
            experts,
            ids(experts + 1, top_k) - 1,
            generator.random((n_tokens, top_k), np.float32),
            generator.random((n_tokens, top_k)) < 0.2,
            generator.random((n_tokens, experts), np.float32).astype(np.float16) if scores else None,
        )
        for block in range(2)
    ]
    return Record(
        *(ids(9), ids(9), ids(9), generator.random(n_tokens, np.float32)),
        np.arange(n_tokens, dtype=np.int32) % 7,
        np.arange(n_tokens, dtype=np.int32) // 7,
        ids(3),
        domains=("x", "y", "z"),
        layers=tuple(layers),
    )


def assert_same(one: Record, other: Record) -> None:
    """To the bit, and in the types that a record has."""
    for name in ("token_id", "target_id", "predicted_id", "loss", "position", "sequence", "domain"):
        assert getattr(one, name).dtype == getattr(other, name).dtype, name
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    for name in ("domains", "vocabulary", "source", "step"):
        assert getattr(one, name) == getattr(other, name)
    assert len(one.layers) == len(other.layers)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert (mine.block, mine.n_experts) == (theirs.block, theirs.n_experts)
        for name in ("selected", "weights", "dropped"):
            assert getattr(mine, name).dtype == getattr(theirs, name).dtype, name
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), name)
        assert (mine.scores is None) == (theirs.scores is None)
        if mine.scores is not None:
            assert mine.scores.dtype == theirs.scores.dtype == np.float16
            np.testing.assert_array_equal(mine.scores, theirs.scores)


def small_groups(monkeypatch: pytest.MonkeyPatch, record: Record, rows: int, groups_a_shard: int) -> None:
    """Let a row group of records like this one hold ``rows`` rows, and a shard so many groups."""
    row_bytes = storage._row_bytes(storage._header_of(record))
    monkeypatch.setattr(storage, "ROW_GROUP_BYTES", rows * row_bytes)
    monkeypatch.setattr(storage, "ROW_GROUPS_A_SHARD", groups_a_shard)


# ----------------------------------------------------------------------------------------------------------- round trip


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_record(tmp_path / "record", by_hand())

    assert_same(read_record(tmp_path / "record"), by_hand())


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    rows=st.integers(1, 20),
    groups=st.integers(1, 4),
    scores=st.booleans(),
)
def test_how_a_record_is_cut_into_parts_groups_and_shards_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], rows: int, groups: int, scores: bool
) -> None:
    whole = random_record(sum(lengths), seed=rows, scores=scores)
    folder = tmp_path_factory.mktemp("records") / "record"

    with pytest.MonkeyPatch.context() as patch:
        small_groups(patch, whole, rows, groups)
        with RecordWriter(folder) as writer:
            for end, length in zip(np.cumsum(lengths), lengths, strict=True):
                writer.append(storage.rows_of(whole, int(end) - length, int(end)))

    assert_same(read_record(folder), whole)
    files = [pq.ParquetFile(path).metadata for path in sorted(folder.glob("*.parquet"))]
    sizes = [file.row_group(index).num_rows for file in files for index in range(file.num_row_groups)]
    assert sizes == [rows] * (whole.n_tokens // rows) + ([whole.n_tokens % rows] if whole.n_tokens % rows else [])
    assert all(file.num_row_groups <= groups for file in files)


def test_layers_and_scores_are_read_only_where_wanted(tmp_path: Path) -> None:
    write_record(tmp_path / "record", by_hand())

    second = read_record(tmp_path / "record", blocks=[3])
    without_scores = read_record(tmp_path / "record", scores=False)

    assert_same(second, replace(by_hand(), layers=by_hand().layers[1:]))
    first, last = by_hand().layers
    assert_same(without_scores, replace(by_hand(), layers=(replace(first, scores=None), last)))


def test_the_header_says_what_is_there_without_reading_rows(tmp_path: Path) -> None:
    write_record(tmp_path / "record", by_hand())
    (tmp_path / "record" / "shard-00000.parquet").unlink()

    header = read_header(tmp_path / "record")

    assert (header.n_tokens, header.source, header.step) == (3, "a run", 40)
    assert header.layers == (LayerShape(1, 4, 2, True), LayerShape(3, 2, 1, False))


# -------------------------------------------------------------------------------------------------------- other readers


def test_pandas_reads_it_in_one_line(tmp_path: Path) -> None:
    write_record(tmp_path / "record", by_hand())

    frame = pd.read_parquet(tmp_path / "record")

    assert frame.text.tolist() == [" naïve", "a", '"\n']
    assert frame.domain.tolist() == ["code", "code", "prose"]
    assert frame.loss.tolist() == np.float32([0.5, 1.25, 3.1]).tolist()
    assert np.stack(frame.selected_1).tolist() == [[2, 0], [3, -1], [1, 2]]
    assert np.stack(frame.dropped_1).tolist() == [[False, False], [False, False], [False, True]]
    assert np.stack(frame.scores_1).tolist() == [[0.25, 0, 0.5, 0.25], [0, 0, 0, 1], [0, 0.5, 0.5, 0]]
    assert "scores_3" not in frame


def test_datasets_reads_several_shards_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = replace(by_hand(), vocabulary=None)
    small_groups(monkeypatch, record, rows=1, groups_a_shard=1)
    write_record(tmp_path / "record", record)
    pattern = str(tmp_path / "record" / "*.parquet")

    rows = datasets.load_dataset("parquet", data_files=pattern, cache_dir=str(tmp_path / "cache"))["train"]

    assert rows["text"][:] == ["<1>", "<0>", "<2>"]
    assert rows["selected_1"][:] == [[2, 0], [3, -1], [1, 2]]


def test_every_shard_says_in_its_schema_what_it_is(tmp_path: Path) -> None:
    write_record(tmp_path / "record", by_hand())

    metadata = pq.read_schema(tmp_path / "record" / "shard-00000.parquet").metadata

    about = json.loads(metadata[b"routing_record"])
    assert (about["format"], about["step"], about["domains"]) == (1, 40, ["prose", "code", "never seen"])
    assert about["layers"][0] == {"block": 1, "n_experts": 4, "top_k": 2, "scores": True}


def test_text_and_ids_are_dictionary_encoded_on_disk(tmp_path: Path) -> None:
    write_record(tmp_path / "record", by_hand())

    group = pq.ParquetFile(tmp_path / "record" / "shard-00000.parquet").metadata.row_group(0)
    encodings = {group.column(index).path_in_schema: group.column(index).encodings for index in range(12)}

    assert all("RLE_DICTIONARY" in encodings[name] for name in ("text", "domain", "selected_1.list.element"))


# --------------------------------------------------------------------------------------------------------------- memory


def test_writing_ten_times_the_tokens_takes_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = random_record(300, experts=32)
    small_groups(monkeypatch, part, rows=1000, groups_a_shard=4)

    def peak(folder: Path, parts: int) -> int:
        """Most bytes of numpy and Python at once; Arrow's own memory is counted by the row groups above."""
        tracemalloc.start()
        with RecordWriter(folder) as writer:
            for _ in range(parts):
                writer.append(replace(part, loss=part.loss + 1))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(tmp_path / "few", 20), peak(tmp_path / "many", 200)

    # All of it would be 200 x 300 rows of 212 bytes: 12.7 MB, and ten times what the first writer saw.
    assert many < 1.2 * few
    assert many < 2_000_000


# ----------------------------------------------------------------------------------------------------- whole or nothing


def test_an_exception_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_groups(monkeypatch, by_hand(), rows=1, groups_a_shard=1)

    with pytest.raises(RuntimeError, match="stop"), RecordWriter(tmp_path / "record") as writer:
        writer.append(by_hand())
        assert not (tmp_path / "record").exists(), "not before it is whole"
        assert list(tmp_path.iterdir()) != [], "rows are written as they come"
        raise RuntimeError("stop")

    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / "record.partial"
    left.mkdir()
    (left / "shard-00000.parquet").write_bytes(b"half")

    write_record(tmp_path / "record", by_hand())

    assert [path.name for path in tmp_path.iterdir()] == ["record"]
    assert_same(read_record(tmp_path / "record"), by_hand())


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    write_record(tmp_path / "record", by_hand())

    with pytest.raises(UserError, match="record: exists; remove it, or record into another folder"):
        write_record(tmp_path / "record", random_record(5))

    assert_same(read_record(tmp_path / "record"), by_hand())


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match="cannot be written"):
        write_record(tmp_path / "file" / "record", by_hand())


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (replace(by_hand(), layers=by_hand().layers[:1]), "layers"),
        (replace(by_hand(), domains=("prose", "code", "other")), "domains"),
        (replace(by_hand(), vocabulary=None), "vocabulary"),
        (replace(by_hand(), step=41), "step"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_part_of_another_record_is_refused(tmp_path: Path, other: Record, field: str) -> None:
    with (
        pytest.raises(ValueError, match=f"the {field} of this part are not those of the first"),
        RecordWriter(tmp_path / "record") as writer,
    ):
        writer.append(by_hand())
        writer.append(other)


def test_a_record_of_nothing_cannot_be_written_but_one_without_tokens_can(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not even the layers are known"), RecordWriter(tmp_path / "nothing"):
        pass

    write_record(tmp_path / "empty", random_record(0))

    assert_same(read_record(tmp_path / "empty"), random_record(0))
    assert not (tmp_path / "nothing").exists()


def test_more_experts_than_an_id_holds_are_refused(tmp_path: Path) -> None:
    many = replace(by_hand().layers[1], n_experts=32768)

    with pytest.raises(ValueError, match="block 3 has 32768 experts"):
        write_record(tmp_path / "record", replace(by_hand(), layers=(many,)))


# --------------------------------------------------------------------------------------------------------- what is none


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x10
    path.write_bytes(content)


def edit_header(folder: Path, **changes: object) -> None:
    path = folder / "_record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "a page with a flipped bit": lambda folder: flip(folder / "shard-00000.parquet", 0.25),
    "a footer with a flipped bit": lambda folder: flip(folder / "shard-00000.parquet", 0.9999),
    "a shard cut short": lambda folder: (folder / "shard-00000.parquet").write_bytes(b"PAR1 and no more"),
    "a shard gone": lambda folder: (folder / "shard-00000.parquet").unlink(),
    "a shard of another length": lambda folder: edit_header(
        folder, shards=[{"name": "shard-00000.parquet", "rows": 9}]
    ),
    "shards of a negative length": lambda folder: edit_header(
        folder, shards=[{"name": "shard-00000.parquet", "rows": -9}]
    ),
    "more rows than any memory holds": lambda folder: edit_header(
        folder, shards=[{"name": "shard-00000.parquet", "rows": 10**15}]
    ),
    "no shards": lambda folder: edit_header(folder, shards=[]),
    "another number of experts": lambda folder: edit_header(
        folder, layers=[{"block": 0, "n_experts": 2, "top_k": 2, "scores": False}]
    ),
    "places that are no number": lambda folder: edit_header(
        folder, layers=[{"block": 0, "n_experts": 5, "top_k": "two", "scores": False}]
    ),
    "another step": lambda folder: edit_header(folder, step=9),
    "a header that is no JSON": lambda folder: (folder / "_record.json").write_text('{"format": 1,'),
    "a header of something else": lambda folder: (folder / "_record.json").write_text('["a", "b"]'),
    "a header without layers": lambda folder: edit_header(folder, layers=None),
    "a domain that the header lacks": lambda folder: edit_header(folder, domains=["x", "z"]),
    "a layer that the shards lack": lambda folder: edit_header(
        folder, layers=[{"block": 9, "n_experts": 5, "top_k": 2, "scores": False}]
    ),
    "another number of places": lambda folder: edit_header(
        folder, layers=[{"block": 0, "n_experts": 5, "top_k": 3, "scores": False}]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_record_is_one_clear_line(tmp_path: Path, damage: object) -> None:
    write_record(tmp_path / "record", random_record(400))
    damage(tmp_path / "record")

    with pytest.raises(
        UserError, match=r"record: the routing record is damaged \(.*\): remove it and record it again"
    ) as caught:
        read_record(tmp_path / "record")

    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no routing record: it has no _record\.json"):
        read_record(tmp_path)


def test_another_format_says_what_to_do(tmp_path: Path) -> None:
    write_record(tmp_path / "record", by_hand())
    edit_header(tmp_path / "record", format=0)

    with pytest.raises(UserError, match="is a record of format 0, not 1: remove it and record it again"):
        read_record(tmp_path / "record")


def test_a_block_without_a_mixture_is_named(tmp_path: Path) -> None:
    write_record(tmp_path / "record", by_hand())

    with pytest.raises(UserError, match="block 2 has no mixture in it; those that have: 1, 3"):
        read_record(tmp_path / "record", blocks=[1, 2])
