"""What decoding and prefill reach on a GPU beside what memory and arithmetic allow: ``python3 dev/gpu_inference.py``.

The model is the 6.85B/1.21B mixture of ``dev/gpu.py`` (16 layers, width 2048, 16 heads, 16 SwiGLU experts of 4096, two
a token, vocabulary 32768), its weights random and bfloat16. Decoding is greedy, by single steps and by a CUDA graph,
after a prompt of random tokens; its bound is the bytes that a step must read over the bandwidth of a copy. Prefill's
bound is its products and causal attention over the rate of a large product. Then the memory of a cache of 32,768 tokens
is held against the planner's. Without CUDA, ``--device cpu --shape tiny`` shows that the script runs.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe.config import AttentionConfig, ExpertsConfig, ModelConfig, RouterConfig
from moe.inference.graphed import GraphedSteps
from moe.model.cache import KVCache
from moe.model.transformer import Transformer
from moe.planner.serving import distinct_experts, kv_bytes_of_sequence

BANDWIDTH = 4.28e12
"""bytes/s of a copy on an H200 (read and written bytes counted)"""
PRODUCT = 724e12
"""FLOP/s of a large bfloat16 product on an H200"""
SHAPES = {
    "1b": ModelConfig(
        vocab_size=32768,
        n_layers=16,
        d_model=2048,
        max_seq=33_000,
        tie_embeddings=False,
        attention=AttentionConfig(n_heads=16, head_dim=128),
        experts=ExpertsConfig(n_experts=16, d_ff=4096),
        router=RouterConfig(top_k=2),
    ),
    "tiny": ModelConfig(
        vocab_size=512,
        n_layers=2,
        d_model=64,
        max_seq=33_000,
        tie_embeddings=False,
        attention=AttentionConfig(n_heads=4, head_dim=16),
        experts=ExpertsConfig(n_experts=4, d_ff=64),
        router=RouterConfig(top_k=2),
    ),
}


@torch.inference_mode()
def main() -> int:
    """Print every figure beside its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens before the first that is timed")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--steps", type=int, default=32, help="steps in a timing, of which the median of five is shown")
    parser.add_argument("--kv-heads", type=int, help="key heads, instead of as many as query heads")
    parser.add_argument("--profile", action="store_true", help="also show the kernels of a step at batch 1")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    run = parser.parse_args()
    device = torch.device(run.device)
    if run.device == "cuda" and not torch.cuda.is_available():
        print("dev/gpu_inference.py: torch finds no CUDA device here; try --device cpu --shape tiny --prompt 16")
        return 2
    config = SHAPES[run.shape]
    if run.kv_heads:
        config = replace(config, attention=replace(config.attention, n_kv_heads=run.kv_heads))
    model = build(config, device)
    name = torch.cuda.get_device_name() if run.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: {config.num_params() / 1e9:.2f}B parameters, ", end="")
    print(f"{config.num_active_params() / 1e9:.2f}B active, {config.attention.kv_heads} key heads\n")
    figures = [
        *decoding(model, run.prompt, run.batches, run.steps),
        *prefill(model, [(1, 4096), (4, 4096), (1, 32_768)] if run.shape == "1b" else [(1, 64)]),
        *long_cache(model, run.steps),
    ]
    if run.profile and device.type == "cuda":
        profile(model, run.prompt)
    if run.out is not None:
        run.out.write_text(json.dumps({"device": name, "torch": torch.__version__, "figures": figures}, indent=1))
    return 0


def build(config: ModelConfig, device: torch.device) -> Transformer:
    """The model with random weights, made where they stay."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.bfloat16().to_empty(device=device).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02) if parameter.ndim > 1 else parameter.data.fill_(1.0)
    return model


def decoding(model: Transformer, prompt: int, batches: list[int], steps: int) -> list[dict[str, Any]]:
    """Greedy tokens a second at each batch."""
    print(f"decoding after {prompt:,} tokens    batch    ms/step      tokens/s   bound ms   of the bound")
    figures = []
    for batch in batches:
        for way in ("single steps", "CUDA graph"):
            if way == "CUDA graph" and not model.embedding.weight.is_cuda:
                continue
            seconds = decode_seconds(model, way, batch, prompt, steps)
            bound = step_bytes(model.config, batch, prompt) / BANDWIDTH
            figures.append({"what": "decode", "way": way, "batch": batch, "seconds": seconds, "bound": bound})
            print(
                f"  {way:27} {batch:6}  {1e3 * seconds:9.3f}  {batch / seconds:12,.0f}  {1e3 * bound:9.3f}  "
                f"{bound / seconds:12.1%}",
                flush=True,
            )
    return figures


def decode_seconds(model: Transformer, way: str, batch: int, prompt: int, steps: int) -> float:
    """Of one step, whose logits decide the next token."""
    device = model.embedding.weight.device
    cache = KVCache(model.config, batch, prompt + 7 * steps + 8, device, torch.bfloat16)
    tokens = torch.randint(model.config.vocab_size or 0, (batch, prompt), device=device)
    for row in range(0, batch, 16):  # in parts, which need less memory than all at once
        part = Part(cache, slice(row, row + 16))
        model.hidden(tokens[row : row + 16], None, part)
    cache.length = prompt
    newest = tokens[:, -1]
    graph = GraphedSteps(model, cache) if way == "CUDA graph" else None

    def write() -> None:
        nonlocal newest
        for _ in range(steps):
            if graph is not None:
                logits = graph.read(newest)
            else:
                hidden, _ = model.hidden(newest[:, None], None, cache)
                logits = model.head(hidden[:, 0])
            newest = logits.argmax(dim=-1)

    taken = timed(write, device, 5) / steps
    del graph, cache
    release()
    return taken


class Part(KVCache):
    """Some rows of a cache, to be filled alone."""

    def __init__(self, cache: KVCache, rows: slice) -> None:
        self.keys, self.values, self.real = cache.keys[:, rows], cache.values[:, rows], cache.real[rows]
        self.padded, self.length = False, 0


def prefill(model: Transformer, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Tokens of prompts a second."""
    print("\nprefill              sequences  tokens       ms      tokens/s   TFLOP/s   bound ms   of the bound")
    figures, device = [], model.embedding.weight.device
    for sequences, length in sizes:
        tokens = torch.randint(model.config.vocab_size or 0, (sequences, length), device=device)
        cache = KVCache(model.config, sequences, length, device, torch.bfloat16)

        def read(cache: KVCache = cache, tokens: torch.Tensor = tokens) -> None:
            cache.length = 0
            model.hidden(tokens, None, cache)

        seconds = timed(read, device, 5)
        flops = prefill_flops(model.config, length) * sequences
        figures.append(
            {
                "what": "prefill",
                "sequences": sequences,
                "tokens": length,
                "seconds": seconds,
                "flops": flops,
                "bound": flops / PRODUCT,
            }
        )
        print(
            f"{'':20} {sequences:9}  {length:6}  {1e3 * seconds:7.1f}  {sequences * length / seconds:12,.0f}  "
            f"{flops / seconds / 1e12:8.0f}  {1e3 * flops / PRODUCT:9.1f}  {flops / PRODUCT / seconds:12.1%}",
            flush=True,
        )
        del cache
        release()
    return figures


