"""What a run ends with: what was learnt, beside what a compressor knows; how the experts were used; a sample of text.

The same facts go to the screen and ``report.txt`` for people, and to ``summary.json`` for programs.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from moe.data.compression import CompressionBaseline, compression_baselines
from moe.inference.generate import generate
from moe.inference.sampling import Sampling
from moe.model.moe_layer import MoELayer
from moe.model.transformer import Transformer
from moe.training.console import DomainResult, domain_table, duration, load_table, printable
from moe.training.evaluate import Score, Validation
from moe.training.loop import Training
from moe.training.metrics import read_metrics

PROMPT_TOKENS = 24
SAMPLE_TOKENS = 80
SAMPLING = Sampling(temperature=0.7, top_p=0.95)


def write_report(training: Training) -> str:
    """Write ``summary.json`` and ``report.txt`` for a finished run and return the latter's text."""
    validation = training.validation
    if validation is None:
        raise ValueError("the run has not been validated")
    baselines = compression_baselines({name: held.text for name, held in training.corpus.validation.items()})
    domains = [_result(name, score, baselines.domains[name]) for name, score in validation.domains.items()]
    pooled = _result("all text", validation.pooled, baselines.pooled)
    samples = _samples(training) if math.isfinite(pooled.cross_entropy) else []
    summary = {
        "parameters": training.model.num_params(),
        "active_parameters": training.model.num_active_params(),
        "mean_active_parameters": mean_active_params(training.model, validation.mlps_per_token),
        "progress": asdict(training.progress),
        "tokens_per_second": training.progress.tokens / max(training.progress.seconds, 1e-9),
        "epochs": training.batches.epochs(training.progress.step),
        "pooled": asdict(pooled),
        "domains": [asdict(result) for result in domains],
        "load": [asdict(layer) for layer in validation.load],
        "mlps_per_token": validation.mlps_per_token,
        "without_mlp": validation.without_mlp,
        "dropped_in_training": _dropped_in_training(training),
        "counts": None if validation.counts is None else validation.counts.tolist(),
        "samples": samples,
    }
    text = "\n\n".join(
        [domain_table(domains, pooled), *_load(training, validation), _facts(training, validation), *_shown(samples)]
    )
    path = training.run_folder.path
    (path / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    (path / "report.txt").write_text(text + "\n", encoding="utf-8")
    return text


def _result(domain: str, score: Score, baseline: CompressionBaseline) -> DomainResult:
    return DomainResult(
        domain=domain,
        tokens=score.tokens,
        n_bytes=score.n_bytes,
        cross_entropy=score.cross_entropy,
        bits_per_byte=score.bits_per_byte,
        gzip=baseline.gzip,
        xz=baseline.xz,
    )


def _load(training: Training, validation: Validation) -> list[str]:
    if validation.counts is None:
        return []
    model = training.config.model
    table = load_table(
        model.moe_layers,
        validation.load,
        validation.counts,
        validation.mlps_per_token,
        n_special=model.special.total,
    )
    lines = []
    if any(validation.without_mlp):
        lines.append(f"{_span(validation.without_mlp)} of a layer's tokens went through no expert's MLP")
    dropped = _dropped_in_training(training)
    if dropped is not None:  # the table is of the validation, which drops nothing by default
        lines.append(f"{_span(dropped)} of a layer's assignments were dropped in the last training step")
    return ["\n".join([table, "", *lines]) if lines else table]


def _span(shares: Sequence[float]) -> str:
    return f"{min(shares):.2%} to {max(shares):.2%}"


def _dropped_in_training(training: Training) -> list[float] | None:
    """The share of assignments that the last step dropped in each mixture layer; None where there is no capacity."""
    model = training.config.model
    if model.router.capacity.factor is None or not model.moe_layers:
        return None
    last = [row for row in read_metrics(training.run_folder.metrics_path) if row["kind"] == "train"][-1]
    return [last[f"load/{layer}/dropped"] for layer in model.moe_layers]


def mean_active_params(model: Transformer, mlps_per_token: Sequence[float]) -> int:
    """Parameters that a token used on average, where each mixture layer computed so many MLPs a token.

    As :meth:`~moe.model.transformer.Transformer.num_active_params`, with what was seen in place of what is aimed at.
    """
    unused = 0.0
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    for layer, mlps in zip(layers, mlps_per_token, strict=True):
        routed = sum(parameter.numel() for parameter in layer.experts.parameters())
        unused += routed * (1 - mlps / model.config.experts.n_experts)
    return round(model.num_params() - unused)


def _facts(training: Training, validation: Validation) -> str:
    model, progress = training.model, training.progress
    mean = mean_active_params(model, validation.mlps_per_token)
    varies = mean != model.num_active_params() or training.config.model.router.selection == "expert_choice"
    used = "used by a token on average" if varies and validation.mlps_per_token else "used by each token"
    rate = progress.tokens / max(progress.seconds, 1e-9)
    skipped = f", {progress.skipped} steps skipped" if progress.skipped else ""
    return (
        f"{model.num_params() / 1e6:.1f}M parameters, {mean / 1e6:.1f}M {used}; "
        f"{progress.tokens / 1e6:.2f}M tokens in {duration(progress.seconds)}, {rate:,.0f} tokens/s "
        f"({training.precision}, {training.device.type}){skipped}"
    )


def _samples(training: Training) -> list[dict[str, str]]:
    """A continuation of held-out text in two domains: the first, and of the others the one with the largest share."""
    corpus = training.corpus
    first = corpus.domains[0]
    others = sorted(corpus.domains[1:], key=lambda domain: corpus.shares[domain], reverse=True)
    chosen = [first, *others[:1]]
    room = training.config.model.max_seq - SAMPLE_TOKENS
    if room < 2:
        return []
    prompts = [corpus.validation[name].stream[: min(PROMPT_TOKENS + 1, room)].tolist() for name in chosen]
    written = generate(training.model, prompts, SAMPLE_TOKENS, SAMPLING, stop=corpus.tokenizer.end_of_text)
    decode = corpus.tokenizer.decode
    return [
        {"domain": name, "prompt": printable(decode(prompt[1:])), "continuation": printable(decode(new))}
        for name, prompt, new in zip(chosen, prompts, written, strict=True)
    ]


def _shown(samples: list[dict[str, str]]) -> list[str]:
    return [
        f"--- {sample['domain']}: held-out text, then [what the model writes after it]\n"
        f"{sample['prompt']}[{sample['continuation']}]"
        for sample in samples
    ]
