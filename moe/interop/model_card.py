"""What a README beside exported weights says: what the model is, its training, its results, and how to use it.

Every number comes out of the run's folder; what is not there is not said.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from moe.config import ModelConfig
from moe.interop.family import Family
from moe.interop.importing import SOURCE
from moe.interop.run_weights import RunWeights
from moe.model.transformer import Transformer


def model_card(weights: RunWeights, family: Family, dtype: str) -> str:
    """The text of a ``README.md`` for a run that is exported as ``family``."""
    name = weights.run.path.resolve().name
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- mixture-of-experts\n- moe-lab\n---",
        f"# {name}",
        _introduction(weights, family),
        "## The model\n\n" + _table(_model_facts(weights.model, dtype)),
        "## Training\n\n" + _table(_training_facts(weights)),
        *_corpus(weights),
        *_results(weights),
        "## Use\n\n" + _use(weights),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(weights: RunWeights, family: Family) -> str:
    kind = "mixture-of-experts" if weights.model.moe_layers else "dense"
    source = _read(weights, SOURCE)
    origin = "trained with moe-lab"
    if source:
        upcycled = source.get("upcycled")
        made = f"made into {upcycled['n_experts']} experts a layer" if upcycled else "taken over as they are"
        origin = f"whose weights came from a {source['family']} checkpoint, {made}"
        origin += f", and were trained on for {weights.saved.step:,} steps with moe-lab" if weights.saved.step else ""
    return (
        f"A {kind} language model {origin}. transformers reads it as `{family.architecture}`, "
        "which computes the same; no code comes with it."
    )


def _model_facts(model: ModelConfig, dtype: str) -> Iterable[tuple[str, str]]:
    with torch.device("meta"):
        counted = Transformer(model)
    attention, router = model.attention, model.router
    yield "parameters", f"{counted.num_params():,}, stored as {dtype}"
    yield "used by a token", f"{counted.num_active_params():,}"
    yield "layers", f"{model.n_layers} of width {model.d_model:,}"
    yield "attention", f"{attention.n_heads} heads of {attention.head_dim}, {attention.kv_heads} for keys and values"
    if model.moe_layers:
        yield "experts", f"{model.experts.n_experts} a mixture layer, of {model.experts.d_ff:,} hidden units"
        yield "mixture layers", f"{len(model.moe_layers)} of {model.n_layers}"
        normalised = "normalised" if router.normalise else "not normalised"
        preset = f" (preset {router.preset})" if router.preset else ""
        yield "router", f"{router.top_k} experts a token, {router.score} scores, weights {normalised}{preset}"
        if model.shared_width:
            yield "shared experts", f"{model.shared_width:,} hidden units"
    else:
        yield "feed-forward", f"{model.dense_width(0):,} hidden units"
    yield "longest text", f"{model.max_seq:,} tokens"
    yield "vocabulary", f"{model.vocab_size:,}"


def _training_facts(weights: RunWeights) -> Iterable[tuple[str, str]]:
    training, progress, step = weights.config.training, weights.saved.progress, weights.saved.step
    yield "steps", f"{step:,} of {training.steps:,}" if step else "none"
    if not step:
        return
    yield "tokens", f"{progress['tokens']:,}"
    yield "batch", f"{training.batch_size} sequences of {weights.config.data.sequence_length} tokens"
    yield "learning rate", f"{training.optimizer.lr:g}, schedule {training.schedule.shape}"
    yield "precision", training.precision
    if weights.model.moe_layers:
        yield "load-balancing coefficient", f"{weights.model.balance.load_balance:g}"
    yield "seed", str(training.seed)
    yield "torch", str(weights.saved.environment.get("torch", "unknown"))


def _corpus(weights: RunWeights) -> list[str]:
    manifest = _read(weights, weights.run.corpus_path.name)
    if not manifest:
        return []
    rows = [
        (domain, f"{counts['train']['tokens']:,}", str(manifest["shares"].get(domain, "")))
        for domain, counts in manifest["domains"].items()
    ]
    return ["## Text\n\n" + _table(rows, ("kind of text", "tokens there were", "share of what was read"))]


def _results(weights: RunWeights) -> list[str]:
    summary = _read(weights, "summary.json")
    if not summary or summary["progress"]["step"] != weights.saved.step:
        return []
    rows = [
        (result["domain"], f"{result['cross_entropy']:.3f}", f"{result['bits_per_byte']:.3f}", f"{result['xz']:.3f}")
        for result in (*summary["domains"], summary["pooled"])
    ]
    heads = ("held-out text", "nats a token", "bits a byte", "bits a byte of xz -9e")
    return ["## Results\n\n" + _table(rows, heads)]


def _use(weights: RunWeights) -> str:
    return (
        "Text begins with the token that ends one, which the tokenizer sees to.\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this one\n'
        "tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)\n"
        'prompt = tokenizer("Once upon a time", return_tensors="pt")\n'
        "[ids] = model.generate(**prompt, max_new_tokens=64, do_sample=False)\n"
        "print(tokenizer.decode(ids, skip_special_tokens=True))\n"
        "```"
    )


def _table(rows: Iterable[tuple[str, ...]], heads: tuple[str, ...] = ("what", "value")) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ("---",) * len(heads), *rows))


def _read(weights: RunWeights, name: str) -> Mapping[str, Any]:
    """The content of a JSON file of the run; empty where there is none, or where it cannot be read."""
    try:
        content = json.loads((weights.run.path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
