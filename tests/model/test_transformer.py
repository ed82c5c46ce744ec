"""The whole model: what it must not depend on (the future, other rows, padding, the cache), and what it must equal."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import (
    AttentionConfig,
    BalanceConfig,
    ConfigError,
    ExpertsConfig,
    FeedForwardConfig,
    LatentConfig,
    ModelConfig,
    RopeConfig,
    RouterConfig,
    SharedExpertsConfig,
)
from moe.model.balance import load_balancing_loss, z_loss
from moe.model.cache import KVCache
from moe.model.feed_forward import FeedForward
from moe.model.moe_layer import MoELayer
from moe.model.routing import Routing
from moe.model.transformer import Batch, Transformer
from moe.parallel.world import World
from moe.training.head_loss import head_loss
from moe.training.objective import Objective, StepCounts, compose

PLAIN = ModelConfig(
    vocab_size=64,
    n_layers=2,
    d_model=32,
    max_seq=48,
    init_std=0.2,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6),
    experts=ExpertsConfig(n_experts=4, d_ff=24),
    router=RouterConfig(top_k=2),
)
EVERYTHING = replace(
    PLAIN,
    norm="layernorm",
    tie_embeddings=False,
    attention=AttentionConfig(n_heads=4, n_kv_heads=1, head_dim=6, qk_norm="head", bias=True),
    feed_forward=FeedForwardConfig(activation="gelu", bias=True),
    experts=ExpertsConfig(n_experts=4, d_ff=24, first_dense=1),
    shared=SharedExpertsConfig(n_experts=1, gated=True),
    router=RouterConfig(top_k=1, normalise=False, scale=2.0),
)
VARIANTS = {
    "plain": PLAIN,
    "everything": EVERYTHING,
    "dense": replace(PLAIN, dense_twin=True),
    "layernorm": replace(PLAIN, norm="layernorm"),
    "gelu": replace(PLAIN, feed_forward=FeedForwardConfig(activation="gelu")),
    "relu": replace(PLAIN, feed_forward=FeedForwardConfig(activation="relu", bias=True)),
    "shared": replace(PLAIN, shared=SharedExpertsConfig(n_experts=2, d_ff=8)),
    "qk_norm_full": replace(PLAIN, attention=replace(PLAIN.attention, qk_norm="full")),
    "every_other": replace(PLAIN, experts=ExpertsConfig(n_experts=4, d_ff=24, every=2)),
    "loop": replace(PLAIN, experts=ExpertsConfig(n_experts=4, d_ff=24, backend="reference")),
    "grouped": replace(PLAIN, experts=ExpertsConfig(n_experts=4, d_ff=24, backend="grouped")),
}
VARIANTS |= {
    "sinks_in_a_window": replace(
        PLAIN, attention=replace(PLAIN.attention, sinks=True, window=4, full_every=2, output_bias=True)
    ),
    "latent": replace(
        PLAIN,
        attention=AttentionConfig(
            n_heads=4, head_dim=6, latent=LatentConfig(rank=8, query_rank=10, rotary_dim=4, value_dim=5)
        ),
    ),
    "learned": replace(
        PLAIN,
        positions="learned",
        norm="layernorm",
        norm_bias=False,
        feed_forward=FeedForwardConfig(activation="gelu_tanh"),
        attention=replace(PLAIN.attention, clip=0.5),
    ),
    "no_positions": replace(PLAIN, positions="none"),
    "clamped": replace(
        PLAIN,
        feed_forward=FeedForwardConfig(activation="swiglu_clamped", bias=True),
        attention=replace(PLAIN.attention, head_dim=8, rope=RopeConfig(fraction=0.5, scaling="yarn", factor=4)),
    ),
}
all_variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
MAIN = {"plain": PLAIN, "everything": EVERYTHING} | {name: VARIANTS[name] for name in ("sinks_in_a_window", "latent")}
main_variants = pytest.mark.parametrize("config", MAIN.values(), ids=MAIN)


def text(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def objective(model: Transformer, inputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Objective:
    """One micro-batch through the real loss."""
    hidden, routings = model.hidden(inputs, mask)
    lm = head_loss(hidden, model.head.weight, targets, mask)
    return compose(lm, routings, BalanceConfig(load_balance=0.1, z_loss=0.01), StepCounts(World()))


# ------------------------------------------------------------------------------------------------- what it must not see


@all_variants
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_future_changes_nothing_to_the_bit(config: ModelConfig, training: bool) -> None:
    """A router that chose tokens for experts, or a capacity over the batch, would leak."""
    model = Transformer(config).train(training)
    tokens = text(2, 20)
    edited = tokens.clone()
    edited[:, 12:] = (edited[:, 12:] + 1) % 64

    before, routings = model(tokens)
    after, routings_after = model(edited)

    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])
    for one, other in zip(routings, routings_after, strict=True):
        assert torch.equal(one.selected.view(2, 20, -1)[:, :12], other.selected.view(2, 20, -1)[:, :12])


@all_variants
def test_a_row_alone_is_a_row_among_others(config: ModelConfig) -> None:
    """To 1e-5 and not to the bit: a product of fewer rows may add its terms in another order."""
    model = Transformer(config).eval()
    tokens = text(5, 20)

    together, routings = model(tokens)
    alone, alone_routings = model(tokens[3:4])

    torch.testing.assert_close(alone, together[3:4], rtol=0, atol=1e-5)
    for one, other in zip(alone_routings, routings, strict=True):
        assert torch.equal(one.selected, other.selected.view(5, 20, -1)[3])


def padded(tokens: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """``tokens`` between columns of padding (token 7, so that it would be noticed), and the mask."""
    return F.pad(tokens, (left, right), value=7), F.pad(torch.ones_like(tokens, dtype=torch.bool), (left, right))


@all_variants
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 5), (3, 4), (15, 15)])
def test_padding_changes_neither_logits_nor_routing(config: ModelConfig, left: int, right: int) -> None:
    model = Transformer(config).eval()
    tokens = text(3, 10)

    logits, routings = model(tokens)
    with_padding, padded_routings = model(*padded(tokens, left, right))

    torch.testing.assert_close(with_padding[:, left : left + 10], logits, rtol=0, atol=1e-5)
    assert with_padding.isfinite().all()
    for plain, masked in zip(routings, padded_routings, strict=True):
        assert torch.equal(plain.counts(), masked.counts())
        assert masked.real_tokens() == 30
        torch.testing.assert_close(load_balancing_loss(masked), load_balancing_loss(plain))
        torch.testing.assert_close(z_loss(masked), z_loss(plain))


@main_variants
@pytest.mark.parametrize(("left", "right"), [(30, 0), (0, 30)])
def test_three_quarters_padding_change_neither_losses_nor_gradients(config: ModelConfig, left: int, right: int) -> None:
    model = Transformer(config).double()
    inputs, targets = text(3, 10), text(3, 10, seed=1)

    plain = objective(model, inputs, targets)
    plain.total.backward()
    expected = gradients(model)
    model.zero_grad()
    padded_inputs, mask = padded(inputs, left, right)
    masked = objective(model, padded_inputs, padded(targets, left, right)[0], mask)
    masked.total.backward()

    torch.testing.assert_close(masked.lm, plain.lm)
    torch.testing.assert_close(masked.auxiliary, plain.auxiliary)
    torch.testing.assert_close(gradients(model), expected)


def test_rows_of_different_lengths_in_one_batch_equal_each_alone() -> None:
    model = Transformer(PLAIN).eval()
    rows = [text(1, length, seed=length)[0] for length in (3, 9, 6)]
    tokens = torch.stack([F.pad(row, (9 - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(9) >= 9 - len(row) for row in rows])

    together, _ = model(tokens, mask)

    for row, logits in zip(rows, together, strict=True):
        torch.testing.assert_close(logits[-len(row) :], model(row[None])[0][0], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ the cache


@all_variants
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 1, 5], [12]], ids=["by token", "in chunks", "at once"])
def test_cached_equals_uncached(config: ModelConfig, chunks: list[int]) -> None:
    model = Transformer(config).eval()
    tokens = text(2, 12)
    cache = KVCache(config, 2, 12, torch.device("cpu"))

    parts = [model(part, cache=cache)[0] for part in tokens.split(chunks, dim=1)]

    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens)[0], rtol=0, atol=1e-5)


@main_variants
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 1, 5]], ids=["by token", "in chunks"])
def test_cached_equals_uncached_with_padding_on_both_sides(config: ModelConfig, chunks: list[int]) -> None:
    model = Transformer(config).eval()
    tokens = text(3, 12)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, :4] = False
    mask[2, 9:] = False
    cache = KVCache(config, 3, 12, torch.device("cpu"))

    results = [
        model(part, real, cache)
        for part, real in zip(tokens.split(chunks, dim=1), mask.split(chunks, dim=1), strict=True)
    ]
    uncached, routings = model(tokens, mask)

    cached = torch.cat([logits for logits, _ in results], dim=1)
    torch.testing.assert_close(cached[mask], uncached[mask], rtol=0, atol=1e-5)
    for layer, routing in enumerate(routings):
        assert torch.equal(sum(part[layer].counts() for _, part in results), routing.counts())


def test_a_sequence_that_is_too_long_is_refused() -> None:
    model = Transformer(PLAIN)

    assert model(text(1, 48))[0].shape == (1, 48, 64)
    with pytest.raises(ValueError, match=r"a sequence of 49 tokens is longer than model.max_seq = 48"):
        model(text(1, 49))


def test_a_cached_sequence_that_grows_too_long_is_refused() -> None:
    model = Transformer(PLAIN)
    cache = KVCache(PLAIN, 1, 60, torch.device("cpu"))
    model(text(1, 48), cache=cache)

    with pytest.raises(ValueError, match="a sequence of 49 tokens"):
        model(text(1, 1), cache=cache)


# ----------------------------------------------------------------------------------------------- dropout, recomputation


@main_variants
def test_evaluation_repeats_itself_and_training_drops_out(config: ModelConfig) -> None:
    model = Transformer(replace(config, dropout=0.5))
    tokens = text(2, 20)

    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    assert torch.equal(model(tokens)[0], Transformer(config).eval()(tokens)[0])

    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])


@main_variants
@pytest.mark.parametrize("part", ["attention", "experts", "block"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_activations_changes_nothing(config: ModelConfig, part: str, dropout: float) -> None:
    """Not the loss, not the auxiliary losses and their gradient, and no assignment is counted twice."""
    results = []
    for recompute in ("none", part):
        model = Transformer(replace(config, dropout=dropout)).train()
        model.activation_checkpointing = recompute
        counts = StepCounts(World())
        torch.manual_seed(1)
        tokens = text(2, 21)
        hidden, routings = model.hidden(tokens[:, :-1])
        lm = head_loss(hidden, model.head.weight, tokens[:, 1:])
        result = compose(lm, routings, BalanceConfig(load_balance=1.0, z_loss=1.0), counts)
        result.total.backward()
        results.append((result.lm, result.auxiliary, gradients(model), counts.counts))

    assert results[0][3].sum(1).tolist() == [2 * 20 * config.router.top_k] * len(config.moe_layers)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@main_variants
def test_recomputation_saves_activations(config: ModelConfig) -> None:
    """Otherwise the test above would pass with a switch that does nothing: what a block keeps for its backward pass is
    the most with none, and the least with the whole block."""
    kept = {}
    for part in ("none", "attention", "experts", "block"):
        model = Transformer(config).train()
        model.activation_checkpointing = part
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: (saved.append(x), x)[1], lambda x: x):
            logits, _ = model(text(2, 20))
        memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved if not is_weight(x)}
        kept[part] = sum(memory.values())
        del logits

    assert kept["block"] < kept["experts"] < kept["none"]
    assert kept["block"] < kept["attention"] < kept["none"]
    assert kept["block"] < kept["none"] / 2


def is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


# -------------------------------------------------------------------------------------------------- what it must equal


EXPERT_NAME = {"w_in.weight": "w_in", "w_out.weight": "w_out", "w_in.bias": "b_in", "w_out.bias": "b_out"}
"""a parameter of the dense layer -> the one that stacks it over the experts"""


def copy_dense_into_mixture(dense: Transformer, mixture: Transformer) -> None:
    """Make every expert of every layer equal to the dense layer; all else has the same name."""
    values = dict(mixture.named_parameters())
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            values[name_in_mixture(name)].copy_(parameter)


def name_in_mixture(name: str) -> str:
    """Where a parameter of the dense model is found in the mixture."""
    block, found, own = name.partition("feed_forward.")
    return f"{block}feed_forward.experts.{EXPERT_NAME[own]}" if found else name


@pytest.mark.parametrize("backend", ["reference", "segments"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_one_expert_is_the_dense_model_for_twenty_steps(backend: str, activation: str) -> None:
    """Logits, gradients, and the loss curve under AdamW: what wrong initialisation or a wrong combine would bend."""
    one_expert = replace(
        PLAIN,
        feed_forward=FeedForwardConfig(activation=activation, bias=True),
        experts=ExpertsConfig(n_experts=1, d_ff=24, backend=backend),
        router=RouterConfig(top_k=1, normalise=False),
    )
    mixture = Transformer(one_expert).double()
    dense = Transformer(replace(one_expert, dense_twin=True)).double()
    copy_dense_into_mixture(dense, mixture)
    curves: dict[str, list[float]] = {}
    first_gradient: dict[str, dict[str, Tensor]] = {}
    for name, model in (("mixture", mixture), ("dense", dense)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        curves[name] = []
        for step in range(20):
            tokens = text(2, 17, seed=step % 4)
            loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            first_gradient.setdefault(name, gradients(model))
            optimizer.step()
            curves[name].append(loss.item())

    assert curves["mixture"] == pytest.approx(curves["dense"], rel=1e-9)
    assert curves["dense"][-1] < 0.5 * curves["dense"][0]
    for name, gradient in first_gradient["dense"].items():
        actual = first_gradient["mixture"][name_in_mixture(name)].view_as(gradient)
        torch.testing.assert_close(actual, gradient, rtol=0, atol=1e-10)


def test_the_twin_has_the_active_parameters_of_the_mixture_without_its_router() -> None:
    config = replace(PLAIN, shared=SharedExpertsConfig(n_experts=1), experts=ExpertsConfig(n_experts=4, d_ff=24))
    mixture, twin = Transformer(config), Transformer(replace(config, dense_twin=True))

    routers = sum(p.numel() for name, p in mixture.named_parameters() if ".router." in name)
    assert routers == 2 * 4 * 32
    assert twin.num_params() == twin.num_active_params() == mixture.num_active_params() - routers
    assert not any(isinstance(module, MoELayer) for module in twin.modules())


def test_the_twin_starts_from_the_same_attention_and_embedding() -> None:
    mixture = dict(Transformer(PLAIN, seed=3).named_parameters())
    twin = dict(Transformer(replace(PLAIN, dense_twin=True), seed=3).named_parameters())

    shared = {name for name in mixture.keys() & twin.keys() if "norm" not in name}
    assert shared == {"embedding.weight"} | {
        f"blocks.{layer}.attention.{projection}.weight"
        for layer in range(2)
        for projection in ("query", "key", "value", "output")
    }
    assert all(torch.equal(mixture[name], twin[name]) for name in shared)


def test_parameters_counted_by_hand() -> None:
    """Vocabulary 64, width 32, 4 query heads and 2 key heads of 6, 4 SwiGLU experts of 24, top 2, tied, 2 layers."""
    attention = 32 * 24 + 2 * 32 * 12 + 24 * 32
    expert = 3 * 32 * 24
    block = attention + 2 * 32 + 4 * 32 + 4 * expert
    model = Transformer(PLAIN)

    assert (attention, expert, block) == (2304, 2304, 11712)
    assert model.num_params() == 64 * 32 + 2 * block + 32 == 25_504
    assert model.num_active_params() == 25_504 - 2 * 2 * expert == 16_288


def test_parameters_counted_by_hand_with_every_option() -> None:
    """Untied, biases, LayerNorm, one gated shared expert, first block dense, GELU, multi-query, top 1 of 4."""
    attention = (32 * 24 + 24) + 2 * (32 * 6 + 6) + (24 * 32 + 32) + 2 * 6
    norms = 2 * (32 + 32)
    expert = (32 * 24 + 24) + (24 * 32 + 32)
    dense = (32 * 48 + 48) + (48 * 32 + 32)  # the width that a token sees in the mixture: 1 x 24 routed, 1 x 24 shared
    mixture = 4 * expert + 4 * 32 + expert + 32
    model = Transformer(EVERYTHING)

    assert model.num_params() == 2 * 64 * 32 + 2 * (attention + norms) + dense + mixture + 64
    assert model.num_params() - model.num_active_params() == 3 * expert


# --------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("every", "first_dense", "mixtures"),
    [
        (1, 0, [0, 1, 2, 3, 4, 5]),
        (2, 0, [1, 3, 5]),
        (3, 0, [2, 5]),
        (1, 2, [2, 3, 4, 5]),
        (2, 2, [3, 5]),
    ],
)
def test_which_layers_are_mixtures(every: int, first_dense: int, mixtures: list[int]) -> None:
    config = replace(
        PLAIN, n_layers=6, experts=ExpertsConfig(n_experts=4, d_ff=8, every=every, first_dense=first_dense)
    )
    model = Transformer(config)

    kinds = [type(block.feed_forward) for block in model.blocks]
    assert [layer for layer, kind in enumerate(kinds) if kind is MoELayer] == mixtures
    assert kinds.count(FeedForward) == 6 - len(mixtures)
    _, routings = model(text(1, 4))
    assert len(routings) == len(mixtures)


def test_dense_layers_among_mixtures_may_have_a_width_of_their_own() -> None:
    config = replace(
        PLAIN,
        feed_forward=FeedForwardConfig(activation="relu", d_ff=100),
        experts=ExpertsConfig(n_experts=4, d_ff=24, first_dense=1),
    )

    assert Transformer(config).blocks[0].feed_forward.w_in.out_features == 100
    twin = Transformer(replace(config, dense_twin=True))
    assert [block.feed_forward.w_in.out_features for block in twin.blocks] == [100, 2 * 24]


def test_routings_come_first_layer_first_with_one_row_a_token() -> None:
    model = Transformer(PLAIN).eval()
    tokens = text(3, 5)
    seen: list[Routing] = []
    for block in model.blocks:
        block.feed_forward.router.register_forward_hook(lambda _, __, routing: seen.append(routing))

    _, routings = model(tokens)

    assert all(one is other for one, other in zip(routings, seen, strict=True))
    assert [routing.selected.shape for routing in routings] == [(15, 2), (15, 2)]


def test_tied_embeddings_are_one_matrix_that_gets_both_gradients() -> None:
    tied, untied = Transformer(PLAIN).double(), Transformer(replace(PLAIN, tie_embeddings=False)).double()
    with torch.no_grad():
        untied.head.weight.copy_(untied.embedding.weight)
    assert tied.head.weight is tied.embedding.weight
    assert untied.num_params() - tied.num_params() == 64 * 32

    for model in (tied, untied):
        objective(model, text(2, 8), text(2, 8, seed=1)).total.backward()

    torch.testing.assert_close(tied.embedding.weight.grad, untied.embedding.weight.grad + untied.head.weight.grad)


def test_a_block_adds_each_branch_to_the_stream_it_norms() -> None:
    """Pre-norm: x + attention(norm(x)), then + feed_forward(norm(·))."""
    model = Transformer(replace(PLAIN, dense_twin=True)).double()
    block = model.blocks[0]
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    still = (torch.ones(1, 1, 4, 3), torch.zeros(1, 1, 4, 3))  # no rotation

    def unit(z: Tensor) -> Tensor:
        return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    middle = x + block.attention(unit(x), still, None)
    expected = middle + block.feed_forward(unit(middle))

    torch.testing.assert_close(
        block(x, Batch(torch.zeros(1, 4), None, torch.arange(4)[None], still, None, None))[0], expected
    )


def test_a_model_needs_a_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size: is null"):
        Transformer(replace(PLAIN, vocab_size=None))


@all_variants
def test_every_parameter_gets_a_gradient(config: ModelConfig) -> None:
    """A parameter without one is forgotten by the forward pass."""
    model = Transformer(config)

    objective(model, text(4, 32), text(4, 32, seed=1)).total.backward()

    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@main_variants
def test_autocast_stays_close_to_float32(config: ModelConfig) -> None:
    model = Transformer(replace(config, init_std=0.02)).eval()
    inputs, targets = text(2, 20), text(2, 20, seed=1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = objective(model, inputs, targets)
    result.total.backward()

    assert result.total.dtype == torch.float32
    torch.testing.assert_close(result.lm, objective(model, inputs, targets).lm, rtol=2e-3, atol=0)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
