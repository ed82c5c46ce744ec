"""What only a CUDA device can show: ``python3 dev/gpu.py check``, ``parts`` and ``step``.

``check`` runs the tests that need one (arguments after it go to pytest). ``parts`` times what a step is made of beside
the experts, each against what torch offers. ``step`` times whole training steps of the
6.85B/1.21B mixture (16 layers, width 2048, 16 heads, 16 SwiGLU experts of 4096, two a token, vocabulary 32768) and of
its dense twin, transformers' Llama of as many active parameters: weights and AdamW states bfloat16, fused AdamW, random
tokens. Both are in memory at once and take turns, so that what the machine does meanwhile meets both. Then a table of
the kernels of one step of ours. Without CUDA ``--device cpu --shape tiny`` shows that the script runs.
"""

import argparse
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe.config import (  # noqa: E402
    AttentionConfig,
    BalanceConfig,
    ExpertsConfig,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
)
from moe.model.router.logits import linear_logits  # noqa: E402
from moe.model.transformer import Transformer  # noqa: E402
from moe.model.weight_dtype import keep_weights  # noqa: E402
from moe.training import gpu  # noqa: E402
from moe.training.compiled import compile_blocks  # noqa: E402
from moe.training.head_loss import head_loss  # noqa: E402
from moe.training.mixed_optimizer import MixedOptimizer  # noqa: E402
from moe.training.muon import orthogonalise  # noqa: E402
from moe.training.optimizer import build_optimizer  # noqa: E402
from moe.training.step import MicroBatch, TrainingStep  # noqa: E402

Step = Callable[[Tensor, Tensor], None]

SHAPES: dict[str, dict[str, int]] = {
    "1b": {"layers": 16, "width": 2048, "heads": 16, "experts": 16, "d_ff": 4096, "vocabulary": 32768, "length": 4096},
    "tiny": {"layers": 2, "width": 64, "heads": 4, "experts": 4, "d_ff": 64, "vocabulary": 512, "length": 64},
}
TOP_K = 2
LEARNING_RATE = 1e-4


def main() -> int:
    """Run the command and return its exit status."""
    if sys.argv[1:2] == ["check"]:
        # Only the files that have such tests: others may import what a bare machine lacks.
        files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
        return subprocess.call([sys.executable, "-m", "pytest", "-m", "gpu", *files, *sys.argv[2:]], cwd=ROOT)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "parts", "step"])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--sequences", type=int, default=8, help="sequences a step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each model in a round")
    parser.add_argument("--rounds", type=int, default=3, help="how often the models take turns")
    parser.add_argument("--backend", default="auto", help="model.experts.backend")
    parser.add_argument("--ours-only", action="store_true", help="leave out the dense twin")
    parser.add_argument("--attention", choices=["cudnn", "flash"], default="cudnn", help="what ours tries first")
    parser.add_argument("--checkpointing", default="none", help="training.activation_checkpointing")
    parser.add_argument("--clip", type=float, help="training.optimizer.clip (without: no clipping, as the twin)")
    parser.add_argument("--expandable-segments", action="store_true", help="let allocated memory grow in place")
    parser.add_argument("--no-compile", action="store_true", help="ours without torch.compile")
    parser.add_argument("--no-profile", action="store_true", help="leave out the table of kernels")
    parser.add_argument("--kernels", type=int, default=40, help="rows of that table")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    run = parser.parse_args()
    if run.device == "cuda" and not torch.cuda.is_available():
        print("dev/gpu.py: torch finds no CUDA device here; --device cpu --shape tiny shows that the script runs")
        return 2
    if run.command == "parts":
        time_parts(SHAPES[run.shape], run.sequences, torch.device(run.device))
    else:
        time_steps(run)
    return 0


