"""A byte-level BPE as the metadata of a GGUF file, for the tokenizers whose rules llama.cpp has under a name."""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from moe.data.tokenizer import CL100K_PATTERN
from moe.errors import UserError
from moe.interop.tokenizer_files import first_token, special_tokens


class TokenType(IntEnum):
    """What kind of token one is, as llama.cpp counts the kinds."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


QWEN2_PATTERN = CL100K_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

PATTERNS = {CL100K_PATTERN: ("llama-bpe", True), QWEN2_PATTERN: ("qwen2", False)}
"""llama.cpp's name of a pattern that splits text into words, and whether a word that is a token is never merged"""
GPT2 = ("gpt-2", False)
"""the same of the pattern that is built into byte-level BPE"""


def gguf_tokenizer(content: Mapping[str, Any], end_of_text: int, vocab_size: int) -> dict[str, Any]:
    """What a file says of the tokenizer, by key below ``tokenizer.ggml.``, from the content of a ``tokenizer.json``.

    Ids beyond the tokenizer's, up to ``vocab_size``, are unused. Raises UserError for one that llama.cpp has not.
    """
    model, added = content["model"], content["added_tokens"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _unknown(
            f"it is no byte-level BPE, but {model.get('type')}{' with byte fallback' * (model.get('type') == 'BPE')}"
        )
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unknown(f"its {key} is {model[key]!r}")
    if (content.get("normalizer") or {}).get("type", "NFC") != "NFC":
        raise _unknown(f"it normalises text by {content['normalizer']['type']}")
    name, whole_words = _splitting(content.get("pre_tokenizer") or {})
    if bool(model.get("ignore_merges")) != whole_words:
        raise _unknown(f"its ignore_merges is {bool(model.get('ignore_merges'))}, and {name} has {whole_words}")

    tokens = {index: f"[unused {index}]" for index in range(vocab_size)}
    types = dict.fromkeys(range(vocab_size), TokenType.UNUSED)
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    first = first_token(content, end_of_text)
    assert end_of_text in special_tokens(content)
    return {
        "model": "gpt2",
        "pre": name,
        "tokens": [tokens[index] for index in range(vocab_size)],
        "token_type": [int(types[index]) for index in range(vocab_size)],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "bos_token_id": end_of_text if first is None else first,
        "eos_token_id": end_of_text,
        "padding_token_id": end_of_text,
        "add_bos_token": first is not None,
        "add_eos_token": False,
    }


def _splitting(pre_tokenizer: Mapping[str, Any]) -> tuple[str, bool]:
    """The entry of :data:`PATTERNS` by which words are split."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise _unknown("it is not byte-level, or puts a space before a text")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in PATTERNS and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"):
            return PATTERNS[pattern]
    raise _unknown("it splits text into words by a rule that has no name there")


def _unknown(reason: str) -> UserError:
    return UserError(f"tokenizer.json: llama.cpp has no such tokenizer: {reason}")
