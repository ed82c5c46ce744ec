"""That ``model.deterministic`` keeps a text's bits on a GPU, and what it costs: ``python3 dev/gpu_exact.py``.

A small model of the toy's kind and one of real widths, with random weights, in float32 and bfloat16: the logits of a
text among strangers, at another slot, with padding on the left, and in chunks from a cache are held against those
alone, with the setting and without. Then the time of prefill and decoding with and without, and a training taken
twice. Each part prints as it ends and survives the others. Without CUDA, ``--device cpu --shape small`` shows that the
script runs.
"""

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe.config import AttentionConfig, ExpertsConfig, ModelConfig
from moe.model.cache import KVCache
from moe.model.transformer import Transformer
from moe.training.machine import repeat_exactly

LENGTH = 200
"""tokens of the text whose bits are watched"""
STRANGERS = 15
SHAPES = {
    "small": ModelConfig(
        vocab_size=6144,
        n_layers=4,
        d_model=128,
        attention=AttentionConfig(n_heads=4, head_dim=32),
        experts=ExpertsConfig(n_experts=16, d_ff=192),
    ),
    "wide": ModelConfig(
        vocab_size=32768,
        n_layers=4,
        d_model=2048,
        attention=AttentionConfig(n_heads=16, head_dim=128, n_kv_heads=4),
        experts=ExpertsConfig(n_experts=16, d_ff=2048),
    ),
}
MODES = {"float32": torch.float32, "bf16 weights": torch.bfloat16, "bf16 autocast": torch.float32}


def main() -> int:
    """Print every part."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    run = parser.parse_args()
    if run.device == "cuda" and not torch.cuda.is_available():
        print("dev/gpu_exact.py: torch finds no CUDA device here; try --device cpu --shape small")
        return 2
    device = torch.device(run.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}\n\nlargest difference of a logit from the text alone (0: the same bits)")
    print(f"{'':34}{'strangers':>12}{'padding':>12}{'chunks':>12}{'one by one':>12}", flush=True)
    parts: list[Callable[[], bool]] = []
    for shape in run.shape:
        for mode in MODES:
            parts += [lambda shape=shape, mode=mode: company(shape, mode, device)]
    parts += [lambda: training_twice(device)]
    parts += [lambda shape=shape: cost(shape, device) for shape in run.shape]
    held = [survive(part) for part in parts]
    print(f"\n{'all held' if all(held) else 'SOMETHING DID NOT HOLD'}")
    return 0 if all(held) else 1


def survive(part: Callable[[], bool]) -> bool:
    """Whether it held; an error in one part is shown, and the next goes on."""
    try:
        return part()
    except Exception:
        print("".join(traceback.format_exc().splitlines(keepends=True)[-12:]), flush=True)
        return False
    finally:
        sys.stdout.flush()


def build(shape: str, weights: torch.dtype, device: torch.device, deterministic: bool) -> Transformer:
    """The same random weights whatever the setting; wide enough that logits are of order one."""
    with device:
        model = Transformer(replace(SHAPES[shape], deterministic=deterministic, init_std=0.04))
    return model.eval().to(device, weights)


def autocast(mode: str, device: torch.device) -> torch.autocast | nullcontext[None]:
    """On where the mode has it."""
    return torch.autocast(device.type, torch.bfloat16) if mode == "bf16 autocast" else nullcontext()


@torch.no_grad()
def company(shape: str, mode: str, device: torch.device) -> bool:
    """Whether a text keeps its bits in four kinds of company; shown with the setting and without."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SHAPES[shape].vocab_size or 0, (STRANGERS + 1, LENGTH), generator=generator).to(device)
    slot, shift = 11, 56
    text = tokens[slot : slot + 1]
    kept = True
    for deterministic in (True, False):
        model = build(shape, MODES[mode], device, deterministic)

        def logits(tokens: Tensor, model: Transformer = model, **more: object) -> Tensor:
            with autocast(mode, device):
                return model(tokens, **more)[0].float()

        def in_chunks(sizes: list[int], batch: int, model: Transformer = model) -> Tensor:
            rows = tokens[slot - batch + 1 : slot + 1]
            cache = KVCache(model.config, batch, LENGTH, device, MODES[mode])
            return torch.cat([logits(part, model, cache=cache)[-1:] for part in rows.split(sizes, dim=1)], dim=1)

        alone = logits(text)
        wider = F.pad(tokens, (shift, 0), value=1)
        mask = torch.ones_like(wider, dtype=torch.bool)
        mask[slot, :shift] = False
        steps = 24
        differences = [
            (logits(tokens)[slot] - alone[0]).abs().max().item(),
            (logits(wider, mask=mask)[slot, shift:] - alone[0]).abs().max().item(),
            (in_chunks([64, 37, 1, LENGTH - 102], 1) - alone).abs().max().item(),
            (in_chunks([LENGTH - steps, *[1] * steps], 4) - alone).abs().max().item(),
        ]
        label = f"{shape}, {mode}, {'deterministic' if deterministic else 'plain'}"
        print(f"{label:34}" + "".join(f"{difference:12.2g}" for difference in differences), flush=True)
        kept &= not deterministic or not any(differences)
        del model
    return kept


def training_twice(device: torch.device) -> bool:
    """Whether eight steps of AdamW under autocast end in the same weights twice, with the setting and without."""
    print()
    held = True
    for deterministic in (False, True):  # what a process was told to repeat, it goes on repeating
        if deterministic:
            repeat_exactly()
        states = []
        for _ in range(2):
            model = build("small", torch.float32, device, deterministic).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            generator = torch.Generator().manual_seed(0)
            for _ in range(8):
                tokens = torch.randint(6144, (8, 257), generator=generator).to(device)
                with torch.autocast(device.type, torch.bfloat16):
                    logits, _ = model(tokens[:, :-1])
                F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
            states.append(model.state_dict())
        same = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        print(f"trained twice, {'deterministic' if deterministic else 'plain'}: {'the same' if same else 'OTHER'} bits")
        held &= same or not deterministic
    return held


@torch.no_grad()
def cost(shape: str, device: torch.device) -> bool:
    """Milliseconds of prefill and of a step of decoding, with and without; nothing to hold."""
    print(f"\n{shape}, ms{'':12}{'plain':>10}{'deterministic':>15}{'times':>8}", flush=True)
    for mode in ("float32", "bf16 weights"):
        models = [build(shape, MODES[mode], device, deterministic) for deterministic in (False, True)]
        for what, batch, length in (("prefill 8 x 512", 8, 512), ("decode 1", 1, 1), ("decode 16", 16, 1)):
            seconds = [time_of(model, batch, length, MODES[mode]) for model in models]
            print(
                f"  {what}, {mode:14}{1e3 * seconds[0]:10.3f}{1e3 * seconds[1]:15.3f}{seconds[1] / seconds[0]:8.2f}",
                flush=True,
            )
        del models
    return True


def time_of(model: Transformer, batch: int, length: int, dtype: torch.dtype) -> float:
    """Median seconds of seven; a single token follows 256 in a cache."""
    device = model.embedding.weight.device
    tokens = torch.randint(6144, (batch, max(length, 256)), device=device)
    cache = KVCache(model.config, batch, 512, device, dtype) if length == 1 else None
    if cache is not None:
        model.hidden(tokens, cache=cache)
    taken = []
    for _ in range(9):
        if cache is not None:
            cache.length = 256
        synchronise(device)
        start = time.perf_counter()
        model.hidden(tokens[:, :length], cache=cache)
        synchronise(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
