"""The record of a published model: run a checkpoint of transformers over text, and read its router logits.

What ``output_router_logits=True`` returns was read in the source of transformers 5.23 and is tested against what the
routers of those models hand to their experts. In every family below it is the logits of all experts before any softmax,
in the model's dtype, for every mixture layer in order; the choice and the weights follow from them by one of two rules:

- softmax, then the k largest (Mixtral, Jiang et al. 2024, arXiv 2401.04088; OLMoE, Muennighoff et al. 2024,
  arXiv 2409.02060), with the weights divided by their sum or left as they are;
- the k largest logits, then a softmax over those k (GPT-OSS, Granite). The weights are those of the first rule, divided
  by their sum; ties and rounding can differ.

A family is refused where the logits do not decide the choice (a selection bias lies in the model, not in them) or where
its rule is not known here. transformers is an optional package and is imported only when a model is.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.errors import UserError
from moe.study.record import Layer, Record
from moe.study.recording import losses_and_predictions
from moe.study.storage import RecordWriter

BATCH_TOKENS = 8192
"""tokens in a batch, or one sequence where that is longer"""


class Decision(NamedTuple):
    """What a router made of its logits, in float32."""

    scores: Float[Tensor, "T E"]
    """softmax of the logits"""
    selected: Int[Tensor, "T K"]
    """best first"""
    weights: Float[Tensor, "T K"]


# ------------------------------------------------------------------------------------------------------------ the rules


def softmax_then_top_k(logits: Float[Tensor, "T E"], top_k: int, *, normalise: bool) -> Decision:
    """The K largest probabilities, divided by their sum if ``normalise``."""
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    weights, selected = scores.topk(top_k, dim=-1)
    return Decision(scores, selected, weights / weights.sum(dim=-1, keepdim=True) if normalise else weights)


def top_k_then_softmax(logits: Float[Tensor, "T E"], top_k: int) -> Decision:
    """The softmax over the K largest logits."""
    largest, selected = logits.topk(top_k, dim=-1)
    scores, weights = (part.softmax(dim=-1, dtype=torch.float32) for part in (logits, largest))
    return Decision(scores, selected, weights)


class Family(NamedTuple):
    """What the routers of one kind of model do with their logits."""

    softmax_first: bool
    """softmax, then top-k; else top-k, then softmax"""
    normalise: bool | None = None
    """whether the weights are then divided by their sum; None: as ``norm_topk_prob`` of the configuration says"""
    rounded: bool = True
    """whether the weights are rounded to the model's dtype"""

    def decide(self, logits: Float[Tensor, "T E"], config: Any, dtype: torch.dtype) -> Decision:
        """The choice from ``logits`` of a model with this configuration of theirs that computes in ``dtype``."""
        top_k = config.num_experts_per_tok
        if self.softmax_first:
            normalise = config.norm_topk_prob if self.normalise is None else self.normalise
            decision = softmax_then_top_k(logits, top_k, normalise=normalise)
        else:
            decision = top_k_then_softmax(logits, top_k)
        return decision._replace(weights=decision.weights.to(dtype).float()) if self.rounded else decision


FAMILIES = {
    "mixtral": Family(softmax_first=True, normalise=True, rounded=False),
    "minimax": Family(softmax_first=True, normalise=True, rounded=False),
    "olmoe": Family(softmax_first=True),
    "flex_olmo": Family(softmax_first=True),
    "qwen2_moe": Family(softmax_first=True),
    "qwen3_moe": Family(softmax_first=True),
    "qwen3_next": Family(softmax_first=True),
    "jamba": Family(softmax_first=True, normalise=False),
    "gpt_oss": Family(softmax_first=False),
    "granitemoe": Family(softmax_first=False),
    "granitemoeshared": Family(softmax_first=False),
}
"""by ``model_type`` of a configuration"""

_BIASED = "adds a selection bias to its scores before it chooses, and the router logits do not hold it"
REFUSED = {
    "deepseek_v3": _BIASED,
    "deepseek_v32": _BIASED,
    "glm4_moe": _BIASED,
    "ernie4_5_moe": _BIASED,
    "dots1": _BIASED,
    "minimax_m2": _BIASED,
    "afmoe": _BIASED,
    "longcat_flash": _BIASED,
    "phimoe": "chooses each expert from what the one before left near enough, by a rule of its own (SparseMixer)",
    "jetmoe": "routes its attention too, and mixes both in its router logits",
    "switch_transformers": "has a capacity, and the router logits do not say which tokens were dropped",
    "nllb-moe": "has a capacity, and the router logits do not say which tokens were dropped",
}
"""why the router logits of a ``model_type`` do not say where its tokens went"""


