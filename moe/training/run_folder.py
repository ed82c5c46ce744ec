"""A run is a folder: everything that resuming, generating, studying or exporting needs, and nothing outside it.

``runs/NAME/`` holds ``config.yaml`` (every setting as it was used), ``tokenizer.json``, ``corpus.json`` (the manifest
of the corpus), ``metrics.jsonl``, ``checkpoints/``, ``records/`` (routing records of a sample), and at the end
``summary.json`` and ``report.txt``.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe import config_file
from moe.config import Config, DataConfig
from moe.data.prepare import PreparedCorpus, reopen
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError
from moe.model.transformer import Transformer
from moe.parallel.world import World
from moe.training import checkpoint


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def corpus_path(self) -> Path:
        return self.path / "corpus.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tiles_path(self) -> Path:
        """How the fused experts cut their products on this device."""
        return self.path / "tiles.json"

    @property
    def records_path(self) -> Path:
        return self.path / "records"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @classmethod
    def create(cls, config: Config, stem: str, corpus: PreparedCorpus, world: World) -> "RunFolder":
        """Make the folder that ``config.run`` names (by default ``stem`` and the time) and write what is fixed.

        Only the first rank writes. Raises UserError where the folder exists.
        """
        path = Path(config.run.folder).expanduser() / (config.run.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
        if not world.is_first:
            return cls(path)
        cls.require_free(config)
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be made: {error.strerror}; choose another --run.folder") from None
        run = cls(path)
        run.write_config(config)
        corpus.tokenizer.save(run.tokenizer_path)
        run.corpus_path.write_text(json.dumps(corpus.manifest, indent=1), encoding="utf-8")
        return run

    @staticmethod
    def require_free(config: Config) -> None:
        """Raise UserError where the run that ``config`` names is there already."""
        path = Path(config.run.folder).expanduser() / (config.run.name or "")
        if config.run.name is not None and path.exists():
            raise UserError(f"{path}: exists; choose another --run.name, or continue it with --resume {path}")

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The run in the folder ``path``; raises UserError where it is none."""
        run = cls(path)
        if not run.config_path.is_file():
            raise UserError(f"{path}: is no run folder: it has no config.yaml")
        return run

    @classmethod
    def of_weights(cls, path: Path) -> "RunFolder":
        """The run that ``path`` is, or is a checkpoint of; raises UserError where it is neither."""
        of_run = path.parent.parent
        is_checkpoint = path.parent.name == "checkpoints" and (of_run / "config.yaml").is_file()
        return cls.open(of_run if is_checkpoint else path)

    def discard(self) -> None:
        """Remove the folder of a run that never began, so that its name is free again."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write_config(self, config: Config) -> None:
        """Write every setting as it is used."""
        self.config_path.write_text(config_file.dump(config), encoding="utf-8")

    def config(self, overrides: Mapping[str, str] = config_file.NOTHING) -> Config:
        """The settings of the run, with ``overrides`` over them."""
        return config_file.load(self.config_path, overrides)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the run was trained with."""
        return Tokenizer.load(self.tokenizer_path)

    def corpus(self, config: DataConfig, say: Callable[[str], None]) -> PreparedCorpus:
        """The corpus that the run is trained on: from the cache, or prepared again.

        Raises UserError where what is installed has changed since, so that the tokens would be others.
        """
        try:
            manifest: dict[str, Any] = json.loads(self.corpus_path.read_text(encoding="utf-8"))
            expected = manifest["files"][self.tokenizer_path.name]["sha256"]
            missing = {"fingerprint", "shares"} - manifest.keys()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.corpus_path}: cannot be read: {error}") from error
        except (LookupError, TypeError) as error:
            raise UserError(f"{self.corpus_path}: is not the manifest of a corpus: {error!r}") from error
        if missing:
            raise UserError(f"{self.corpus_path}: is not the manifest of a corpus: it has no {sorted(missing)[0]}")
        corpus = reopen(config, manifest, self.path, say)
        saved = self.tokenizer_path
        if not saved.is_file() or hashlib.sha256(saved.read_bytes()).hexdigest() != expected:
            say(f"{saved}: is damaged or missing, and is written again")
            corpus.tokenizer.save(saved)
        return corpus

    def require_tokens_of(self, other: Tokenizer, setting: str) -> None:
        """Raise UserError, which names ``setting``, unless this run was trained with the tokens of ``other``."""
        own = self.tokenizer()
        if own.text() != other.text():
            raise UserError(
                f"{setting}: the tokens of {self.path} are not those of this corpus; set --data.tokenizer "
                f"{self.tokenizer_path}"
            )

    def load_model(self) -> Transformer:
        """The model at the newest checkpoint whose digests are right, in evaluation mode."""
        model = Transformer(self.config().model)
        checkpoint.newest(self.checkpoints_path, print).load_model(model)
        return model.eval()
