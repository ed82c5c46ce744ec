"""Overlaps and flips of hand-built records, margins of hand-built scores, and what bfloat16 does to a model."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import AttentionConfig, BalanceConfig, ExpertsConfig, ModelConfig, RouterConfig
from moe.model.router import Router
from moe.model.transformer import Transformer
from moe.study.metrics.stability import flip_rate, near_ties, precision_flips, saturation, selection_margin
from moe.study.record import EMPTY


def random_places(generator: np.random.Generator, n: int, n_experts: int, top_k: int) -> np.ndarray:
    return generator.random((n, n_experts)).argsort(axis=1)[:, :top_k]


# ---------------------------------------------------------------------------------------------------------- saturation


def test_saturation_is_the_share_of_final_experts_that_were_there(records: Any) -> None:
    early = records.of([[[0, 1], [2, 3], [1, 0]]], 4, step=10)
    final = records.of([[[1, 2], [2, 3], [0, 1]]], 4, step=20)

    measured = saturation([early, final])

    # Shared: 1 of 2, 2 of 2, 2 of 2; the same first choice: only the second token.
    assert measured.values[0] == pytest.approx(np.array([[5 / 6, 1 / 3], [1, 1]]))
    assert [axis.labels for axis in measured.axes] == [("0",), ("10", "20"), ("any", "first")]
    assert measured.chance is not None
    assert measured.chance[0] == pytest.approx(np.array([[2 / 4, 1 / 4]] * 2))


def test_saturation_of_each_layer_is_its_own(records: Any) -> None:
    one = records.of([[[0], [1]], [[2], [2]]], 4, step=0)
    two = records.of([[[0], [1]], [[2], [3]]], 4, step=1)

    assert saturation([one, two]).values[:, 0, 0].tolist() == [1, 0.5]


def test_unrelated_routing_is_at_chance_and_collapsed_routing_at_its_null(records: Any) -> None:
    generator = np.random.default_rng(0)
    balanced = [records.of([random_places(generator, 4000, 8, 2)], 8, step=step) for step in (1, 2)]
    # Nine tokens in ten go to expert 0 at both steps, though not the same tokens.
    collapsed = [records.of([np.where(generator.random((4000, 1)) < 0.9, 0, 1)], 8, step=step) for step in (1, 2)]

    assert saturation(balanced).values[0, 0] == pytest.approx([2 / 8, 1 / 8], abs=0.02)
    measured = saturation(collapsed)
    # 0.9² + 0.1² = 0.82, where chance says 1/8.
    assert measured.values[0, 0] == pytest.approx([0.82, 0.82], abs=0.02)
    assert measured.null is not None
    assert measured.null[0, 0] == pytest.approx([0.82, 0.82], abs=0.02)
    assert measured.chance is not None
    assert measured.chance[0, 0] == pytest.approx([1 / 8, 1 / 8])


def test_the_exact_null_is_the_mean_over_shuffled_tokens(records: Any) -> None:
    generator = np.random.default_rng(1)
    early = np.where(generator.random((300, 2)) < 0.2, EMPTY, random_places(generator, 300, 5, 2))
    final = np.where(generator.random((300, 2)) < 0.3, EMPTY, random_places(generator, 300, 5, 2))
    final[:, 0] = np.where(final[:, 0] == EMPTY, final[:, 1], final[:, 0])
    final[:, 1] = EMPTY
    kept = final[:, 0] != EMPTY
    early, final = early[kept], final[kept]

    null = saturation([records.of([early], 5, step=0), records.of([final], 5, step=1)]).null
    shuffled = [
        saturation([records.of([generator.permutation(early)], 5, step=0), records.of([final], 5, step=1)]).values[0, 0]
        for _ in range(300)
    ]

    assert null is not None
    assert null[0, 0] == pytest.approx(np.mean(shuffled, axis=0), abs=0.006)


def test_a_token_counts_by_the_experts_that_it_has_in_the_end(records: Any) -> None:
    # Token 0 ends with one expert, which it had; token 1 with two, of which it had one; token 2 with none: left out.
    early = records.of([[[0, 1], [1, EMPTY], [3, 2]]], 4, step=0)
    final = records.of([[[0, EMPTY], [1, 2], [EMPTY, EMPTY]]], 4, step=1)

    assert saturation([early, final]).values[0, 0, 0] == pytest.approx((1 + 1 / 2) / 2)


def test_the_first_choice_is_the_first_place_that_holds_an_expert(records: Any) -> None:
    # Of token 0 the best expert was knocked out in the end, and its next is what it had first before.
    early = records.of([[[1, 0], [2, 3]]], 4, step=0)
    final = records.of([[[EMPTY, 1], [2, EMPTY]]], 4, step=1)

    assert saturation([early, final]).values[0, 0, 1] == 1
    assert flip_rate(early, final).values[0].tolist() == [1, 0]


def test_saturation_refuses_what_cannot_be_compared(records: Any) -> None:
    one, two = records.of([[[0], [1]]], 4, step=1), records.of([[[0], [1]]], 4, step=2)
    other_tokens = replace(two, token_id=np.array([0, 7], dtype=np.int32))

    with pytest.raises(ValueError, match="at least 2"):
        saturation([one])
    with pytest.raises(ValueError, match="increasing"):
        saturation([two, one])
    with pytest.raises(ValueError, match="known"):
        saturation([records.of([[[0], [1]]], 4), two])
    with pytest.raises(ValueError, match="token_id differs"):
        saturation([one, other_tokens])
    with pytest.raises(ValueError, match="different layers"):
        saturation([one, records.of([[[0], [1]]], 5, step=2)])


# --------------------------------------------------------------------------------------------------------------- flips


def test_a_set_in_another_order_is_the_same_set_with_another_first_choice(records: Any) -> None:
    # Token 0: same; 1: swapped; 2: another second; 3: another first.
    one = records.of([[[0, 1], [0, 1], [0, 1], [0, 1]]], 4)
    other = records.of([[[0, 1], [1, 0], [0, 2], [3, 1]]], 4)

    measured = flip_rate(one, other)

    assert measured.values[0].tolist() == [2 / 4, 2 / 4]
    assert measured.chance is not None
    # 1 - 1/C(4, 2) = 5/6 and 1 - 1/4.
    assert measured.chance[0] == pytest.approx([5 / 6, 3 / 4])
    assert measured.null is not None
    # Sets: {0, 1} always against {0, 1} twice in four. First: 0 always against 0 twice in four.
    assert measured.null[0] == pytest.approx([1 / 2, 1 / 2])


def test_routing_at_random_flips_at_chance(records: Any) -> None:
    generator = np.random.default_rng(0)
    one, other = (records.of([random_places(generator, 4000, 6, 2)], 6) for _ in range(2))

    measured = flip_rate(one, other)

    assert measured.chance is not None
    assert measured.null is not None
    assert measured.values == pytest.approx(measured.chance, abs=0.02)
    assert measured.null == pytest.approx(measured.chance, abs=0.005)


@given(st.integers(0, 1000), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_laws_of_flips_and_overlaps(records: Any, seed: int, top_k: int) -> None:
    generator = np.random.default_rng(seed)
    places = [random_places(generator, 30, 9, top_k) for _ in range(2)]
    one, other = (records.of([chosen], 9, step=step) for step, chosen in enumerate(places))

    flips = flip_rate(one, other).values

    assert flips == pytest.approx(flip_rate(other, one).values)
    assert (flip_rate(one, one).values == 0).all()
    # A set that did not flip overlaps fully, and one that did lacks at least one of k.
    overlap = saturation([one, other]).values[0, 0, 0]
    assert 1 - flips[0, 0] - 1e-9 <= overlap <= 1 - flips[0, 0] / top_k + 1e-9
    assert saturation([one, other]).values[0, 0, 1] == pytest.approx(1 - flips[0, 1])


def test_flips_refuse_other_tokens(records: Any) -> None:
    with pytest.raises(ValueError, match="token_id differs"):
        flip_rate(records.of([[[0]]], 4), records.of([[[0], [1]]], 4))


# ------------------------------------------------------------------------------------------------------------- margins


def test_a_margin_is_the_last_score_selected_minus_the_next(records: Any) -> None:
    scores = [[0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.375, 0.0]]
    record = records.of([[[0, 1], [1, 2]]], 4, scores=[scores])

    measured = selection_margin(record)

    # 0.25 - 0.125 and 0.375 - 0.125; the median of two is their mean.
    assert measured.axes[1].labels[3] == "50%"
    assert measured.values[0, 3] == pytest.approx(0.1875)
    assert measured.values[0, [0, -1]] == pytest.approx([0.125 + 0.01 * 0.125, 0.125 + 0.95 * 0.125])
    assert near_ties(record, 0.1).values.tolist() == [0]
    assert near_ties(record, 0.2).values.tolist() == [0.5]


def test_a_selection_that_the_scores_did_not_make_has_a_margin_below_0(records: Any) -> None:
    # A bias lifted expert 2 over expert 0.
    record = records.of([[[2]]], 4, scores=[[[0.5, 0.0, 0.25, 0.25]]])

    assert selection_margin(record).values[0] == pytest.approx([-0.25] * 6)
    assert near_ties(record, 0.1).values.tolist() == [0]


def test_a_token_of_all_experts_or_none_has_no_margin(records: Any) -> None:
    record = records.of([[[0, 1], [EMPTY, EMPTY], [1, EMPTY]]], 2, scores=[[[0.5, 0.5], [0.5, 0.5], [0.25, 0.75]]])

    assert selection_margin(record).values[0, 3] == 0.5
    assert np.isnan(selection_margin(records.of([[[0, 1]]], 2, scores=[[[0.5, 0.5]]])).values).all()
    assert np.isnan(near_ties(records.of([[[0, 1]]], 2, scores=[[[0.5, 0.5]]])).values).all()


def test_margins_need_scores(records: Any) -> None:
    with pytest.raises(ValueError, match="block 0: the scores"):
        selection_margin(records.of([[[0]]], 4))
    with pytest.raises(ValueError, match="not recorded"):
        near_ties(records.of([[[0]]], 4))


# ----------------------------------------------------------------------------------------------------------- precision


def model_of(**router: object) -> Transformer:
    """Two narrow layers of 16 experts whose logits are of the size of a trained router's."""
    config = ModelConfig(
        vocab_size=64,
        n_layers=2,
        d_model=32,
        max_seq=64,
        init_std=0.2,
        attention=AttentionConfig(n_heads=2, head_dim=16),
        experts=ExpertsConfig(n_experts=16, d_ff=8),
        router=RouterConfig(**router),
        balance=BalanceConfig(load_balance=0),
    )
    return Transformer(config)


