"""A transformers checkpoint as a run folder: settings, weights, tokenizer, and on request a text to go on with.

Everything is checked before anything is written: settings, names, shapes and dtypes of all tensors, from the headers of
the files. The weights are then read one by one into files of their own (:mod:`.storage`), of which the checkpoint is
made, so that a model may be larger than memory. No code of the checkpoint is run and no pickle opened.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe import config_file
from moe.config import Config, ConfigError, DataConfig, ModelConfig, RunConfig
from moe.data.prepare import PreparedCorpus, prepare, resolve_paths
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError
from moe.interop.families import FAMILIES, HARMLESS
from moe.interop.family import Family
from moe.interop.links import Piece, shapes
from moe.interop.representation import decisive, differences
from moe.interop.shards import DTYPES, Shards
from moe.interop.storage import Storage, give_memory
from moe.interop.upcycle import Upcycling
from moe.model.initialise import initialise
from moe.model.transformer import Transformer
from moe.model.weight_dtype import keep_weights
from moe.training import checkpoint
from moe.training.loop import Progress
from moe.training.machine import choose_device, choose_precision
from moe.training.optimizer import build_optimizer
from moe.training.run_folder import RunFolder

Say = Callable[[str], None]

SOURCE = "source.json"
"""what a run folder's weights came from"""


# ---------------------------------------------------------------------------------------------------------- the command


def import_checkpoint(
    folder: Path,
    overrides: Mapping[str, str] = config_file.NOTHING,
    *,
    upcycling: Upcycling | None = None,
    with_text: bool = False,
    say: Say = lambda line: None,
) -> RunFolder:
    """Make the run folder that ``overrides`` (dotted settings) name, of the transformers checkpoint in ``folder``.

    With ``upcycling`` a dense model becomes a mixture. ``with_text`` prepares the corpus of ``data.corpus`` with the
    model's own tokenizer, so that training can go on and the study has something to read.

    Raises UserError, with the name of the key, tensor or file, for whatever cannot be used; nothing is left then.
    """
    source = Source.open(folder)
    for key in source.family.unread(source.settings, HARMLESS):
        say(f"{source.config_path}: {key} is not read: models of the family {source.family.name} do not depend on it")
    tokenizer = Tokenizer.load(_tokenizer_file(folder))
    config = _configured(source, overrides, upcycling)
    if tokenizer.size > source.settings["vocab_size"]:
        known = source.settings["vocab_size"]
        raise UserError(f"{source.config_path}: vocab_size is {known}, but tokenizer.json has {tokenizer.size} ids")
    shards = Shards.open(folder)
    pieces = source.family.pieces(source.model)
    _require_same_tensors(shards, pieces, source)
    config = _with_precision(config)
    RunFolder.require_free(config)
    assert config.run.name is not None
    path = Path(config.run.folder).expanduser() / config.run.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".importing-", dir=path.parent, ignore_cleanup_errors=True) as work:
            made = RunFolder(Path(work) / "run")
            made.path.mkdir()
            tokenizer.save(made.tokenizer_path)
            if with_text:
                config = _with_text(config, made, say)
            made.write_config(config)
            _write_source(made.path / SOURCE, source, upcycling)
            say(f"reading {len(shards.entries):,} tensors of a {source.family.name} model")
            _write_weights(made, config, source.model, shards, pieces, upcycling, Path(work))
            made.path.rename(path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}; choose another --run.folder") from None
    return RunFolder(path)


@dataclass(frozen=True)
class Source:
    """A transformers checkpoint whose settings are read."""

    folder: Path
    settings: Mapping[str, Any]
    """of its config.json"""
    family: Family
    model: ModelConfig
    """ours, of its weights as they are"""

    @property
    def config_path(self) -> Path:
        """The file of the settings."""
        return self.folder / "config.json"

    @classmethod
    def open(cls, folder: Path) -> "Source":
        """The checkpoint in ``folder``; raises UserError where it is none, or none that our model can be."""
        path = folder / "config.json"
        try:
            settings = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{folder}: is no folder of a transformers model: it has no config.json") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        if not isinstance(settings, dict):
            raise UserError(f"{path}: must hold settings, and holds {type(settings).__name__}")
        family = _family_of(settings, path)
        try:
            return cls(folder, settings, family, family.model_config(settings))
        except ConfigError as error:
            raise UserError(f"{path}: {error.key} {error.reason}") from None


