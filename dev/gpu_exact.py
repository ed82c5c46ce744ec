"""What ``model.deterministic`` promises, on a GPU: ``python3 dev/gpu_exact.py`` (one minute).

A text's logits alone against the same text among strangers, padded, and in chunks from a cache, in float32 and
bfloat16, for each kind of attention; how far they differ without the promise; what it costs; and two trainings of one
seed, bit by bit. ``--device cpu`` shows that the script runs. Exit status 1 where a promise is broken.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe.config import (
    AttentionConfig,
    BalanceConfig,
    ExpertsConfig,
    LatentConfig,
    ModelConfig,
    OptimizerConfig,
    SharedExpertsConfig,
)
from moe.model.cache import KVCache
from moe.model.transformer import Transformer
from moe.training.machine import repeat_exactly
from moe.training.optimizer import build_optimizer
from moe.training.step import MicroBatch, TrainingStep

VOCABULARY, LENGTH = 2048, 512
MODES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
KINDS: dict[str, dict[str, Any]] = {
    "multi-query": {"n_kv_heads": 1},
    "grouped, norms": {"n_kv_heads": 2, "qk_norm": "head"},
    "windows, sinks": {"n_kv_heads": 2, "window": 100, "full_every": 2, "sinks": True},
    "latent": {"latent": LatentConfig(rank=64, rotary_dim=16)},
}


def config_of(kind: str, deterministic: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        n_layers=4,
        d_model=512,
        max_seq=1024,
        init_std=0.05,
        deterministic=deterministic,
        attention=AttentionConfig(n_heads=8, head_dim=64, **KINDS[kind]),
        experts=ExpertsConfig(n_experts=16, d_ff=768),
        shared=SharedExpertsConfig(n_experts=1),
        balance=BalanceConfig(z_loss=0.001),
    )


def compare(model: Transformer, text: Tensor, strangers: Tensor) -> dict[str, float]:
    """The largest difference of the text's logits from those of the text alone, in each company."""
    length, device = text.shape[1], text.device
    alone = model(text)[0].float()

    def away(logits: Tensor) -> float:
        return float((logits.float() - alone).abs().max())

    batch = torch.cat([strangers[:37, :length], text, strangers[37:, :length]])
    found = {"batch": away(model(batch)[0][37:38])}
    longer = torch.cat([strangers[:2], torch.cat([text.new_zeros(1, strangers.shape[1] - length), text], dim=1)])
    mask = torch.ones_like(longer, dtype=torch.bool)
    mask[2, : longer.shape[1] - length] = False
    found["padded"] = away(model(longer, mask)[0][2:, -length:])
    cache = KVCache(model.config, 3, length, device, model.embedding.weight.dtype)
    three = torch.cat([strangers[:2, :length], text])
    cuts = [0, 100, 101, 102, 300, length]
    read = [model(three[:, a:b], cache=cache)[0][2:] for a, b in pairwise(cuts)]
    return found | {"chunks": away(torch.cat(read, dim=1))}


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def train(deterministic: bool, device: torch.device, steps: int) -> tuple[dict[str, Tensor], float]:
    """The weights after a few steps, and the seconds of one."""
    model = Transformer(config_of("grouped, norms", deterministic), seed=3).to(device)
    step = TrainingStep(model, build_optimizer(model, OptimizerConfig()), precision="bf16", clip=1.0)
    generator = torch.Generator().manual_seed(5)
    times = []
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (8, LENGTH + 1), generator=generator).to(device)
        synchronise(device)
        start = time.perf_counter()
        step([MicroBatch(tokens[:, :-1], tokens[:, 1:])], 1e-3)
        synchronise(device)
        times.append(time.perf_counter() - start)
    return {name: value.clone() for name, value in model.state_dict().items()}, statistics.median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=10)
    run = parser.parse_args()
    device = torch.device(run.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("dev/gpu_exact.py: torch finds no CUDA device here; --device cpu shows that the script runs")
        return 2
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}", flush=True)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(VOCABULARY, (1, LENGTH), generator=generator).to(device)
    strangers = torch.randint(VOCABULARY, (63, LENGTH + 77), generator=generator).to(device)
    broken = False
    plain_seconds = train(False, device, run.steps)[1]
    repeat_exactly()
    (first, one), (second, _) = (train(True, device, run.steps) for _ in range(2))
    equal = all(torch.equal(first[name], second[name]) for name in first)
    broken |= not equal
    print(
        f"two trainings of {run.steps} steps: {'the same bits' if equal else 'NOT THE SAME'}; a step takes "
        f"{plain_seconds * 1e3:.1f} ms plain, {one * 1e3:.1f} ms deterministic, {one / plain_seconds:.2f}x",
        flush=True,
    )
    print("largest difference of a logit from that of the text alone", flush=True)
    with torch.no_grad():
        for mode, weights in MODES.items():
            for kind in KINDS:
                for deterministic in (False, True):
                    model = Transformer(config_of(kind, deterministic)).eval().to(device, weights)
                    try:
                        with torch.autocast(device.type, torch.bfloat16, enabled=mode == "autocast"):
                            found = compare(model, text, strangers)
                    except Exception as error:  # the other kinds are worth knowing all the same
                        print(f"{kind}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                        broken = True
                        continue
                    broken |= deterministic and any(found.values())
                    label = "deterministic" if deterministic else "plain"
                    numbers = "  ".join(f"{company} {largest:.1e}" for company, largest in found.items())
                    print(f"{mode:9}{kind:16}{label:14} {numbers}", flush=True)
        for weights in (torch.float32, torch.bfloat16):
            plain, invariant = (
                Transformer(replace(config_of("grouped, norms", False), deterministic=chosen))
                .eval()
                .to(device, weights)
                for chosen in (False, True)
            )
            for label, tokens in (("64 x 512 tokens", torch.cat([strangers, strangers[:1]])[:, :512]),
                                  ("16 x 1 token", strangers[:16, :1])):  # fmt: skip
                costs = [seconds(lambda m=m, t=tokens: m(t), device, 5) for m in (plain, invariant)]  # type: ignore[misc]
                print(
                    f"cost, {str(weights).removeprefix('torch.')}, {label}: {costs[0] * 1e3:.1f} ms plain, "
                    f"{costs[1] * 1e3:.1f} ms deterministic, {costs[1] / costs[0]:.2f}x",
                    flush=True,
                )
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
