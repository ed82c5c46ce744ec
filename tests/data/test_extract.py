"""How documents come out of files: each extractor on an input small enough to read."""

import ast
import sysconfig
import warnings
from pathlib import Path

import pytest

from moe.data.extract import JOINED_BYTES, code, dialogue, docstrings, gettext, python_strings

MODULE = '''\
"""A module.

    With détails.
"""

import os  # stays

def area(r):
    """The area."""

    return 3 * r * r

class Empty:
    "Nothing else."

def one(): "doc"; return 1

async def noted():
    ("in parentheses")  # a remark
    if os:
        def inner():
            """Inner."""
            return "not a docstring"
'''


def test_code_is_the_module_without_its_docstrings() -> None:
    expected = """\
import os  # stays

def area(r):
    return 3 * r * r

class Empty:
    pass

def one(): pass; return 1

async def noted():
    pass  # a remark
    if os:
        def inner():
            return "not a docstring"
"""
    assert code(MODULE) == [expected]


def test_docstrings_are_what_code_leaves_out() -> None:
    expected = "A module.\n\nWith détails.\n\nThe area.\n\nNothing else.\n\ndoc\n\nin parentheses\n\nInner."
    assert docstrings(MODULE) == [expected]


def test_a_module_that_is_only_a_docstring_holds_no_code() -> None:
    assert code('"""All there is."""\n') == []
    assert docstrings("x = 1\n") == []


@pytest.mark.parametrize("name", ["argparse.py", "dataclasses.py", "asyncio/events.py", "statistics.py"])
def test_stripped_library_code_parses_to_the_same_tree_without_docstrings(name: str) -> None:
    source = (Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8")

    def skeleton(text: str) -> str:
        """The tree with every docstring and every ``pass`` removed, by a walk of its own."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if ast.get_docstring(node, clean=False) is not None:
                    del node.body[0]
                node.body = [statement for statement in node.body if not isinstance(statement, ast.Pass)]
        return ast.dump(tree)

    (stripped,) = code(source)
    assert skeleton(stripped) == skeleton(source)
    assert len(stripped) < len(source)
    assert docstrings(stripped) == []


def test_python_strings_are_the_long_values_of_literals() -> None:
    assert python_strings(r'LICENSES = (("MIT", "Permission\nis granted."),)') == ["Permission\nis granted."]
    # Keys and strings of one line do not count, and what holds a call is no literal: nothing is executed.
    assert python_strings(r'topics = {"a\nkey": "One\ntwo", "b": "short"}') == ["One\ntwo"]
    assert python_strings(r'topics = {"a": "One\ntwo", "b": print("executed")}') == []


def test_dialogue_keeps_answers_that_yaml_takes_for_booleans() -> None:
    content = "categories:\n- food\nconversations:\n- - Do you eat?\n  - Yes\n- - Why?\n  - 42\n"
    assert dialogue(content) == ["Do you eat?\nYes\n\nWhy?\n42\n"]


@pytest.mark.parametrize("content", ["just text", "conversations: 3", "a: [", "- a\n- b\n"])
def test_a_file_without_conversations_is_refused(content: str) -> None:
    with pytest.raises(ValueError):
        dialogue(content)


def test_gettext_takes_translations_but_no_header_no_fuzzy_and_no_obsolete_entry() -> None:
    content = """\
# A comment.
msgid ""
msgstr "Language: zh\\n"

#: place
msgid "Yes"
msgstr "是"

#, fuzzy
#| msgid "old"
msgid "No"
msgstr "?"

msgctxt "menu"
msgid ""
"Two "
"parts"
msgstr ""
"两个"
"\\"部分\\""
msgid "%d day"
msgid_plural "%d days"
msgstr[0] "一天"
msgstr[1] "%d天"

msgid "Untranslated"
msgstr ""

#~ msgid "Obsolete"
#~ msgstr "旧"
"""
    assert gettext(content) == ['是\n\n两个"部分"\n\n一天\n\n%d天\n']


def test_short_strings_are_joined_into_documents_of_about_a_kilobyte_whatever_their_script() -> None:
    entries = "".join(f'msgid "{n}"\nmsgstr "{n % 10}是是"\n\n' for n in range(300))  # 7 bytes each
    documents = gettext(entries)
    # 147 strings of 7 bytes are the first to reach 1024, so 300 strings make 147, 147 and 6.
    assert JOINED_BYTES == 1024
    assert [document.count("是是") for document in documents] == [147, 147, 6]
