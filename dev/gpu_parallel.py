"""What only GPUs can show of moe/parallel: that layouts over NCCL are one GPU, and that one GPU loses nothing to them.

    python3 dev/gpu_parallel.py one                                          # on one GPU
    torchrun --nproc-per-node 2 dev/gpu_parallel.py equal                    # on two
    torchrun --nproc-per-node 2 dev/gpu_parallel.py speed                    # on two

``one`` times steps of the 6.85B/1.21B mixture (16 layers, width 2048, 16 experts of 4096, two a token, vocabulary
32768) at 4096 tokens a sequence, bfloat16 weights, compiled blocks: as it is, and through the parallel code with every
degree 1. ``equal`` takes five steps of a small mixture in float32 under every layout of the processes and compares them
with one GPU's. ``speed`` times the large mixture under layouts of the processes. ``--device cpu --tiny`` shows that the
script runs.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe.config import (  # noqa: E402
    AttentionConfig,
    BalanceConfig,
    Config,
    DataConfig,
    ExpertsConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RouterConfig,
    TrainingConfig,
    parse_layout,
)
from moe.model.transformer import Transformer  # noqa: E402
from moe.model.weight_dtype import keep_weights  # noqa: E402
from moe.parallel.mesh import build_mesh  # noqa: E402
from moe.parallel.parallelize import parallelize  # noqa: E402
from moe.parallel.spread import spread_of  # noqa: E402
from moe.parallel.world import World, join_world, leave_world, local_rank  # noqa: E402
from moe.training.compiled import compile_blocks  # noqa: E402
from moe.training.optimizer import build_optimizer  # noqa: E402
from moe.training.step import MicroBatch, TrainingStep  # noqa: E402

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""dense bfloat16 products a second, by NVIDIA's data sheets"""


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["one", "equal", "speed"])
    parser.add_argument("--sequences", type=int, default=4, help="sequences a step on each GPU")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--checkpointing", default="none", choices=["none", "attention", "experts", "block"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--layouts", nargs="*", help="instead of those that suit the processes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a mixture that a CPU can hold")
    run = parser.parse_args()
    device = torch.device(run.device, local_rank()) if run.device == "cuda" else torch.device("cpu")
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    world = join_world(device)
    say(world, f"{name_of(device)} x {world.size}, torch {torch.__version__}")
    if run.command == "equal":
        compare(world, device, run.layouts)
    elif run.command == "one":
        for label, parallel in (("plain", None), ("through moe/parallel, all degrees 1", ParallelConfig())) * 2:
            time_steps(world, device, run, label, parallel)
    else:
        for layout in run.layouts or [
            f"ep{world.size},full,keep",
            f"ep{world.size},full",
            "full,keep",
            f"tp{world.size}",
        ]:
            time_steps(world, device, run, layout, parse_layout(layout))
    leave_world()
    return 0


# ---------------------------------------------------------------------------------------------------------------- speed


def time_steps(
    world: World, device: torch.device, run: argparse.Namespace, label: str, parallel: ParallelConfig | None
) -> None:
    """Build the large mixture under a layout, take its steps, and print what one takes."""
    try:
        seconds, peak, flops, tokens = measured(world, device, run, parallel)
    except (RuntimeError, ValueError) as error:
        say(world, f"{label:36} failed: {str(error).splitlines()[0]}")
        return
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    median = statistics.median(seconds)
    speed = tokens / median
    top = next((rate for name, rate in PEAK.items() if name in name_of(device)), None)
    share = f"{speed * flops / world.size / top:6.1%}" if top else "   n/a"
    say(
        world,
        f"{label:36} {speed:10,.0f} tok/s  {median * 1e3:8.1f} ms  spread {(max(seconds) - min(seconds)) / median:5.1%}"
        f"  MFU {share}  peak {peak / 1e9:6.2f} GB a GPU",
    )


def measured(
    world: World, device: torch.device, run: argparse.Namespace, parallel: ParallelConfig | None
) -> tuple[list[float], int, float, int]:
    """Seconds of each step, peak of this GPU in bytes, training FLOPs a token, and tokens a step over all GPUs."""
    length = 64 if run.tiny else run.length
    config = large(run.tiny, length, run.checkpointing, parallel or ParallelConfig())
    # Made where it is used: drawn on the host, 7 billion numbers take minutes.
    with torch.device("meta"):
        model = Transformer(config.model)
    keep_weights(model, "bf16")
    mesh = None
    if parallel is not None:
        mesh = build_mesh(parallel, world.size, device.type)
        parallelize(model, config, mesh, device)
    model.to_empty(device=device)
    fill(model)
    spread = spread_of(model)
    if spread is not None:
        spread.refresh()
    model.activation_checkpointing = run.checkpointing
    optimizer = build_optimizer(model, config.training.optimizer, None if spread is None else spread.parameters)
    sharing = World.alone() if mesh is None or mesh.data_group is None else World(mesh.data_group)
    step = TrainingStep(model, optimizer, precision="bf16", clip=1.0, world=sharing)
    if not (run.no_compile or device.type == "cpu"):
        compile_blocks(model, lambda line: say(world, line))
    generator = torch.Generator().manual_seed(sharing.rank)
    vocabulary = config.model.vocab_size
    assert vocabulary is not None
    batches = [torch.randint(vocabulary, (run.sequences, length + 1), generator=generator) for _ in range(4)]
    seconds = []
    for number in range(3 + run.steps):
        if number == 3 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronise(device)
        start = time.perf_counter()
        batch = batches[number % 4]
        step([MicroBatch(batch[:, :-1], batch[:, 1:])], 1e-4).read()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return seconds[3:], peak, flops_per_token(config.model, length), run.sequences * length * sharing.size


