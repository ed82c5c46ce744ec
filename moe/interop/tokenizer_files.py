"""The tokenizer of a run as transformers wants it, such that it encodes a text as the run was trained on it.

A run encodes text that spells a special token as the characters that it is, and begins every text with the token that
ends one. Both are said here. A tokenizer from elsewhere that says itself what a text begins with is left to do so.
"""

from collections.abc import Mapping
from typing import Any

Content = Mapping[str, Any]
"""of a tokenizer.json"""


def transformers_tokenizer(content: Content, end_of_text: int, max_seq: int) -> dict[str, Any]:
    """The contents of ``tokenizer.json`` and ``tokenizer_config.json``, by file name, from those of a run's."""
    name = special_tokens(content)[end_of_text]
    if content.get("post_processor") is None:
        content = {**content, "post_processor": _beginning_with(name, end_of_text)}
    return {
        "tokenizer.json": content,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": name,
            "eos_token": name,
            "pad_token": name,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_seq,
        },
    }


def special_tokens(content: Content) -> dict[int, str]:
    """What each special token is called, by its id."""
    return {token["id"]: token["content"] for token in content["added_tokens"] if token["special"]}


def first_token(content: Content, end_of_text: int) -> int | None:
    """The id that a text is made to begin with: what the tokenizer says itself, else the end of text; None for none."""
    processor = content.get("post_processor")
    if processor is None:
        return end_of_text
    for step in processor.get("processors", [processor]):
        for first in step.get("single", [])[:1]:
            if "SpecialToken" in first:
                ids: list[int] = step["special_tokens"][first["SpecialToken"]["id"]]["ids"]
                return ids[0]
    return None


def _beginning_with(name: str, index: int) -> dict[str, Any]:
    """The post-processor that puts a special token before a text."""
    special: dict[str, Any] = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]}},
    }
