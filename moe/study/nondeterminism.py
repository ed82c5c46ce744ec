"""Does what a stranger asks change my answer? A mixture with a capacity, served in batches, at temperature 0.

Requests that are computed together share each expert's capacity, and who overflows depends on all of them: so one
prompt gets several answers ("non-determinism in GPT-4 is caused by sparse mixture-of-experts", 152334H 2023). Here a
prompt is continued greedily again and again, each time among other strangers, under several capacities. All arithmetic
is that of ``model.deterministic``, in which strangers change no bit, so that what is left is routing. The rival cause,
arithmetic that depends on the batch's size (He et al. 2025), is measured by itself, without a capacity.

The same channel lets a stranger act on purpose: :func:`exposure` is how far one request changes another's logits
through the capacity that they share (Hayes et al. 2024, arXiv 2402.05526).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import CapacityConfig
from moe.config.router import CapacityOrder
from moe.model.cache import KVCache
from moe.model.router import Router
from moe.model.router.capacity import beyond_capacity
from moe.model.routing import Routing
from moe.model.transformer import Transformer

Place = Literal["any", "first"]


@dataclass(frozen=True)
class Setting:
    """Under what a prompt is served."""

    factor: float | None
    """of the capacity that a batch shares; None: dropless"""
    order: CapacityOrder = "position"
    place: Place = "any"
    """of the prompt among the requests of its batch"""


@dataclass
class Drops:
    """Assignments so far, and how many of them were dropped."""

    dropped: int = 0
    assigned: int = 0

    @property
    def share(self) -> float:
        """Of the assignments that were dropped."""
        return self.dropped / max(self.assigned, 1)


@dataclass(frozen=True)
class Outcome:
    """What became of the prompts under one setting."""

    unique: list[int]
    """different completions of each prompt"""
    trials: int
    difference: float
    """largest, over prompts, of the range of a first token's logit over the trials"""
    prefill: Drops = field(default_factory=Drops)
    decode: Drops = field(default_factory=Drops)

    @property
    def mean(self) -> float:
        """Different completions of a prompt."""
        return sum(self.unique) / len(self.unique)


@dataclass(frozen=True)
class Exposure:
    """How far one other request in the batch changes a prompt's logits."""

    swapped: float
    """largest change of a logit when one random stranger becomes another"""
    flipped: float
    """share of these swaps after which another first token is the likeliest"""
    copied: float
    """largest change when that stranger sends the prompt itself, to fill the experts that it wants"""


@contextmanager
def sharing(model: Transformer, setting: Setting, batches: int) -> Iterator[list[Drops]]:
    """Let the sequences of a forward pass be ``batches`` batches, one after the other, each with a capacity of its own.

    Yields a list whose last entry counts drops; append another to count apart. Whatever capacity the routers have of
    their own is put aside.
    """
    counted = [Drops()]
    capacity = CapacityConfig()
    if setting.factor is not None:
        capacity = CapacityConfig(factor=setting.factor, order=setting.order, scope="sequence", in_evaluation=True)

    def within_capacity(routing: Routing, router: Router) -> Routing:
        assigned = int(routing.counts().sum())
        counted[-1].assigned += assigned
        if capacity.factor is None:
            return routing
        # A batch is to the capacity what a sequence is to it otherwise.
        beyond = beyond_capacity(replace(routing, n_sequences=batches), router.config.top_k, capacity)
        counted[-1].dropped += int(beyond.sum())
        return routing.dropping(beyond)

    routers: list[Any] = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.within_capacity = lambda routing, router=router: within_capacity(routing, router)
    try:
        yield counted
    finally:
        for router in routers:
            del router.within_capacity


@torch.no_grad()
def greedily(
    model: Transformer, tokens: Int[Tensor, "B S"], n_new: int, advance: Callable[[], object] = lambda: None
) -> Iterator[tuple[Int[Tensor, " B"], Float[Tensor, "B V"]]]:
    """The likeliest next token of each sequence and its logits, ``n_new`` times."""
    cache = KVCache(model.config, len(tokens), tokens.shape[1] + n_new, tokens.device)
    for _ in range(n_new):
        hidden, _ = model.hidden(tokens, None, cache)
        logits = model.head(hidden[:, -1]).float()
        tokens = logits.argmax(dim=-1)[:, None]
        advance()
        yield tokens[:, 0], logits


