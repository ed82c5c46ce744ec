"""What the text viewer holds: some tokens of each domain and their routing in all layers, packed for a page."""

import base64
from typing import Any

import numpy as np

from moe.study.measurement import Array
from moe.study.record import Layer, Record

TOKENS_PER_DOMAIN = 1200
FEWEST_TOKENS = 100
PACKED_BYTES = 1_500_000
"""with more layers and places there are fewer tokens of each domain, so that the page stays small"""
LOSS_STEP = 1e-3
"""nats; losses are whole numbers of it"""
WEIGHT_STEPS = 32_767
"""from 0 to the largest weight of a layer"""


def packed_tokens(record: Record, tokens_per_domain: int = TOKENS_PER_DOMAIN) -> dict[str, Any]:
    """The first tokens of each domain, domain after domain, as values that go into JSON.

    ``tokens_per_domain`` at most, fewer where all would take more than :data:`PACKED_BYTES`. Arrays are {type, data}
    with ``data`` the base64 of little-endian numbers; ``experts`` and ``weights`` are [n, K] in rows, and the largest
    number of the type stands for an empty place.
    """
    rows_of = _rows_of_domains(record, tokens_per_domain)
    rows = np.concatenate([*rows_of, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    ids, places = np.unique(record.token_id[rows], return_inverse=True)
    starts = np.flatnonzero(np.diff(record.sequence[rows], prepend=-1) != 0)
    losses = np.nan_to_num(record.loss[rows], nan=0.0, posinf=np.inf) / LOSS_STEP
    return {
        "domains": [{"name": name, "count": len(of)} for name, of in zip(record.domains, rows_of, strict=True)],
        "texts": [record.text_of(int(token_id)) for token_id in ids],
        "text": _packed(places.reshape(-1), len(ids)),
        "starts": [int(start) for start in starts],
        "loss": _packed(np.clip(losses, 0, 65_535).round(), 65_536),
        "loss_step": LOSS_STEP,
        "layers": [_packed_layer(layer, rows) for layer in record.layers],
    }


def _rows_of_domains(record: Record, tokens_per_domain: int) -> list[Array]:
    per_token = 4 + sum(4 * layer.top_k for layer in record.layers)
    room = int(PACKED_BYTES * 0.75 / per_token / max(len(record.domains), 1))
    n_tokens = min(tokens_per_domain, max(room, FEWEST_TOKENS))
    return [np.flatnonzero(record.domain == index)[:n_tokens] for index in range(len(record.domains))]


def _packed_layer(layer: Layer, rows: Array) -> dict[str, Any]:
    assigned = layer.assigned[rows]
    weights = np.where(assigned, np.nan_to_num(layer.weights[rows]), 0.0)
    # Weights can be negative where gates are signed.
    largest = float(np.abs(weights).max(initial=0.0)) or 1.0
    empty = 255 if layer.n_experts < 255 else 65_535
    return {
        "block": layer.block,
        "n_experts": layer.n_experts,
        "top_k": layer.top_k,
        "experts": _packed(np.where(assigned, layer.selected[rows], empty), empty + 1),
        "empty": empty,
        "weights": _packed(np.round(weights / largest * WEIGHT_STEPS) + WEIGHT_STEPS, 2 * WEIGHT_STEPS + 1),
        "weight_step": largest / WEIGHT_STEPS,
        "weight_zero": WEIGHT_STEPS,
        "dropped": _packed(layer.dropped[rows] & assigned, 2) if bool(layer.dropped[rows].any()) else None,
    }


def _packed(values: Array, n_values: int) -> dict[str, str]:
    """Whole numbers below ``n_values`` in the smallest type that holds them."""
    kind = "Uint8" if n_values <= 1 << 8 else "Uint16" if n_values <= 1 << 16 else "Uint32"
    numbers = np.ascontiguousarray(values).astype("<u" + str({"Uint8": 1, "Uint16": 2, "Uint32": 4}[kind]))
    return {"type": kind, "data": base64.b64encode(numbers.tobytes()).decode("ascii")}