def some_tokens() -> torch.Tensor:
    return torch.randint(64, (64, 64), generator=torch.Generator().manual_seed(0))


def test_bfloat16_sends_some_tokens_elsewhere() -> None:
    model = model_of().train()

    measured = precision_flips(model, some_tokens())

    assert [axis.name for axis in measured.axes] == ["layer", "precision", "choice"]
    # Between one token in a thousand and one in ten; chance is 1 - 1/C(16, 2) = 119/120 and 15/16.
    assert measured.values[..., 0].min() > 0.001
    assert measured.values.max() < 0.1
    assert measured.chance is not None
    assert measured.chance[0, 0] == pytest.approx([119 / 120, 15 / 16])
    assert model.training


def test_a_router_in_bfloat16_flips_what_a_plain_matrix_product_says() -> None:
    model = model_of(top_k=1, normalise=False)
    tokens = some_tokens()
    seen: list[torch.Tensor] = []
    router = model.blocks[0].feed_forward.router
    handle = router.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model.eval().hidden(tokens)
    handle.remove()
    exact = seen[0] @ router.weight.T
    product = torch.nn.functional.linear(seen[0].bfloat16(), router.weight.bfloat16())

    values = precision_flips(model, tokens).values[0, :, 1]

    # Of equal logits, of which bfloat16 makes some, either may win: topk decides here as there.
    expected = [float(first(exact).ne(first(logits.float())).double().mean()) for logits in (product, exact.bfloat16())]
    assert values[1:] == pytest.approx(expected, abs=5e-4)


