"""From a corpus file to cached token streams."""

import json
import random
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from moe.config import DataConfig
from moe.data.corpus import Document
from moe.data.prepare import PreparedCorpus, prepare, reopen, split_documents
from moe.data.tokenizer import END_OF_TEXT, Tokenizer, train_bpe
from moe.errors import UserError

WORDS = [*"abcdefghij", "the", "house", "sleeps", "slowly", "and", "or", "Käse", "日本"]


def test_the_streams_are_the_documents(tmp_path: Path) -> None:
    corpus = _prepare(tmp_path)
    tokenizer = corpus.tokenizer
    assert corpus.domains == ("prose", "lists")
    assert corpus.shares == {"prose": Fraction(3, 4), "lists": Fraction(1, 4)}
    for domain, held_out in corpus.validation.items():
        written = {path.read_text() for path in (tmp_path / domain).iterdir()}
        trained = _between(corpus.train[domain], tokenizer)
        assert corpus.train[domain][-1] == tokenizer.end_of_text
        assert held_out.stream[0] == tokenizer.end_of_text
        assert _between(held_out.stream, tokenizer) == [text.decode() for text in held_out.documents]
        # Every document is on exactly one side.
        assert sorted([*trained, *(text.decode() for text in held_out.documents)]) == sorted(written)
        assert held_out.n_bytes == len(held_out.text) == sum(map(len, held_out.documents))
        assert 0 < held_out.n_bytes <= sum(len(text.encode()) for text in written) / 10


def test_the_manifest_counts_what_is_there(tmp_path: Path) -> None:
    corpus = _prepare(tmp_path)
    prose = corpus.manifest["domains"]["prose"]
    assert prose["train"]["tokens"] == len(corpus.train["prose"])
    assert prose["train"]["documents"] == np.count_nonzero(corpus.train["prose"] == corpus.tokenizer.end_of_text)
    assert prose["validation"]["tokens"] == len(corpus.validation["prose"].stream) - prose["validation"]["documents"]
    assert prose["train"]["documents"] + prose["validation"]["documents"] == 40
    size = sum(len(path.read_bytes()) for path in (tmp_path / "prose").iterdir())
    assert prose["train"]["bytes"] + prose["validation"]["bytes"] == size
    assert corpus.manifest["python"] == ".".join(map(str, sys.version_info[:3]))
    assert corpus.manifest["shares"] == {"prose": "3/4", "lists": "1/4"}
    assert json.loads(json.dumps(corpus.manifest)) == corpus.manifest


def test_a_second_call_takes_the_cache_and_the_same_order(tmp_path: Path) -> None:
    said: list[str] = []
    first = _prepare(tmp_path)
    again = _prepare(tmp_path, said=said)
    assert said == []
    assert again.folder == first.folder
    assert all(np.array_equal(again.train[domain], first.train[domain]) for domain in first.domains)


def test_every_setting_that_decides_the_tokens_has_its_own_folder(tmp_path: Path) -> None:
    folders = {
        _prepare(tmp_path).folder,
        _prepare(tmp_path, vocab_size=290).folder,
        _prepare(tmp_path, validation_bytes=50).folder,
        _prepare(tmp_path, max_bytes=1000).folder,
    }
    (tmp_path / "prose" / "7.txt").write_text("A document that was edited.")
    folders.add(_prepare(tmp_path).folder)
    assert len(folders) == 5


def test_sequence_length_and_shares_prepare_nothing_anew(tmp_path: Path) -> None:
    folder = _prepare(tmp_path).folder
    assert _prepare(tmp_path, sequence_length=17).folder == folder
    (tmp_path / "corpus.yaml").write_text((tmp_path / "corpus.yaml").read_text().replace("share: 3", "share: 1"))
    again = prepare(_config(tmp_path), tmp_path, lambda line: None)
    assert again.folder == folder
    assert again.shares == {"prose": Fraction(1, 2), "lists": Fraction(1, 2)}


def test_repeated_documents_are_kept_once_over_all_domains(tmp_path: Path) -> None:
    _write_corpus(tmp_path)
    licence = "Permission is\nhereby granted to do this."
    (tmp_path / "prose" / "licence.txt").write_text(licence)
    (tmp_path / "prose" / "copy.txt").write_text("  Permission is hereby\tgranted to do this.\n\n")
    (tmp_path / "lists" / "copy.txt").write_text(licence)
    corpus = prepare(_config(tmp_path), tmp_path, lambda line: None)
    texts = [
        *(text for domain in corpus.domains for text in _between(corpus.train[domain], corpus.tokenizer)),
        *(text.decode() for held_out in corpus.validation.values() for text in held_out.documents),
    ]
    assert sum(text.split() == licence.split() for text in texts) == 1
    assert corpus.manifest["duplicates_removed"] == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_cache_is_built_again_with_a_line_that_says_so(tmp_path: Path, damage: str) -> None:
    first = _prepare(tmp_path)
    tokens = first.train["prose"].tolist()
    victim = first.folder / ("manifest.json" if damage == "manifest" else "prose.train.npy")
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
        victim.write_bytes(content)
    elif damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content[:-20])
    said: list[str] = []
    again = _prepare(tmp_path, said=said)
    assert [line for line in said if "damaged" in line] == [said[0]]
    assert victim.name in said[0]
    assert again.train["prose"].tolist() == tokens
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.folder.name]


