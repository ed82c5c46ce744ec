"""How alike the experts of a layer are: their weights, what they compute, and what the router looks for.

The hidden units of an expert can be put in any order without a change in what it computes, so that two experts of the
same function may have weights that look unrelated: a cosine of weights finds copies (upcycled experts, twins), and only
the similarity of outputs finds experts that do the same.
"""

from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from moe.model.experts import ExpertWeights
from moe.model.experts.reference import one_expert
from moe.model.moe_layer import MoELayer
from moe.model.transformer import Transformer
from moe.study.intervene import mixture_layers
from moe.study.measurement import Array, Axis, Measurement

Layers = dict[int, MoELayer]
"""the mixture layers of a model by number of block"""


def weight_similarity(model: Transformer) -> Measurement:
    """Cosine of the weights of two experts, all matrices and biases flattened into one vector: [layer, from, to].

    1 on the diagonal. Of independent weights it is 0, with deviation 1/√n for n weights an expert; the order of hidden
    units matters (see above). Special experts have no weights and are left out. Raises ValueError for a model without
    mixture layers.
    """
    layers = _layers_of(model)
    vectors = [_flat(layer.experts.weights) for layer in layers.values()]
    return _of_pairs(
        "weight_similarity",
        "Similarity of experts' weights",
        "The cosine of two experts' weights: 1 is a copy, 0 unrelated or the same hidden units in another order; "
        "similarity of outputs tells these apart.",
        layers,
        np.stack([_cosines(vector) for vector in vectors]),
        deviation=np.array([vector.shape[1] ** -0.5 for vector in vectors]),
    )


def router_similarity(model: Transformer) -> Measurement:
    """Cosine of the router's rows for two experts: [layer, from, to]; experts of similar rows are wanted together.

    1 on the diagonal. Of independent rows it is 0, with deviation 1/√D; for a router with a projection, the rows are in
    the space that it projects to. Special experts have rows too, and come last. Raises ValueError for a model without
    mixture layers, or whose routers have no weights (a hashed or random choice, equally weighted).
    """
    layers = _layers_of(model)
    rows = []
    for block, layer in layers.items():
        if layer.router.weight is None:
            raise ValueError(f"block {block}: a router with selection {layer.router.config.selection} has no weights")
        rows.append(layer.router.weight.detach().double())
    return _of_pairs(
        "router_similarity",
        "Similarity of router rows",
        "The cosine of what the router looks for in a token for two experts: 1 wants the same tokens, -1 the opposite, "
        "0 is unrelated.",
        layers,
        np.stack([_cosines(matrix) for matrix in rows]),
        deviation=np.array([matrix.shape[1] ** -0.5 for matrix in rows]),
    )


def output_similarity(
    model: Transformer, tokens: Int[Tensor, "B S"], sample: int = 512, random_experts: int = 8, seed: int = 0
) -> Measurement:
    """Linear CKA of two experts' outputs on the same hidden states: [layer, from, to].

    Of all tokens of the layer, whatever experts they went to, ``sample`` drawn at random. CKA (Kornblith et al. 2019,
    arXiv 1905.00414, eq. 2) with the unbiased estimate of HSIC (Song et al. 2012, eq. 5), which is 0 on average for
    unrelated outputs however few the tokens; a value may be below 0. It ignores rotation and scale of the outputs, and
    so the order of hidden units.

    Chance is far above 0, because all experts see the same hidden states: it is the mean over pairs of
    ``random_experts`` with normal weights of the same standard deviations. The model's mode is restored. Raises
    ValueError for a model without mixture layers, or fewer than 4 tokens.
    """
    layers = _layers_of(model)
    values, chance = [], []
    for layer, x in zip(layers.values(), _hidden_states(model, layers, tokens, sample, seed), strict=True):
        weights = layer.experts.weights
        n_experts = len(weights.w_in)
        values.append(linear_cka([one_expert(x, expert, weights) for expert in range(n_experts)]))
        random = _random_like(weights, random_experts, seed)
        of_random = linear_cka([one_expert(x, expert, random) for expert in range(random_experts)])
        chance.append(of_random[~np.eye(random_experts, dtype=np.bool_)].mean())
    return _of_pairs(
        "output_similarity",
        "Similarity of experts' outputs (CKA)",
        "How alike two experts transform the same hidden states, whatever the order of their hidden units: 1 is the "
        "same but for rotation and scale, and experts of random weights give the chance value.",
        layers,
        np.stack(values),
        chance=np.array(chance),
    )


