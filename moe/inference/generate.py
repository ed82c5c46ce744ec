"""Continue prompts, one token at a time for all of them together, each token read once."""

from collections.abc import Sequence

import torch

from moe.inference.graphed import GraphedSteps, can_graph
from moe.inference.one_token import OneToken, can_read
from moe.inference.sampling import Sampling, sample
from moe.model.cache import KVCache
from moe.model.transformer import Transformer

WORTH_A_GRAPH = 16
"""new tokens from which on a recording pays: it takes as long as a few steps without"""


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: int | None = None,
) -> list[list[int]]:
    """Return up to ``max_new_tokens`` new ids for each prompt (prompt and ``stop`` token left out).

    Prompts may differ in length: shorter ones are padded on the left, and padding is neither attended to nor routed.
    A row ends at ``stop`` and is then padding for the experts too. Row b draws from a generator of its own, seeded by
    (``seed``, b). The cache has the dtype that the model computes in. Raises ValueError for an empty prompt, or where
    prompt and new tokens would not fit ``max_seq``.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    longest = max(len(prompt) for prompt in prompts)
    capacity = longest + max_new_tokens
    if capacity > model.config.max_seq:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit max_seq = {model.config.max_seq}"
        )
    device = model.embedding.weight.device
    sampling = sampling or Sampling()
    generators = [torch.Generator().manual_seed((seed << 20) + row) for row in range(len(prompts))]
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    real = None  # where no sequence is padded, nobody has to know of a mask
    if any(len(prompt) < longest for prompt in prompts):
        real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device).bool()
    cache = KVCache(model.config, len(prompts), capacity, device, model.embedding.weight.dtype)
    going = [True] * len(prompts)
    written: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        # Compiled for training's shapes, blocks would be compiled again for each kind of step here.
        with torch.compiler.set_stance("force_eager"):
            one_token = OneToken(model, cache) if can_read(model, len(prompts)) else None
            graph = GraphedSteps(model, cache) if can_graph(model) and max_new_tokens >= WORTH_A_GRAPH else None
            for step in range(max_new_tokens):
                if step and graph is not None:
                    logits = graph.read(tokens[:, 0])
                elif step == 0 or one_token is None:
                    hidden, _ = model.hidden(tokens, real, cache)
                    logits = model.head(hidden[:, -1])
                else:
                    logits = one_token.read(tokens[:, 0], going)
                chosen = sample(logits, sampling, generators)
                for row, token in enumerate(chosen.tolist()):
                    going[row] = going[row] and token != stop
                    if going[row]:
                        written[row].append(token)
                if not any(going):
                    break
                tokens = chosen[:, None]
                real = None if all(going) else torch.tensor(going, device=device)[:, None]
    finally:
        model.train(was_training)
    return written
