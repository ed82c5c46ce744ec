import pytest
import torch

from moe.bench.shapes import LAYERS, MODELS, LayerShape
from moe.model.transformer import Transformer


def test_a_layers_flops_are_those_of_nine_products_an_assignment():
    # 2 tokens to 2 experts each: N = 4. Forward three products of 3 x 5 weights, each 2 · 4 · 3 · 5 = 120 FLOPs;
    # backward twice as many.
    shape = LayerShape(tokens=2, d_model=3, d_ff=5, n_experts=4, top_k=2)
    assert shape.flops(backward=False) == 3 * 120
    assert shape.flops() == 9 * 120
    assert shape.parameters == 4 * 3 * 15


# Published: 29.2 ms at 677 TFLOP/s, and 11.0 ms at 674, for the six products of a layer.
@pytest.mark.parametrize(("name", "milliseconds", "tflops"), [("gpt4s", 29.2, 677), ("qwen3", 11.0, 674)])
def test_large_layers_have_the_published_work(name, milliseconds, tflops):
    assert LAYERS[name].flops() == pytest.approx(milliseconds / 1000 * tflops * 1e12, rel=0.01)


def test_the_large_model_has_6_85_billion_parameters_of_which_a_token_uses_1_21():
    with torch.device("meta"):
        model = Transformer(MODELS["1b"].config())
    assert model.num_params() == pytest.approx(6.85e9, rel=0.001)
    assert model.num_active_params() == pytest.approx(1.21e9, rel=0.005)


def test_flops_of_a_token_agree_with_the_parameters_and_with_the_published_share():
    shape = MODELS["1b"]
    with torch.device("meta"):
        twin = Transformer(shape.config(dense_twin=True))
    multiplying = (
        twin.num_params()
        - twin.embedding.weight.numel()
        - sum(parameter.numel() for name, parameter in twin.named_parameters() if "norm" in name)
    )
    # Attention, causal: half of S keys a query, two products of d each, forward and twice backward, in every layer.
    attention = shape.n_layers * 3 * 2 * 2 * (shape.sequence // 2) * shape.d_model
    assert shape.flops_per_token == 6 * multiplying + attention
    # 56,037 tokens a second were 59.2 % of 724 TFLOP/s.
    assert 56_037 * shape.flops_per_token == pytest.approx(0.592 * 724e12, rel=0.005)