def time_steps(run: argparse.Namespace) -> None:
    """Time both models in turn, and print what was seen."""
    if run.expandable_segments:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    shape = SHAPES[run.shape] | ({"layers": run.layers} if run.layers else {})
    device = torch.device(run.device)
    torch.manual_seed(0)
    rate = product_rate(device, 8192 if run.device == "cuda" else 512)
    name = torch.cuda.get_device_name() if run.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; bf16 product {rate / 1e12:.0f} TFLOP/s", flush=True)

    builders: dict[str, Callable[[], tuple[nn.Module, Step]]] = {}
    if not run.ours_only:
        builders["dense twin, compiled"] = lambda: llama(shape, device)
    label = f"mixture, {run.backend}" + ("" if run.no_compile else ", compiled")
    builders[label] = lambda: mixture(shape, device, run)

    batches = [random_batch(shape, run.sequences, device) for _ in range(4)]
    models: dict[str, Step] = {}
    peaks: dict[str, float] = {}
    for which, build in builders.items():
        resident = memory(device)
        began = time.perf_counter()
        model, step = build()
        synchronise(device)
        built = time.perf_counter() - began
        began = time.perf_counter()
        step(*batches[0])
        synchronise(device)
        first = time.perf_counter() - began
        reset_peak(device)
        for batch in batches[1:3]:
            step(*batch)
        peaks[which] = peak(device) - resident
        parameters = sum(parameter.numel() for parameter in model.parameters())
        models[which] = step
        print(
            f"{which}: {parameters / 1e9:.2f}B parameters, built in {built:.0f} s, first step {first:.0f} s", flush=True
        )

    times: dict[str, list[float]] = {which: [] for which in models}
    for _ in range(run.rounds):
        for which, step in models.items():
            step(*batches[0])  # so that the clocks are those of this model
            times[which] += timed(step, batches, run.steps, device)
    tokens = run.sequences * shape["length"]
    flops = tokens * flops_per_token(shape)
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "product_tflops": rate / 1e12}
    print(f"{'':32} {'tok/s':>9} {'ms':>8} {'spread':>7} {'share':>7} {'peak GB':>8}")
    for which, seconds in times.items():
        median = statistics.median(seconds)
        spread = (max(seconds) - min(seconds)) / median
        speed, share = tokens / median, flops / median / rate
        print(f"{which:32} {speed:9,.0f} {median * 1e3:8.1f} {spread:7.1%} {share:7.1%} {peaks[which] / 1e9:8.1f}")
        result[which] = {"tokens_per_second": speed, "seconds": seconds, "share": share, "peak_gb": peaks[which] / 1e9}
    if not run.ours_only:
        twin, ours = (statistics.median(seconds) for seconds in times.values())
        print(f"ours / twin: {twin / ours:.3f}")
    if not run.no_profile:
        profile(models[label], batches, run.kernels, device)
    if run.out is not None:
        run.out.write_text(json.dumps(result, indent=1))


# ---------------------------------------------------------------------------------------------------------------- parts


