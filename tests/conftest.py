"""What every test shares: one thread, since tensors here are too small to share out and tests may fork; and, without a
GPU, Triton's interpreter, which runs the kernels on tensors of a CPU.

Triton reads TRITON_INTERPRET when it is imported, which torch may do at any time: so it is set here, before all.
"""

import ast
import dataclasses
import os
from typing import Any

import numpy
import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _let_interpreted_loops_run() -> None:
    """Make ``range`` of a scalar work in the interpreter: Triton 3.6 asks numpy for the int of an array of one element,
    which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def _let_interpreted_bfloat16_be_right() -> None:
    """Round and multiply bfloat16 in the interpreter as a GPU does: Triton 3.6 cuts off where it should round, and
    multiplies the bits, which it holds in unsigned integers, as if they were the numbers."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, create_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def to_float32(bits: numpy.ndarray) -> numpy.ndarray:
        return (bits.astype(numpy.uint32) << 16).view(numpy.float32)

    def convert_float(values: numpy.ndarray, source: Any, target: Any, rounding: Any) -> numpy.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return to_float32(values).view(numpy.uint32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.tensor(values).bfloat16().view(torch.uint16).numpy()
        return convert(values, source, target, rounding)

    def dot(builder: Any, left: Any, right: Any, sums: Any, *options: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16:
            left, right = (interpreter.TensorHandle(to_float32(one.data), tl.float32) for one in (left, right))
        return create_dot(builder, left, right, sums, *options)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert_float, dot


def _let_the_interpreter_hurry() -> None:
    """Halve its time: a helper of a kernel finds the language remapped already, and no test's integers overflow."""
    import triton.language as tl
    from triton.runtime import interpreter

    call = interpreter.InterpretedFunction.__call__

    def call_once_remapped(function: Any, *args: Any, **kwargs: Any) -> Any:
        ours = function.fn.__globals__.get("tl") is tl
        return function.rewrite()(*args, **kwargs) if ours else call(function, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_once_remapped
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _interpreter_is_known() -> bool:
    """The mends above are of the interpreter of Triton 3.6."""
    try:
        import triton
    except ImportError:
        return False
    return str(triton.__version__).startswith("3.6.")


if os.environ.get("TRITON_INTERPRET") == "1" and _interpreter_is_known():
    _let_interpreted_loops_run()
    _let_interpreted_bfloat16_be_right()
    _let_the_interpreter_hurry()


def _leave_kernels_unchecked() -> None:
    """Keep ``--jaxtyping-packages`` from wrapping what Triton compiles: it reads a kernel's source, not its wrapper."""
    from jaxtyping._import_hook import JaxtypingTransformer

    check = JaxtypingTransformer.visit_FunctionDef

    def check_unless_compiled(transformer: Any, function: ast.FunctionDef) -> ast.FunctionDef:
        is_kernel = any(".jit" in ast.unparse(decorator) for decorator in function.decorator_list)
        return function if is_kernel else check(transformer, function)

    JaxtypingTransformer.visit_FunctionDef = check_unless_compiled


_leave_kernels_unchecked()


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
    if request.param == "cpu" and not _interpreter_is_known():
        pytest.skip("the interpreter's faults are mended for Triton 3.6 alone")
    return str(request.param)
