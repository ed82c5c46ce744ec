"""Tensors in files, and a model whose memory they are."""

from pathlib import Path

import torch

from moe.config import AttentionConfig, ExpertsConfig, ModelConfig, RouterConfig
from moe.interop.links import shapes
from moe.interop.storage import Storage, give_memory
from moe.model.transformer import Transformer

MODEL = ModelConfig(
    vocab_size=64,
    n_layers=2,
    d_model=8,
    attention=AttentionConfig(n_heads=2, head_dim=4),
    experts=ExpertsConfig(n_experts=3, d_ff=2),
    router=RouterConfig(selection_bias="sign"),
)


def test_what_is_written_to_a_tensor_is_in_its_file(tmp_path: Path) -> None:
    like = {"a": torch.empty(3, 4, device="meta"), "b": torch.empty(5, dtype=torch.bfloat16, device="meta")}

    storage = Storage(tmp_path / "tensors", like)
    storage.tensors["a"][1] = 7.0

    assert storage.tensors["b"].dtype == torch.bfloat16
    assert (tmp_path / "tensors" / "0").stat().st_size == 48
    in_file = torch.from_file(str(tmp_path / "tensors" / "0"), size=12)
    assert in_file.tolist() == [0.0] * 4 + [7.0] * 4 + [0.0] * 4


def test_an_empty_tensor_needs_no_file(tmp_path: Path) -> None:
    assert Storage(tmp_path / "tensors", {"a": torch.empty(0, 4)}).tensors["a"].shape == (0, 4)


def test_a_model_without_memory_is_given_some(tmp_path: Path) -> None:
    """Every parameter and buffer, a tied one once; the model then computes with what the files hold."""
    storage = Storage(tmp_path / "tensors", shapes(MODEL))
    source = Transformer(MODEL, seed=3).eval()
    for name, tensor in storage.tensors.items():
        tensor.copy_(source.state_dict()[name])
    with torch.device("meta"):
        model = Transformer(MODEL).eval()

    give_memory(model, storage.tensors)

    assert model.head.weight is model.embedding.weight
    assert model.head.weight.data_ptr() == storage.tensors["embedding.weight"].data_ptr()
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids)[0], source(ids)[0])


def test_what_is_not_there_stays_without_memory(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Transformer(MODEL)

    give_memory(model, {"norm.weight": torch.ones(8)})

    assert not model.norm.weight.is_meta
    assert model.embedding.weight.is_meta
    assert model.head.weight is model.embedding.weight
