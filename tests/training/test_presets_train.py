"""Every published router in the whole loop: fifty steps without a NaN, and a resumed run that is the straight one."""

import io
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch

from moe import config_file
from moe.config import Preset
from moe.data.prepare import PreparedCorpus
from moe.parallel.world import World
from moe.training import checkpoint
from moe.training.console import Console
from moe.training.loop import Training
from moe.training.metrics import read_metrics
from moe.training.run_folder import RunFolder

SMALL = {
    "model.experts.n_experts": "16",
    "model.experts.d_ff": "8",
    "training.steps": "50",
    "training.batch_size": "4",
    "training.accumulation": "2",
    "training.evaluate_every": "100",
    "training.checkpoint_every": "25",
    "training.keep_checkpoints": "3",
}


def begin(tiny: Path, corpus: PreparedCorpus, folder: Path, preset: str, resume: bool) -> Training:
    overrides = SMALL | {"model.router.preset": preset, "run.folder": str(folder.parent), "run.name": folder.name}
    config = config_file.load(tiny, overrides).with_vocab(corpus.tokenizer.size)
    run = RunFolder(folder) if resume else RunFolder.create(config, "tiny", corpus, World())
    saved = checkpoint.newest(run.checkpoints_path, print) if resume else None
    console = Console(config.training.steps, every=50, stream=io.StringIO())
    return Training(config, corpus, run, torch.device("cpu"), World(), console, saved)


def numbers(training: Training) -> list[dict[str, object]]:
    found = read_metrics(training.run_folder.metrics_path)
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in found]


@pytest.mark.parametrize("preset", get_args(Preset))
def test_a_preset_trains_and_resumes_to_the_bit(
    preset: str, tiny: Path, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    straight = begin(tiny, corpus, tmp_path / "straight", preset, resume=False)
    assert straight.run()

    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000050")
    resumed = begin(tiny, corpus, tmp_path / "resumed", preset, resume=True)
    assert resumed.progress.step == 25
    assert resumed.run()

    trained = [row for row in numbers(straight) if row["kind"] == "train"]
    assert len(trained) == 50
    assert straight.progress.skipped == 0
    assert trained[-1]["lm_loss"] < trained[0]["lm_loss"]
    assert numbers(resumed) == numbers(straight)
    after, again = straight.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert {**vars(resumed.progress), "seconds": 0} == {**vars(straight.progress), "seconds": 0}
