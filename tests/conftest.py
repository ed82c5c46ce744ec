"""What every test shares: one thread, since tensors here are too small to share out and tests may fork; and, without a
GPU, Triton's interpreter, which runs the kernels on tensors of a CPU.

Triton reads TRITON_INTERPRET when it is imported, which torch may do at any time: so it is set here, before all.
"""

import os

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