def test_processes_that_prepare_at_once_end_with_one_sound_folder(tmp_path: Path) -> None:
    _write_corpus(tmp_path)
    program = (
        "import sys; from pathlib import Path\n"
        "from moe.config import DataConfig; from moe.data.prepare import prepare\n"
        "folder = Path(sys.argv[1]); sys.stdin.readline()\n"
        "config = DataConfig(corpus='corpus.yaml', vocab_size=280, validation_bytes=200, cache=str(folder / 'cache'))\n"
        "found = prepare(config, folder); print(found.folder.name, int(found.train['prose'].sum()))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:  # started when all are ready, as near as a pipe can
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1
    said: list[str] = []
    prepare(_config(tmp_path), tmp_path, said.append)
    assert said == []  # what is left is whole


def test_a_missing_source_is_said_and_its_share_goes_to_the_others(tmp_path: Path) -> None:
    _write_corpus(tmp_path)
    with (tmp_path / "corpus.yaml").open("a") as file:
        file.write("- {domain: gone, kind: package, distribution: no-such-thing, include: x, share: 9}\n")
    said: list[str] = []
    corpus = prepare(_config(tmp_path), tmp_path, said.append)
    assert said[0] == "left out: gone: the package no-such-thing is not installed: pip install no-such-thing"
    assert corpus.shares == {"prose": Fraction(3, 4), "lists": Fraction(1, 4)}


def test_the_corpus_file_is_relative_to_the_configuration_else_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_corpus(tmp_path)
    elsewhere = tmp_path / "configs"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    assert prepare(_config(tmp_path), elsewhere, lambda line: None).domains == ("prose", "lists")
    with pytest.raises(UserError, match=r"data\.corpus: .*no file .*configs/absent\.yaml nor absent\.yaml; name one"):
        prepare(_config(tmp_path, corpus="absent.yaml"), elsewhere, lambda line: None)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    _write_corpus(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache: .*file"):
        prepare(_config(tmp_path, cache=str(tmp_path / "file" / "cache")), tmp_path, lambda line: None)


def test_a_tokenizer_file_is_used_as_it_is(tmp_path: Path) -> None:
    _write_corpus(tmp_path)
    train_bpe(["the cat"], 259).save(tmp_path / "mine.json")
    corpus = prepare(_config(tmp_path, tokenizer="mine.json"), tmp_path, lambda line: None)
    assert corpus.tokenizer.size == 259


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    lossy = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "</s>": 2}, unk_token="[UNK]"))
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy.add_special_tokens(["</s>"])
    lossy.save(str(tmp_path / "lossy.json"))
    _write_corpus(tmp_path)
    with pytest.raises(UserError, match=r"does not give back .* bits per byte would be wrong"):
        prepare(_config(tmp_path, tokenizer="lossy.json"), tmp_path, lambda line: None)


def test_a_run_reopens_its_own_tokens_although_the_sources_have_changed(tmp_path: Path) -> None:
    first = _prepare(tmp_path)
    (tmp_path / "prose" / "7.txt").write_text("A document that was edited.")
    said: list[str] = []
    again = reopen(_config(tmp_path), first.manifest, tmp_path, said.append)
    assert (again.folder, said) == (first.folder, [])
    # Once the cache is gone, the edited sources give other tokens, and the run must not go on with those.
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"data\.corpus: corpus\.yaml gives other tokens"):
        reopen(_config(tmp_path), first.manifest, tmp_path, said.append)