def time_parts(shape: dict[str, int], sequences: int, device: torch.device) -> None:
    """Print the milliseconds of each part at the size that it has in one step or layer, the median of ten."""
    width, vocabulary, experts = shape["width"], shape["vocabulary"], shape["experts"]
    n_tokens = sequences * shape["length"]

    def random(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*size, device=device) * scale).to(dtype)

    def show(name: str, work: Callable[[], Any], unit: str = "", amount: float = 0.0) -> None:
        for _ in range(3):
            work()
        seconds = statistics.median(timed(lambda *_: work(), [()], 10, device))  # type: ignore[arg-type, list-item]
        rate = f"{amount / seconds / 1e12:8.2f} {unit}" if unit else ""
        print(f"{name:60} {seconds * 1e3:9.3f} ms {rate}", flush=True)

    stacked = (experts, 2 * shape["d_ff"], width)
    for label, of in (("ours, rounded by chance", MixedOptimizer), ("torch's fused", torch.optim.AdamW)):
        parameter = nn.Parameter(random(*stacked, scale=0.02))
        parameter.grad = random(*stacked)
        group = {"params": [parameter], "lr": 1e-4, "weight_decay": 0.1}
        optimizer = of([group]) if of is MixedOptimizer else of([group], fused=True)  # type: ignore[call-arg]
        show(f"AdamW of W_in of a layer, {label}", optimizer.step, "TB/s", 14 * parameter.numel())
        del parameter, optimizer
    matrices = random(2 * experts, shape["d_ff"], width)
    flops = 5 * (4 * width**2 * shape["d_ff"] + 2 * width**3) * len(matrices)
    show("Muon's iteration of W_in of a layer", lambda: orthogonalise(matrices), "TFLOP/s", flops)

    hidden, weight = random(sequences, shape["length"], width).requires_grad_(), random(vocabulary, width, scale=0.02)
    weight.requires_grad_()
    targets = torch.randint(vocabulary, (sequences, shape["length"]), device=device)
    flops = 6 * n_tokens * width * vocabulary
    both = (hidden, weight)

    def by_blocks() -> None:
        torch.autograd.grad(head_loss(hidden, weight, targets), both)

    def by_logits() -> None:
        logits = (hidden @ weight.t()).flatten(0, 1)
        torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets.flatten()), both)

    show("head and loss, f+b, ours", by_blocks, "TFLOP/s", flops)
    show("head and loss, f+b, all logits at once", by_logits, "TFLOP/s", flops)
    del hidden, weight, both

    states, router = random(n_tokens, width).requires_grad_(), random(experts, width, scale=0.02, dtype=torch.float32)
    router.requires_grad_()
    grad = random(n_tokens, experts, dtype=torch.float32)

    def route(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        compiled = torch.compile(product) if device.type == "cuda" else product
        return lambda: torch.autograd.grad(compiled(states, router), (states, router), grad)

    show("router's product, f+b, compiled, in slices", route(linear_logits))
    show("router's product, f+b, compiled, in float32", route(lambda x, w: torch.nn.functional.linear(x.float(), w)))

    heads, length = shape["heads"], shape["length"]
    for order in ("cudnn", "flash"):
        queries, keys, values = (random(sequences, length, heads, width // heads).transpose(1, 2) for _ in range(3))
        for part in (queries, keys, values):
            part.requires_grad_()
        above = torch.randn_like(queries)
        backends = [gpu.SDPBackend.FLASH_ATTENTION, gpu.SDPBackend.MATH]
        backends = ([gpu.SDPBackend.CUDNN_ATTENTION] if order == "cudnn" else []) + backends

        def attend(
            backends: list[Any] = backends, inputs: Any = (queries, keys, values), above: Tensor = above
        ) -> None:
            with gpu.sdpa_kernel(backends, set_priority=True):
                answer = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
                torch.autograd.grad(answer, inputs, above)

        show(f"attention of a layer, f+b, {order} first", attend, "TFLOP/s", 7 * length * n_tokens * width)


# --------------------------------------------------------------------------------------------------------------- models


def mixture(shape: dict[str, int], device: torch.device, run: argparse.Namespace) -> tuple[nn.Module, Step]:
    """Our model, and its training step."""
    if run.attention == "flash":
        gpu.ATTENTION.remove(gpu.SDPBackend.CUDNN_ATTENTION)
    config = ModelConfig(
        vocab_size=shape["vocabulary"],
        n_layers=shape["layers"],
        d_model=shape["width"],
        max_seq=shape["length"],
        tie_embeddings=False,
        attention=AttentionConfig(n_heads=shape["heads"], head_dim=shape["width"] // shape["heads"]),
        experts=ExpertsConfig(n_experts=shape["experts"], d_ff=shape["d_ff"], backend=run.backend),
        router=RouterConfig(top_k=TOP_K),
        balance=BalanceConfig(load_balance=0.01),
    )
    with torch.device("meta"):
        model = Transformer(config)
    keep_weights(model, "bf16")
    model.to_empty(device=device)
    draw(model)
    model.activation_checkpointing = run.checkpointing
    optimizer = build_optimizer(model, OptimizerConfig(lr=LEARNING_RATE, clip=run.clip))
    take_step = TrainingStep(model, optimizer, precision="bf16", clip=run.clip)
    if not run.no_compile:
        compile_blocks(model, print)

    def step(tokens: Tensor, targets: Tensor) -> None:
        take_step([MicroBatch(tokens, targets)], LEARNING_RATE)

    return model, step


def llama(shape: dict[str, int], device: torch.device) -> tuple[nn.Module, Step]:
    """transformers' Llama with as many parameters as a token of the mixture uses, and its training step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["width"],
        intermediate_size=TOP_K * shape["d_ff"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=shape["length"],
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    draw(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = torch.compile(model)

    def step(tokens: Tensor, targets: Tensor) -> None:
        # transformers shifts the labels itself: position t is scored on label t + 1.
        run(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Gains 1, all else normal of 0.02, drawn on the model's own device, where that takes a second."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)


# ------------------------------------------------------------------------------------------------------------ measuring


def random_batch(shape: dict[str, int], sequences: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and targets [B, S], uniform: the router sends them to all experts about alike."""
    size = (sequences, shape["length"] + 1)
    text = torch.randint(shape["vocabulary"], size, device=device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def flops_per_token(shape: dict[str, int]) -> float:
    """Of forward and backward: 6 for every weight of a matrix that a token passes, and the causal half of attention."""
    width, layers = shape["width"], shape["layers"]
    matrices = layers * (4 * width**2 + TOP_K * 3 * width * shape["d_ff"]) + shape["vocabulary"] * width
    return 6.0 * matrices + layers * 6.0 * width * shape["length"]


def timed(step: Step, batches: list[tuple[Tensor, Tensor]], steps: int, device: torch.device) -> list[float]:
    """Seconds of each of so many steps, which follow each other without a pause."""
    if device.type == "cpu":
        seconds = []
        for index in range(steps):
            began = time.perf_counter()
            step(*batches[index % len(batches)])
            seconds.append(time.perf_counter() - began)
        return seconds
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for index, mark in enumerate(marks[1:]):
        step(*batches[index % len(batches)])
        mark.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(marks)]


def product_rate(device: torch.device, size: int) -> float:
    """FLOP/s of a product of two random bfloat16 matrices, the median of twenty."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    seconds = timed(lambda x, y: torch.mm(x, y), [(a, b)], 20, device)  # type: ignore[arg-type, return-value]
    return 2 * size**3 / statistics.median(seconds)


def profile(step: Step, batches: list[tuple[Tensor, Tensor]], rows: int, device: torch.device) -> None:
    """Print the kernels of one step by the time that they took, and how long no kernel ran."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step(*batches[0])
    synchronise(device)
    with torch.profiler.profile(activities=activities) as seen:
        began = time.perf_counter()
        step(*batches[1])
        queued = time.perf_counter() - began
        synchronise(device)
        took = time.perf_counter() - began
    print(f"one step: {took * 1e3:.1f} ms, queued by the host in {queued * 1e3:.1f} ms (both with the profiler on)")
    if device.type != "cuda":
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=70))
        return
    totals: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            entry = totals.setdefault(event.name, [0.0, 0])
            entry[0] += event.self_device_time_total / 1e3
            entry[1] += 1
    busy = sum(milliseconds for milliseconds, _ in totals.values())
    print(f"{len(totals)} kernels, {sum(int(calls) for _, calls in totals.values())} launches, {busy:.1f} ms")
    print(f"{'ms':>8} {'share':>6} {'calls':>6}  kernel")
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])
    for kernel, (milliseconds, calls) in ordered[:rows]:
        print(f"{milliseconds:8.2f} {milliseconds / busy:6.1%} {int(calls):6d}  {kernel[:100]}")
    rest = sum(milliseconds for _, (milliseconds, _) in ordered[rows:])
    print(f"{rest:8.2f} {rest / busy:6.1%}         all others")


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(device: torch.device) -> float:
    """Bytes allocated now, once what nobody holds is gone."""
    gc.collect()
    return torch.cuda.memory_allocated() if device.type == "cuda" else math.nan


def reset_peak(device: torch.device) -> None:
    """Forget the largest allocation so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> float:
    """Bytes allocated at most since then."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else math.nan


if __name__ == "__main__":
    sys.exit(main())
