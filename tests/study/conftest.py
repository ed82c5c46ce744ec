"""Records made by hand, of which a test says only what it is about.

The fixture ``records`` holds the functions below: ``records.of``, ``records.uniform``, ``records.one_hot``, ...
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import default_rng

from moe.study.record import EMPTY, Layer, Record


def record_of(
    selected: Any,
    n_experts: int | Sequence[int] | None = None,
    *,
    dropped: Any = None,
    weights: Any = None,
    scores: Any = None,
    blocks: Sequence[int] | None = None,
    domains: tuple[str, ...] | None = None,
    **columns: Any,
) -> Record:
    """A record of L layers and N tokens: ``selected`` is [L][N][K], nested lists or arrays (K may differ by layer).

    n_experts: E of all layers or of each; the largest number seen plus one unless said. dropped, weights: [L][N][K];
    nothing is dropped, and held places share 1, unless said. scores: [L][N][E] or None. blocks: 0, 1, ... unless said.
    columns: token_id, target_id, predicted_id, loss, position, sequence, domain: [N] or one number for all, 0 unless
    said; position counts from 0 in each sequence; vocabulary, source and step as in Record.
    """
    chosen = [np.asarray(layer, np.int32) for layer in selected]
    n_tokens = len(chosen[0])
    numbers = [int(layer.max(initial=0)) + 1 for layer in chosen]
    if isinstance(n_experts, int):
        numbers = [n_experts] * len(chosen)
    elif n_experts is not None:
        numbers = list(n_experts)
    layers = []
    for index, (places, number) in enumerate(zip(chosen, numbers, strict=True)):
        held = places != EMPTY
        layers.append(
            Layer(
                index if blocks is None else blocks[index],
                number,
                places,
                (held / np.maximum(held.sum(axis=1, keepdims=True), 1)).astype(np.float32)
                if weights is None
                else np.asarray(weights[index], np.float32),
                np.zeros(places.shape, np.bool_) if dropped is None else np.asarray(dropped[index], np.bool_),
                None if scores is None else np.asarray(scores[index], np.float16),
            )
        )

    def column(name: str, dtype: type = np.int32) -> np.ndarray:
        return np.array(np.broadcast_to(np.asarray(columns.pop(name, 0), dtype), n_tokens))

    sequence, domain = column("sequence"), column("domain")
    _, start, number = np.unique(sequence, return_index=True, return_inverse=True)
    columns.setdefault("position", np.arange(n_tokens) - start[number])
    return Record(
        token_id=column("token_id"),
        target_id=column("target_id"),
        predicted_id=column("predicted_id"),
        loss=column("loss", np.float32),
        position=column("position"),
        sequence=sequence,
        domain=domain,
        domains=domains or tuple("abcdefghijklmnopqrstuvwxyz"[: int(domain.max(initial=0)) + 1]),
        layers=tuple(layers),
        **columns,
    )


def any_places(generator: np.random.Generator, shape: tuple[int, int], n_experts: int) -> np.ndarray:
    """[N, K] different experts for each token, all choices equally likely."""
    return generator.random((shape[0], n_experts)).argsort(axis=1)[:, : shape[1]].astype(np.int32)


def uniform(n_tokens: int, n_experts: int, top_k: int, n_layers: int = 1, seed: int = 0, **columns: Any) -> Record:
    """Routing that knows nothing: each token goes to ``top_k`` different experts at random, in each layer anew."""
    generator = default_rng(seed)
    return record_of(
        [any_places(generator, (n_tokens, top_k), n_experts) for _ in range(n_layers)], n_experts, **columns
    )


def balanced(n_tokens: int, n_experts: int, top_k: int, n_layers: int = 1, **columns: Any) -> Record:
    """Perfect balance: token n goes to experts n, n + 1, ..., n + top_k - 1 (mod E), in each layer."""
    places = (np.arange(n_tokens)[:, None] + np.arange(top_k)) % n_experts
    return record_of([places] * n_layers, n_experts, **columns)


def one_hot(n_tokens: int, n_experts: int, top_k: int = 1, n_layers: int = 1, **columns: Any) -> Record:
    """Collapse: every token goes to experts 0, 1, ..., top_k - 1."""
    return record_of([np.tile(np.arange(top_k), (n_tokens, 1))] * n_layers, n_experts, **columns)


def half_dead(n_tokens: int, n_experts: int, top_k: int, n_layers: int = 1, seed: int = 0, **columns: Any) -> Record:
    """Routing at random to the first half of the experts; none goes to the others."""
    generator = default_rng(seed)
    return record_of(
        [any_places(generator, (n_tokens, top_k), n_experts // 2) for _ in range(n_layers)], n_experts, **columns
    )


def planted(
    n_domains: int,
    experts_per_domain: int,
    top_k: int,
    n_layers: int = 1,
    *,
    purity: float = 1.0,
    sequences_per_domain: int = 10,
    length: int = 50,
    n_token_ids: int = 20,
    seed: int = 0,
) -> Record:
    """Domain d owns experts d·m to d·m + m - 1, m = ``experts_per_domain``.

    A token goes to ``top_k`` of its domain's experts at random with probability ``purity``, else to any of all; the
    same holds in each layer. Sequences are of one domain, token ids are drawn without regard to it.
    """
    generator = default_rng(seed)
    n_tokens, n_experts = n_domains * sequences_per_domain * length, n_domains * experts_per_domain
    sequence = np.repeat(np.arange(n_domains * sequences_per_domain), length)
    domain = sequence // sequences_per_domain
    selected = []
    for _ in range(n_layers):
        own = any_places(generator, (n_tokens, top_k), experts_per_domain) + domain[:, None] * experts_per_domain
        anywhere = any_places(generator, (n_tokens, top_k), n_experts)
        selected.append(np.where(generator.random((n_tokens, 1)) < purity, own, anywhere))
    token_id = generator.integers(0, n_token_ids, n_tokens)
    return record_of(selected, n_experts, sequence=sequence, domain=domain, token_id=token_id)


class Records:
    """The functions of this file, for tests: they cannot import a conftest."""

    of = staticmethod(record_of)
    uniform = staticmethod(uniform)
    balanced = staticmethod(balanced)
    one_hot = staticmethod(one_hot)
    half_dead = staticmethod(half_dead)
    planted = staticmethod(planted)


@pytest.fixture(scope="session")
def records() -> type[Records]:
    """Records made by hand: ``records.of([[[0, 1], [2, 3]]])`` is two tokens in one layer."""
    return Records


# ------------------------------------------------------------------------------------------------------- a run to study

CONFIGURATION = """\
model:
  n_layers: 2
  d_model: 16
  max_seq: 64
  attention: {n_heads: 2, head_dim: 8}
  experts: {n_experts: 4, d_ff: 8}
data: {corpus: corpus.yaml, cache: CACHE, vocab_size: 300, sequence_length: 16, validation_bytes: 1500}
training: {steps: 4, batch_size: 4, device: cpu, precision: fp32, checkpoint_every: 2, record_every: 2}
"""


def write_herds(folder: Path) -> Path:
    """Write a corpus of sheep and goats to ``folder``, and the configuration of a run of four steps; return the latter.

    The run has checkpoints after steps 2 and 4, and records at 0, 2 and 4.
    """
    for herd in ("sheep", "goats"):
        (folder / herd).mkdir()
        for number in range(30):
            text = " ".join(f"{herd} {count} jump" for count in range(number, number + 12))
            (folder / herd / f"{number}.txt").write_text(text)
    (folder / "corpus.yaml").write_text(
        "".join(f"- {{domain: {herd}, kind: files, include: {herd}/*.txt}}\n" for herd in ("sheep", "goats"))
    )
    (folder / "tiny.yaml").write_text(CONFIGURATION.replace("CACHE", str(folder / "cache")))
    return folder / "tiny.yaml"


@pytest.fixture(scope="session")
def herds() -> Callable[[Path], Path]:
    """:func:`write_herds`, since tests cannot import a conftest."""
    return write_herds