def test_the_input_of_the_router_is_rounded_too() -> None:
    # Tokens are alike but for a little, to which the router listens, and its weights are bfloat16 from the start.
    model = model_of(top_k=1, normalise=False)
    with torch.no_grad():
        model.embedding.weight.add_(16)
        for router in (module for module in model.modules() if isinstance(module, Router)):
            router.weight.sub_(router.weight.mean(dim=1, keepdim=True))
            router.weight.copy_(router.weight.bfloat16())

    _, by_router, by_logits = precision_flips(model, some_tokens()).values[0, :, 1]

    assert by_router > 3 * by_logits
    assert by_router > 0.003


def first(logits: torch.Tensor) -> torch.Tensor:
    return logits.topk(1, dim=-1).indices


def test_a_router_whose_logits_stay_apart_when_rounded_never_flips() -> None:
    # Expert e has e times the first dimension as its logit: 13, 14 and 15 of anything differ in 8 bits.
    model = model_of()
    for module in model.modules():
        if isinstance(module, Router):
            with torch.no_grad():
                module.weight.zero_()
                module.weight[:, 0] = torch.arange(16.0)

    values = precision_flips(model, some_tokens()).values

    # The order of the experts hangs on the sign of that dimension, which rounding keeps.
    assert (values[:, 1:] == 0).all()


def test_routing_by_token_id_never_flips() -> None:
    assert (precision_flips(model_of(selection="hash"), some_tokens()).values == 0).all()


def test_flips_of_a_router_that_builds_on_the_one_before() -> None:
    model = model_of(residual=True, projection="two_layer", projection_width=8)
    before = copy.deepcopy(model.state_dict())

    values = precision_flips(model, some_tokens()).values

    assert (values > 0).any()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_precision_needs_float32_and_experts(records: Any) -> None:
    with pytest.raises(ValueError, match="no float32 to compare"):
        precision_flips(model_of().bfloat16(), some_tokens())
    dense = Transformer(replace(model_of().config, dense_twin=True))
    with pytest.raises(ValueError, match="no mixture layers"):
        precision_flips(dense, some_tokens())
    assert math.isnan(flip_rate(records.of([np.zeros((0, 1))], 4), records.of([np.zeros((0, 1))], 4)).values[0, 0])
