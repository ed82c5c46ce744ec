"""A dense model becomes a mixture that computes the same, and then may become something else."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import ConfigError
from moe.errors import UserError
from moe.interop.exporting import export_huggingface
from moe.interop.upcycle import Upcycling
from moe.model.moe_layer import MoELayer
from moe.model.transformer import Transformer

Make = Callable[..., Any]

IDS = torch.randint(0, 320, (3, 40), generator=torch.Generator().manual_seed(2))


def logits(model: Transformer) -> Tensor:
    """In float64, so that nothing but the function is compared; every selection is decided far above its rounding."""
    with torch.no_grad():
        return model.double()(IDS)[0]


def mixtures(model: Transformer) -> list[MoELayer]:
    return [block.feed_forward for block in model.blocks if isinstance(block.feed_forward, MoELayer)]


# ---------------------------------------------------------------------------------------------------- the same function

SHAPES = [
    # Experts, parts of an MLP, experts a token.
    (2, 1, 2),
    (4, 1, 2),
    (5, 1, 3),
    (8, 2, 2),
    (8, 2, 6),
    (8, 4, 4),
    (16, 8, 16),
    (12, 3, 6),
]


@pytest.mark.parametrize("dense", ["llama", "llama_tied", "qwen3"])
@pytest.mark.parametrize(("experts", "granularity", "top_k"), SHAPES)
def test_with_normalised_weights_the_function_stays(
    dense: str, experts: int, granularity: int, top_k: int, checkpoint_of: Make, imported: Make
) -> None:
    """Weights sum to 1 over copies of one MLP; over G parts of it, to a G-th, times G, exact but for three parts."""
    folder = checkpoint_of(dense, intermediate_size=48)

    before = imported(folder, {"run.name": "dense"}).load_model()
    after = imported(
        folder,
        {"run.name": "mixture", "model.router.top_k": str(top_k)},
        upcycling=Upcycling(experts, granularity),
    ).load_model()

    assert [layer.router.n_experts for layer in mixtures(after)] == [experts] * 3
    assert after.config.experts.d_ff == 48 // granularity
    rounded = 1e-12 if granularity != 3 else 1e-5  # three times a number is rounded to float32 when it is written
    torch.testing.assert_close(logits(after), logits(before), atol=rounded, rtol=rounded)


def test_a_token_takes_whole_mlps(checkpoint_of: Make, imported: Make) -> None:
    """Two of the four groups of three parts each: every part of a copy, or none."""
    model = imported(checkpoint_of("qwen3", intermediate_size=48), upcycling=Upcycling(12, 3)).load_model()

    with torch.no_grad():
        _, routings = model(IDS)

    for routing in routings:
        taken = torch.zeros(routing.n_tokens, 12).scatter(1, routing.selected, 1.0).view(-1, 4, 3).sum(dim=2)
        assert set(taken.flatten().tolist()) == {0.0, 3.0}
        assert (taken.sum(dim=1) == 6).all()
        assert (taken.sum(dim=0) > 0).all(), "no group is idle from the start"


def test_parts_put_together_are_the_mlp(checkpoint_of: Make, imported: Make) -> None:
    folder = checkpoint_of("qwen3")
    dense = imported(folder, {"run.name": "dense"}).load_model().blocks[1].feed_forward

    experts = mixtures(imported(folder, upcycling=Upcycling(8, 4)).load_model())[1].experts

    for group in (experts.w_in[:4], experts.w_in[4:]):
        gates, values = (torch.cat([part.chunk(2)[half] for part in group]) for half in (0, 1))
        assert torch.equal(torch.cat([gates, values]), dense.w_in.weight)
    assert torch.equal(torch.cat(list(experts.w_out[:4]), dim=1), 4 * dense.w_out.weight)


def test_layers_that_stay_dense_keep_their_mlp(checkpoint_of: Make, imported: Make) -> None:
    """Every second layer a mixture, as Komatsuzaki et al. have it."""
    folder = checkpoint_of("llama", intermediate_size=48)
    before = imported(folder, {"run.name": "dense"}).load_model()

    after = imported(folder, {"model.experts.every": "2"}, upcycling=Upcycling(4)).load_model()

    assert after.config.moe_layers == [1]
    assert after.config.feed_forward.d_ff == 48
    torch.testing.assert_close(logits(after), logits(before), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        # Raw probabilities of a router of zeros are 1/8: two of them weigh a quarter.
        ({"model.router.normalise": "false"}, 4.0),
        # Raw sigmoids of zeros are 1/2: two of them weigh 1.
        ({"model.router.normalise": "false", "model.router.score": "sigmoid"}, 1.0),
        ({"model.router.normalise": "false", "model.router.top_k": "1"}, 8.0),
        ({"model.router.scale": "2.5"}, 0.4),
    ],
)
def test_weights_that_do_not_sum_to_1_are_made_up_for(
    settings: Mapping[str, str], scale: float, checkpoint_of: Make, imported: Make
) -> None:
    """Exactly where all logits are 0, which a new router's are near."""
    folder = checkpoint_of("qwen3")
    before = imported(folder, {"run.name": "dense"}).load_model()

    after = imported(folder, settings, upcycling=Upcycling(8)).load_model()

    w_out = before.blocks[0].feed_forward.w_out.weight
    torch.testing.assert_close(mixtures(after)[0].experts.w_out[5], scale * w_out)
    with torch.no_grad():
        for layer in mixtures(after):
            layer.router.weight.zero_()
    # The scale itself was rounded to float32.
    torch.testing.assert_close(logits(after), logits(before), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- what is new


def test_the_router_is_drawn_with_a_row_for_each_group(checkpoint_of: Make, imported: Make) -> None:
    folder = checkpoint_of("qwen3", hidden_size=256)

    first, second = (
        mixtures(imported(folder, {"run.name": seed, "training.seed": seed}, upcycling=Upcycling(8, 2)).load_model())
        for seed in ("0", "1")
    )

    rows = first[0].router.weight.view(4, 2, 256)
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert rows[:, 0].std().item() == pytest.approx(0.02, rel=0.15)
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(first[0].router.weight, first[1].router.weight)
    assert not torch.equal(first[0].router.weight, second[0].router.weight)


def test_noise_is_a_share_of_what_a_matrix_varies_by(checkpoint_of: Make, imported: Make) -> None:
    """Each expert has its own, and the same seed gives the same."""
    folder = checkpoint_of("llama", hidden_size=64, intermediate_size=256)
    [plain] = mixtures(imported(folder, {"run.name": "plain"}, upcycling=Upcycling(2)).load_model())[:1]

    noisy, again = (
        mixtures(imported(folder, {"run.name": name}, upcycling=Upcycling(2, noise=0.1)).load_model())[0].experts
        for name in ("a", "b")
    )

    for name in ("w_in", "w_out"):
        added = getattr(noisy, name) - getattr(plain.experts, name)
        for expert in (0, 1):
            share = added[expert].std() / getattr(plain.experts, name)[expert].std()
            assert share.item() == pytest.approx(0.1, rel=0.03)
        assert abs(torch.corrcoef(added.flatten(1))[0, 1]) < 0.05
        assert torch.equal(getattr(noisy, name), getattr(again, name))
    assert torch.equal(noisy.b_in, plain.experts.b_in)


def test_another_router_can_be_asked_for(checkpoint_of: Make, imported: Make) -> None:
    """DeepSeek-V3's scores and selection bias, without its groups; normalised, so the function stays."""
    folder = checkpoint_of("qwen3")
    before = imported(folder, {"run.name": "dense"}).load_model()

    settings = {"model.router.score": "sigmoid", "model.router.selection_bias": "sign"}
    after = imported(folder, settings, upcycling=Upcycling(8, 2)).load_model()

    assert (mixtures(after)[0].router.selection_bias == 0).all()
    torch.testing.assert_close(logits(after), logits(before), atol=1e-12, rtol=1e-12)


def test_what_was_made_can_be_exported(checkpoint_of: Make, imported: Make, tmp_path: Path) -> None:
    assert (
        export_huggingface(imported(checkpoint_of("llama_tied"), upcycling=Upcycling(4)), tmp_path / "out").name
        == "mixtral"
    )


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_experts": 1}, "--upcycle: is 1, and must be at least 2"),
        ({"n_experts": 8, "granularity": 0}, "--granularity: is 0, and must be at least 1"),
        ({"n_experts": 8, "granularity": 3}, "--granularity: is 3, and must divide the 8 experts of --upcycle"),
        ({"n_experts": 8, "noise": -0.1}, "--noise: is -0.1, and must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_asked_for(arguments: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Upcycling(**arguments)


REFUSED: Mapping[str, tuple[Upcycling, Mapping[str, str], str]] = {
    "parts": (Upcycling(10, 5), {}, "--granularity: is 5, and must divide the 32 hidden units"),
    "whole MLPs": (
        Upcycling(8, 2),
        {"router.top_k": "3"},
        "--model.router.top_k is 3, and must be a multiple of --gra",
    ),
    "selection": (
        Upcycling(8),
        {"router.selection": "top_p", "router.normalise": "false"},
        "--model.router.selection is top_p; experts are made for top_k",
    ),
    "order": (Upcycling(8), {"router.apply": "before"}, "--model.router.apply is before"),
    "residual": (
        Upcycling(8),
        {"router.residual": "true"},
        "--model.router.residual is true: a dense model has no log",
    ),
    "score": (
        Upcycling(8),
        {"router.score": "relu", "router.normalise": "false"},
        "--model.router.score is relu: a new router would give no expert weight",
    ),
    "shared": (
        Upcycling(8),
        {"shared.n_experts": "1"},
        "--model.shared.n_experts is set, and a dense model has nothing",
    ),
    "special": (Upcycling(8), {"special.copy": "2"}, "--model.special.copy is set"),
    "number": (Upcycling(8), {"experts.n_experts": "4"}, "--model.experts.n_experts is 4, and --upcycle makes 8"),
    "width": (Upcycling(8), {"experts.d_ff": "64"}, "--model.experts.d_ff is 64, and a part of the MLP has 32"),
    "no mixture": (Upcycling(8), {"dense_twin": "true"}, "--model.dense_twin is true: there would be no experts"),
    "dense width": (
        Upcycling(8),
        {"experts.every": "2", "feed_forward.d_ff": "16"},
        r"--model.feed_forward.d_ff is \[16\], and the MLP that stays in the dense layers has 32",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_mixture_that_cannot_begin_as_the_dense_model_is_refused(
    what: str, checkpoint_of: Make, imported: Make, tmp_path: Path
) -> None:
    upcycling, settings, message = REFUSED[what]
    flags = {f"model.{key}": value for key, value in settings.items()}

    with pytest.raises((UserError, ConfigError), match=message):
        imported(checkpoint_of("qwen3"), flags, upcycling=upcycling)
    assert not (tmp_path / "runs").exists()


def test_a_mixture_is_one_already(checkpoint_of: Make, imported: Make) -> None:
    with pytest.raises(UserError, match="is a mixture already; --upcycle makes one of a dense model"):
        imported(checkpoint_of("olmoe"), upcycling=Upcycling(8))
