"""A table of tensors gives every element of a model of ours one place, and every tensor of theirs one source."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe.config import AttentionConfig, ExpertsConfig, ModelConfig, RouterConfig
from moe.interop.families import FAMILIES
from moe.interop.importing import Source
from moe.interop.links import Link, gate_bias, gate_rows, homeless, pieces, shapes, value_bias, value_rows
from moe.interop.llama_cpp import in_pairs
from moe.interop.shards import SINGLE

Make = Callable[..., Any]

MODEL = ModelConfig(
    vocab_size=64,
    n_layers=2,
    d_model=8,
    attention=AttentionConfig(n_heads=2, head_dim=4),
    experts=ExpertsConfig(n_experts=3, d_ff=2),
)


def test_every_element_has_one_place_and_every_tensor_of_theirs_one_source(case: str, checkpoint_of: Make) -> None:
    source = Source.open(checkpoint_of(case))
    times = {name: torch.zeros(tensor.shape) for name, tensor in shapes(source.model).items()}
    theirs = []
    joined: dict[str, torch.Tensor] = {}

    for piece in source.family.pieces(source.model):
        if piece.ours is not None:
            piece.view(times[piece.ours]).add_(1)
        if piece.theirs is not None:
            theirs.append(piece.theirs)
            if piece.place is not None:
                piece.place(joined.setdefault(piece.theirs, torch.zeros(piece.shape))).add_(1)

    assert all((count == 1).all() for count in times.values())
    assert sorted({*theirs}) == sorted(load_file(source.folder / SINGLE))
    assert len(theirs) == len({*theirs}) or joined, "only what is in pieces comes more than once"
    assert all((count == 1).all() for count in joined.values())


def test_gate_and_value_are_the_halves_of_the_rows() -> None:
    """Two hidden units of width 3: rows 0 and 1 are gates, 2 and 3 values."""
    rows = torch.arange(12).view(4, 3)

    assert gate_rows(rows, MODEL).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert value_rows(rows, MODEL).tolist() == [[6, 7, 8], [9, 10, 11]]
    assert gate_rows(rows.expand(5, 4, 3), MODEL).shape == (5, 2, 3)
    assert gate_bias(torch.arange(4), MODEL).tolist() == [0, 1]
    assert value_bias(torch.arange(4), MODEL).tolist() == [2, 3]


def test_neighbours_are_turned_in_llama_cpp_where_halves_are_here() -> None:
    """Two heads of four rows: i and i + 2 belong together here, and stand side by side there."""
    assert in_pairs(torch.arange(8), MODEL).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert in_pairs(torch.arange(8)[:, None].expand(8, 3), MODEL)[:, 1].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_layers_and_experts_are_counted() -> None:
    links = [Link("l{layer}.e{expert}", "blocks.{layer}.feed_forward.experts.w_out"), Link("top", "norm.weight")]

    found = pieces(links, MODEL)

    assert [piece.theirs for piece in found] == ["l0.e0", "l0.e1", "l0.e2", "top", "l1.e0", "l1.e1", "l1.e2"]
    assert {piece.theirs: piece.shape for piece in found}["l1.e2"] == (8, 2)
    stack = torch.arange(3)[:, None, None].expand(3, 8, 2)
    assert found[5].view(stack).unique().tolist() == [1]


def test_a_tensor_that_the_model_does_not_have_is_left_out_or_made_of_zeros() -> None:
    mixed = replace(MODEL, experts=ExpertsConfig(n_experts=3, d_ff=2, first_dense=1))
    links = [
        Link("{layer}.bias", "blocks.{layer}.attention.query.bias"),
        Link("{layer}.gate", "blocks.{layer}.feed_forward.shared.gate.weight", zeros=lambda model: (1, model.d_model)),
        Link("copy", "head.weight", instead="embedding.weight"),
    ]

    found = {piece.theirs: (piece.ours, piece.shape) for piece in pieces(links, mixed)}

    assert found == {"1.gate": (None, (1, 8)), "copy": ("embedding.weight", (64, 8))}


def test_what_has_no_place_is_named() -> None:
    """A bias of the router, and the values of experts whose gates alone are linked."""
    biased = replace(MODEL, n_layers=1, router=RouterConfig(bias=True))
    gates = Link("gates", "blocks.{layer}.feed_forward.experts.w_in", gate_rows)
    others = [Link(name, name) for name in shapes(biased) if not name.endswith(("router.bias", "experts.w_in"))]

    assert sorted(homeless([gates, *others], biased)) == [
        "blocks.0.feed_forward.experts.w_in",
        "blocks.0.feed_forward.router.bias",
    ]


SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "mixtral": (
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        46_702_792_704,
    ),
    "olmoe": (
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
        6_919_161_856,
    ),
    "qwen3_moe": (
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        30_532_122_624,
    ),
}
"""settings of Mixtral-8x7B, OLMoE-1B-7B and Qwen3-30B-A3B, and how many parameters transformers counts in each"""


@pytest.mark.parametrize("name", SHAPES)
def test_published_models_have_their_size_and_a_place_for_all_of_it(name: str) -> None:
    """Without memory for it."""
    settings, parameters = SHAPES[name]
    family = FAMILIES[name]

    model = family.model_config({"max_position_embeddings": 4096, "rms_norm_eps": 1e-5} | settings)

    assert sum(tensor.numel() for tensor in shapes(model).values()) == parameters
    assert family.homeless(model) == []


def test_a_tied_head_is_the_embedding() -> None:
    assert "head.weight" not in shapes(MODEL)
    assert "head.weight" in shapes(replace(MODEL, tie_embeddings=False))


def test_names_count_layers_on_both_sides() -> None:
    """No name of a table leaves a hole where a layer or an expert belongs."""
    for family in FAMILIES.values():
        for link in family.tensors:
            assert ("{layer}" in link.ours) == ("{layer}" in (link.theirs or link.ours))
