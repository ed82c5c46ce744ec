"""From hidden states to logits, and from logits to scores."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moe.config import Score

Product = Callable[[Tensor, Tensor], Tensor]
"""the signature of :func:`linear_logits`"""
COLDEST = 0.01
"""The cosine router's temperature goes no lower: its logits stay within 100 (as in Tutel)."""


def linear_logits(x: Float[Tensor, "T n"], weight: Float[Tensor, "m n"]) -> Float[Tensor, "T m"]:
    """x Wᵀ in at least float32, outside autocast."""
    if x.is_cuda and x.dtype == torch.bfloat16 and weight.dtype == torch.float32:
        product: Tensor = ProductInSlices.apply(x, weight)  # type: ignore[no-untyped-call]
        return product
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype))


def cosine_logits(
    x: Float[Tensor, "T W"],
    experts: Float[Tensor, "E W"],
    temperature: Float[Tensor, ""],
    product: Product = linear_logits,
) -> Float[Tensor, "T E"]:
    """cos(x, e) / τ for each expert's vector e (Chi et al. 2022, X-MoE, eq. 6-7): bounded, whatever the norm of x."""
    unit = F.normalize(experts.to(x.dtype), dim=-1)
    return product(F.normalize(x, dim=-1), unit) / temperature.to(x.dtype).clamp(min=COLDEST)


def logit_norm(logits: Float[Tensor, "T E"], factor: float) -> Float[Tensor, "T E"]:
    """λ (z - mean z) / std z over the experts of a token (Wei et al. 2024, Skywork-MoE, section 4.1).

    The population's deviation; a token whose logits are all equal keeps zeros.
    """
    centred = logits - logits.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return factor * centred * torch.rsqrt(variance + torch.finfo(logits.dtype).eps)


def noise_std(noise_logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """softplus(x W_noise), the deviation of the noise on each logit (Shazeer et al. 2017, eq. 4).

    Not below the precision of the dtype: the load loss divides by it.
    """
    return F.softplus(noise_logits).clamp(min=torch.finfo(noise_logits.dtype).eps)


def score_function(logits: Float[Tensor, "T E"], score: Score) -> Float[Tensor, "T E"]:
    """Scores over all experts: probabilities (softmax), each expert on its own (sigmoid, √softplus), or ReLU."""
    if score == "softmax":
        return logits.softmax(dim=-1)
    if score == "sigmoid":
        return logits.sigmoid()
    if score == "sqrt_softplus":
        # The root has no finite slope at 0, which softplus becomes by underflow.
        return F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()
    return torch.relu(logits)


class ProductInSlices(torch.autograd.Function):
    """x Wᵀ of bfloat16 x and float32 W, as exact as a float32 product, by the units that multiply bfloat16.

    Those are many times faster on a GPU, and x need be neither widened nor kept twice. A float32 is the sum of three
    bfloat16 (8 bits each), the products of two bfloat16 are exact in float32, and so are the sums.
    """

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "T n"], weight: Float[Tensor, "m n"]) -> Float[Tensor, "T m"]:
        ctx.save_for_backward(x, weight)
        slices = torch.cat(_slices(weight, 3))
        return _product(x, slices.t()).view(len(x), 3, -1).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "T m"]) -> tuple[Float[Tensor, "T n"], Float[Tensor, "m n"]]:
        x, weight = ctx.saved_tensors
        high, middle, low = _slices(grad, 3)
        w_high, w_middle = _slices(weight, 2)
        # The gradient of x is rounded to bfloat16: two slices each are more than it shows.
        grad_x = torch.cat([high, high, middle], dim=1) @ torch.cat([w_high, w_middle, w_high])
        grad_weight = _product(torch.cat([high, middle, low], dim=1).t(), x)
        return grad_x, grad_weight.view(3, *weight.shape).sum(dim=0)


def _slices(x: Float[Tensor, "a b"], n: int) -> list[Float[Tensor, "a b"]]:
    """``n`` bfloat16 tensors, each 8 bits further down, that sum to ``x``: exactly for three and a float32.

    The bits are cut off, not rounded by a cast: torch.compile takes a cast there and back for none.
    """
    slices = []
    for _ in range(n):
        top = (x.view(torch.int32) & -0x10000).view(torch.float32)
        slices.append(top.to(torch.bfloat16))
        x = x - top
    return slices


def _product(a: Float[Tensor, "a b"], b: Float[Tensor, "b c"]) -> Float[Tensor, "a c"]:
    """A product of bfloat16 matrices in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
