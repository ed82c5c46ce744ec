"""SonicMoE as a contestant: its layer, and its kernels compiled ahead on all cores.

Its products are QuACK's. At the first call of each of the six, QuACK compiles the 9 to 22 configurations among which it
then chooses by timing: 80 in all, 2 s each on a core of an AMD EPYC. What it has for doing so in parallel starts one
process after the other, each when the one before has imported torch and CuTe (4 s), and all of them anew for each
product; with 16 processes that takes longer than one alone would. But its kernels are compiled for sizes not known yet,
and kept on disk: whoever has compiled those of one shape has those of all. Here ``python -m moe.bench.sonic 3 16``
compiles the fourth of sixteen shares of them, and the sixteen start at once. What is compiled, how it is tuned and what
is then called stays SonicMoE's own.
"""

import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.bench.layers import Layer, Weights, leaf, require_bf16
from moe.bench.shapes import LAYERS, LayerShape


def sonic_experts(shape: LayerShape, weights: Weights) -> Layer:
    """SonicMoE's two autograd functions and its sorting kernel: its layer from the point where tokens have experts.

    Its w1 has the rows of gate and value in turn. Tuned configurations are kept for the next run in its own cache.
    """
    _set_up_quack()
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import TC_topk_router_metadata_triton, _DownProjection, _UpProjection

    require_bf16(weights, "SonicMoE")
    device, n_experts, top_k = weights.w_in.device, shape.n_experts, shape.top_k
    halves = weights.w_in.view(n_experts, 2, shape.d_ff, shape.d_model)
    in_turn = halves.transpose(1, 2).flatten(1, 2)
    w1, w2 = leaf(in_turn), leaf(weights.w_out)

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    def forward(x: Tensor, selected: Tensor, combine: Tensor) -> Tensor:
        rows = selected.numel()
        frequency, offsets = empty(n_experts), empty(n_experts + 1)
        gathered, scattered, gathered_back = empty(rows), empty(rows), empty(rows)
        TC_topk_router_metadata_triton(
            selected.int(), n_experts, frequency, offsets, gathered, scattered, gathered_back
        )
        order = (gathered, scattered, gathered_back)
        inner, hidden = _UpProjection.apply(
            *(x, w1.permute(1, 2, 0), None, offsets, rows, top_k, *order, None, False),
            *(ActivationType.SWIGLU, False, False),
        )
        y: Tensor = _DownProjection.apply(
            *(inner, hidden, w2.permute(1, 2, 0), None, combine, offsets, x.shape[0], top_k, *order, None, False),
            ActivationType.SWIGLU,
        )
        return y

    def ours(gradients: Sequence[Tensor]) -> Weights:
        pairs = gradients[0].view(n_experts, shape.d_ff, 2, shape.d_model)
        return Weights(pairs.transpose(1, 2).flatten(1, 2), gradients[1])

    return Layer(forward, [w1, w2], ours)


def _set_up_quack() -> None:
    """Before it is imported: keep what it tunes on disk, and start no processes to compile in (we did: see above)."""
    os.environ.setdefault("QUACK_CACHE_AUTOTUNING", "1")
    os.environ.setdefault("QUACK_COMPILE_WORKERS", "1")


@contextmanager
def untuned() -> Iterator[None]:
    """Compile all configurations, and let what is called within run each of them without timing any.

    What is then taken for the best is forgotten at the end, so that the next call tunes, on compiled kernels.
    """
    _set_up_quack()
    compile_products()
    from quack.gemm_interface import gemm_dgated_tuned, gemm_gated_tuned, gemm_tuned
    from sonicmoe.functional.reduction_over_k_gather import token_gather_sum_kernel

    tuners: list[Any] = [gemm_tuned, gemm_gated_tuned, gemm_dgated_tuned, token_gather_sum_kernel]
    before = [(tuner.cache_results, dict(tuner.cache)) for tuner in tuners]
    for tuner in tuners:
        tuner.cache_results = False
        tuner.do_bench = _run_once
    try:
        yield
    finally:
        for tuner, (keeps, tuned) in zip(tuners, before, strict=True):
            tuner.cache_results = keeps
            tuner.cache.clear()
            tuner.cache.update(tuned)
            del tuner.do_bench


def _run_once(call: Any, quantiles: Sequence[float]) -> list[float]:
    """In place of a tuner's measurement."""
    call()
    return [1.0 for _ in quantiles]


@cache
def compile_products() -> None:
    """Have all configurations of all products on disk, compiled for the current GPU. Raises RuntimeError."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"sm_{major}{minor}"
    done = _kernels() / f"all-{architecture}"
    if done.exists():
        return
    n_shares = len(os.sched_getaffinity(0))
    shares = [
        subprocess.Popen(
            [sys.executable, "-m", "moe.bench.sonic", str(share), str(n_shares)],
            env={**os.environ, "QUACK_ARCH": architecture},
        )
        for share in range(n_shares)
    ]
    statuses = [process.wait() for process in shares]
    if any(statuses):
        raise RuntimeError("compiling the products of QuACK ahead failed")
    done.touch()


def _kernels() -> Path:
    """Where QuACK keeps what was compiled of its present sources."""
    from quack import cache_utils

    folder: Path = cache_utils.get_cache_path() / cache_utils._compute_source_fingerprint()
    return folder


def compile_share(share: int, n_shares: int) -> int:
    """Compile every ``n_shares``-th configuration, from number ``share`` on; returns how many there are in all.

    No GPU is touched: the layer runs on tensors without storage, on which QuACK's operators compile and do no more.
    """
    from quack import cache_utils, gemm_interface
    from sonicmoe.functional import backward, forward

    numbers = count()

    def compile_configurations(tuner: Any, *args: Any, **kwargs: Any) -> None:
        """In place of QuACK's, which compiles a default alone."""
        given = dict(zip(tuner.arg_names, args, strict=False)) | kwargs
        tuner.nargs = {name: value for name, value in given.items() if name in tuner.arg_names}
        for configuration in tuner.prune_configs({}):
            if next(numbers) % n_shares == share:
                try:
                    tuner.fn(**tuner.nargs, **configuration.all_kwargs())
                except Exception:  # QuACK's tuner passes over what cannot be compiled, too
                    traceback.print_exc()

    cache_utils.COMPILE_ONLY = True
    gemm_interface._precompile_default_config = compile_configurations
    for operator in (
        forward._up_projection_forward,
        forward._down_projection_forward,
        backward._down_projection_backward_act,
        backward._down_projection_backward_weight,
        backward._up_projection_backward_act,
        backward._up_projection_backward_weight,
    ):
        operator.register_fake(operator._init_fn)  # as on a GPU, down to QuACK's operators
    _run_without_storage(LAYERS["mini"])
    return next(numbers)


def _run_without_storage(shape: LayerShape) -> None:
    """The layer forward and backward on the meta device; the sizes do not matter."""

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    d_model, d_ff, n_experts = shape.d_model, shape.d_ff, shape.n_experts
    layer = sonic_experts(shape, Weights(empty(n_experts, 2 * d_ff, d_model), empty(n_experts, d_model, d_ff)))
    x = empty(shape.tokens, d_model).requires_grad_()
    selected = empty(shape.tokens, shape.top_k, dtype=torch.int64)
    weights = empty(shape.tokens, shape.top_k, dtype=torch.float32).requires_grad_()
    y = layer.forward(x, selected, weights)
    torch.autograd.grad(y, [x, weights, *layer.parameters], empty(shape.tokens, d_model))


if __name__ == "__main__":
    compile_share(int(sys.argv[1]), int(sys.argv[2]))
