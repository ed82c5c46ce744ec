"""Two processes route and balance as one: the same counts, biases, gradient norm and weights, for every router.

What is compared with what: two ranks of one micro-batch each with one process of two micro-batches. Each micro-batch
has its own random numbers, counts add up as whole numbers, and a mean of two is exact, so everything is equal to the
bit. The exception is a load that is taken over the global batch: in one process the first micro-batch has not seen the
second yet, while two ranks see each other. Two ranks are then one process with the whole batch in one micro-batch,
equal to rounding.
"""

import io
import multiprocessing
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe import config_file
from moe.data.prepare import PreparedCorpus, prepare
from moe.parallel.world import World, join_world, leave_world
from moe.presets import presets
from moe.training.console import Console
from moe.training.loop import Training
from moe.training.run_folder import RunFolder

SETTINGS = """\
model:
  n_layers: 2
  d_model: 32
  max_seq: 32
  init_std: 0.1
  attention: {{n_heads: 2, head_dim: 16}}
  experts: {{n_experts: 16, d_ff: 8}}
data:
  corpus: {folder}/corpus.yaml
  cache: {folder}/cache
  vocab_size: 300
  sequence_length: 16
  validation_bytes: 200
training:
  steps: 4
  batch_size: 4
  device: cpu
  precision: fp32
  schedule: {{warmup_steps: 1}}
  optimizer: {{eps: 1.0e-3}}  # else Adam makes a whole step out of a gradient that is rounding error
"""
STEPS = 3
ON_BOTH = {
    "quantile and dropout": {"router.preset": "quantile", "dropout": 0.1},
    "all of the losses that see micro-batches": {
        "router.noise": "shazeer",
        "balance.importance": 0.1,
        "balance.noisy_load": 0.1,
        "balance.device": 0.1,
        "balance.n_devices": 4,
        "balance.entropy": 0.01,
        "balance.orthogonality": 0.01,
    },
}
CASES: dict[str, Mapping[str, object]] = {
    name: {"router.preset": name} | ({"balance.scope": "micro_batch"} if name == "grin" else {})
    for name in presets()
    if name != "qwen3"  # the global batch is what it is about
} | ON_BOTH
GLOBAL: dict[str, Mapping[str, object]] = {
    "qwen3": {"router.preset": "qwen3", "balance.load_balance": 0.1},
    "mixtral": {"router.preset": "mixtral", "balance.scope": "global_batch", "balance.load_balance": 0.1},
    "devices": {
        "balance.scope": "global_batch",
        "balance.device": 0.1,
        "balance.n_devices": 4,
        "balance.choices": "first",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file and its corpus: 60 lines, of words that repeat in different orders."""
    folder = tmp_path_factory.mktemp("ranks")
    words = ["the", "a", "house", "ship", "dog", "sleeps", "runs", "sings", "slowly", "and", "or", "under", "Käse"]
    lines = [" ".join(words[i * j % 13] for j in range(1, 30)) for i in range(1, 61)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "corpus.yaml").write_text("- {domain: text, kind: files, include: text.txt}\n")
    (folder / "small.yaml").write_text(SETTINGS.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def corpus(folder: Path) -> PreparedCorpus:
    return prepare(config_file.load(folder / "small.yaml").data, folder, lambda line: None)


def train(folder: Path, corpus: PreparedCorpus, world: World, case: Mapping[str, object], cuts: int) -> dict[str, Any]:
    """What three steps leave and report, with ``cuts`` micro-batches in all."""
    flags = {f"model.{key}": str(value) for key, value in case.items()}
    flags |= {"training.accumulation": str(cuts // world.size)}
    config = config_file.load(folder / "small.yaml", flags).with_vocab(corpus.tokenizer.size)
    console = Console(STEPS, every=1, stream=io.StringIO())
    training = Training(config, corpus, RunFolder(folder / "run"), torch.device("cpu"), world, console)
    steps = []
    for _ in range(STEPS):
        steps.append(training.take_step())
        training.progress.step += 1
    return {
        "state": training.model.state_dict(),
        "initial": Training(
            config, corpus, RunFolder(folder / "run"), torch.device("cpu"), world, console
        ).model.state_dict(),
        "counts": torch.stack([step.counts for step in steps]),
        "dropped": [step.dropped for step in steps],
        "norms": [step.gradient_norm for step in steps],
        "losses": [step.losses for step in steps],
        "coefficient": training.progress.sparsity_coefficient,
    }


def on_two_ranks(
    folder: Path, corpus: PreparedCorpus, cases: Mapping[str, Mapping[str, object]]
) -> list[dict[str, Any]]:
    """:func:`train` of every case in each of two forked processes that have joined over gloo."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_member, args=(folder, corpus, cases, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _member(folder: Path, corpus: PreparedCorpus, cases: Mapping[str, Mapping[str, object]], rank: int) -> None:
    meeting = f"file://{folder / f'meeting of {len(cases)}'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    world = join_world(torch.device("cpu"))
    torch.save(
        {name: train(folder, corpus, world, case, cuts=2) for name, case in cases.items()}, folder / f"{rank}.pt"
    )
    leave_world()


@pytest.fixture(scope="module")
def ranks(folder: Path, corpus: PreparedCorpus) -> list[dict[str, Any]]:
    return on_two_ranks(folder, corpus, CASES)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_of_two_micro_batches_to_the_bit(
    folder: Path, corpus: PreparedCorpus, ranks: list[dict[str, Any]], name: str
) -> None:
    first, second = (results[name] for results in ranks)
    alone = train(folder, corpus, World(), CASES[name], cuts=2)

    assert any(not torch.equal(alone["state"][key], value) for key, value in alone["initial"].items())
    for here in (first, second):
        assert torch.equal(here["counts"], alone["counts"])
        assert here["dropped"] == alone["dropped"]
        assert here["norms"] == alone["norms"]
        assert here["losses"] == alone["losses"]
        assert here["coefficient"] == alone["coefficient"]
        for key, value in alone["state"].items():
            assert torch.equal(here["state"][key], value), key


@pytest.mark.parametrize("name", ["sign", "proportional", "quantile"])
def test_the_biases_of_that_comparison_have_moved(ranks: list[dict[str, Any]], name: str) -> None:
    preset = {"sign": "loss_free", "proportional": "longcat", "quantile": "quantile"}[name]
    biases = [value for key, value in ranks[0][preset]["state"].items() if key.endswith("selection_bias")]

    assert len(biases) == 2
    assert all(bias.ne(0).any() for bias in biases)


def test_loads_over_the_global_batch_are_those_of_one_process_with_the_whole_batch(
    folder: Path, corpus: PreparedCorpus
) -> None:
    """Counts to the bit, the rest to rounding."""
    first, second = on_two_ranks(folder, corpus, GLOBAL)
    for name, case in GLOBAL.items():
        alone = train(folder, corpus, World(), case, cuts=1)
        assert torch.equal(first[name]["counts"], alone["counts"]), name
        assert first[name]["norms"] == second[name]["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        for mine, theirs in zip(first[name]["losses"], alone["losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
        for key, value in alone["state"].items():
            assert torch.equal(first[name]["state"][key], second[name]["state"][key]), key
            torch.testing.assert_close(first[name]["state"][key], value, rtol=0, atol=1e-6, msg=f"{name}: {key}")


def test_loads_over_the_global_batch_in_two_micro_batches_are_not_quite_those(
    folder: Path, corpus: PreparedCorpus
) -> None:
    """The first of two micro-batches counts itself alone, and reads higher than with the other."""
    case = GLOBAL["mixtral"]

    whole, halves = (train(folder, corpus, World(), case, cuts)["losses"][0] for cuts in (1, 2))

    assert halves["load_balance"] > 1.001 * whole["load_balance"]
    assert halves["lm_loss"] == pytest.approx(whole["lm_loss"], rel=1e-6)