# -------------------------------------------------------------------------------------------------------------- running


def import_record(
    checkpoint: Path,
    documents: Mapping[str, Sequence[str] | Sequence[Sequence[int]]],
    folder: Path,
    *,
    sequence_length: int = 1024,
    scores: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    advance: Callable[[int], object] = lambda rows: None,
) -> None:
    """Run the model in the folder ``checkpoint`` over ``documents`` and write the record to ``folder``.

    ``documents`` has for each domain texts, which the folder's tokenizer encodes with the special tokens that it adds
    by itself, or token ids. A document is cut into sequences of ``sequence_length`` tokens that do not overlap, the
    last of them shorter; each token but a document's first is the target of one row. ``dtype`` None computes in the
    dtype of the files. ``advance`` is called with the new rows after each batch. Memory does not grow with the text.

    The files must be safetensors and the model's code must be that of transformers: none is taken from the folder, and
    nothing is fetched. Raises UserError where transformers is missing, for a folder that holds no such model or lacks
    some of its weights, for a family whose router logits do not decide its choice, for text without a tokenizer, and
    what :class:`~moe.study.storage.RecordWriter` raises.
    """
    transformers = _transformers()
    config = _config(transformers, checkpoint)
    family = _family_of(checkpoint, config.model_type)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and not 1 <= sequence_length <= longest:
        raise UserError(f"sequences of {sequence_length} tokens: {checkpoint} takes 1 to {longest}")
    tokenizer = _tokenizer(transformers, checkpoint, needed=_has_text(documents))
    encoded = _encoded(documents, tokenizer, config.vocab_size)
    if folder.exists():
        raise UserError(f"{folder}: exists; remove it, or record into another folder")
    model = _model(transformers, checkpoint, dtype).to(device).eval()
    blocks = _mixture_blocks(model)
    vocabulary = None if tokenizer is None else _vocabulary(tokenizer, config.vocab_size)
    head = model.get_output_embeddings().weight
    first_sequence = 0
    with RecordWriter(folder) as writer, torch.no_grad():
        for domain, windows in _batches(encoded, sequence_length):
            tokens, targets = windows[:, :-1], windows[:, 1:]
            output = model.base_model(tokens.to(device), output_router_logits=True, use_cache=False)
            router_logits = output.router_logits
            if len(router_logits) != len(blocks):
                raise UserError(
                    f"{checkpoint}: its routing cannot be recorded: {len(blocks)} blocks have experts, "
                    f"and {len(router_logits)} gave router logits"
                )
            # Granite divides its logits by a constant; nobody else has one.
            hidden = output.last_hidden_state / getattr(config, "logits_scaling", 1)
            losses, predicted = losses_and_predictions(hidden, head, targets.to(device))
            rows, length = tokens.shape
            part = Record(
                token_id=_column(tokens),
                target_id=_column(targets),
                predicted_id=_column(predicted),
                loss=losses.flatten().float().cpu().numpy(),
                position=_column(torch.arange(length).expand(rows, length)),
                sequence=_column(torch.arange(first_sequence, first_sequence + rows)[:, None].expand(rows, length)),
                domain=np.full(rows * length, domain, np.int32),
                domains=tuple(documents),
                layers=tuple(
                    _layer(block, family.decide(logits, config, hidden.dtype), scores)
                    for block, logits in zip(blocks, router_logits, strict=True)
                ),
                vocabulary=vocabulary,
                source=str(checkpoint),
            )
            writer.append(part)
            advance(part.n_tokens)
            first_sequence += rows