def linear_cka(outputs: list[Float[Tensor, "n D"]]) -> Array:
    """CKA of each pair of outputs for the same n tokens, by unbiased HSIC: float64 [len, len], 1 on the diagonal.

    HSIC_1 of two kernels is the inner product of their U-centred matrices over n(n - 3) (Székely and Rizzo 2014), so
    CKA is the cosine of these. NaN for outputs that do not vary. Raises ValueError for n < 4.
    """
    n = len(outputs[0])
    if n < 4:
        raise ValueError(f"{n} tokens: the unbiased estimate needs at least 4")
    centred = torch.stack([_u_centred(output.detach().double()).flatten() for output in outputs])
    return _cosines(centred)


def _layers_of(model: Transformer) -> Layers:
    layers = mixture_layers(model)
    if not layers:
        raise ValueError("the model has no mixture layers")
    return layers


def _of_pairs(
    name: str,
    title: str,
    reading: str,
    layers: Layers,
    values: Array,
    *,
    chance: Array | None = None,
    deviation: Array | None = None,
) -> Measurement:
    """A measurement of all pairs of experts; ``chance`` [L] is 0 where it is None, with ``deviation`` [L]."""
    experts = tuple(str(number) for number in range(values.shape[-1]))
    return Measurement(
        name,
        title,
        reading,
        values,
        (Axis("layer", tuple(str(block) for block in layers)), Axis("from", experts), Axis("to", experts)),
        "",
        chance=np.zeros(()) if chance is None else chance[:, None, None],
        null=None if deviation is None else np.zeros(()),
        null_std=None if deviation is None else deviation[:, None, None],
    )


def _flat(weights: ExpertWeights) -> Float[Tensor, "E P"]:
    parts = [part for part in (weights.w_in, weights.w_out, weights.b_in, weights.b_out) if part is not None]
    return torch.cat([part.detach().double().flatten(1) for part in parts], dim=1)


def _cosines(vectors: Float[Tensor, "m P"]) -> Array:
    """Cosine of each pair of rows, NaN for rows of zeros."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cosines: Array = (unit @ unit.T).cpu().numpy()
    return cosines


def _u_centred(output: Float[Tensor, "n D"]) -> Float[Tensor, "n n"]:
    """The kernel of inner products without its diagonal, less row and column means, such that each row sums to 0."""
    n = len(output)
    kernel = (output @ output.T).fill_diagonal_(0.0)
    rows = kernel.sum(dim=0)
    centred = kernel - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0.0)


def _random_like(weights: ExpertWeights, n_experts: int, seed: int) -> ExpertWeights:
    """Experts with normal weights, of the same mean and standard deviation as each stacked weight."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(stacked: Tensor | None) -> Tensor | None:
        if stacked is None:
            return None
        noise = torch.randn(n_experts, *stacked.shape[1:], generator=generator, dtype=torch.float64).to(stacked)
        return noise * stacked.detach().std() + stacked.detach().mean()

    w_in, w_out = drawn(weights.w_in), drawn(weights.w_out)
    assert w_in is not None
    assert w_out is not None
    return ExpertWeights(w_in, w_out, drawn(weights.b_in), drawn(weights.b_out), weights.activation)


@torch.no_grad()
def _hidden_states(
    model: Transformer, layers: Layers, tokens: Int[Tensor, "B S"], sample: int, seed: int
) -> list[Float[Tensor, "n D"]]:
    """What the experts of each layer are given, for the same tokens of all layers."""
    seen: list[Tensor] = []

    def watch(layer: Any, arguments: tuple[Any, ...]) -> None:
        seen.append(rearrange(arguments[0], "b s d -> (b s) d"))

    handles = [layer.register_forward_pre_hook(watch) for layer in layers.values()]
    was_training = model.training
    model.eval()
    try:
        model.hidden(tokens)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    kept = np.random.default_rng(seed).permutation(tokens.numel())[:sample]
    rows = torch.from_numpy(kept).to(tokens.device)
    return [x[rows] for x in seen]
