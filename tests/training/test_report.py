"""The end of a run: the same numbers for people and for programs, and text from the model."""

import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe import config_file
from moe.data.prepare import PreparedCorpus
from moe.parallel.world import World
from moe.training.console import Console
from moe.training.loop import Training
from moe.training.report import write_report
from moe.training.run_folder import RunFolder


@pytest.fixture
def begin(tiny: Path, corpus: PreparedCorpus, tmp_path: Path) -> Callable[..., Training]:
    """A training of four steps with changes to the configuration."""

    def make(**overrides: str) -> Training:
        changes = {key.replace("__", "."): value for key, value in overrides.items()}
        config = config_file.load(
            tiny, {"run.folder": str(tmp_path), "run.name": "run", "training.steps": "4"} | changes
        )
        config = config.with_vocab(corpus.tokenizer.size)
        folder = RunFolder.create(config, "tiny", corpus, World())
        return Training(config, corpus, folder, torch.device("cpu"), World(), Console(4, stream=io.StringIO()))

    return make


def test_the_files_hold_the_numbers_of_the_validation(begin: Callable[..., Training], corpus: PreparedCorpus) -> None:
    training = begin()
    training.run()

    text = write_report(training)

    path = training.run_folder.path
    assert (path / "report.txt").read_bytes().decode() == text + "\n"
    summary = json.loads((path / "summary.json").read_text())
    validation = training.validation
    held_out = corpus.validation["prose"].text
    assert [domain["domain"] for domain in summary["domains"]] == ["prose", "lists"]
    prose = summary["domains"][0]
    assert prose["bits_per_byte"] == validation.domains["prose"].bits_per_byte
    assert prose["gzip"] == 8 * len(gzip.compress(held_out, 9, mtime=0)) / len(held_out)
    extreme = lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)
    assert prose["xz"] == 8 * len(extreme) / len(held_out)
    assert summary["pooled"]["bits_per_byte"] == validation.pooled.bits_per_byte
    assert summary["counts"] == validation.counts.tolist()
    assert summary["progress"]["tokens"] == 4 * 8 * 16
    assert summary["epochs"] == training.batches.epochs(4)
    assert f"{validation.pooled.bits_per_byte:.3f}" in text
    assert "load of the experts" in text
    assert f"{training.model.num_params() / 1e6:.1f}M parameters" in text


def test_parameters_in_the_summary_are_those_of_the_model(begin: Callable[..., Training]) -> None:
    """Of four experts of 3 · 32 · 16 weights in each of two layers, a token uses two."""
    training = begin()
    training.run()
    write_report(training)

    summary = json.loads((training.run_folder.path / "summary.json").read_text())
    assert summary["parameters"] - summary["active_parameters"] == 2 * 2 * 3 * 32 * 16
    assert summary["mean_active_parameters"] == summary["active_parameters"]
    assert summary["mlps_per_token"] == [2.0, 2.0]
    assert summary["dropped_in_training"] is None


def test_what_a_varying_number_of_experts_costs_is_measured(begin: Callable[..., Training]) -> None:
    training = begin(model__router__preset="remoe")
    training.run()

    text = write_report(training)

    summary = json.loads((training.run_folder.path / "summary.json").read_text())
    first, second = summary["mlps_per_token"]
    # 1536 weights an MLP; the aim is two a token, and at first about half of all logits are above 0.
    assert first != 2
    difference = summary["mean_active_parameters"] - summary["active_parameters"]
    assert difference == pytest.approx(1536 * (first - 2 + second - 2), abs=1)
    assert "used by a token on average" in text
    assert f"  {first:.2f}  " in text


def test_tokens_that_no_expert_chose_are_reported(begin: Callable[..., Training]) -> None:
    """Each of four experts takes a quarter of a batch's tokens: one a token on average, and for some none."""
    training = begin(model__router__preset="expert_choice", model__router__top_k="1")
    training.run()

    text = write_report(training)

    summary = json.loads((training.run_folder.path / "summary.json").read_text())
    low, high = (f"{bound(summary['without_mlp']):.2%}" for bound in (min, max))
    assert max(summary["without_mlp"]) > 0
    assert f"{low} to {high} of a layer's tokens went through no expert's MLP" in text
    assert summary["mlps_per_token"] == pytest.approx([1, 1], rel=0.01)
    assert "used by a token on average" in text


def test_special_experts_are_no_mlps(begin: Callable[..., Training]) -> None:
    training = begin(model__router__preset="moe_plus_plus")
    training.run()

    text = write_report(training)

    summary = json.loads((training.run_folder.path / "summary.json").read_text())
    of_mlps = [sum(counts[:4]) / sum(counts) for counts in summary["counts"]]
    assert summary["mlps_per_token"] == pytest.approx([2 * share for share in of_mlps])
    assert "the last 4 without an MLP" in text


def test_the_report_says_what_training_dropped(begin: Callable[..., Training]) -> None:
    """The validation drops nothing: its table alone would say that nothing was ever lost."""
    training = begin(model__router__preset="switch", model__router__capacity__factor="0.5")
    training.run()

    text = write_report(training)

    summary = json.loads((training.run_folder.path / "summary.json").read_text())
    assert all(share >= 0.5 for share in summary["dropped_in_training"])
    assert [layer["dropped"] for layer in summary["load"]] == [0, 0]
    low, high = (f"{bound(summary['dropped_in_training']):.2%}" for bound in (min, max))
    assert f"{low} to {high} of a layer's assignments were dropped in the last training step" in text
    assert "went through no expert" not in text


def test_a_sample_for_each_of_two_domains_goes_on_from_held_out_text(
    begin: Callable[..., Training], corpus: PreparedCorpus
) -> None:
    training = begin()
    training.run()

    text = write_report(training)

    samples = json.loads((training.run_folder.path / "summary.json").read_text())["samples"]
    assert [sample["domain"] for sample in samples] == ["prose", "lists"]
    for sample in samples:
        assert sample["prompt"]
        assert corpus.validation[sample["domain"]].text.decode().startswith(sample["prompt"][:10])
        assert f"{sample['prompt']}[{sample['continuation']}]" in text


def test_a_model_without_room_writes_no_sample(begin: Callable[..., Training]) -> None:
    training = begin(model__max_seq="40")
    training.run()

    assert "held-out text" not in write_report(training)


def test_the_dense_twin_has_no_load_to_show(begin: Callable[..., Training]) -> None:
    training = begin(model__dense_twin="true")
    training.run()

    text = write_report(training)

    summary = json.loads((training.run_folder.path / "summary.json").read_text())
    assert (summary["load"], summary["counts"]) == ([], None)
    assert summary["parameters"] == summary["active_parameters"]
    tables = text.split("--- prose")[0]
    assert "bits/byte" in tables
    assert "load" not in tables


def test_skipped_steps_are_reported(begin: Callable[..., Training]) -> None:
    training = begin()
    training.model.norm.weight.register_hook(
        lambda gradient: gradient * float("nan") if training.progress.step == 1 else gradient
    )
    training.run()

    assert ", 1 steps skipped" in write_report(training)


def test_a_run_that_was_not_validated_has_no_report(begin: Callable[..., Training]) -> None:
    with pytest.raises(ValueError, match="has not been validated"):
        write_report(begin())