def among_strangers(
    model: Transformer,
    setting: Setting,
    prompts: Int[Tensor, "P S"],
    strangers: Int[Tensor, "N S"],
    *,
    n_new: int,
    trials: int = 30,
    batch: int = 16,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> Outcome:
    """Continue each prompt ``trials`` times, each in a ``batch`` of its own with other strangers.

    All trials of a prompt are computed at once, as batches that share nothing. ``advance`` is called after each step.
    """
    generator = torch.Generator().manual_seed(seed)
    unique, difference, prefill, decode = [], 0.0, Drops(), Drops()
    for prompt in prompts:
        rows, slots = [], []
        for _ in range(trials):
            others = strangers[torch.randperm(len(strangers), generator=generator)[: batch - 1]]
            slot = int(torch.randint(batch, (), generator=generator)) if setting.place == "any" else 0
            rows.append(torch.cat([others[:slot], prompt[None], others[slot:]]))
            slots.append(slot)
        mine = torch.arange(trials) * batch + torch.tensor(slots)
        completions = []
        with sharing(model, setting, trials) as counted:
            counted[-1] = prefill
            for step, (chosen, logits) in enumerate(greedily(model, torch.cat(rows), n_new, advance)):
                completions.append(chosen[mine])
                if step == 0:
                    counted.append(decode)
                    first = logits[mine]
                    difference = max(difference, float((first.amax(dim=0) - first.amin(dim=0)).max()))
        unique.append(len(set(map(tuple, torch.stack(completions, dim=1).tolist()))))
    return Outcome(unique, trials, difference, prefill, decode)


def by_batch_size(
    model: Transformer,
    prompts: Int[Tensor, "P S"],
    strangers: Int[Tensor, "N S"],
    *,
    n_new: int,
    largest: int = 16,
    bf16: bool = False,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> Outcome:
    """The rival: each prompt once in a batch of each size up to ``largest``, without a capacity."""
    generator = torch.Generator().manual_seed(seed)
    autocast = torch.autocast(prompts.device.type, torch.bfloat16) if bf16 else nullcontext()
    unique, difference = [], 0.0
    with sharing(model, Setting(None), 1), autocast:
        for prompt in prompts:
            completions, firsts = set(), []
            for size in range(1, largest + 1):
                others = strangers[torch.randperm(len(strangers), generator=generator)[: size - 1]]
                steps = list(greedily(model, torch.cat([prompt[None], others]), n_new))
                completions.add(tuple(int(chosen[0]) for chosen, _ in steps))
                firsts.append(steps[0][1][0])
                advance()
            first = torch.stack(firsts)
            difference = max(difference, float((first.amax(dim=0) - first.amin(dim=0)).max()))
            unique.append(len(completions))
    return Outcome(unique, largest, difference)


@torch.no_grad()
def exposure(
    model: Transformer,
    setting: Setting,
    prompts: Int[Tensor, "P S"],
    strangers: Int[Tensor, "N S"],
    *,
    trials: int = 30,
    batch: int = 16,
    seed: int = 0,
) -> Exposure:
    """Swap one request ``trials`` times, and look at the prompt's logits.

    The prompt is the last of its batch and the other the first; the other way round where the setting has it first.
    """
    generator = torch.Generator().manual_seed(seed)
    swapped, copied, flips = 0.0, 0.0, 0
    for prompt in prompts:
        drawn = strangers[torch.randperm(len(strangers), generator=generator)]
        attackers = torch.cat([drawn[batch - 2 : batch - 1 + trials], prompt[None]])
        ends = [(attacker, prompt) if setting.place == "any" else (prompt, attacker) for attacker in attackers]
        tokens = torch.cat([torch.cat([first[None], drawn[: batch - 2], last[None]]) for first, last in ends])
        with sharing(model, setting, len(attackers)):
            hidden, _ = model.hidden(tokens)
        logits = model.head(hidden[batch - 1 if setting.place == "any" else 0 :: batch]).float()
        change = (logits - logits[0]).abs().amax(dim=(1, 2))
        swapped, copied = max(swapped, float(change[1:-1].max())), max(copied, float(change[-1]))
        flips += int((logits[1:-1, -1].argmax(dim=-1) != logits[0, -1].argmax()).sum())
    return Exposure(swapped, flips / (trials * len(prompts)), copied)