def _batches(encoded: Sequence[Sequence[Tensor]], sequence_length: int) -> Iterator[tuple[int, Int[Tensor, "B S"]]]:
    """(domain, windows of one more token than a sequence), as many of one length together as come in a row.

    There is no padding, which a model might attend to, or route.
    """
    rows = max(1, BATCH_TOKENS // sequence_length)
    for domain, documents in enumerate(encoded):
        waiting: list[Tensor] = []
        for ids in documents:
            for start in range(0, len(ids) - 1, sequence_length):
                window = ids[start : start + sequence_length + 1]
                if waiting and (len(waiting) == rows or len(waiting[0]) != len(window)):
                    yield domain, torch.stack(waiting)
                    waiting = []
                waiting.append(window)
        if waiting:
            yield domain, torch.stack(waiting)


def _layer(block: int, decision: Decision, scores: bool) -> Layer:
    selected = decision.selected.cpu().numpy().astype(np.int32)
    return Layer(
        block=block,
        n_experts=decision.scores.shape[1],
        selected=selected,
        weights=decision.weights.cpu().numpy(),
        dropped=np.zeros(selected.shape, np.bool_),
        scores=decision.scores.half().cpu().numpy() if scores else None,
    )


def _column(values: Tensor) -> Any:
    return values.flatten().to(torch.int32).cpu().numpy()


def _mixture_blocks(model: Any) -> list[int]:
    """Numbers of the blocks that have experts."""
    matches = [re.search(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?experts$", name) for name, _ in model.named_modules()]
    return [int(match[1]) for match in matches if match]


# -------------------------------------------------------------------------------------------------------------- loading


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "importing a record needs transformers, which is not installed: pip install transformers"
        ) from None
    return transformers


def _config(transformers: Any, checkpoint: Path) -> Any:
    if not (checkpoint / "config.json").is_file():
        raise UserError(f"{checkpoint}: is no folder of a transformers model: it has no config.json")
    return _loaded(checkpoint, transformers.AutoConfig)


def _family_of(checkpoint: Path, name: str) -> Family:
    if name in FAMILIES:
        return FAMILIES[name]
    reason = REFUSED.get(name, f"is not one whose rule is known here, which are {', '.join(FAMILIES)}")
    raise UserError(f"{checkpoint}: its routing cannot be recorded: the family {name} {reason}")


def _tokenizer(transformers: Any, checkpoint: Path, *, needed: bool) -> Any:
    """The folder's tokenizer; None where it has none and none is ``needed``."""
    if not any((checkpoint / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        if needed:
            raise UserError(f"{checkpoint}: has no tokenizer to encode text with: give token ids, or add the tokenizer")
        return None
    return _loaded(checkpoint, transformers.AutoTokenizer)


def _model(transformers: Any, checkpoint: Path, dtype: torch.dtype | None) -> Any:
    model, info = _loaded(
        checkpoint,
        transformers.AutoModelForCausalLM,
        dtype="auto" if dtype is None else dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    # What the files lack is filled in at random, and only a warning says so.
    missing = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if missing:
        raise UserError(f"{checkpoint}: {len(missing)} tensors of the model are not in its files, as {missing[0]}")
    return model


def _loaded(checkpoint: Path, auto: Any, **options: Any) -> Any:
    """What one of the ``Auto`` classes makes of the folder, without its code and without the network."""
    try:
        return auto.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True, **options)
    # Whatever is wrong with the folder, and these libraries raise many things.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{checkpoint}: transformers cannot load it ({auto.__name__}: {reason})") from error


def _has_text(documents: Mapping[str, Sequence[str] | Sequence[Sequence[int]]]) -> bool:
    return any(isinstance(document, str) for found in documents.values() for document in found)


def _encoded(
    documents: Mapping[str, Sequence[str] | Sequence[Sequence[int]]], tokenizer: Any, vocab_size: int
) -> list[list[Int[Tensor, " S"]]]:
    """The ids of each document of each domain; one without a target has no rows. Raises UserError without any row."""
    encoded = [
        [
            torch.tensor(tokenizer(document).input_ids if isinstance(document, str) else document, dtype=torch.int64)
            for document in found
        ]
        for found in documents.values()
    ]
    lengths = [len(ids) for found in encoded for ids in found]
    if not any(length > 1 for length in lengths):
        raise UserError("there is no document of two tokens or more to record")
    for domain, found in zip(documents, encoded, strict=True):
        for ids in found:
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                raise UserError(f"domain {domain}: has token ids outside the model's 0 to {vocab_size - 1}")
    return encoded


def _vocabulary(tokenizer: Any, size: int) -> tuple[str, ...]:
    """The text of each id, spaces kept; ``<id>`` for those that the tokenizer has not."""
    texts = []
    for index in range(size):
        if index >= len(tokenizer):
            texts.append(f"<{index}>")
            continue
        text = tokenizer.decode([index], clean_up_tokenization_spaces=False)
        # A tokenizer of the SentencePiece kind takes the space off what it believes to begin a text.
        begins_a_word = str(tokenizer.convert_ids_to_tokens(index)).startswith("\N{LOWER ONE EIGHTH BLOCK}")
        texts.append(" " + text if begins_a_word and not text.startswith(" ") else text)
    return tuple(texts)
