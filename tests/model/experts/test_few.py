"""The experts for a few tokens: they compute the loop, read no more than they must, and are taken where they should."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from moe.config import Activation, ExpertsConfig, FeedForwardConfig
from moe.model import experts as experts_package
from moe.model.experts import Experts, ExpertWeights, few, reference_experts
from moe.model.experts.few import NOBODY, all_at_once_pays, few_experts, fits, places_of_experts, sum_of_experts
from moe.model.feed_forward import input_width
from moe.model.routing import Routing

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}
N_EXPERTS, TOP_K, D_MODEL, D_FF = 4, 2, 16, 24
WAYS = pytest.mark.parametrize("all_at_once", [False, True, None], ids=["one by one", "all at once", "in one call"])
"""by torch's products, or by the kernel in C++, which has no float64"""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_weights(
    dtype: torch.dtype = torch.float64,
    activation: str = "swiglu",
    bias: bool = False,
    d_model: int = D_MODEL,
    d_ff: int = D_FF,
) -> ExpertWeights:
    width = input_width(activation, d_ff)
    return ExpertWeights(
        draw(N_EXPERTS, width, d_model, seed=1, dtype=dtype) / d_model**0.5,
        draw(N_EXPERTS, d_model, d_ff, seed=2, dtype=dtype) / d_ff**0.5,
        draw(N_EXPERTS, width, seed=3, dtype=dtype) if bias else None,
        draw(N_EXPERTS, d_model, seed=4, dtype=dtype) if bias else None,
        activation,
    )


def routing_of(selected: list[list[int]], dtype: torch.dtype = torch.float32, **fields: object) -> Routing:
    """A decision by hand, with random weights, 0 where ``assigned`` or ``mask`` is False."""
    chosen = torch.tensor(selected, dtype=torch.int64).view(len(selected), -1 if selected else TOP_K)
    wide = torch.promote_types(dtype, torch.float32)
    weights = draw(*chosen.shape, seed=5, dtype=wide).abs()
    uniform = torch.full((len(selected), N_EXPERTS), 1 / N_EXPERTS, dtype=wide)
    routing = Routing(uniform.log(), uniform, chosen, weights, **fields)
    present = routing.present
    return routing if present is None else replace(routing, weights=weights.where(present, 0.0))


ROUTINGS = {
    "spread": routing_of([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]]),
    "one empty": routing_of([[0, 1], [3, 0], [1, 3]]),
    "all to two": routing_of([[2, 1]] * 7),
    "one token": routing_of([[3, 1]]),
    "one of each": routing_of([[3, 1, 0, 2]]),
    "padding": routing_of([[0, 1], [2, 3], [3, 0]], mask=torch.tensor([True, False, True])),
    "one token of padding": routing_of([[0, 1]], mask=torch.tensor([False])),
    "empty places": routing_of([[0, 1], [2, 3]], assigned=torch.tensor([[True, False], [False, False]])),
    "one token, one place": routing_of([[0, 1]], assigned=torch.tensor([[True, False]])),
    "dropped": routing_of([[0, 1], [2, 3]]).dropping(torch.tensor([[False, True], [False, False]])),
    "special": routing_of([[0, 3], [3, 1]], n_special=1),
    "no token": routing_of([]),
}


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    all_at_once = request.getfixturevalue("all_at_once")
    if all_at_once is not None:
        monkeypatch.setattr(few.native, "computes", lambda *_: False)
    monkeypatch.setattr(few, "all_at_once_pays", lambda *_: bool(all_at_once))


@WAYS
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("gelu", True)])
def test_they_compute_the_loop(
    routing: Routing, dtype: torch.dtype, activation: str, bias: bool, all_at_once: bool | None
) -> None:
    weights, x = make_weights(dtype, activation, bias), draw(routing.n_tokens, D_MODEL, seed=6, dtype=dtype)
    if routing.n_special:
        weights = ExpertWeights(*(t if t is None else t[:-1] for t in weights[:4]), activation)
    if dtype == torch.float64:
        routing = replace(routing, weights=routing.weights.double())

    y, expected = few_experts(x, routing, weights), reference_experts(x, routing, weights)

    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    difference, size = (y.double() - expected.double()).norm(), expected.double().norm()
    assert difference <= TOLERANCE[dtype] * size


@WAYS
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_model", "d_ff"), [(5, 7), (1, 1), (20, 3), (70, 45), (33, 96)])
def test_they_take_any_shape(d_model: int, d_ff: int, dtype: torch.dtype, all_at_once: bool | None) -> None:
    weights = make_weights(dtype, d_model=d_model, d_ff=d_ff)
    x, routing = draw(5, d_model, dtype=dtype), ROUTINGS["spread"]

    y, expected = few_experts(x, routing, weights), reference_experts(x, routing, weights)

    assert (y - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@WAYS
@pytest.mark.usefixtures("way")
def test_it_does_not_matter_how_numbers_lie_in_memory(all_at_once: bool | None) -> None:
    weights, routing = make_weights(torch.float32, bias=True), ROUTINGS["spread"]
    x = draw(routing.n_tokens, D_MODEL, dtype=torch.float32)
    turned = ExpertWeights(*(t.mT.contiguous().mT for t in weights[:4]), weights.activation)

    y = few_experts(x.t().contiguous().t(), routing, turned)

    torch.testing.assert_close(y, few_experts(x, routing, weights))


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "with biases"])
def test_one_call_knows_every_activation(activation: str, bias: bool) -> None:
    weights, routing = make_weights(torch.float32, activation, bias), ROUTINGS["all to two"]
    x = 4 * draw(routing.n_tokens, D_MODEL, dtype=torch.float32)

    y, expected = few_experts(x, routing, weights), reference_experts(x, routing, weights)

    assert (y - expected).norm() <= TOLERANCE[torch.float32] * expected.norm()


