"""In what dtype a model's weights are kept, where they need not all be float32."""

import torch
from torch import nn

from moe.config import WeightDtype

IN_FLOAT32 = (".router.", ".special.", ".sinks", "norm.weight", "norm.bias")
"""What stays float32, as parts of names: what decides where a token goes, and gains and sinks, which bfloat16 would
freeze: next to 1 its numbers are 1/128 apart, and a step of less than half of that changes nothing"""


def keep_weights(model: nn.Module, weight_dtype: WeightDtype) -> None:
    """Make the parameters of ``model`` what ``training.weight_dtype`` says: all float32, or all but a few bfloat16.

    The parameters stay the same objects. Buffers are left alone: a selection bias is float32 in any case.
    """
    for name, parameter in model.named_parameters():
        in_float32 = weight_dtype == "fp32" or any(part in name for part in IN_FLOAT32)
        parameter.data = parameter.data.to(torch.float32 if in_float32 else torch.bfloat16)
