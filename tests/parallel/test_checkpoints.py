"""A checkpoint of any layout loads into any other: weights, buffers and optimizer's states to the bit."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe.config import (
    AttentionConfig,
    Config,
    DataConfig,
    ExpertsConfig,
    FeedForwardConfig,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
    parse_layout,
)
from moe.errors import UserError
from moe.model.transformer import Transformer
from moe.parallel.mesh import build_mesh
from moe.parallel.parallelize import parallelize
from moe.parallel.pipeline import cut
from moe.parallel.spread import spread_of
from moe.parallel.world import World
from moe.training import checkpoint
from moe.training.checkpoint import DamagedCheckpointError
from moe.training.optimizer import build_optimizer
from moe.training.pieces import Cut, Piece

Together = Callable[[Callable[[], Any], Path, int], list[Any]]

MODEL = ModelConfig(
    vocab_size=30,  # uneven among four
    n_layers=2,
    d_model=15,  # of 3 experts on a rank, two ranks can share no dimension evenly
    attention=AttentionConfig(n_heads=4, head_dim=4, bias=True),
    feed_forward=FeedForwardConfig(bias=True),
    experts=ExpertsConfig(n_experts=6, d_ff=6),
    router=RouterConfig(selection_bias="sign"),
)
LAYOUTS = {
    1: [""],
    2: ["full", "ep2", "tp2", "pp2"],
    4: ["ep2,full", "tp2,ep2", "hybrid2", "pp2,full"],
}


def build(size: int, layout: str, seed: int) -> tuple[Transformer, torch.optim.Optimizer]:
    """A model with an optimizer that has taken a step, on gradients that are random and the same for every layout."""
    model = Transformer(MODEL, seed)
    with torch.no_grad():
        model.blocks[0].feed_forward.router.selection_bias.copy_(torch.arange(6) + seed)
    gradients = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(seed + number))
        for number, (name, value) in enumerate(model.named_parameters())
    }
    if size > 1:
        config = Config(model=MODEL, data=DataConfig(sequence_length=8), parallel=parse_layout(layout))
        mesh = build_mesh(config.parallel, size, "cpu")
        if mesh.pipeline_group is not None:
            cut(model, config, mesh.pipeline_rank)
        parallelize(model, config, mesh, torch.device("cpu"))
    spread = spread_of(model)
    parameters = dict(model.named_parameters()) if spread is None else spread.parameters
    optimizer = build_optimizer(model, OptimizerConfig(), parameters)
    for name, parameter in parameters.items():
        parameter.grad = gradients[name] if spread is None else spread.part(name, gradients[name]).clone()
    optimizer.step()
    return model, optimizer


def whole_state(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of both, gathered."""
    spread = spread_of(model)
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, kind, tensor in parts_here(model, optimizer):
        plain = spread is None or tensor.dim() == 0
        state[f"{kind} of {name}"] = (tensor if plain else spread.whole(name, tensor)).clone()
    return state


def differing(model: Transformer, optimizer: torch.optim.Optimizer, whole: dict[str, torch.Tensor]) -> list[str]:
    """The tensors of which what is here is not what belongs here of ``whole``."""
    spread = spread_of(model)
    wrong = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, whole[name])]
    for name, kind, tensor in parts_here(model, optimizer):
        expected = whole[f"{kind} of {name}"]
        if spread is not None and tensor.dim() > 0:
            expected = spread.part(name, expected)
        if not torch.equal(tensor, expected):
            wrong.append(f"{kind} of {name}")
    return wrong


def parts_here(model: Transformer, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, torch.Tensor]]:
    spread = spread_of(model)
    for name, parameter in (dict(model.named_parameters()) if spread is None else spread.parameters).items():
        for kind, tensor in ({"weight": parameter.detach()} | optimizer.state[parameter]).items():
            yield name, kind, tensor


