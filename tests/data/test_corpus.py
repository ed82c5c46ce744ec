"""Corpus files: what they may say, and what is found on this machine."""

import json
import socket
import time
from fractions import Fraction
from pathlib import Path

import pytest
from huggingface_hub import constants

from moe.data import corpus as corpus_module
from moe.data.corpus import Document, read_corpus, whole_shares
from moe.errors import UserError


def test_the_corpora_of_the_project_are_sound() -> None:
    folder = Path(__file__).parents[2] / "configs" / "corpora"
    default, languages = (read_corpus(folder / name) for name in ("default.yaml", "languages.yaml"))
    domains = list(dict.fromkeys(source.domain for source in default.sources))
    assert domains == ["python", "cpp", "docs", "speech", "legal", "dialogue"]
    assert default.shares(domains)["python"] == Fraction(22, 100)
    assert len({source.domain for source in languages.sources}) == 26


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("domain: a", "a corpus is a list of sources"),
        ("", "a corpus is a list of sources"),
        ("- {domain: a\n- b", ":2: not YAML"),
        ("- just a name", ":1: a source is a mapping"),
        ("- domain: a\n", ":1: the source has no kind"),
        ("- domain: a\n  kind: pakage\n", r":2: kind: 'pakage' is none of .*; did you mean package\?"),
        ("- kind: stdlib\n  include: x\n", ":1: a stdlib source needs domain"),
        ("- domain: a\n  kind: package\n  include: x\n", ":1: a package source needs distribution"),
        ("- domain: a\n  kind: files\n  inclde: x\n", r":3: .*'inclde' is none of .*; did you mean include\?"),
        ("- domain: a\n  kind: files\n  include: x\n  extract: cod\n", r":4: extract: 'cod' .*did you mean code\?"),
        ("- domain: a\n  kind: files\n  include: x\n  share: none\n", ":4: share: is none"),
        ("- domain: a\n  kind: files\n  include: x\n  share: 0\n", ":4: share: is 0"),
        ("- domain: a\n  kind: files\n  include: []\n", ":3: include: must be a glob"),
        ("- domain: a\n  domain: b\n  kind: files\n", ":2: domain: written twice"),
        ("- domain: a/b\n  kind: files\n  include: x\n", ":1: domain: is 'a/b'"),
        ("- domain: a\n  kind: hub\n  dataset: x\n  max_bytes: 1.5\n", ":4: max_bytes: is 1.5"),
        (
            "- {domain: a, kind: files, include: x, share: 1}\n- {domain: a, kind: files, include: y, share: 2}\n",
            ":2: share of a: already written at line 1",
        ),
        (
            "- {domain: a, kind: files, include: x, share: 0.1234567}\n- {domain: b, kind: files, include: x}\n",
            "write them with fewer digits",
        ),
    ],
)
def test_a_faulty_corpus_file_gets_one_line_with_the_place(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "corpus.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as caught:
        read_corpus(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_shares_are_exact_and_renormalised_over_the_domains_that_exist(tmp_path: Path) -> None:
    lines = [
        f"- {{domain: {name}, kind: files, include: x, share: {share}}}"
        for name, share in zip("abc", (".4", ".1", ".3"), strict=True)
    ]
    (tmp_path / "corpus.yaml").write_text("\n".join(lines))
    corpus = read_corpus(tmp_path / "corpus.yaml")
    assert corpus.shares(["a", "b", "c"]) == {"a": Fraction(1, 2), "b": Fraction(1, 8), "c": Fraction(3, 8)}
    assert corpus.shares(["a", "b"]) == {"a": Fraction(4, 5), "b": Fraction(1, 5)}
    assert whole_shares([Fraction(1, 2), Fraction(1, 8), Fraction(3, 8)]) == [4, 1, 3]


def test_files_are_chosen_by_globs_and_named_by_their_path(tmp_path: Path) -> None:
    _write(tmp_path, {"a/one.txt": "one", "a/deep/two.txt": "two", "a/three.md": "three", "a/no/four.txt": "four"})
    documents = _documents(tmp_path, '{domain: d, kind: files, include: "a/**/*.txt", exclude: "**/no/*"}')
    assert documents == [Document("a/deep/two.txt", "two"), Document("a/one.txt", "one")]


def test_files_that_are_no_text_are_left_out_and_named(tmp_path: Path) -> None:
    _write(tmp_path, {"good.py": "x = 1\n", "bad.py": "x ="})
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    left_out: list[str] = []
    documents = _documents(tmp_path, '{domain: d, kind: files, include: "*.py", extract: code}', left_out)
    assert documents == [Document("good.py", "x = 1\n")]
    assert left_out == ["bad.py", "latin.py"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_records_are_read_through_datasets(tmp_path: Path, suffix: str) -> None:
    rows = [{"body": "erstes", "id": 1}, {"body": "zweites", "id": 2}]
    if suffix == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    else:
        lines = "\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows)
        (tmp_path / f"rows.{suffix}").write_text(lines)
    source = f"{{domain: d, kind: files, include: rows.{suffix}, field: body}}"
    assert [document.text for document in _documents(tmp_path, source)] == ["erstes", "zweites"]
    with pytest.raises(UserError, match=r"rows.*'bodi' is none of body; did you mean body\?"):
        _documents(tmp_path, source.replace("field: body", "field: bodi"))


def test_a_package_is_read_by_its_record_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(
        tmp_path,
        {
            "toy/__init__.py": "raise RuntimeError('imported')",
            "toy/data/a.txt": "alpha",
            "toy/data/b.txt": "beta",
            "toy_text-1.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy-text\nVersion: 1.5\n",
            "toy_text-1.5.dist-info/RECORD": "toy/__init__.py,,\ntoy/data/a.txt,,\ntoy/data/b.txt,,\ntoy/gone.txt,,\n",
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = '{domain: d, kind: package, distribution: toy_text, include: "toy/**/*.txt"}'
    assert [document.text for document in _documents(tmp_path, source)] == ["alpha", "beta"]
    (listing,), _ = read_corpus(tmp_path / "corpus.yaml").find()
    assert listing.origin == "toy-text 1.5"
    everywhere = '{domain: d, kind: package, distribution: "*", include: "toy/data/a*"}'
    assert [document.text for document in _documents(tmp_path, everywhere)] == ["alpha"]


def test_the_standard_library_comes_without_tests_and_packages(tmp_path: Path) -> None:
    (tmp_path / "corpus.yaml").write_text('- {domain: d, kind: stdlib, include: "**/*.py"}')
    (listing,), _ = read_corpus(tmp_path / "corpus.yaml").find()
    names = {file.name for file in listing.files}
    assert {"stdlib:argparse.py", "stdlib:json/decoder.py"} <= names
    folders = {part for name in names for part in name.removeprefix("stdlib:").split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "__pycache__"}


def test_a_missing_source_is_named_with_its_remedy_and_the_others_go_on(tmp_path: Path) -> None:
    _write(tmp_path, {"a.txt": "text"})
    (tmp_path / "corpus.yaml").write_text(
        "- {domain: a, kind: files, include: a.txt}\n"
        "- {domain: b, kind: package, distribution: no-such-thing, extra: toy, include: x}\n"
        "- {domain: c, kind: package, distribution: no-such-thing, include: x}\n"
        "- {domain: d, kind: files, include: absent/*.txt}\n"
        "- {domain: e, kind: package, distribution: numpy, include: no/such/*.file}\n"
    )
    found, missing = read_corpus(tmp_path / "corpus.yaml").find()
    assert [listing.source.domain for listing in found] == ["a"]
    assert missing == [
        "b: the package no-such-thing is not installed: pip install -e '.[toy]'",
        "c: the package no-such-thing is not installed: pip install no-such-thing",
        f"d: below {tmp_path} is no file like absent/*.txt",
        "e: numpy holds no file like no/such/*.file",
    ]


def test_a_corpus_of_which_nothing_is_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.yaml").write_text("- {domain: b, kind: package, distribution: no-such-thing, include: x}")
    with pytest.raises(UserError, match=r"none of its sources is there; b: the package no-such-thing"):
        read_corpus(tmp_path / "corpus.yaml").find()


HUB = "{domain: d, kind: hub, dataset: nobody/nothing, max_bytes: 12}"


def test_an_unreachable_hub_fails_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with socket.socket() as unused:  # bound, but not listening: connections to it are refused
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"data set nobody/nothing: 127\.0\.0\.1 does not answer"):
            _documents(tmp_path, HUB)
    assert time.monotonic() - begin < 5


def test_the_offline_switch_of_the_hub_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        _documents(tmp_path, HUB)


def test_a_data_set_is_streamed_up_to_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder stands in for a name on the hub: the same call reads it, without a network.
    monkeypatch.setattr(corpus_module, "_require_hub", lambda dataset: None)
    _write(
        tmp_path, {"set/train.jsonl": "\n".join(json.dumps({"text": word}) for word in ("four", "fünf", "six", "7"))}
    )
    documents = _documents(tmp_path, f"{{domain: d, kind: hub, dataset: '{tmp_path}/set', max_bytes: 10}}")
    assert [document.text for document in documents] == ["four", "fünf"]  # 4 + 5 bytes; six would make 12
    with pytest.raises(UserError, match="cannot be streamed"):
        _documents(tmp_path, f"{{domain: d, kind: hub, dataset: '{tmp_path}/set', max_bytes: 10, split: absent}}")


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def _documents(folder: Path, source: str, left_out: list[str] | None = None) -> list[Document]:
    (folder / "corpus.yaml").write_text(f"- {source}\n", encoding="utf-8")
    listings, _ = read_corpus(folder / "corpus.yaml").find()
    return [
        document for found in listings for document in found.source.read(found, [] if left_out is None else left_out)
    ]
