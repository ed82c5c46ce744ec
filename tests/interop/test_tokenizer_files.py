"""What transformers and llama.cpp are told of a tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe.data.tokenizer import CL100K_PATTERN, Tokenizer
from moe.errors import UserError
from moe.interop.gguf_tokenizer import QWEN2_PATTERN, TokenType, gguf_tokenizer
from moe.interop.tokenizer_files import first_token, special_tokens, transformers_tokenizer

Content = dict[str, Any]


@pytest.fixture
def content(tokenizer: Tokenizer, tmp_path: Path) -> Content:
    """Of the tokenizer.json of a tokenizer that was trained here."""
    tokenizer.save(tmp_path / "tokenizer.json")
    return dict(json.loads((tmp_path / "tokenizer.json").read_text()))


def published(pattern: str | None, *, ignore_merges: bool = False, processor: Any = None, **model: Any) -> Content:
    """A tokenizer.json of the kind that Llama 3 and Qwen have: four bytes, one merge, two special tokens, one added."""
    vocabulary = {"a": 0, "b": 1, "Ġ": 2, "ab": 3}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")], ignore_merges=ignore_merges, **model))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    backend.pre_tokenizer = (
        byte_level
        if pattern is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level])
    )
    backend.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|endoftext|>", special=True)])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    if processor is not None:
        backend.post_processor = processor
    return dict(json.loads(backend.to_str()))


BEGINNING = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 4)])


# --------------------------------------------------------------------------------------------------------- transformers


def test_a_text_begins_with_the_token_that_ends_one(content: Content, tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = transformers_tokenizer(content, tokenizer.end_of_text, 64)

    (tmp_path / "out.json").write_text(json.dumps(files["tokenizer.json"]))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out.json"))
    ids = tokenizer.encode("the ship")
    assert theirs("the ship").input_ids == [tokenizer.end_of_text, *ids]
    assert theirs("the ship", "the ship").input_ids == [tokenizer.end_of_text, *ids, tokenizer.end_of_text, *ids]
    assert content["post_processor"] is None, "the run's own is left as it was"
    assert files["tokenizer_config.json"]["bos_token"] == "<|endoftext|>"
    assert files["tokenizer_config.json"]["model_max_length"] == 64


def test_a_tokenizer_that_says_how_a_text_begins_is_left_to(tokenizer: Tokenizer) -> None:
    content = published(CL100K_PATTERN, ignore_merges=True, processor=BEGINNING)

    assert transformers_tokenizer(content, 5, 64)["tokenizer.json"] == content


@pytest.mark.parametrize(
    ("processor", "first"),
    [
        (None, 5),
        (BEGINNING, 4),
        (processors.ByteLevel(), None),
        (processors.Sequence([processors.ByteLevel(), BEGINNING]), 4),
        (processors.TemplateProcessing(single="$A <|begin|>", special_tokens=[("<|begin|>", 4)]), None),
    ],
)
def test_what_a_text_begins_with(processor: Any, first: int | None) -> None:
    content = published(None, processor=processor)

    assert first_token(content, 5) == first
    assert special_tokens(content) == {4: "<|begin|>", 5: "<|endoftext|>"}


# ------------------------------------------------------------------------------------------------------------ llama.cpp


@pytest.mark.parametrize(
    ("pattern", "ignore_merges", "name"),
    [(None, False, "gpt-2"), (CL100K_PATTERN, True, "llama-bpe"), (QWEN2_PATTERN, False, "qwen2")],
)
def test_rules_that_split_text_have_names(pattern: str | None, ignore_merges: bool, name: str) -> None:
    found = gguf_tokenizer(published(pattern, ignore_merges=ignore_merges), 5, 8)

    assert found["pre"] == name
    assert found["model"] == "gpt2"


def test_every_id_has_a_token_and_a_kind() -> None:
    found = gguf_tokenizer(published(CL100K_PATTERN, ignore_merges=True, processor=BEGINNING), 5, 8)

    assert found["tokens"] == ["a", "b", "Ġ", "ab", "<|begin|>", "<|endoftext|>", "<tool>", "[unused 7]"]
    assert found["token_type"] == [TokenType.NORMAL] * 4 + [TokenType.CONTROL] * 2 + [
        TokenType.USER_DEFINED,
        TokenType.UNUSED,
    ]
    assert found["merges"] == ["a b"]
    assert (found["bos_token_id"], found["eos_token_id"], found["add_bos_token"]) == (4, 5, True)


def test_where_nothing_is_put_before_a_text_llama_cpp_does_not_either() -> None:
    found = gguf_tokenizer(published(QWEN2_PATTERN, processor=processors.ByteLevel()), 5, 8)

    assert (found["bos_token_id"], found["add_bos_token"]) == (5, False)


def altered(content: Content, key: str, value: object) -> Content:
    section, _, name = key.rpartition(".")
    if section:
        content[section] = content[section] | {name: value}
    else:
        content[name] = value
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (altered(published(None), "model.type", "Unigram"), "it is no byte-level BPE, but Unigram"),
        (published(None, byte_fallback=True), "it is no byte-level BPE, but BPE with byte fallback"),
        (published(None, unk_token="a"), "its unk_token is 'a'"),
        (published(None, ignore_merges=True), "its ignore_merges is True, and gpt-2 has False"),
        (published(CL100K_PATTERN), "its ignore_merges is False, and llama-bpe has True"),
        (published(r"\w+"), "it splits text into words by a rule that has no name there"),
        (altered(published(None), "pre_tokenizer", None), "it is not byte-level"),
        (altered(published(None), "pre_tokenizer.add_prefix_space", True), "puts a space before a text"),
        (
            altered(published(None), "normalizer", json.loads(tokenizers.Tokenizer(models.BPE()).to_str())["model"]),
            "it normalises text by BPE",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not(content: Content, reason: str) -> None:
    with pytest.raises(UserError, match=rf"tokenizer.json: llama.cpp has no such tokenizer: .*{reason}"):
        gguf_tokenizer(content, 5, 8)


def test_qwen_composes_characters_which_is_let_pass() -> None:
    content = published(QWEN2_PATTERN)
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.normalizer = normalizers.NFC()

    assert gguf_tokenizer(json.loads(backend.to_str()), 5, 8)["pre"] == "qwen2"
