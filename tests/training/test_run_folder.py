"""A run's folder holds everything that was decided, and says what is wrong with it."""

import json
from pathlib import Path

import pytest
import torch

from moe import config_file
from moe.config import Config
from moe.data.prepare import PreparedCorpus
from moe.errors import UserError
from moe.model.transformer import Transformer
from moe.parallel.world import World
from moe.training import checkpoint
from moe.training.run_folder import RunFolder


@pytest.fixture
def config(tiny: Path, corpus: PreparedCorpus, tmp_path: Path) -> Config:
    overrides = {"run.folder": str(tmp_path / "runs"), "run.name": "first"}
    return config_file.load(tiny, overrides).with_vocab(corpus.tokenizer.size)


def test_what_is_decided_is_written_and_read_back(config: Config, corpus: PreparedCorpus, tmp_path: Path) -> None:
    made = RunFolder.create(config, "tiny", corpus, World())

    run = RunFolder.open(tmp_path / "runs" / "first")
    assert run == made
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "corpus.json", "tokenizer.json"]
    assert run.config() == config
    assert run.config({"training.steps": "99"}).training.steps == 99
    text = "The Käse sleeps. 日本"
    assert run.tokenizer().encode(text) == corpus.tokenizer.encode(text)
    assert json.loads(run.corpus_path.read_text()) == corpus.manifest
    reopened = run.corpus(config.data, lambda line: pytest.fail(line))
    assert all((reopened.train[domain] == corpus.train[domain]).all() for domain in corpus.domains)


def test_without_a_name_it_is_called_after_the_configuration_and_the_time(
    tiny: Path, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    config = config_file.load(tiny, {"run.folder": str(tmp_path)})

    assert RunFolder.create(config, "tiny", corpus, World()).path.match("tiny-[0-9]*-[0-9]*")


def test_a_run_that_exists_is_not_touched(config: Config, corpus: PreparedCorpus) -> None:
    run = RunFolder.create(config, "tiny", corpus, World())
    run.config_path.write_text("precious")

    with pytest.raises(
        UserError, match=r"first: exists; choose another --run.name, or continue it with --resume .*firs"
    ):
        RunFolder.create(config, "tiny", corpus, World())
    assert run.config_path.read_text() == "precious"


def test_a_place_that_cannot_hold_a_folder(tiny: Path, corpus: PreparedCorpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = config_file.load(tiny, {"run.folder": str(tmp_path / "file"), "run.name": "x"})

    with pytest.raises(UserError, match=r"file.x: cannot be made: .*; choose another --run.folder"):
        RunFolder.create(config, "tiny", corpus, World())


def test_only_the_first_rank_writes(config: Config, corpus: PreparedCorpus, tmp_path: Path) -> None:
    second = World()
    second.rank, second.size = 1, 2

    assert RunFolder.create(config, "tiny", corpus, second).path == tmp_path / "runs" / "first"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_is_no_run(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "x").mkdir()

    with pytest.raises(UserError, match=r"x: is no run folder: it has no config.yaml"):
        RunFolder.open(tmp_path / "x")


@pytest.mark.parametrize("text", ["", "{", "[1,", '{"files": '])
def test_a_manifest_that_is_no_json(config: Config, corpus: PreparedCorpus, text: str) -> None:
    run = RunFolder.create(config, "tiny", corpus, World())
    run.corpus_path.write_text(text)

    with pytest.raises(UserError, match=r"corpus.json: cannot be read"):
        run.corpus(config.data, print)


def test_a_manifest_that_is_not_there(config: Config, corpus: PreparedCorpus) -> None:
    run = RunFolder.create(config, "tiny", corpus, World())
    run.corpus_path.unlink()

    with pytest.raises(UserError, match=r"corpus.json: cannot be read"):
        run.corpus(config.data, print)


def test_the_model_is_that_of_the_newest_sound_checkpoint(
    config: Config, corpus: PreparedCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.create(config, "tiny", corpus, World())
    models = {step: Transformer(config.model, seed=step) for step in (1, 2)}
    for step, model in models.items():
        checkpoint.save(run.checkpoints_path, step, model, None, {}, keep=2)

    def is_model(step: int) -> bool:
        loaded = run.load_model()
        assert not loaded.training
        return all(
            torch.equal(parameter, models[step].get_parameter(name)) for name, parameter in loaded.named_parameters()
        )

    assert is_model(2)
    damaged = run.checkpoints_path / "step-00000002" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert is_model(1)
    assert str(damaged) in capsys.readouterr().out
