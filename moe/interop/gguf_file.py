"""A run as a GGUF file, which llama.cpp runs: metadata, tokenizer and weights, written one tensor at a time.

The converters that come with llama.cpp know tokenizers by name and refuse one that was trained here; so the file is
written directly.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe.errors import UserError
from moe.interop.exporting import DTYPES, WeightDtype, require_free
from moe.interop.family import Family
from moe.interop.gguf_tokenizer import gguf_tokenizer
from moe.interop.links import Piece
from moe.interop.llama_cpp import ARCHITECTURES, ROUTERS, written
from moe.interop.run_weights import RunWeights
from moe.training.run_folder import RunFolder

Say = Callable[[str], None]


def export_gguf(run: RunFolder, target: Path, *, dtype: WeightDtype = "fp32", say: Say = lambda line: None) -> Family:
    """Write the newest sound checkpoint of ``run`` to the new file ``target``, and return what it is there.

    In bf16, what has one dimension and what routes stays float32, as llama.cpp wants it.

    Raises UserError, before anything is written, where the package gguf is missing, where no architecture represents
    the run, with the option that stands in the way of each, for a tokenizer that llama.cpp has not, and where
    ``target`` exists.
    """
    gguf = _gguf()
    weights = RunWeights.open(run, say)
    family = weights.family(ARCHITECTURES, "llama.cpp")
    tokenizer = gguf_tokenizer(weights.tokenizer_json, weights.tokenizer.end_of_text, _vocab_size(weights))
    require_free(target)
    say(f"writing step {weights.saved.step} of {run.path} as {family.name}")
    pieces = [piece for piece in family.pieces(weights.model) if piece.theirs is not None]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".exporting-", dir=target.parent, ignore_cleanup_errors=True) as work:
            part = Path(work) / "model.gguf"
            writer = gguf.GGUFWriter(part, family.architecture)
            writer.add_name(run.path.resolve().name)
            writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "fp32" else gguf.LlamaFileType.MOSTLY_BF16)
            for key, value in written(family.settings_of(weights.model)).items():
                _add(writer, f"{family.architecture}.{key}", value)
            for key, value in tokenizer.items():
                _add(writer, f"tokenizer.ggml.{key}", value)
            _write_tensors(gguf, writer, weights, pieces, DTYPES[dtype])
            writer.close()
            part.rename(target)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}; choose another place") from None
    return family


def _vocab_size(weights: RunWeights) -> int:
    assert weights.model.vocab_size is not None
    return weights.model.vocab_size


def _add(writer: Any, key: str, value: object) -> None:
    """Add one entry of metadata, in the type that llama.cpp reads it in."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _write_tensors(gguf: Any, writer: Any, weights: RunWeights, pieces: list[Piece], dtype: torch.dtype) -> None:
    """Write the headers, then the data, of all tensors."""
    types = {torch.float32: gguf.GGMLQuantizationType.F32, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
    kinds = [torch.float32 if _stays_float32(piece) else dtype for piece in pieces]
    for piece, kind in zip(pieces, kinds, strict=True):
        n_bytes = torch.Size(piece.shape).numel() * kind.itemsize
        writer.add_tensor_info(piece.theirs, piece.shape, None, n_bytes, raw_dtype=types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for piece, kind in zip(pieces, kinds, strict=True):
        writer.write_tensor_data(weights.tensor(piece, kind).contiguous().view(torch.uint8).numpy())


def _stays_float32(piece: Piece) -> bool:
    return piece.stays_float32 or len(piece.shape) == 1 or str(piece.theirs).endswith(ROUTERS)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("--to gguf needs the package gguf, which is not installed: pip install -e '.[gguf]'") from None
    return gguf
