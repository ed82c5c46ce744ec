"""A corpus of two domains and a run of a few steps on it, made once; small enough to train in a second."""

import random
from pathlib import Path

import pytest

from moe import config_file
from moe.data.prepare import PreparedCorpus, prepare
from moe.training.command import main as train
from moe.training.run_folder import RunFolder

WORDS = ["the", "a", "house", "ship", "dog", "sleeps", "runs", "sings", "slowly", "and", "or", "under", "Käse", "日本"]

SETTINGS = """\
model:
  n_layers: 2
  d_model: 32
  max_seq: 160
  init_std: 0.1
  attention: {{n_heads: 2, head_dim: 16}}
  experts: {{n_experts: 4, d_ff: 16}}
data:
  corpus: {folder}/corpus.yaml
  cache: {folder}/cache
  vocab_size: 320
  sequence_length: 32
  validation_bytes: 2000
training:
  steps: 6
  batch_size: 8
  device: cpu
  precision: fp32
  evaluate_every: 100
  checkpoint_every: 3
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file."""
    folder = tmp_path_factory.mktemp("tiny")
    source = random.Random(0)
    for domain, documents, separator in (("prose", 60, " "), ("lists", 40, "\n")):
        (folder / domain).mkdir()
        for number in range(documents):
            text = separator.join(source.choices(WORDS, k=source.randint(30, 120)))
            (folder / domain / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "corpus.yaml").write_text(
        "- {domain: prose, kind: files, include: prose/*.txt, share: 1}\n"
        "- {domain: lists, kind: files, include: lists/*.txt, share: 3}\n"
    )
    path = folder / "tiny.yaml"
    path.write_text(SETTINGS.format(folder=folder))
    return path


@pytest.fixture(scope="session")
def corpus(tiny: Path) -> PreparedCorpus:
    """The tokens of that corpus."""
    return prepare(config_file.load(tiny).data, tiny.parent, lambda line: None)


@pytest.fixture(scope="session")
def run(tiny: Path, corpus: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of six steps, with checkpoints at 3 and 6. Tests write nothing into it."""
    folder = tmp_path_factory.mktemp("runs")
    assert train([str(tiny), "--run.folder", str(folder), "--run.name", "run"], tiny) == 0
    return RunFolder.open(folder / "run")
