"""One optimizer step, driven by hand: no corpus, no run folder, no schedule."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.config import (
    AttentionConfig,
    BalanceConfig,
    ExpertBackend,
    ExpertsConfig,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
)
from moe.model.transformer import Transformer
from moe.model.weight_dtype import keep_weights
from moe.training.compiled import compile_blocks
from moe.training.gpu import Transfer, preferred_attention, to_device
from moe.training.optimizer import build_optimizer
from moe.training.step import MicroBatch, TrainingStep

CPU = torch.device("cpu")


def config(**router: object) -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        n_layers=2,
        d_model=32,
        tie_embeddings=False,
        attention=AttentionConfig(n_heads=2, head_dim=16),
        experts=ExpertsConfig(n_experts=4, d_ff=32),
        router=RouterConfig(top_k=2, **router),
        balance=BalanceConfig(load_balance=0.0 if router else 0.01),
    )


def built(
    settings: OptimizerConfig | None = None, *, bf16: bool = False, device: torch.device = CPU, **router: object
) -> TrainingStep:
    settings = settings or OptimizerConfig()
    model = Transformer(config(**router))
    keep_weights(model, "bf16" if bf16 else "fp32")
    model.to(device)
    precision = "bf16" if bf16 else "fp32"
    return TrainingStep(model, build_optimizer(model, settings), precision=precision, clip=settings.clip)


def batch(seed: int = 0, rows: int = 4, length: int = 16) -> MicroBatch:
    text = torch.randint(64, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(text[:, :-1], text[:, 1:])


def weights(step_on: TrainingStep) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in step_on.model.state_dict().items()}


@pytest.mark.parametrize("backend", ["segments", "grouped"])
def test_a_hundred_steps_have_the_losses_of_the_loop(backend: ExpertBackend) -> None:
    """On ever new text, whose every token says which is next: from 4.2 nats down, to a thousandth at every step."""
    losses: dict[str, list[float]] = {}
    follows = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for how in ("reference", backend):
        model = Transformer(replace(config(), experts=ExpertsConfig(n_experts=4, d_ff=32, backend=how)))
        step_on = TrainingStep(model, build_optimizer(model, OptimizerConfig()), precision="fp32", clip=1.0)
        losses[how] = []
        for seed in range(100):
            text = [torch.randint(64, (4,), generator=torch.Generator().manual_seed(seed))]
            for _ in range(16):
                text.append(follows[text[-1]])
            tokens = torch.stack(text, dim=1)
            step = step_on([MicroBatch(tokens[:, :-1], tokens[:, 1:])], 1e-3).read()
            losses[how].append(step.losses["lm_loss"])

    assert losses[backend] == pytest.approx(losses["reference"], rel=1e-3)
    assert losses[backend][-1] < 0.8 * losses[backend][0]


def test_a_step_says_what_it_saw() -> None:
    """4 sequences of 16 tokens, each to two of four experts, in two layers."""
    step = built()([batch()], learning_rate=1e-3).read()

    assert step.losses["lm_loss"] == pytest.approx(math.log(64), rel=0.05)
    assert set(step.losses) == {"lm_loss", "load_balance", "load_balance/common", "z_loss", "z_loss/common"}
    assert step.counts.sum(1).tolist() == [128, 128]
    assert (step.tokens, step.dropped, step.mlps_per_token) == (64, [0, 0], [2.0, 2.0])
    assert (step.learning_rate, step.skipped) == (1e-3, False)
    assert step.gradient_norm > 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("bf16", [False, True])
def test_steps_on_one_batch_learn_it(name: str, bf16: bool) -> None:
    step_on = built(OptimizerConfig(name=name), bf16=bf16)

    losses = [step_on([batch()], learning_rate=0.01).read().losses["lm_loss"] for _ in range(25)]

    assert losses[-1] < 0.7 * losses[0]


def test_two_micro_batches_are_one_batch() -> None:
    halves = batch()
    whole, parts = built(), built()

    one = whole([halves], 1e-3).read()
    two = parts(
        [MicroBatch(halves.tokens[rows], halves.targets[rows]) for rows in (slice(0, 2), slice(2, 4))],
        1e-3,
        accumulation=2,
    ).read()

    assert two.losses["lm_loss"] == pytest.approx(one.losses["lm_loss"], rel=1e-6)
    assert torch.equal(one.counts, two.counts)


def test_steps_can_be_read_late_and_in_any_order() -> None:
    """Each keeps its own numbers, whatever was begun since."""
    early, late = built(), built()
    expected = [early([batch(seed)], 1e-3).read() for seed in range(3)]

    in_flight = [late([batch(seed)], 1e-3) for seed in range(3)]

    for seed in (2, 0, 1):
        actual = in_flight[seed].read()
        assert actual.losses == expected[seed].losses
        assert torch.equal(actual.counts, expected[seed].counts)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("bias", ["none", "sign", "quantile"])
def test_a_bad_step_changes_nothing(bf16: bool, name: str, bias: str) -> None:
    """Weights, states and selection biases, though nobody asked whether it was good."""
    step_on = built(OptimizerConfig(name=name), bf16=bf16, **({} if bias == "none" else {"selection_bias": bias}))
    step_on([batch()], 0.01)
    before, state = weights(step_on), states(step_on)
    gain = step_on.model.blocks[0].attention_norm.weight
    gain.register_hook(lambda gradient: gradient * math.nan)

    step = step_on([batch(1)], 0.01).read()

    assert step.skipped
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(step_on).items())
    assert all(torch.equal(*pair) for pair in zip(states(step_on), state, strict=True))
    gain._backward_hooks.clear()
    assert not step_on([batch(1)], 0.01).read().skipped
    assert not all(torch.equal(tensor, before[key]) for key, tensor in weights(step_on).items())


def states(step_on: TrainingStep) -> list[Tensor]:
    found = step_on.optimizer.state_dict()["state"]
    return [value.clone() for values in found.values() for value in values.values()]


@pytest.mark.parametrize("bf16", [False, True])
def test_the_norm_is_that_of_all_gradients(bf16: bool) -> None:
    step_on = built(OptimizerConfig(clip=None), bf16=bf16)
    gradients: list[Tensor] = []
    for parameter in step_on.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.double()))

    step = step_on([batch()], 1e-3).read()

    expected = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert step.gradient_norm == pytest.approx(expected, rel=1e-5)


def test_clipping_in_bf16_scales_what_the_moments_see() -> None:
    """The first moment after one step is a tenth of the clipped gradient, whose norm as a whole is 0.01."""
    step_on = built(OptimizerConfig(clip=0.01), bf16=True)

    step = step_on([batch()], 1e-3).read()

    moments = [values["exp_avg"] for values in step_on.optimizer.state_dict()["state"].values()]
    norm = math.sqrt(sum(float(moment.double().square().sum()) for moment in moments))
    assert step.gradient_norm > 0.1
    assert norm == pytest.approx(0.001, rel=0.01)


def test_nothing_is_pinned_and_nothing_preferred_on_a_cpu() -> None:
    tensor = torch.arange(3)

    assert to_device(tensor, CPU) is tensor
    assert Transfer(torch.tensor([1.0, math.nan])).read()[0] == 1.0
    with preferred_attention(CPU):
        pass


# ------------------------------------------------------------------------------------------------------------- on a GPU

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """An error where torch would make the host wait for the device."""
    yield
    torch.cuda.set_sync_debug_mode("default")


class TestOnAGPU:
    """In bfloat16, as large runs are trained there."""

    pytestmark = gpu

    @pytest.mark.parametrize("bias", ["none", "sign"])
    @pytest.mark.parametrize("name", ["adamw", "muon"])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_step_does_not_wait(self, no_waiting: None, bias: str, name: str, compiled: bool) -> None:
        """With tokens that come from the host; only reading waits."""
        router = {} if bias == "none" else {"selection_bias": bias}
        step_on = built(OptimizerConfig(name=name), bf16=True, device=CUDA, **router)
        if compiled:
            compile_blocks(step_on.model, print)
        for seed in range(2):
            step_on([batch(seed)], 1e-3).read()

        torch.cuda.set_sync_debug_mode("error")
        in_flight = [step_on([batch(seed)], 1e-3) for seed in range(2)]
        torch.cuda.set_sync_debug_mode("default")

        assert all(math.isfinite(step.read().losses["lm_loss"]) for step in in_flight)

    def test_the_loss_is_that_of_a_cpu(self) -> None:
        """Twenty steps on one batch, in bfloat16 here and in float32 there."""
        here, there = built(bf16=True, device=CUDA), built()
        losses = [[step_on([batch()], 3e-3).read().losses["lm_loss"] for _ in range(20)] for step_on in (here, there)]

        assert losses[0] == pytest.approx(losses[1], rel=0.03)
        assert losses[0][-1] < 0.9 * losses[0][0]

    def test_compiled_blocks_train_as_plain_ones(self) -> None:
        plain, compiled = (built(bf16=True, device=CUDA) for _ in range(2))
        said: list[str] = []
        compile_blocks(compiled.model, said.append)
        losses = [
            [step_on([batch()], 3e-3).read().losses["lm_loss"] for _ in range(10)] for step_on in (plain, compiled)
        ]

        assert losses[0] == pytest.approx(losses[1], rel=0.01)
        assert not said

    def test_a_bad_step_changes_nothing(self) -> None:
        step_on = built(bf16=True, device=CUDA)
        step_on([batch()], 0.01)
        before = weights(step_on)
        step_on.model.blocks[0].attention_norm.weight.register_hook(lambda gradient: gradient * math.nan)

        assert step_on([batch(1)], 0.01).read().skipped
        assert all(torch.equal(tensor, before[key]) for key, tensor in weights(step_on).items())

    def test_attention_is_cudnns_where_it_takes_the_input(self) -> None:
        """Or flash attention, by what the library supports; never the one that holds all scores."""
        query, key, value = torch.randn(3, 2, 4, 256, 64, device=CUDA, dtype=torch.bfloat16).unbind()
        with preferred_attention(CUDA), torch.profiler.profile() as seen:
            torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

        ran = {event.key for event in seen.key_averages()}
        fast = {f"aten::_scaled_dot_product_{name}_attention" for name in ("cudnn", "flash")}
        assert ran & fast
        if torch.cuda.get_device_capability() >= (9, 0) and torch.backends.cudnn.is_available():
            assert "aten::_scaled_dot_product_cudnn_attention" in ran
