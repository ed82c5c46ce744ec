"""Continue prompts, one token at a time for all of them together, each token read once."""

from collections.abc import Sequence

import torch

from moe.inference.sampling import Sampling, sample
from moe.model.cache import KVCache
from moe.model.transformer import Transformer


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
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device, dtype=torch.bool)
    cache = KVCache(model.config, len(prompts), capacity, device, model.embedding.weight.dtype)
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    written: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            # Compiled for training's shapes, blocks would be compiled again for each kind of step here.
            with torch.compiler.set_stance("force_eager"):
                logits, _ = model(tokens, mask=real, cache=cache)
            chosen = sample(logits[:, -1], sampling, generators)
            if stop is not None:
                going = going & (chosen != stop)
            for row, (token, is_going) in enumerate(zip(chosen.tolist(), going.tolist(), strict=True)):
                if is_going:
                    written[row].append(token)
            if not going.any():
                break
            tokens, real = chosen[:, None], going[:, None]
    finally:
        model.train(was_training)
    return written
