"""The model that is evaluated: of a run or of one of its checkpoints, with how it reads text and where results go."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe.config import Config, ModelConfig, Precision
from moe.errors import UserError
from moe.model.transformer import Transformer
from moe.study.plots import FORMATS, require_browser, save_all
from moe.training import checkpoint
from moe.training.console import showable
from moe.training.machine import choose_device, keep_freed_memory
from moe.training.run_folder import RunFolder

BATCH_SIZE = 32
FORMAT = 1
"""of the JSON files; raised whenever a reader of the old ones would misread the new ones"""


@dataclass(frozen=True)
class Subject:
    """The model to be evaluated, and how."""

    path: Path
    run: RunFolder
    config: Config
    step: int
    model: Transformer
    """in evaluation mode, on its device"""
    sequence_length: int
    batch_size: int
    precision: Precision
    out: Path
    suffix: str
    """of the picture, with its dot"""

    @property
    def title(self) -> str:
        """Whose numbers they are."""
        return f"{self.path} at step {self.step:,}"

    def facts(self) -> dict[str, Any]:
        """What a reader of the numbers has to know of how they came about."""
        return {
            "format": FORMAT,
            "run": str(self.path),
            "step": self.step,
            "sequence_length": self.sequence_length,
            "precision": self.precision,
            "device": self.model.embedding.weight.device.type,
            "batch_size": self.batch_size,
        }

    def write(self, stem: str, numbers: Mapping[str, Any], figure: Any) -> None:
        """Write ``stem``.json and the picture beside it, and print where; raises UserError where that cannot be."""
        path, picture = self.out / f"{stem}.json", self.out / f"{stem}{self.suffix}"
        text = json.dumps({**self.facts(), **numbers}, ensure_ascii=False, allow_nan=False, indent=1)
        try:
            partial = path.with_name(f".partial-{path.name}")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
            print(f"\nall numbers: {path}")
            save_all({picture: figure})
        except OSError as error:
            raise UserError(f"{error.filename or self.out}: cannot be written ({error.strerror or error})") from error
        print(f"picture: {picture}")


def open_subject(path: Path, options: Mapping[str, str], longest: int = 0) -> Subject:
    """The model of a run or a checkpoint, loaded; every option is checked first, and that results can be written.

    It reads at least ``longest`` tokens at once, more than model.max_seq if need be. Raises UserError where it cannot.
    """
    device = options.get("--device", "auto")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is {device}, and must be auto, cpu or cuda")
    precision = options.get("--precision", "fp32")
    if precision not in ("fp32", "bf16"):
        raise UserError(f"--precision is {precision}, and must be fp32 or bf16")
    suffix = f".{options.get('--format', 'html')}"
    if suffix not in FORMATS:
        raise UserError(f"--format is {suffix[1:]}, and must be one of {', '.join(name[1:] for name in FORMATS)}")
    run = RunFolder.open(run_of(path))
    is_checkpoint = run.path != path
    config = _that_reads(longest, run.config())
    length = count(options, "--sequence-length") or min(config.data.sequence_length, config.model.max_seq)
    if length > config.model.max_seq:
        raise UserError(
            f"--sequence-length is {length}, and the model reads at most model.max_seq = {config.model.max_seq}"
        )
    saved = checkpoint.open_checkpoint(path) if is_checkpoint else checkpoint.newest(run.checkpoints_path, say)
    name = f"evaluation-{saved.step:08d}" if is_checkpoint else "evaluation"
    out = Path(options["--out"]) if "--out" in options else run.path / name
    on = choose_device(device)  # type: ignore[arg-type]
    batch_size = count(options, "--batch-size") or BATCH_SIZE
    if suffix != ".html":
        require_browser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror or error})") from error
    keep_freed_memory()
    model = Transformer(config.model)
    saved.load_model(model)
    return Subject(
        path=path,
        run=run,
        config=config,
        step=saved.step,
        model=model.to(on).eval(),
        sequence_length=length,
        batch_size=batch_size,
        precision="bf16" if precision == "bf16" else "fp32",
        out=out,
        suffix=suffix,
    )


def _that_reads(longest: int, config: Config) -> Config:
    """The configuration with ``model.max_seq`` at least ``longest``, and rotary positions as they are."""
    model = config.model
    if longest <= model.max_seq:
        return config
    if model.positions == "learned":
        raise UserError(f"{longest:,} tokens are more than the {model.max_seq:,} positions that the model has learned")
    rope = model.attention.rope
    if rope.scaling in ("yarn", "llama3") and rope.original_max_seq is None:
        rope = replace(rope, original_max_seq=int(model.max_seq / rope.factor))
    return replace(config, model=replace(model, max_seq=longest, attention=replace(model.attention, rope=rope)))


def run_of(path: Path) -> Path:
    """The folder of the run that ``path`` is, or is a checkpoint of."""
    of_run = path.parent.parent
    return of_run if path.parent.name == "checkpoints" and (of_run / "config.yaml").is_file() else path


def count(options: Mapping[str, str], flag: str) -> int | None:
    """The value of ``flag``, a whole number from 1 on; None where it is not given."""
    if flag not in options:
        return None
    try:
        number = int(options[flag])
    except ValueError:
        raise UserError(f"{flag} is {options[flag]!r}, and must be a whole number") from None
    if number < 1:
        raise UserError(f"{flag} is {number}, and must be 1 or more")
    return number


def competition(model: ModelConfig) -> str | None:
    """What to know of numbers from ``model``, if tokens compete for its experts in evaluation; None if they do not."""
    if not model.moe_layers:
        return None
    says = []
    if not model.router.is_causal(training=False):
        says.append("a prediction may have seen the token that it predicts")
    if not model.router.is_batch_independent(training=False):
        says.append("the other sequences of a batch have a say, so that numbers change with --batch-size")
    return f"tokens compete for this router's experts: {', and '.join(says)}" if says else None


def say(line: str) -> None:
    """Print ``line`` where it is not mixed up with results."""
    print(showable(line, sys.stderr), file=sys.stderr)
