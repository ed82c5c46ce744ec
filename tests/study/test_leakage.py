"""What a router declares, and what editing the future shows: every preset, routers by hand, and routers that lie."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from moe import presets
from moe.config import (
    BalanceConfig,
    CapacityConfig,
    ConfigError,
    ExpertsConfig,
    ModelConfig,
    Preset,
    RouterConfig,
    SharedExpertsConfig,
    SpecialExpertsConfig,
)
from moe.model.moe_layer import MoELayer
from moe.model.router import Router
from moe.model.routing import summarise_load
from moe.model.transformer import Transformer
from moe.study.leakage import Finding, check_router, findings_table, overview_table, tiny_model

NO_LOSS = BalanceConfig(load_balance=0)


def model_of(**router: object) -> ModelConfig:
    return ModelConfig(router=RouterConfig(**router), balance=NO_LOSS)


def seen(findings: list[Finding]) -> str:
    """Which edits changed something: f, b and a for future, batch-mates and all futures; training | evaluation."""
    letters = [finding.edit[0] if finding.changed else "-" for finding in findings]
    return "".join(letters[:3]) + "|" + "".join(letters[3:])


# -------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", get_args(Preset))
def test_what_a_preset_declares_holds(name: str) -> None:
    findings = check_router(presets.model_config(name))

    assert [finding.verdict for finding in findings] == ["holds"] * 6
    # Rounding and leaks are both far from the limit between them, so that neither is taken for the other.
    assert all(finding.largest < 1e-12 or finding.largest > 1e-6 for finding in findings)


# ----------------------------------------------------------------------------------------------------- routers by hand


def capacity(factor: float, order: str, scope: str = "micro_batch", in_evaluation: bool = False) -> CapacityConfig:
    return CapacityConfig(factor=factor, order=order, scope=scope, in_evaluation=in_evaluation)


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        ({}, "---|---"),
        ({"selection": "expert_choice"}, "fba|fba"),
        ({"selection": "expert_choice", "top_k": 1}, "fba|fba"),
        ({"selection": "sinkhorn"}, "fba|---"),
        ({"selection": "base", "top_k": 1, "normalise": False}, "fba|---"),
        # In the order of the tokens a sequence takes places from those after it, whose earlier tokens then see it.
        ({"capacity": capacity(1, "position")}, "-ba|---"),
        ({"capacity": capacity(2, "position", in_evaluation=True)}, "-ba|-ba"),
        ({"capacity": capacity(1, "position", "sequence")}, "---|---"),
        ({"capacity": capacity(2, "choice")}, "fba|---"),
        ({"capacity": capacity(2, "choice", in_evaluation=True)}, "fba|fba"),
        ({"capacity": capacity(2, "choice", "sequence", in_evaluation=True)}, "f-a|f-a"),
        # With one choice there are no later choices to evict.
        ({"capacity": capacity(1, "choice", "sequence"), "top_k": 1, "normalise": False}, "---|---"),
        ({"capacity": capacity(2, "score")}, "fba|---"),
        ({"capacity": capacity(2, "score", "sequence", in_evaluation=True)}, "f-a|f-a"),
        ({"capacity": capacity(1, "score", "sequence"), "top_k": 1, "normalise": False}, "f-a|---"),
        # top_k 1 is not one choice where the number of experts varies.
        (
            {"capacity": capacity(1, "choice", "sequence"), "selection": "top_p", "top_k": 1, "normalise": False},
            "f-a|---",
        ),
        (
            {
                "capacity": capacity(1, "choice", "sequence"),
                "selection": "positive",
                "score": "relu",
                "top_k": 1,
                "normalise": False,
            },
            "f-a|---",
        ),
        # Noise is each token's own: the same before and after an edit, it is no leak.
        ({"noise": "shazeer", "jitter": 0.1, "second_choice": 0.5}, "---|---"),
        ({"noise": "gumbel"}, "---|---"),
        ({"selection": "sampled", "gradient": "heun", "normalise": False}, "---|---"),
    ],
    ids=str,
)
def test_edits_find_what_leaks_and_nothing_else(router: dict, expected: str) -> None:
    findings = check_router(model_of(**router), edits=8)

    assert seen(findings) == expected
    assert all(finding.holds for finding in findings)


def test_a_dropless_mixtral_changes_by_rounding_alone() -> None:
    findings = check_router(model_of(top_k=2))

    assert [finding.changed for finding in findings] == [0] * 6
    assert [finding.edits for finding in findings] == [16] * 6
    assert max(finding.largest for finding in findings) < 1e-12


# ---------------------------------------------------------------------------------------------------- routers that lie


def test_a_leak_that_is_declared_clean_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RouterConfig, "is_causal", lambda self, *, training: True)
    monkeypatch.setattr(RouterConfig, "is_batch_independent", lambda self, *, training: True)

    findings = check_router(model_of(selection="sinkhorn"), edits=4)

    lie, holds = "LEAKS, and declared clean", "holds"
    assert [finding.verdict for finding in findings] == [lie, lie, lie, holds, holds, holds]


def test_a_leak_that_is_declared_and_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RouterConfig, "is_causal", lambda self, *, training: False)

    findings = check_router(model_of(), edits=4)

    unseen, holds = "declared leaking, not seen", "holds"
    assert [finding.verdict for finding in findings] == [unseen, holds, unseen] * 2


def test_a_router_that_looks_at_the_mean_of_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of the code, not of the declaration, and one that changes no choice, only weights, and by little."""
    honest = Router.forward

    def forward(self: Router, x: Tensor, *arguments: object, **keywords: object) -> object:
        return honest(self, x + 1e-4 * x.mean(dim=0), *arguments, **keywords)

    monkeypatch.setattr(Router, "forward", forward)

    findings = check_router(model_of(selection="all"), edits=2)

    assert seen(findings) == "fba|fba"
    assert all(finding.changed == 2 and not finding.holds for finding in findings)


