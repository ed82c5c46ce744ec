"""In what dtype a model's weights are kept, where they need not all be float32."""

import torch
from torch import nn

from moe.config import Weights

IN_FLOAT32 = (".router.", ".special.", "norm.weight", "norm.bias")
"""What stays float32, as parts of names: what decides where a token goes, and gains, which bfloat16 would freeze: next
to 1 its numbers are 1/128 apart, and a step of less than half of that changes nothing"""


def keep_weights(model: nn.Module, weights: Weights) -> None:
    """Make the parameters of ``model`` what ``training.weights`` says: all float32, or all but a few bfloat16.

    The parameters stay the same objects. Buffers are left alone: a selection bias is float32 in any case.
    """
    for name, parameter in model.named_parameters():
        dtype = torch.bfloat16 if weights == "bf16" and not any(part in name for part in IN_FLOAT32) else torch.float32
        parameter.data = parameter.data.to(dtype)
