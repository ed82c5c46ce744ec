import torch

from moe.bench.loads import assign
from moe.bench.shapes import LAYERS, LayerShape


def test_a_balanced_load_gives_every_expert_the_same_number_of_tokens():
    for name in ("tiny", "qwen3"):
        shape = LAYERS[name]
        selected, _ = assign(shape, "balanced", seed=0)
        counts = torch.bincount(selected.flatten(), minlength=shape.n_experts)
        assert counts.tolist() == [shape.assignments // shape.n_experts] * shape.n_experts


def test_no_token_has_an_expert_twice_and_its_weights_sum_to_one():
    shape = LAYERS["small"]
    for skew in ("balanced", "zipf"):
        selected, weights = assign(shape, skew, seed=3)
        assert selected.shape == weights.shape == (shape.tokens, shape.top_k)
        assert (selected.sort(dim=1).values.diff(dim=1) > 0).all()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(shape.tokens))


def test_zipf_gives_the_rth_expert_a_share_of_one_over_r():
    # With one expert a token there is no exclusion: shares 1, 1/2, 1/3, 1/4 over 25/12.
    shape = LayerShape(tokens=60_000, d_model=1, d_ff=1, n_experts=4, top_k=1)
    selected, _ = assign(shape, "zipf", seed=0)
    shares = torch.bincount(selected.flatten(), minlength=4).sort(descending=True).values / shape.tokens
    # Standard deviation of a share below 0.0021.
    torch.testing.assert_close(shares, torch.tensor([12, 6, 4, 3]) / 25, atol=0.01, rtol=0)


def test_another_seed_is_another_assignment():
    shape = LAYERS["small"]
    for skew in ("balanced", "zipf"):
        assert not torch.equal(assign(shape, skew, seed=0)[0], assign(shape, skew, seed=1)[0])
        assert torch.equal(assign(shape, skew, seed=1)[0], assign(shape, skew, seed=1)[0])
