"""A folder of safetensors, read without trusting it, and written as transformers does."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.errors import UserError
from moe.interop.shards import INDEX, SINGLE, Shards, bytes_of, write_shards

TENSORS = {name: torch.full((2, 3), float(number)) for number, name in enumerate("abcd")}


def write_two(folder: Path) -> None:
    """a and b in one file, c and d in another, and their index."""
    save_file({name: TENSORS[name] for name in "ab"}, folder / "one.safetensors")
    save_file({name: TENSORS[name] for name in "cd"}, folder / "two.safetensors")
    write_index(folder, {"a": "one", "b": "one", "c": "two", "d": "two"})


def write_index(folder: Path, files: dict[str, str]) -> None:
    weight_map = {name: f"{file}.safetensors" for name, file in files.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same(found: dict[str, Tensor]) -> None:
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_one_file_or_several(tmp_path: Path) -> None:
    write_two(tmp_path)
    shards = Shards.open(tmp_path)

    assert_same(dict(iter(shards)))
    assert torch.equal(shards.read("c"), TENSORS["c"])
    assert shards.entries["b"].shape == (2, 3)
    assert shards.entries["b"].dtype == "F32"
    (tmp_path / INDEX).unlink()
    save_file(TENSORS, tmp_path / SINGLE)
    assert_same(dict(iter(Shards.open(tmp_path))))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "one", "b": "one", "c": "two"}, r"two.safetensors: holds d, which .* does not list there"),
        ({"a": "two", "b": "one", "c": "two", "d": "two"}, r"one.safetensors: holds a, which .* does not list there"),
        (
            {"a": "one", "b": "one", "c": "two", "d": "two", "e": "two"},
            r"index.json: lists e, which two.safetensors does not hold",
        ),
        (
            {"a": "one", "b": "one", "e": "three"},
            r"three.safetensors: there is no such file, and model.safetensors.index",
        ),
        ({"a": "../one"}, r"names '../one.safetensors', which is no safetensors file of this folder"),
    ],
)
def test_an_index_that_is_not_true(tmp_path: Path, files: dict[str, str], message: str) -> None:
    write_two(tmp_path)
    write_index(tmp_path, files)

    with pytest.raises(UserError, match=message):
        Shards.open(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "x.bin"}}']
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)

    with pytest.raises(UserError, match=r"index.json: (is no index of safetensors|names )"):
        Shards.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 20, b"\xff" * 100, pickle.dumps({"a": 1})])
def test_a_file_that_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(content)

    with pytest.raises(UserError, match=r"model.safetensors: cannot be read as safetensors"):
        Shards.open(tmp_path)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:-1])

    with pytest.raises(UserError, match=r"model.safetensors: cannot be read as safetensors .*; download it again"):
        Shards.open(tmp_path)


def test_a_pickle_is_left_shut(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))

    with pytest.raises(UserError, match="as pickles, which can run code and are not opened"):
        Shards.open(tmp_path)


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return pytest.fail, ("the pickle was opened",)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no weights: neither model.safetensors nor model.safetensors.index.json"):
        Shards.open(tmp_path)


@pytest.mark.parametrize(
    ("limit", "files"),
    [
        (10_000, [SINGLE]),
        # Each of the four takes 24 bytes.
        (48, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        (47, [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]),
        (1, [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]),
    ],
)
def test_files_are_as_large_as_allowed(tmp_path: Path, limit: int, files: list[str]) -> None:
    sizes = {name: bytes_of((2, 3), torch.float32) for name in TENSORS}

    write_shards(tmp_path, iter(TENSORS.items()), sizes, limit)

    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == files
    assert (tmp_path / INDEX).exists() == (len(files) > 1)
    assert_same(dict(iter(Shards.open(tmp_path))))


def test_pieces_of_one_tensor_are_written_apart(tmp_path: Path) -> None:
    """Views share memory, which safetensors refuses to write."""
    whole = torch.arange(12.0).view(4, 3)

    write_shards(tmp_path, iter([("up", whole[:2]), ("down", whole[2:].T)]), {"up": 24, "down": 24})

    stored = load_file(tmp_path / SINGLE)
    assert torch.equal(stored["up"], whole[:2])
    assert torch.equal(stored["down"], whole[2:].T)