def test_saved_on_any_layout_it_loads_on_any_other(together: Together, tmp_path: Path) -> None:
    folder = tmp_path / "saved"

    def save(size: int) -> dict[str, Any]:
        saved = {}
        for number, layout in enumerate(LAYOUTS[size]):
            model, optimizer = build(size, layout, seed=10 * size + number)
            cut = size > 1 and spread_of(model).is_cut
            if cut or size == 1 or dist.get_rank() == 0:
                checkpoint.save(folder / f"{size} {layout}", 1, model, optimizer, {"tokens": 7}, 1, World())
            saved[size, layout] = whole_state(model, optimizer)
        return saved

    def load(size: int) -> list[str]:
        wrong = []
        for layout in LAYOUTS[size]:
            model, optimizer = build(size, layout, seed=0)
            for other, whole in saved.items():
                found = checkpoint.newest(folder / f"{other[0]} {other[1]}", print)
                found.load_model(model)
                found.load_optimizer(optimizer, model)
                wrong += [f"{size} {layout} from {other}: {name}" for name in differing(model, optimizer, whole)]
        return wrong

    saved = save(1)
    for size in (2, 4):
        for rank in together(lambda size=size: save(size), tmp_path / f"{size}", size):
            for key, state in rank.items():
                saved[key] = saved.get(key, {}) | state  # ranks of a pipeline have different parts of it

    assert len(saved) == 9
    assert load(1) == []
    assert together(lambda: load(2), tmp_path / "2 again", 2) == [[]] * 2
    assert together(lambda: load(4), tmp_path / "4 again", 4) == [[]] * 4


def test_a_piece_that_is_damaged_or_missing_is_named(together: Together, tmp_path: Path) -> None:
    folder = tmp_path / "saved"

    def save() -> None:
        checkpoint.save(folder, 1, *build(2, "ep2,full", seed=1), {}, 1, World())

    together(save, tmp_path, 2)
    files = sorted(path.name for path in (folder / "step-00000001").iterdir())
    assert files == [
        "manifest.json",
        *(f"{kind}-0000{rank}.safetensors" for kind in ("model", "optimizer") for rank in range(2)),
        "rng.safetensors",
        "state.json",
    ]
    path = folder / "step-00000001" / "model-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"model-00001.safetensors: damaged"):
        checkpoint.open_checkpoint(path.parent)

    path.unlink()
    manifest = json.loads((path.parent / "manifest.json").read_text())
    del manifest["files"][path.name]
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"the pieces of \S+ are [0-9,]+ of its [0-9,]+ numbers"):
        checkpoint.open_checkpoint(path.parent).load_model(Transformer(MODEL))


def test_a_disk_that_refuses_one_process_stops_all_and_leaves_what_was_there(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"

    def save() -> str:
        model, optimizer = build(2, "full", seed=1)
        checkpoint.save(folder, 1, model, optimizer, {}, 1, World())

        def refuse(*arguments: object, **settings: object) -> None:
            raise OSError("no space")

        if dist.get_rank() == 1:
            monkeypatch.setattr(checkpoint, "save_file", refuse)
        try:
            checkpoint.save(folder, 2, model, optimizer, {}, 1, World())
        except UserError as error:
            return str(error)
        return ""

    first, second = together(save, tmp_path, 2)

    assert "could not be written (on 1 of 2 processes); earlier ones are untouched" in first
    assert "could not be written (no space)" in second
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_rows_of_stacked_matrices_in_uneven_pieces() -> None:
    """Two matrices of two rows, the second column of each: the rows 1, 3, 5, 7; three ranks have 2, 2 and 0."""
    whole = torch.arange(8.0).view(2, 2, 2)
    pieces = [Piece((2, 2, 2), (Cut(2, 1, 2), Cut(0, rank, 3, joined=True))) for rank in range(3)]

    assert [piece.take(whole).flatten().tolist() for piece in pieces] == [[1, 3], [5, 7], []]
    put = torch.zeros(2, 2, 2)
    for piece in pieces[:2]:
        piece.put(put, piece.take(whole))
    assert put.flatten().tolist() == [0, 1, 0, 3, 0, 5, 0, 7]


def test_pieces_of_halves_within_pieces() -> None:
    """Rows 0-3 gate, 4-7 value: rank 1 of 2 has 2, 3, 6, 7, of which the last of 3 has 7 (chunks of 2, 2 and none)."""
    whole = torch.arange(8.0)
    cuts = [Piece((8,), (Cut(0, 1, 2, halves=2), Cut(0, rank, 3))) for rank in range(3)]

    assert [piece.take(whole).tolist() for piece in cuts] == [[2.0, 3.0], [6.0, 7.0], []]
    put = torch.zeros(8)
    for piece in cuts[:2]:
        piece.put(put, piece.take(whole))
    assert put.tolist() == [0, 0, 2, 3, 0, 0, 6, 7]