def long_cache(model: Transformer, steps: int) -> list[dict[str, Any]]:
    """The memory of 32,768 tokens, and a step at their end."""
    device, length = model.embedding.weight.device, 32_768
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    cache = KVCache(model.config, 1, length, device, torch.bfloat16)
    held = cache.keys.nbytes + cache.values.nbytes
    allocated = torch.cuda.memory_allocated() - before if device.type == "cuda" else held
    planned = kv_bytes_of_sequence(model.config, length)
    print(f"\na cache of {length:,} tokens: {held:,} bytes of keys and values, {planned:,.0f} planned; ", end="")
    print(f"{allocated:,} bytes more are allocated with it")
    figures: list[dict[str, Any]] = [
        {"what": "cache", "tokens": length, "bytes": held, "planned": planned, "allocated": allocated}
    ]
    if device.type == "cuda":
        cache.length = length - 8 * steps - 8
        graph = GraphedSteps(model, cache)
        newest = torch.zeros(1, dtype=torch.int64, device=device)

        def write() -> None:
            nonlocal newest
            for _ in range(steps):
                newest = graph.read(newest).argmax(dim=-1)

        torch.cuda.reset_peak_memory_stats()
        seconds = timed(write, device, 5) / steps
        bound = step_bytes(model.config, 1, length) / BANDWIDTH
        peak = torch.cuda.max_memory_allocated()
        print(
            f"a step at its end: {1e3 * seconds:.3f} ms, bound {1e3 * bound:.3f} ms ({bound / seconds:.1%}); ", end=""
        )
        print(f"peak memory {peak / 1e9:.2f} GB, of which weights {2 * model.num_params() / 1e9:.2f}")
        figures.append({"what": "long step", "seconds": seconds, "bound": bound, "peak": peak})
    return figures


def profile(model: Transformer, prompt: int) -> None:
    """The kernels of one step."""
    cache = KVCache(model.config, 1, prompt + 8, model.embedding.weight.device, torch.bfloat16)
    newest = torch.zeros(1, 1, dtype=torch.int64, device=model.embedding.weight.device)
    model.hidden(newest.expand(1, prompt), None, cache)
    model.hidden(newest, None, cache)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        model.head(model.hidden(newest, None, cache)[0])
        torch.cuda.synchronize()
    print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=70))


# -------------------------------------------------------------------------------------------------------------- bounds


def step_bytes(config: ModelConfig, batch: int, context: int) -> float:
    """What one step must read: each matrix that is hit, and the keys and values of every text."""
    attention, experts = config.attention, config.experts
    query, key = attention.n_heads * attention.head_dim, attention.kv_heads * attention.head_dim
    hit = distinct_experts(experts.n_experts, config.router.top_k, batch)
    layer = 2 * config.d_model * (query + key) + config.d_model * (3 * experts.d_ff * hit + experts.n_experts)
    weights = config.n_layers * layer + config.d_model * (config.vocab_size or 0)
    return 2 * weights + batch * kv_bytes_of_sequence(config, context)


def prefill_flops(config: ModelConfig, length: int) -> float:
    """Products of one text without the head, and causal attention."""
    attention, experts = config.attention, config.experts
    query, key = attention.n_heads * attention.head_dim, attention.kv_heads * attention.head_dim
    layer = 2 * config.d_model * (query + key) + config.d_model * (
        3 * experts.d_ff * config.router.top_k + experts.n_experts
    )
    return config.n_layers * (2.0 * layer * length + 2.0 * query * length * length)


def timed(work: Callable[[], None], device: torch.device, repetitions: int) -> float:
    """Median seconds of ``work``, after one call that is not counted."""
    work()
    taken = []
    for _ in range(repetitions):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
