"""A run as a folder that transformers reads, 4.57 and 5 alike, by ``AutoModelForCausalLM`` and without code of ours.

``config.json`` is written by hand, in the spelling of both: transformers 5 calls some settings by other names, which 4
takes for unknown ones and leaves at their defaults without a word.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from moe.errors import UserError
from moe.interop.families import FAMILIES
from moe.interop.family import Family
from moe.interop.model_card import model_card
from moe.interop.run_weights import RunWeights
from moe.interop.shards import SHARD_BYTES, bytes_of, write_shards
from moe.interop.tokenizer_files import transformers_tokenizer
from moe.training.run_folder import RunFolder

Say = Callable[[str], None]
WeightDtype = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_huggingface(
    run: RunFolder,
    target: Path,
    *,
    dtype: WeightDtype = "fp32",
    shard_bytes: int = SHARD_BYTES,
    say: Say = lambda line: None,
) -> Family:
    """Write the newest sound checkpoint of ``run`` to the new folder ``target``, and return what it is there.

    Raises UserError, before anything is written, where no architecture represents the run, with the option that stands
    in the way of each, and where ``target`` exists.
    """
    weights = RunWeights.open(run, say)
    family = weights.family(FAMILIES, "transformers")
    require_free(target)
    say(f"writing step {weights.saved.step} of {run.path} as {family.architecture}")
    pieces = [piece for piece in family.pieces(weights.model) if piece.theirs is not None]
    torch_dtype = DTYPES[dtype]
    sizes = {
        str(piece.theirs): bytes_of(piece.shape, torch.float32 if piece.stays_float32 else torch_dtype)
        for piece in pieces
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".exporting-", dir=target.parent, ignore_cleanup_errors=True) as work:
            folder = Path(work) / "model"
            folder.mkdir()
            _write_json(folder / "config.json", _config(weights, family, dtype))
            _write_json(folder / "generation_config.json", _special_ids(weights))
            for name, content in transformers_tokenizer(
                weights.tokenizer_json, weights.tokenizer.end_of_text, weights.model.max_seq
            ).items():
                _write_json(folder / name, content)
            (folder / "README.md").write_text(model_card(weights, family, dtype), encoding="utf-8")
            write_shards(folder, weights.tensors(pieces, torch_dtype), sizes, shard_bytes)
            folder.rename(target)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}; choose another place") from None
    return family


def require_free(target: Path) -> None:
    """Raise UserError where ``target`` is there already."""
    if target.exists():
        raise UserError(f"{target}: exists; remove it, or choose another place")


def _config(weights: RunWeights, family: Family, dtype: WeightDtype) -> dict[str, Any]:
    """What transformers builds the model from."""
    name = str(DTYPES[dtype]).removeprefix("torch.")
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **family.settings_of(weights.model),
        # Without a token to pad with: transformers would keep that one's embedding from being trained.
        **{key: value for key, value in _special_ids(weights).items() if key != "pad_token_id"},
        "attention_dropout": 0.0,
        "initializer_range": weights.model.init_std,
        "use_cache": True,
        "dtype": name,
        "torch_dtype": name,
    }


def _special_ids(weights: RunWeights) -> dict[str, int]:
    """One token begins a text, ends it and fills up a batch, as in training."""
    end = weights.tokenizer.end_of_text
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
