"""The blocks of a model through torch.compile, with a bound on how often they are compiled.

Every block runs the same code, so blocks of one kind (dense, a mixture, the first mixture of a residual router) share
one compiled version, whatever their number. Blocks are compiled for training alone: validation, generation and the
study, whose batches have other shapes, run them as they are written.
"""

import logging
from collections.abc import Callable

import torch

from moe.errors import UserError
from moe.model.transformer import Transformer
from moe.training.gpu import triton_is_installed

LOGGER = "torch._dynamo.convert_frame"
"""where torch tells that it gives up compiling anew"""


def compile_blocks(model: Transformer, say: Callable[[str], None]) -> None:
    """Have each block compiled when it is first called.

    torch compiles a function for at most ``torch._dynamo.config.recompile_limit`` (8) kinds of input; what is beyond
    runs as it is written, and ``say`` gets a line with the reason. Raises UserError where code cannot be generated.
    """
    _require_compiler(next(model.parameters()).device)
    # A block's number, by which a hash tells layers apart, shall be an input and not a constant of the compiled code.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    logger = logging.getLogger(LOGGER)
    for earlier in [known for known in logger.filters if isinstance(known, _Limit)]:
        logger.removeFilter(earlier)
    logger.addFilter(_Limit(say))
    for block in model.blocks:
        block.compile()


def _require_compiler(device: torch.device) -> None:
    """torch.compile writes Triton for a GPU, and C++ for a CPU."""
    if device.type == "cuda":
        if not triton_is_installed():
            raise UserError("training.compile needs Triton on a GPU; pip install triton, or set it to false")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        raise UserError("training.compile needs a C++ compiler on a CPU; install g++, or set it to false") from None


class _Limit(logging.Filter):
    """Turns torch's paragraph about its limit into a line; other records pass."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be logged."""
        message = record.getMessage()
        if "hit config." not in message:
            return True
        reason = next((line for line in message.splitlines() if "last reason" in line), message.splitlines()[0])
        reason = reason.partition("last reason:")[2].partition("#")[0].strip() or "see TORCH_LOGS=recompiles"
        self._say(
            f"training.compile: torch compiled a block for {torch._dynamo.config.recompile_limit} kinds of input and "
            f"runs it uncompiled for others, which is slower (last reason: {reason}); set training.compile to false, "
            "or keep to one shape of batch"
        )
        return False