def test_a_run_whose_cache_is_gone_gets_the_same_tokens_from_the_same_sources(tmp_path: Path) -> None:
    first = _prepare(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    assert reopen(_config(tmp_path), first.manifest, tmp_path, lambda line: None).manifest == first.manifest


def test_a_run_does_not_go_on_with_other_shares(tmp_path: Path) -> None:
    first = _prepare(tmp_path)
    (tmp_path / "corpus.yaml").write_text((tmp_path / "corpus.yaml").read_text().replace("share: 3", "share: 1"))
    with pytest.raises(UserError, match="other tokens or shares"):
        reopen(_config(tmp_path), first.manifest, tmp_path, lambda line: None)


# ------------------------------------------------------------------------------------------------- held-out documents


def test_documents_are_held_out_whole_until_there_are_enough() -> None:
    documents = [Document(f"{n}", "x" * 99 + "\n") for n in range(100)]
    split = split_documents("d", documents, validation_bytes=250, max_bytes=None)
    assert len(split.validation) == 3  # 250 bytes in documents of 100
    assert len(split.train) == 97
    assert not {d.name for d in split.train} & {d.name for d in split.validation}


def test_no_more_than_a_tenth_is_held_out() -> None:
    documents = [Document(f"{n}", "x" * 99 + "\n") for n in range(100)]
    assert len(split_documents("d", documents, validation_bytes=10**9, max_bytes=None).validation) == 10


def test_a_long_document_is_passed_over_rather_than_holding_out_far_too_much() -> None:
    documents = [*(Document(f"{n}", "x" * 99 + "\n") for n in range(1000)), Document("long", "x" * 5000)]
    for seed in range(20):  # wherever its name falls in the order
        renamed = [*documents[:-1], Document(f"long {seed}", documents[-1].text)]
        split = split_documents("d", renamed, validation_bytes=300, max_bytes=None)
        assert sum(len(document.text) for document in split.validation) <= 600


def test_a_text_that_others_repeat_is_never_held_out() -> None:
    documents = [Document(f"d{i}", "x" * 100) for i in range(100)]
    repeats = dict.fromkeys(documents[:90], 0.21)
    split = split_documents("d", documents, 10**9, None, repeats)
    assert {document.name for document in split.validation} == {f"d{i}" for i in range(90, 100)}
    assert len(split.train) == 90


def test_two_documents_of_one_file_are_two_and_on_one_side() -> None:
    """A file's code and its docstrings have one name; 30 files of 200 bytes, of which 600 bytes may be held out."""
    documents = [Document(f"f{i}", letter * 100) for letter in "ab" for i in range(30)]
    repeats = {document: 0.9 for document in documents if document.text.startswith("a")}

    split = split_documents("d", documents, 10**9, None)
    assert sorted(document.text[0] for document in split.validation) == ["a"] * 3 + ["b"] * 3
    assert not {d.name for d in split.validation} & {d.name for d in split.train}
    assert len(split.train) == 54

    split = split_documents("d", documents, 10**9, None, repeats)
    assert [document.text[0] for document in split.validation] == ["b"] * 6
    assert len(split.train) == 54


def test_what_is_held_out_stays_so_when_documents_are_added() -> None:
    documents = [Document(f"{n}", "x" * 99 + "\n") for n in range(400)]
    order = [d.name for d in split_documents("d", documents, 4000, None).train]
    fewer = [d.name for d in split_documents("d", documents[:300], 3000, None).train]
    before = {d.name for d in split_documents("d", documents[:300], 3000, None).validation}
    after = {d.name for d in split_documents("d", documents, 3000, None).validation}
    assert len(before) == 30
    # With a third more documents, about a quarter of the places go to new ones, in front of old ones.
    assert len(before & after) >= 15
    assert after - before <= {f"{n}" for n in range(300, 400)}
    common = set(order) & set(fewer)
    assert [name for name in order if name in common] == [name for name in fewer if name in common]


def test_of_a_single_text_the_end_is_held_out_from_a_line_on() -> None:
    text = "".join(f"line {n:04}\n" for n in range(1000))  # 10 bytes each
    split = split_documents("d", [Document("book", text)], validation_bytes=305, max_bytes=None)
    assert [d.text for d in split.train] == [text[: 1000 * 10 - 300]]
    assert [d.text for d in split.validation] == [text[1000 * 10 - 300 :]]


def test_training_text_is_limited_in_whole_documents() -> None:
    documents = [Document(f"{n}", "x" * 99 + "\n") for n in range(100)]
    split = split_documents("d", documents, validation_bytes=100, max_bytes=550)
    assert len(split.train) == 5
    book = Document("book", "".join(f"line {n:04}\n" for n in range(1000)))
    assert [d.text for d in split_documents("d", [book], 100, max_bytes=25).train] == ["line 0000\nline 0001\n"]


def test_a_text_too_short_to_divide_is_refused() -> None:
    with pytest.raises(UserError, match="domain d: its text is too short"):
        split_documents("d", [Document("tiny", "hi")], validation_bytes=100, max_bytes=None)


# --------------------------------------------------------------------------------------------------------- arrangement


def _write_corpus(folder: Path) -> None:
    """Two domains of forty and twenty documents of random words; written once, so that their times stay."""
    if (folder / "corpus.yaml").exists():
        return
    draw = random.Random(0)
    for domain, count, length in (("prose", 40, 60), ("lists", 20, 30)):
        (folder / domain).mkdir()
        for n in range(count):
            (folder / domain / f"{n}.txt").write_text(" ".join(draw.choices(WORDS, k=length)) + "\n")
    (folder / "corpus.yaml").write_text(
        "- {domain: prose, kind: files, include: prose/*.txt, share: 3}\n"
        "- {domain: lists, kind: files, include: lists/*.txt}\n"
    )


def _config(folder: Path, **settings: object) -> DataConfig:
    usual = {"corpus": "corpus.yaml", "vocab_size": 280, "validation_bytes": 200, "cache": str(folder / "cache")}
    return DataConfig(**{**usual, **settings})  # type: ignore[arg-type]


def _prepare(folder: Path, said: list[str] | None = None, **settings: object) -> PreparedCorpus:
    _write_corpus(folder)
    return prepare(_config(folder, **settings), folder, (lambda line: None) if said is None else said.append)


def _between(stream: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The texts between the ends of text."""
    texts = tokenizer.decode(stream.tolist()).split(END_OF_TEXT)
    return [text for text in texts if text]
