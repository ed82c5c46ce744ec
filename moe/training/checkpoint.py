"""Checkpoints: the whole state of a run in a folder that is either complete and right, or not used.

``checkpoints/step-00000250/`` holds

- ``model.safetensors``: every tensor of the model's ``state_dict``, by canonical name (:func:`canonical_name`);
  a tensor that has several names is stored once, under the first;
- ``optimizer.safetensors``: the optimizer's tensors as ``<kind>/<parameter name>`` (``exp_avg/head.weight``), and its
  hyperparameters by parameter name;
- ``rng.safetensors``: the random generators of torch, each CUDA device, numpy and Python;
- ``state.json``: the step, what the caller counts (tokens seen, skipped steps), versions and thread count;
- ``manifest.json``: size and XXH3-128 digest of each of the others, written last.

Of a model that is spread over processes each writes what it has, to ``model-00003.safetensors`` and the like, with how
it was cut (:mod:`.pieces`); such a checkpoint, and one in whole, load into a model of any layout.

A checkpoint is written to a folder beside its place, which gets its name only when every byte is on the disk: a
process may be killed or a disk fill up at any moment, and what was there before still is. A flipped bit, which
safetensors and ``torch.load`` read without complaint, is found by its digest. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import platform
import random
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe.errors import UserError
from moe.parallel.spread import Spread, spread_of
from moe.parallel.world import World
from moe.training.pieces import Piece, StoredTensors, metadata, piece_here

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None

FORMAT, FORMAT_IN_PIECES = 1, 2
MODEL, OPTIMIZER, RANDOM, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
    "manifest.json",
)

# ".replaced" is the old checkpoint of a step that is being saved again, for the moment in which neither has the name.
_FOLDER_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_PARTIAL = ".partial"

# How a step is computed, not what it computes: these may differ between the machines that save and resume.
_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}
# Moved by the schedule, so restored and not compared.
_SCHEDULED = {"lr", "initial_lr"}
_PARAMETER_LISTS = {"params", "param_names"}


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be trusted; the message names the file and what is wrong with it."""


# --------------------------------------------------------------------------------------------------------------- saving


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    progress: Mapping[str, JSON],
    keep: int,
    world: World | None = None,
) -> Path:
    """Write the checkpoint of ``step`` below ``folder``, then remove all but the ``keep`` newest; return its folder.

    ``progress`` is whatever the caller wants back on resuming (numbers that are not finite come back as they were,
    tuples as lists). A checkpoint of the same step is replaced. Those of later steps, which an interrupted run may
    have left, are neither counted nor removed. Where the model is cut over processes (:attr:`Spread.is_cut`), all of
    ``world`` call this, and see the same disk; else the first rank alone.

    Raises UserError where the disk does not take it; nothing is left of it then, and earlier checkpoints are untouched.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step {step} must not be negative, and keep {keep} must be at least 1")
    final = folder / f"step-{step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    spread = spread_of(model)
    if spread is not None and spread.is_cut:
        assert world is not None
        return _save_in_pieces(final, partial, step, model, optimizer, progress, keep, spread, world)
    try:
        _begin(partial, step, progress)
        save_file(_on_host(_named_tensors(model)), partial / MODEL)
        if optimizer is not None:
            _save_optimizer(partial / OPTIMIZER, optimizer, model)
        _save_random_state(partial / RANDOM)
        _finish(partial, final, {file.name: _entry(file) for file in sorted(partial.iterdir())}, FORMAT)
    except (OSError, SafetensorError) as error:
        raise _unwritten(final, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _prune(folder, step, keep)
    return final


def _save_in_pieces(
    final: Path,
    partial: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    progress: Mapping[str, JSON],
    keep: int,
    spread: Spread,
    world: World,
) -> Path:
    """Every process writes its pieces and what they digest to; the first begins and ends."""

    def begin() -> None:
        if world.is_first:
            _begin(partial, step, progress)
            _save_random_state(partial / RANDOM)

    def write() -> None:
        mine = [partial / f"model-{world.rank:05d}.safetensors", partial / f"optimizer-{world.rank:05d}.safetensors"]
        _save_pieces(mine[0], *_pieces_of_model(model, spread))
        if optimizer is not None:
            _save_optimizer_pieces(mine[1], optimizer, spread)
        entries = {file.name: _entry(file) for file in mine if file.exists()}
        (partial / f"{world.rank:05d}.digests").write_text(json.dumps(entries))
        for file in mine:
            if file.exists():
                shutil.copymode(partial / STATE, file)
                _to_disk(file)

    def finish() -> None:
        if not world.is_first:
            return
        entries = {name: _entry(partial / name) for name in (STATE, RANDOM)}
        for file in sorted(partial.glob("*.digests")):
            entries |= json.loads(file.read_text())
            file.unlink()
        _finish(partial, final, entries, FORMAT_IN_PIECES)

    try:
        for work in (begin, write, finish):
            error: Exception | None = None
            try:
                work()
            except (OSError, SafetensorError) as refused:
                error = refused
            failed = int(world.sum(torch.tensor(int(error is not None), device=world.device)))
            if error is not None or failed:
                raise _unwritten(final, error or f"on {failed} of {world.size} processes")
    finally:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
    if world.is_first:
        _prune(final.parent, step, keep)
    return final


def _begin(partial: Path, step: int, progress: Mapping[str, JSON]) -> None:
    """Make the folder and write the state, from which the others take their permissions: safetensors' are private."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(partial.parent)
    partial.mkdir()
    (partial / STATE).write_text(
        json.dumps({"step": step, "progress": progress, "environment": _environment()}, indent=1)
    )


