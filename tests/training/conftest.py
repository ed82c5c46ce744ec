"""A corpus of two domains and a model of two layers, so small that a step takes milliseconds; prepared once."""

import random
from pathlib import Path

import pytest

from moe import config_file
from moe.data.prepare import PreparedCorpus, prepare

WORDS = ["the", "a", "house", "ship", "dog", "sleeps", "runs", "sings", "slowly", "and", "or", "under", "Käse", "日本"]

SETTINGS = """\
model:
  n_layers: 2
  d_model: 32
  max_seq: 128
  init_std: 0.05
  attention: {{n_heads: 2, head_dim: 16}}
  experts: {{n_experts: 4, d_ff: 16}}
  balance: {{z_loss: 0.001}}
data:
  corpus: {folder}/corpus.yaml
  cache: {folder}/cache
  vocab_size: 300
  sequence_length: 16
  validation_bytes: 600
training:
  steps: 12
  batch_size: 8
  device: cpu
  precision: fp32
  evaluate_every: 5
  checkpoint_every: 100
  log_every: 1
  schedule: {{warmup_steps: 2}}
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file; three quarters of the tokens are lists, which are read again within twelve steps."""
    folder = tmp_path_factory.mktemp("tiny")
    source = random.Random(0)
    for domain, documents, separator in (("prose", 60, " "), ("lists", 12, "\n")):
        (folder / domain).mkdir()
        for number in range(documents):
            text = separator.join(source.choices(WORDS, k=source.randint(15, 40)))
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
