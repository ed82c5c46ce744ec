"""Compiled blocks: how many versions torch makes of them, what happens at its limit, and that they compute the same.

What torch captures of a block is run as it is, without the minute of generating code.
"""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.exc import InvalidCxxCompiler

from moe import presets
from moe.config import Checkpointing, ModelConfig
from moe.errors import UserError
from moe.inference.generate import generate
from moe.model.transformer import Transformer
from moe.model.weight_dtype import keep_weights
from moe.training.compiled import LOGGER, compile_blocks

COMPILE = nn.Module.compile


def capture_with(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda block: COMPILE(block, backend=backend))


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that has seen nothing yet, is quick, and is left as it was; attention as on a GPU."""
    capture_with(monkeypatch, "eager")
    monkeypatch.setattr("moe.model.short_attention.pays", lambda *_, **__: False)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=False):
        yield
    torch._dynamo.reset()
    counters.clear()
    for known in list(logging.getLogger(LOGGER).filters):
        logging.getLogger(LOGGER).removeFilter(known)


def config_of(preset: str) -> ModelConfig:
    """Twelve layers, more than torch compiles a function for, of which the first is dense."""
    return presets.model_config(
        preset,
        vocab_size=64,
        n_layers=12,
        d_model=32,
        attention={"n_heads": 2, "head_dim": 16},
        experts={"n_experts": 4, "d_ff": 16, "backend": "grouped", "first_dense": 1},
    )


def built(config: ModelConfig, say: Callable[[str], None] = print, compiled: bool = True) -> Transformer:
    """In bfloat16, which grouped_mm needs under torch.compile."""
    model = Transformer(config).train()
    keep_weights(model, "bf16")
    if compiled:
        compile_blocks(model, say)
    return model


def train_once(model: Transformer, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    hidden, _ = model.hidden(tokens)
    hidden.float().square().mean().backward()
    return hidden.detach()


VERSIONS = {"mixtral": 2, "moe_plus_plus": 3, "hash": 3}
"""dense block and mixture; besides, the first mixture of a residual router, and of a hash, which is told apart from the
others by its number until torch has seen a second one"""


@pytest.mark.parametrize("preset", VERSIONS)
def test_twelve_layers_are_compiled_for_each_kind_of_block(preset: str) -> None:
    said: list[str] = []
    model = built(config_of(preset), said.append)

    for seed in range(2):
        train_once(model, seed)

    assert counters["stats"]["unique_graphs"] == VERSIONS[preset]
    assert not counters["graph_break"]
    assert not said


@pytest.mark.parametrize("part", ["attention", "experts", "block"])
def test_a_block_that_recomputes_is_one_graph_and_gives_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, part: Checkpointing
) -> None:
    """With the backward pass captured, too."""
    capture_with(monkeypatch, "aot_eager")
    config = config_of("mixtral")
    plain, model = built(config, compiled=False), built(config)
    model.activation_checkpointing = part

    assert torch.equal(train_once(plain), train_once(model))

    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    for (name, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (expected.grad is None) == (actual.grad is None), name
        assert expected.grad is None or torch.equal(actual.grad, expected.grad), name


def test_generating_compiles_nothing() -> None:
    model = built(config_of("mixtral"))
    train_once(model)
    before = counters["stats"]["unique_graphs"]

    generate(model, [[1, 2, 3], [4]], 3)

    assert counters["stats"]["unique_graphs"] == before


@torch._dynamo.config.patch(recompile_limit=1)
def test_at_the_limit_a_line_is_said_and_the_block_runs_as_written(caplog: pytest.LogCaptureFixture) -> None:
    """A limit of one, and two kinds of block: the mixtures run uncompiled, with the same result."""
    said: list[str] = []
    config = config_of("mixtral")
    plain, model = built(config, compiled=False), built(config, said.append)

    expected, actual = train_once(plain), train_once(model)
    train_once(model)

    assert torch.equal(actual, expected)
    assert counters["stats"]["unique_graphs"] == 1
    [line] = said
    assert line.startswith("training.compile: torch compiled a block for 1 kinds of input and runs it uncompiled")
    assert "(last reason: " in line and "; set training.compile to false" in line
    assert "hit config" not in caplog.text


@torch._dynamo.config.patch(recompile_limit=1)
def test_a_second_run_speaks_to_its_own_screen() -> None:
    first: list[str] = []
    second: list[str] = []
    built(config_of("mixtral"), first.append)
    model = built(config_of("mixtral"), second.append)

    train_once(model)

    assert (len(first), len(second)) == (0, 1)


def test_without_a_compiler_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)

    with pytest.raises(UserError, match=r"^training.compile needs a C\+\+ compiler on a CPU; install g\+\+, or set"):
        built(config_of("mixtral"))