def large(tiny: bool, length: int, checkpointing: str, parallel: ParallelConfig) -> Config:
    """The mixture that is timed: 6.85B parameters, 1.21B of them used by a token."""
    width, layers, heads, hidden, vocabulary = (64, 2, 4, 64, 512) if tiny else (2048, 16, 16, 4096, 32768)
    model = ModelConfig(
        vocab_size=vocabulary,
        n_layers=layers,
        d_model=width,
        max_seq=length,
        tie_embeddings=False,
        attention=AttentionConfig(n_heads=heads, head_dim=width // heads),
        experts=ExpertsConfig(n_experts=16, d_ff=hidden),
        router=RouterConfig(top_k=2),
        balance=BalanceConfig(load_balance=0.01),
    )
    training = TrainingConfig(
        precision="bf16",
        weight_dtype="bf16",
        optimizer=OptimizerConfig(lr=1e-4),
        activation_checkpointing=checkpointing,  # type: ignore[arg-type]
    )
    return Config(model=model, data=DataConfig(sequence_length=length), training=training, parallel=parallel)


def fill(model: torch.nn.Module) -> None:
    """Random weights, gains 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if name.endswith("norm.weight"):
                local.fill_(1.0)
            else:
                local.normal_(std=0.02)


def flops_per_token(model: ModelConfig, length: int) -> float:
    """Training FLOPs: six a parameter that multiplies, and the causal half of the attention scores."""
    width, attention = model.attention.n_heads * model.attention.head_dim, 4 * model.d_model**2
    experts = model.router.top_k * 3 * model.d_model * model.experts.d_ff
    assert model.vocab_size is not None
    multiplied = model.n_layers * (attention + experts + model.d_model * model.experts.n_experts)
    multiplied += model.vocab_size * model.d_model
    return 6.0 * multiplied + 3 * 2 * model.n_layers * width * length


# ------------------------------------------------------------------------------------------------------------- equality


def compare(world: World, device: torch.device, layouts: list[str] | None) -> None:
    """Five steps in float32 under each layout, beside five on this GPU alone."""
    # TensorFloat-32 has ten bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    reference = five_steps(world, device, None)
    n = world.size
    for layout in layouts or ["replicate", "full", f"hybrid{n}", f"ep{n}", f"ep{n},full", f"tp{n}"]:
        try:
            here = five_steps(world, device, parse_layout(layout))
        except (RuntimeError, ValueError) as error:
            say(world, f"{layout:20} failed: {str(error).splitlines()[0]}")
            continue
        loss = max(abs(a - b) / abs(b) for a, b in zip(here["losses"], reference["losses"], strict=True))
        norm = max(abs(a - b) / abs(b) for a, b in zip(here["norms"], reference["norms"], strict=True))
        weights = max(float((here["weights"][k] - v).abs().max()) for k, v in reference["weights"].items())
        counts = bool(torch.equal(here["counts"], reference["counts"]))
        say(
            world,
            f"{layout:20} loss {loss:.1e}  norm {norm:.1e} (relative)  weights {weights:.1e}  "
            f"counts {'equal' if counts else 'DIFFER'}",
        )


def five_steps(world: World, device: torch.device, parallel: ParallelConfig | None) -> dict[str, Any]:
    """Losses, norms, counts and weights of five steps on the same eight sequences a step."""
    length, vocabulary = 64, 512
    model_config = ModelConfig(
        vocab_size=vocabulary,
        n_layers=2,
        d_model=128,
        max_seq=length,
        init_std=0.05,
        attention=AttentionConfig(n_heads=8, head_dim=16),
        experts=ExpertsConfig(n_experts=8, d_ff=256),
        router=RouterConfig(top_k=2, selection_bias="sign"),
        balance=BalanceConfig(load_balance=0.01, scope="global_batch"),
    )
    optimizer_config = OptimizerConfig(lr=1e-3, clip=1.0, eps=1e-3)
    training = TrainingConfig(precision="fp32", optimizer=optimizer_config)
    model, sharing = Transformer(model_config), World.alone()
    if parallel is None:
        model.to(device)
    else:
        mesh = build_mesh(parallel, world.size, device.type)
        config = Config(
            model=model_config, data=DataConfig(sequence_length=length), training=training, parallel=parallel
        )
        parallelize(model, config, mesh, device)
        sharing = sharing if mesh.data_group is None else World(mesh.data_group)
    spread = spread_of(model)
    optimizer = build_optimizer(model, optimizer_config, None if spread is None else spread.parameters)
    step = TrainingStep(model, optimizer, precision="fp32", clip=1.0, world=sharing)
    steps = []
    for number in range(5):
        batch = torch.randint(vocabulary, (8, length + 1), generator=torch.Generator().manual_seed(number))
        rows = batch.chunk(sharing.size)[sharing.rank]
        steps.append(step([MicroBatch(rows[:, :-1], rows[:, 1:])], 1e-3).read())
    weights = {
        name: (value.detach() if spread is None else spread.whole(name)).clone()
        for name, value in model.named_parameters()
    }
    return {
        "losses": [step.losses["lm_loss"] for step in steps],
        "norms": [step.gradient_norm for step in steps],
        "counts": torch.stack([step.counts for step in steps if step.counts is not None]),
        "weights": weights,
    }


def say(world: World, line: str) -> None:
    """Print on the first rank."""
    if world.is_first:
        print(line, flush=True)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