@WAYS
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["one empty", "one token", "padding", "special"])
def test_what_no_token_chose_has_no_say(name: str, all_at_once: bool | None) -> None:
    """Not even where it is NaN: the weights of an expert that is not hit, and the token of padding."""
    routing, weights = ROUTINGS[name], make_weights(torch.float32)
    x = draw(routing.n_tokens, D_MODEL, dtype=torch.float32)
    expected = few_experts(x, routing, weights)

    executed = routing.executed
    hit = routing.selected.flatten() if executed is None else routing.selected[executed]
    idle = [expert for expert in range(N_EXPERTS) if expert not in hit]
    weights.w_in[idle] = torch.nan
    weights.w_out[idle] = torch.nan
    if routing.mask is not None:
        x[~routing.mask] = torch.nan

    assert torch.equal(few_experts(x, routing, weights), expected)


@pytest.mark.parametrize("all_at_once", [False], ids=["one by one"])
@pytest.mark.usefixtures("way")
def test_one_by_one_reads_nothing_else(all_at_once: bool) -> None:
    """Experts 0 and 3 of four, one row of the first and two of the last; others are not even looked at."""

    class Watched(list):
        def __init__(self, matrices: Tensor) -> None:
            super().__init__(matrices)
            self.read: list[int] = []

        def __getitem__(self, expert: int) -> Tensor:
            self.read.append(expert)
            return super().__getitem__(expert)

    if hasattr(sum_of_experts, "__wrapped__"):
        pytest.skip("whoever checks the annotations reads, too")
    weights = make_weights()
    w_in, w_out = Watched(weights.w_in), Watched(weights.w_out)
    chosen, combine = [[3, 0], [NOBODY, 3]], draw(2, 2, seed=7)

    y = sum_of_experts(draw(2, D_MODEL), chosen, combine, weights, (w_in, w_out))

    assert (w_in.read, w_out.read) == ([3, 0], [3, 0])
    assert y.shape == (2, D_MODEL)


def test_places_on_paper() -> None:
    """Token t has places 2 t and 2 t + 1."""
    assert places_of_experts([[3, 0], [NOBODY, 3], [0, 1]]) == {3: [0, 3], 0: [1, 4], 1: [5]}


@pytest.mark.parametrize(
    ("hit", "rows", "pays"),
    [
        # 16 experts of 3 x 128 x 256 float32, 393 kB: all cost 6.3 MB x (1 + rows / 12), one 393 kB and a call, 300 kB.
        (16, 1, True),  # 6.8 MB against 11.1
        (14, 5, True),  # 8.9 against 9.7
        (14, 8, False),  # 10.5 against 9.7
        (2, 1, False),
    ],
)
def test_one_product_of_all_pays_where_most_are_hit(hit: int, rows: int, pays: bool) -> None:
    weights = ExpertWeights(torch.empty(16, 512, 128), torch.empty(16, 128, 256), None, None, "swiglu")
    places = {expert: list(range(rows if expert == 0 else 1)) for expert in range(hit)}

    assert all_at_once_pays(places, weights) is pays


def test_in_bfloat16_fewer_have_to_be_hit() -> None:
    """Half the bytes, and a call that costs as much as 1.5 MB: 3.1 MB x 13 / 12 against 1.7 MB an expert."""
    weights = ExpertWeights(
        torch.empty(16, 512, 128, dtype=torch.bfloat16), torch.empty(16, 128, 256, dtype=torch.bfloat16), None, None, ""
    )

    assert [all_at_once_pays({e: [e] for e in range(hit)}, weights) for hit in (1, 2, 4)] == [False, False, True]


def test_they_fit_few_tokens_without_gradients_on_a_cpu() -> None:
    x, routing = draw(32, D_MODEL), routing_of([[0, 1]] * 32)
    with torch.no_grad():
        assert fits(x, routing)
        assert not fits(draw(33, D_MODEL), routing_of([[0, 1]] * 33))
        assert not fits(x.to("meta"), routing)
    assert not fits(x, routing)


@pytest.mark.parametrize(("backend", "taken"), [("auto", True), ("segments", False), ("reference", False)])
def test_auto_takes_them_for_a_few_tokens(backend: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(experts_package.few, "few_experts", lambda x, *_: calls.append(1) or x)
    layer = Experts(ExpertsConfig(n_experts=4, d_ff=D_FF, backend=backend), FeedForwardConfig(), D_MODEL).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, routing = draw(1, D_MODEL), replace(ROUTINGS["one token"], weights=torch.ones(1, 2).double())

    layer(x, routing)
    assert not calls
    with torch.no_grad():
        layer(x, routing)
    assert bool(calls) is taken


def test_under_autocast_products_are_in_its_dtype() -> None:
    weights, x, routing = make_weights(torch.float32), draw(5, D_MODEL, dtype=torch.float32), ROUTINGS["spread"]
    narrow = ExpertWeights(weights.w_in.bfloat16(), weights.w_out.bfloat16(), None, None, "swiglu")

    with torch.autocast("cpu", torch.bfloat16):
        y = few_experts(x, routing, weights)

    assert y.dtype == torch.float32
    torch.testing.assert_close(y, few_experts(x.bfloat16(), routing, narrow).float(), rtol=0.02, atol=0.02)