def test_a_logit_that_is_no_number_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Transformer, "forward", lambda self, tokens: (torch.full((*tokens.shape, 64), float("nan")), [])
    )

    findings = check_router(model_of(), edits=2)

    assert all(finding.changed == 2 and finding.largest != finding.largest for finding in findings)


# ------------------------------------------------------------------------------------------------------- the tiny model


def test_the_tiny_model_has_the_axes_of_the_configuration_and_its_own_sizes() -> None:
    config = ModelConfig(
        d_model=512,
        n_layers=12,
        dropout=0.5,
        experts=ExpertsConfig(n_experts=24, d_ff=2048, first_dense=3, every=2),
        shared=SharedExpertsConfig(n_experts=2, d_ff=999, gated=True),
        special=SpecialExpertsConfig(zero=1, copy=2, constant=3),
        router=RouterConfig(top_k=5),
    )

    tiny = tiny_model(config, 0).config

    assert (tiny.router, tiny.special, tiny.balance) == (config.router, config.special, config.balance)
    assert (tiny.experts.n_experts, tiny.shared.n_experts, tiny.shared.gated) == (24, 2, True)
    assert tiny.moe_layers == [0, 1]
    assert tiny.dropout == 0
    assert max(tiny.d_model, tiny.experts.d_ff) <= 16


def test_no_leak_can_hide_in_a_router_that_is_not_trained() -> None:
    """What starts at a constant is random, experts are used unequally, and the computation is float64 throughout."""
    config = model_of(noise="shazeer", bias=True, selection_bias="sign", score="sigmoid")
    model = tiny_model(config, 0)

    logits, routings = model.eval()(torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0)))

    assert logits.dtype == torch.float64
    routers = [module.router for module in model.modules() if isinstance(module, MoELayer)]
    for router, routing in zip(routers, routings, strict=True):
        for values in (router.weight, router.noise_weight, router.bias, router.selection_bias):
            assert values.std() > 0.1
        # More than twice the fair share somewhere: a capacity of factor 2 drops.
        assert summarise_load(routing.counts()).max_over_fair > 2


# ------------------------------------------------------------------------------------------------------------ behaviour


def test_the_seed_decides_the_findings_and_the_state_of_torch_is_left() -> None:
    config = model_of(selection="sinkhorn", noise="none")
    torch.manual_seed(7)
    state = torch.get_rng_state()

    first = check_router(config, edits=3, seed=1)
    again = check_router(config, edits=3, seed=1)
    other = check_router(config, edits=3, seed=2)

    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_each_round_is_announced() -> None:
    rounds: list[None] = []

    check_router(model_of(), edits=3, advance=lambda: rounds.append(None))

    assert len(rounds) == 2 * 3


def test_a_dense_model_has_no_router() -> None:
    with pytest.raises(ConfigError, match=r"model\.dense_twin: is true: there is no router to check"):
        check_router(ModelConfig(dense_twin=True))


# --------------------------------------------------------------------------------------------------------------- tables


def finding(edit: str, changed: int, clean: bool, *, training: bool = True) -> Finding:
    largest = 0.25 if changed else 0.0
    return Finding(training=training, edit=edit, edits=8, changed=changed, largest=largest, declared_clean=clean)


def test_the_table_of_one_router() -> None:
    findings = [finding("future", 5, False), finding("batch-mates", 5, True), finding("all futures", 0, False)]

    assert findings_table("mine", findings).splitlines() == [
        "mine",
        "",
        "mode      edited               compared    edits that changed a logit  largest change  declared  verdict",
        "training  a sequence's future  its past    5 of 8                      2.5e-01         leaks     holds",
        "training  its batch-mates      all of it   5 of 8                      2.5e-01         clean     "
        "LEAKS, and declared clean",
        "training  every future         every past  0 of 8                      0.0e+00         leaks     "
        "declared leaking, not seen",
    ]


def test_the_table_of_several_routers() -> None:
    clean = [finding(edit, 0, True, training=mode) for mode in (True, False) for edit in ("future", "x", "y")]
    lying = [finding(edit, 8, True, training=mode) for mode in (True, False) for edit in ("future", "x", "y")]

    assert overview_table({"honest": clean, "lying": lying}).splitlines() == [
        "        training                            evaluation",
        "router  future    batch-mates  all futures  future      batch-mates  all futures  declarations",
        "honest  0 of 8    0 of 8       0 of 8       0 of 8      0 of 8       0 of 8       hold",
        "lying   8 of 8    8 of 8       8 of 8       8 of 8      8 of 8       8 of 8       LEAKS, and declared clean",
    ]