def _family_of(settings: Mapping[str, Any], path: Path) -> Family:
    name = settings.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise UserError(f"{path}: model_type is {name!r}, which is none of those known here: {', '.join(FAMILIES)}")
    architectures = settings.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UserError(
            f"{path}: architectures is {architectures}, and must be {family.architecture}: a model that predicts the "
            "next token"
        )
    for key, reason in {
        "auto_map": "names code of its own, which is not run",
        "quantization_config": "says that the weights are quantised; take the model before it was",
    }.items():
        if settings.get(key):
            raise UserError(f"{path}: {key} {reason}")
    return family


def _tokenizer_file(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: has no tokenizer.json, without which the run could not read text; transformers writes one: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return path


# ------------------------------------------------------------------------------------------------------------- settings


def _configured(source: Source, overrides: Mapping[str, str], upcycling: Upcycling | None) -> Config:
    """Every setting of the run: the model's own, the defaults of the rest, and ``overrides`` over both.

    Raises UserError where an override would make it a model that the weights are not of.
    """
    dense, overrides = source.model, dict(overrides)
    model = dense
    if upcycling is not None:
        if dense.moe_layers:
            raise UserError(f"{source.config_path}: is a mixture already; --upcycle makes one of a dense model")
        settings = upcycling.settings(dense)
        model = _with(dense, settings)
        stays_dense = {"model.experts.every": "1", "model.experts.first_dense": "0"}
        if any(overrides.get(key, usual) != usual for key, usual in stays_dense.items()):
            overrides.setdefault("model.feed_forward.d_ff", str(dense.active_width))
    base = Config(
        model=model,
        data=DataConfig(tokenizer="tokenizer.json", sequence_length=min(DataConfig.sequence_length, model.max_seq)),
        run=RunConfig(name=source.folder.resolve().name),
    )
    config = config_file.parse(config_file.dump(base), str(source.config_path), overrides)
    if config.data.tokenizer != "tokenizer.json":
        raise UserError(f"--data.tokenizer {config.data.tokenizer}: the model comes with its own")
    if upcycling is not None:
        try:
            upcycling.require_possible(dense, config.model)
        except ConfigError as error:
            raise UserError(f"--model.{error.key} {error.reason}") from None
        return config
    if others := differences(decisive(config.model), decisive(dense), "the checkpoint"):
        raise UserError(f"{source.config_path}: it would be another model: {'; '.join(others)}")
    return config


def _with_precision(config: Config) -> Config:
    """The settings with a precision that is not ``auto``, as every run has them."""
    training = config.training
    wanted = "bf16" if training.weight_dtype == "bf16" else training.precision
    found = choose_precision(wanted, choose_device(training.device), config.model.d_model)
    return replace(config, training=replace(training, precision=found))


def _with(model: ModelConfig, settings: Mapping[str, Any]) -> ModelConfig:
    """``model`` with other values of some settings, by dotted key."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    own = sections.pop("", {})
    return replace(model, **own, **{name: replace(getattr(model, name), **values) for name, values in sections.items()})


def _with_text(config: Config, run: RunFolder, say: Say) -> Config:
    """Prepare the corpus with the run's tokenizer, write its manifest, and return the settings with absolute paths."""
    data = replace(resolve_paths(config.data, run.path), tokenizer=config.data.tokenizer)
    corpus: PreparedCorpus = prepare(data, run.path, say)
    corpus.tokenizer.save(run.tokenizer_path)
    run.corpus_path.write_text(json.dumps(corpus.manifest, indent=1), encoding="utf-8")
    return replace(config, data=data)


def _write_source(path: Path, source: Source, upcycling: Upcycling | None) -> None:
    facts: dict[str, Any] = {
        "folder": str(source.folder.resolve()),
        "family": source.family.name,
        "dtype": source.settings.get("dtype") or source.settings.get("torch_dtype"),
        "upcycled": None if upcycling is None else asdict(upcycling),
    }
    path.write_text(json.dumps(facts, indent=1), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- weights


def _require_same_tensors(shards: Shards, pieces: list[Piece], source: Source) -> None:
    """Raise UserError unless the files hold exactly the tensors of the family, in their shapes, and as numbers."""
    wanted = {piece.theirs: piece.shape for piece in pieces if piece.theirs is not None}
    there = shards.entries
    optional = source.family.derived_names(source.model.n_layers)
    if source.model.tie_embeddings and source.family.tied_copy is not None:
        optional.add(source.family.tied_copy)
    if missing := sorted(wanted.keys() - there.keys()):
        raise UserError(f"{source.folder}: has no tensor {_first(missing)}, which a {source.family.name} model has")
    if extra := sorted(there.keys() - wanted.keys() - optional):
        raise UserError(f"{source.folder}: has a tensor {_first(extra)}, which a {source.family.name} model has not")
    for name, shape in wanted.items():
        entry = there[name]
        if entry.shape != shape:
            raise UserError(f"{entry.file}: {name} is {list(entry.shape)}, and by config.json should be {list(shape)}")
        if entry.dtype not in DTYPES:
            raise UserError(f"{entry.file}: {name} is stored as {entry.dtype}; only {', '.join(DTYPES)} are weights")
    _require_that_a_copy_is_one(shards, pieces, source)


def _require_that_a_copy_is_one(shards: Shards, pieces: list[Piece], source: Source) -> None:
    """Raise UserError where the head is tied to the embedding, is stored all the same, and is another matrix."""
    head = source.family.tied_copy
    if not source.model.tie_embeddings or head not in shards.entries:
        return
    [embedding] = [piece.theirs for piece in pieces if piece.ours == "embedding.weight"]
    assert head is not None
    assert embedding is not None
    if not torch.equal(shards.read(head), shards.read(embedding)):
        raise UserError(
            f"{source.folder}: {head} is not {embedding}, which {source.config_path.name} says by tie_word_embeddings"
        )


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _write_weights(
    run: RunFolder,
    config: Config,
    source_model: ModelConfig,
    shards: Shards,
    pieces: list[Piece],
    upcycling: Upcycling | None,
    work: Path,
) -> None:
    """Write the checkpoint of step 0."""
    with torch.device("meta"):
        model = Transformer(config.model, config.training.seed)
    keep_weights(model, config.training.weight_dtype)
    kept = shapes(config.model)
    ours = Storage(work / "ours", {name: tensor for name, tensor in model.state_dict().items() if name in kept})
    if upcycling is None:
        _fill(ours.tensors, shards, pieces)
        give_memory(model, ours.tensors)
    else:
        dense = Storage(work / "dense", shapes(source_model))
        _fill(dense.tensors, shards, pieces)
        _upcycle(model, ours.tensors, dense.tensors, config, upcycling)
        del dense
        shutil.rmtree(work / "dense")
    checkpoint.save(
        run.checkpoints_path,
        0,
        model,
        build_optimizer(model, config.training.optimizer),
        asdict(Progress(sparsity_coefficient=config.model.balance.sparsity)),
        keep=1,
    )


@torch.no_grad()
def _fill(ours: Mapping[str, Tensor], shards: Shards, pieces: list[Piece]) -> None:
    """Copy every tensor of theirs to its place among ``ours``, which are zeros."""
    places: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.theirs is not None and piece.ours is not None:
            places.setdefault(piece.theirs, []).append(piece)
    for name, tensor in shards:
        for piece in places.get(name, ()):
            assert piece.ours is not None
            piece.view(ours[piece.ours]).copy_(tensor if piece.place is None else piece.place(tensor))


@torch.no_grad()
def _upcycle(
    model: nn.Module,
    ours: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    config: Config,
    upcycling: Upcycling,
) -> None:
    """Give ``model`` the memory of ``ours``, new routers in it, and experts made of the ``dense`` MLPs."""
    routers = {name: tensor for name, tensor in ours.items() if ".router." in name}
    give_memory(model, routers)
    # Draws what has memory, which so far are the routers.
    initialise(model, config.model.init_std, config.model.n_layers, config.training.seed)
    for tensor in routers.values():
        if tensor.dim() and tensor.shape[0] == upcycling.n_experts:
            upcycling.share_rows(tensor)
    for name, expert, value in upcycling.mixture_tensors(dense, config.model, config.training.seed):
        (ours[name] if expert is None else ours[name][expert]).copy_(value)
    give_memory(model, ours)
