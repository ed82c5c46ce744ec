"""Does a rehearsal on fake tensors allocate what a GPU does? Prints both peaks, for the toy and for a 7B mixture.

    python dev/gpu_rehearsal.py

Needs a CUDA device of 80 GB. The real peak is ``torch.cuda.max_memory_allocated`` over the third of three steps.
"""

import gc
import time
from pathlib import Path

import torch

from moe import config_file
from moe.config import Config
from moe.model.transformer import Transformer
from moe.model.weight_dtype import keep_weights
from moe.rehearsal.rehearse import rehearse
from moe.training.optimizer import build_optimizer
from moe.training.step import MicroBatch, TrainingStep

GIB = 2**30
SEVEN_BILLION = {
    "model.n_layers": "16", "model.d_model": "2048", "model.max_seq": "4096", "model.tie_embeddings": "false",
    "model.attention.n_heads": "16", "model.attention.n_kv_heads": "8", "model.attention.head_dim": "128",
    "model.experts.n_experts": "16", "model.experts.d_ff": "4096", "model.router.top_k": "2",
    "model.vocab_size": "50304", "data.sequence_length": "4096", "training.weight_dtype": "bf16",
}  # fmt: skip
CASES = {
    "toy": ({}, 16),
    "toy, 64 sequences": ({}, 64),
    "toy, gelu": ({"model.feed_forward.activation": "gelu"}, 16),
    "toy, block": ({"training.activation_checkpointing": "block"}, 64),
    "toy, experts": ({"training.activation_checkpointing": "experts"}, 64),
    "toy, 2 micro-batches": ({"training.accumulation": "2"}, 32),
    "7B": (SEVEN_BILLION, 2),
    "7B, block": (SEVEN_BILLION | {"training.activation_checkpointing": "block"}, 4),
}  # fmt: skip
"""settings over the toy's, and sequences of a micro-batch"""


def real_peak(config: Config, micro_batch: int) -> tuple[int, int]:
    """(allocated, requested) bytes at the peak of the third step on this GPU."""
    settings, device = config.training, torch.device("cuda")
    with torch.device("meta"):
        model = Transformer(config.model, settings.seed)
    keep_weights(model, settings.weight_dtype)
    model.to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.activation_checkpointing = settings.activation_checkpointing
    optimizer = build_optimizer(model, settings.optimizer)
    step = TrainingStep(model, optimizer, precision="bf16", clip=settings.optimizer.clip)
    for measured in (False, False, True):
        if measured:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        tokens = torch.randint(config.model.vocab_size or 0, (micro_batch, config.data.sequence_length), device=device)
        batches = [MicroBatch(tokens, tokens) for _ in range(settings.accumulation)]
        step(batches, 1e-4, accumulation=settings.accumulation).read()
    return torch.cuda.max_memory_allocated(), torch.cuda.memory_stats()["requested_bytes.all.peak"]


def main() -> None:
    """Print a line for each case."""
    a = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    a @ a
    # A workspace for this thread, and one for autograd's, which has a cuBLAS handle of its own.
    libraries = 2 * (torch.cuda.memory_allocated() - before)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"cuBLAS keeps {libraries / 2**20:.1f} MiB for two threads, which is added to what was rehearsed")
    print(f"{'case':22}{'allocated':>11}{'requested':>11}{'rehearsed':>11}{'ratio':>8}   parts in GiB")
    for name, (settings, micro_batch) in CASES.items():
        flags = {"training.batch_size": "64", "training.precision": "bf16"} | settings
        config = config_file.load(Path(__file__).parent.parent / "configs/toy.yaml", flags).with_vocab(6144)
        start = time.perf_counter()
        try:
            rehearsal = rehearse(config, micro_batch)
            allocated, requested = real_peak(config, micro_batch)
        except RuntimeError as error:  # out of memory, or a torch that lacks an operator: the others shall be seen
            print(f"{name:22} {type(error).__name__}: {str(error)[:300]}")
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        rehearsed = rehearsal.peak.total + libraries
        parts = ", ".join(f"{part} {size / GIB:.3f}" for part, size in rehearsal.peak.parts.items())
        print(
            f"{name:22}{allocated / GIB:11.3f}{requested / GIB:11.3f}{rehearsed / GIB:11.3f}"
            f"{rehearsed / allocated:8.3f}   {parts} at {rehearsal.peak.operator} in the {rehearsal.peak.phase} "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
