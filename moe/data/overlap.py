"""How much of each document stands in other documents too: what must not be held out, or memory would pass for skill.

Licences, generated headers and forms come in many near-copies. Removing exact duplicates leaves them, and a held-out
near-copy of a training text measures what was remembered.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RUN = 13
"""words in a row that count as the same text in two documents: more than chance and idiom give"""


def repeated_shares(texts: Sequence[str]) -> list[float]:
    """For each text the share of its distinct runs of 13 words (case and layout aside) that another text has too.

    A text of fewer words has no run, and a share of 0. Runs are compared by a 64-bit hash that is the same everywhere.
    """
    runs = [_runs(text) for text in texts]
    if not runs or sum(map(len, runs)) == 0:
        return [0.0] * len(texts)
    _, place, count = np.unique(np.concatenate(runs), return_inverse=True, return_counts=True)
    repeated = (count > 1)[place]
    ends = np.cumsum([len(own) for own in runs])
    return [
        float(repeated[end - len(own) : end].mean()) if len(own) else 0.0 for own, end in zip(runs, ends, strict=True)
    ]


def _runs(text: str) -> npt.NDArray[np.uint64]:
    """Hashes of the distinct runs of a text: a polynomial in the words' hashes, modulo 2⁶⁴."""
    words = text.lower().split()
    if len(words) < RUN:
        return np.empty(0, np.uint64)
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    combined = np.zeros(len(words) - RUN + 1, np.uint64)
    for offset in range(RUN):
        combined = combined * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + len(combined)]
    return np.unique(combined)