def _finish(partial: Path, final: Path, entries: Mapping[str, JSON], version: int) -> None:
    """Write the manifest, wait for the disk, and give the folder its name."""
    (partial / MANIFEST).write_text(json.dumps({"format": version, "files": entries}, indent=1))
    for file in partial.iterdir():
        shutil.copymode(partial / STATE, file)
        _to_disk(file)
    _to_disk(partial)
    _put_in_place(partial, final)


def _entry(file: Path) -> dict[str, JSON]:
    return {"size": file.stat().st_size, "xxh3_128": _digest(file)}


def _unwritten(final: Path, cause: object) -> UserError:
    return UserError(
        f"{final}: the checkpoint could not be written ({cause}); earlier ones are untouched: "
        "make room, or set run.folder to another disk, and resume"
    )


def canonical_name(name: str) -> str:
    """``name`` without the ``_orig_mod`` that torch.compile puts in: a compiled model and a plain one are the same."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by canonical name; of the names of a tied weight, the first."""
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}: a checkpoint holds parameters and buffers")
        if id(value) not in names:
            names[id(value)] = name
            tensors[canonical_name(name)] = value
    return tensors


def _parameter_names(model: nn.Module) -> dict[int, str]:
    """The canonical name of each parameter, or of what is here of it, by its identity."""
    if (spread := spread_of(model)) is not None:
        return {id(parameter): name for name, parameter in spread.parameters.items()}
    return {id(parameter): canonical_name(name) for name, parameter in model.named_parameters()}


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` as safetensors can write them: on the CPU, contiguous, no two in the same memory."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        if host.untyped_storage().data_ptr() in storages:
            host = host.clone()
        storages.add(host.untyped_storage().data_ptr())
        result[name] = host
    return result


def _save_optimizer(path: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    names = _parameter_names(model)
    groups = []
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        parameters = [_name_of(parameter, names) for parameter in group["params"]]
        groups.append({"parameters": parameters, "hyperparameters": _hyperparameters(group)})
        for name, parameter in zip(parameters, group["params"], strict=True):
            for kind, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"the optimizer's {kind} of {name} is a {type(value).__name__}, not a tensor")
                tensors[f"{kind}/{name}"] = value
    save_file(_on_host(tensors), path, metadata={"groups": json.dumps(groups)})


def _pieces_of_model(model: nn.Module, spread: Spread) -> tuple[dict[str, Tensor], dict[str, Piece]]:
    """What this process writes of parameters and persistent buffers, and how that was cut from the whole."""
    tensors, pieces = {}, {}
    for name, value in _named_tensors(model).items():
        if name not in spread.parameters:
            if spread.is_first:
                tensors[name] = value
        elif spread.keeps(name):
            tensors[name], pieces[name] = spread.parameters[name], piece_here(spread, name)
    return tensors, pieces


def _save_pieces(
    path: Path, tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece], more: Mapping[str, str] | None = None
) -> None:
    full = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 0 or tensor.numel() > 0}
    save_file(_on_host(full), path, metadata=metadata(pieces) | dict(more or {}))


def _save_optimizer_pieces(path: Path, optimizer: torch.optim.Optimizer, spread: Spread) -> None:
    names = {id(parameter): name for name, parameter in spread.parameters.items()}
    groups, tensors, pieces = [], {}, {}
    for group in optimizer.param_groups:
        parameters = [_name_of(parameter, names) for parameter in group["params"]]
        groups.append({"parameters": parameters, "hyperparameters": _hyperparameters(group)})
        for name, parameter in zip(parameters, group["params"], strict=True):
            for kind, value in optimizer.state.get(parameter, {}).items():
                if value.dim() == 0 and spread.is_first:
                    tensors[f"{kind}/{name}"] = value
                elif value.dim() > 0 and spread.keeps(name):
                    tensors[f"{kind}/{name}"], pieces[f"{kind}/{name}"] = value, piece_here(spread, name)
    _save_pieces(path, tensors, pieces, {"groups": json.dumps(groups)})


def _name_of(parameter: Tensor, names: Mapping[int, str]) -> str:
    if id(parameter) not in names:
        raise ValueError(f"the optimizer has a parameter of shape {tuple(parameter.shape)} that the model has not")
    return names[id(parameter)]


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group, as they read after a round trip through JSON."""
    kept = {key: value for key, value in group.items() if key not in _IMPLEMENTATION | _PARAMETER_LISTS}
    plain = {key: value.item() if isinstance(value, Tensor) else value for key, value in kept.items()}
    return dict(json.loads(json.dumps(plain)))


def _save_random_state(path: Path) -> None:
    python_version, python_words, python_gauss = random.getstate()
    _, numpy_words, *numpy_rest = np.random.get_state(legacy=True)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python_words),
        "numpy": torch.from_numpy(np.asarray(numpy_words).astype(np.int64)),
    }
    # Asking an idle CUDA for its generators would start it.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        tensors |= {f"cuda/{device}": state for device, state in enumerate(torch.cuda.get_rng_state_all())}
    metadata = {"python": json.dumps([python_version, python_gauss]), "numpy": json.dumps(numpy_rest)}
    save_file(tensors, path, metadata=metadata)


def _environment() -> dict[str, JSON]:
    """What a resumed run must share with the saved one for its numbers to be the same to the last bit."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until the file or folder is on the disk and not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, final: Path) -> None:
    """Give ``partial`` its name. A folder cannot be renamed over a full one, so an old one steps aside first."""
    aside = final.with_name(final.name + ".replaced")
    if final.exists():
        _remove(aside)
        final.rename(aside)
    partial.rename(final)
    _to_disk(final.parent)
    _remove(aside)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove what is older than the ``keep`` newest steps up to ``step``, whose checkpoint is in its place."""
    steps = sorted({found for found, _ in _checkpoints(folder) if found <= step})
    for found, path in _checkpoints(folder):
        if found in steps[:-keep]:
            try:
                _remove(path)
            except OSError as error:
                raise UserError(f"{path}: this old checkpoint could not be removed ({error}); remove it") from error


def _remove(path: Path) -> None:
    """Remove a checkpoint such that a kill in the middle leaves none that looks whole."""
    if path.exists():
        doomed = path.with_name(path.name + _PARTIAL)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed save left."""
    for path in folder.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of every checkpoint, whole or not, newest first; one that was being replaced after its like."""
    matches = [(_FOLDER_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    found = [(int(match[1]), match[2] is None, path) for match, path in matches if match]
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


# -------------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose digests are right."""

    folder: Path
    step: int
    """optimizer steps done"""
    progress: dict[str, Any]
    """what the caller of :func:`save` wanted back"""
    environment: dict[str, Any]
    """versions and thread count of the process that saved it"""

    def load_model(self, model: nn.Module) -> None:
        """Fill every parameter and persistent buffer of ``model``, or raise UserError and change none.

        The names, shapes and dtypes must be those of the checkpoint, whether or not either model is compiled; but that
        a model in float32 takes weights that were kept in bfloat16, as they are.
        """
        stored, spread = self._stored(MODEL), spread_of(model)
        path, tensors = stored.paths[0], _named_tensors(model)
        _require_same_names(path, _of_this_stage(stored.names(), tensors, spread), tensors, "model")
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise ValueError(f"{name} is on the meta device; give the model memory first (to_empty)")
            like = stored.like(name)
            widened = like.dtype == torch.bfloat16 and tensor.dtype == torch.float32
            _require_like(path, name, like.float() if widened else like, _whole_like(name, tensor, spread))
        with torch.no_grad():
            for name, tensor in tensors.items():
                whole = stored.read(name)
                if spread is not None and name in spread.parameters:
                    spread.parameters[name].copy_(spread.part(name, whole))
                else:
                    tensor.copy_(whole)

    def _stored(self, name: str) -> StoredTensors:
        """The tensors of a file, or of its pieces."""
        path = self.folder / name
        pieces = sorted(self.folder.glob(f"{path.stem}-*{path.suffix}"))
        if not path.exists() and not pieces:
            raise UserError(f"{path}: there is none: this checkpoint was saved without an optimizer")
        return StoredTensors([path] if path.exists() else pieces)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Give ``optimizer``, which holds parameters of ``model``, its saved state and learning rates.

        Groups may be ordered differently; every parameter must have the hyperparameters it was saved with. Raises
        UserError, and changes nothing, where a name, shape, dtype or hyperparameter is not the saved one.
        """
        stored, spread = self._stored(OPTIMIZER), spread_of(model)
        path = stored.paths[0]
        groups = [group for text in stored.metadata("groups") for group in json.loads(text)]
        saved = {name: group["hyperparameters"] for group in groups for name in group["parameters"]}

        names = _parameter_names(model)
        by_name = {
            _name_of(parameter, names): parameter for group in optimizer.param_groups for parameter in group["params"]
        }
        _require_same_names(path, _of_this_stage(saved, by_name, spread), by_name, "optimizer")
        for group in optimizer.param_groups:
            _require_same_hyperparameters(path, group, [names[id(parameter)] for parameter in group["params"]], saved)
        state = _state_by_name(path, stored, by_name, [group["parameters"] for group in groups], spread)

        # The optimizer's own loader puts each tensor where the optimizer wants it (fused AdamW: the step on the GPU).
        packed = optimizer.state_dict()
        packed["state"] = {}
        for group, packed_group in zip(optimizer.param_groups, packed["param_groups"], strict=True):
            for parameter, index in zip(group["params"], packed_group["params"], strict=True):
                name = names[id(parameter)]
                if name in state:
                    packed["state"][index] = state[name]
                for key in _SCHEDULED & saved[name].keys() & group.keys():
                    rate = group[key]
                    value = saved[name][key]
                    packed_group[key] = torch.full_like(rate, value) if isinstance(rate, Tensor) else value
        optimizer.load_state_dict(packed)

    def restore_random_state(self) -> None:
        """Set the generators of torch, numpy and Python, and of each CUDA device that has a saved one, as they were."""
        path = self.folder / RANDOM
        stored = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        python_version, python_gauss = json.loads(metadata["python"])
        random.setstate((python_version, tuple(stored["python"].tolist()), python_gauss))
        numpy_words = stored["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", numpy_words, *json.loads(metadata["numpy"])))
        torch.set_rng_state(stored["torch"].clone())
        for device in range(torch.cuda.device_count()):
            if f"cuda/{device}" in stored:
                torch.cuda.set_rng_state(stored[f"cuda/{device}"].clone(), device)

    def environment_differences(self) -> list[str]:
        """Versions and thread counts that differ here from where it was saved; empty: the same numbers, to the bit."""
        here = _environment()
        return [
            f"{key} {self.environment[key]} then, {here[key]} now" for key in here if self.environment[key] != here[key]
        ]


def newest(folder: Path, report: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint below ``folder`` whose digests are right.

    ``report`` gets a line for each newer one that is damaged, naming the file. Raises UserError where none is left.
    """
    found = _checkpoints(folder) if folder.is_dir() else []
    for _, path in found:
        try:
            return open_checkpoint(path)
        except DamagedCheckpointError as damage:
            report(f"{damage}; looking for an earlier checkpoint")
    if not found:
        raise UserError(f"{folder}: no checkpoint here; start the run from the beginning")
    raise UserError(f"{folder}: every checkpoint here ({len(found)}) is damaged; start the run from the beginning")


def any_below(folder: Path) -> bool:
    """Whether there is a checkpoint below ``folder``, sound or not."""
    return folder.is_dir() and bool(_checkpoints(folder))


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder ``path``, every file checked; raises DamagedCheckpointError, naming the file."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = {str(name): (int(entry["size"]), str(entry["xxh3_128"])) for name, entry in manifest["files"].items()}
        version = manifest["format"]
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path / MANIFEST}: missing") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path / MANIFEST}: unreadable ({error})") from error
    if version not in (FORMAT, FORMAT_IN_PIECES):
        raise DamagedCheckpointError(f"{path / MANIFEST}: of format {version!r}, not {FORMAT} or {FORMAT_IN_PIECES}")
    required = {MODEL, RANDOM, STATE} if version == FORMAT else {"model-00000.safetensors", RANDOM, STATE}
    for name in sorted(required | files.keys()):
        if name not in files:
            raise DamagedCheckpointError(f"{path / MANIFEST}: does not list {name}")
        _require_intact(path / name, *files[name])
    state = json.loads((path / STATE).read_bytes())
    match = _FOLDER_NAME.fullmatch(path.name)
    if match is None or int(match[1]) != state["step"]:
        raise DamagedCheckpointError(f"{path}: holds step {state['step']}, which is not what it is called")
    return Checkpoint(path, state["step"], state["progress"], state["environment"])


def _require_intact(path: Path, size: int, digest: str) -> None:
    try:
        actual = path.stat().st_size
        if actual != size:
            raise DamagedCheckpointError(f"{path}: {actual:,} bytes, and should be {size:,}")
        if _digest(path) != digest:
            raise DamagedCheckpointError(f"{path}: damaged (its digest is not the one in {MANIFEST})")
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path}: missing") from error
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: unreadable ({error.strerror})") from error


def _is_stage(spread: Spread | None) -> bool:
    """Whether some of the model is on other ranks of a pipeline."""
    return spread is not None and spread.mesh.pipeline_group is not None


def _of_this_stage(stored: Iterable[str], here: Iterable[str], spread: Spread | None) -> Iterable[str]:
    """Of the stored names those that this process has to do with: all, unless it is a pipeline's stage."""
    return set(stored) & set(here) if _is_stage(spread) else stored


def _require_same_names(path: Path, stored: Iterable[str], wanted: Iterable[str], owner: str) -> None:
    remedy = "use the configuration that it was saved with"
    missing = sorted(set(wanted) - set(stored))
    extra = sorted(set(stored) - set(wanted))
    if missing:
        raise UserError(f"{path}: has no {_first_of(missing)}, which the {owner} has; {remedy}")
    if extra:
        raise UserError(f"{path}: has {_first_of(extra)}, which the {owner} has not; {remedy}")


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _require_like(path: Path, name: str, stored: Tensor, wanted: Tensor) -> None:
    if stored.shape != wanted.shape or stored.dtype != wanted.dtype:
        raise UserError(
            f"{path}: {name} is {_describe(stored)}, and should be {_describe(wanted)}; "
            "use the configuration that it was saved with"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _require_same_hyperparameters(
    path: Path, group: Mapping[str, Any], names: Sequence[str], saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """One group of the optimizer, against what each of its parameters was saved with."""
    here = _hyperparameters(group)
    for name in names:
        for key in sorted(here.keys() | saved[name].keys()):
            # A group has one learning rate: those of its parameters must have been equal, whatever they were.
            reference = saved[names[0]] if key in _SCHEDULED else here
            if saved[name].get(key) != reference.get(key):
                raise UserError(
                    f"{path}: {key} of {name} is {saved[name].get(key)}, and should be {reference.get(key)}; "
                    "use the configuration that it was saved with"
                )


def _whole_like(name: str, tensor: Tensor, spread: Spread | None) -> Tensor:
    """A tensor without memory, like the whole of one of which this process may have a part."""
    shape = tensor.shape if spread is None else spread.shapes.get(name, tensor.shape)
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def _state_by_name(
    path: Path,
    stored: StoredTensors,
    parameters: Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
    spread: Spread | None,
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors by parameter and kind.

    The parameters of a group have the same kinds, all of them or, if there never was a gradient, none.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for key in stored.names():
        kind, _, name = key.partition("/")
        if name not in parameters:
            if _is_stage(spread):
                continue
            raise UserError(f"{path}: has {key}, but the optimizer has no parameter {name}")
        like = stored.like(key)
        if like.dim() > 0:
            _require_like(path, key, like, _whole_like(name, parameters[name], spread))
        tensor = stored.read(key)
        state.setdefault(name, {})[kind] = tensor if spread is None or like.dim() == 0 else spread.part(name, tensor)
    for names in groups:
        kinds = {kind for name in names for kind in state.get(name, {})}
        for name in state.keys() & set(names):
            if missing := sorted(kinds - state[name].keys()):
                raise UserError(f"{path}: has no {missing[0]}/{name}, which goes with {sorted(state[name])[0]}/{name}")
    return state
