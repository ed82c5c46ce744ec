"""What every test shares: one thread, since tensors here are too small to share out and tests may fork; and, without a
GPU, Triton's interpreter, which runs the kernels on tensors of a CPU.

Triton reads TRITON_INTERPRET when it is imported, which torch may do at any time: so it is set here, before all.
"""

import os

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _let_interpreted_loops_run() -> None:
    """Make ``range`` of a scalar work in the interpreter: Triton 3.6 asks numpy for the int of an array of one element,
    which numpy 2.4 refuses."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


if os.environ.get("TRITON_INTERPRET") == "1":
    _let_interpreted_loops_run()


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled where it can be")),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ]
)
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where Triton's kernels run: interpreted on a CPU, and on a machine with a GPU compiled, there alone."""
    pytest.importorskip("triton")
    return str(request.param)
