"""What general compressors make of the held-out text, in the unit of the model's loss: bits per byte."""

import gzip
import lzma
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CompressionBaseline:
    """Compressed bits per byte of text, each the size of the whole compressed file: headers are paid for."""

    gzip: float
    """``gzip -9``; by zlib, whose output differs from that of the GNU program by less than a hundredth"""
    xz: float
    """``xz -9e``"""


@dataclass(frozen=True)
class CompressionBaselines:
    """Each domain by itself, and all of them in one file."""

    domains: Mapping[str, CompressionBaseline]
    pooled: CompressionBaseline


def compression_baselines(texts: Mapping[str, bytes]) -> CompressionBaselines:
    """Bits per byte of ``gzip -9`` and ``xz -9e`` on each of ``texts`` and on their concatenation, in order.

    Raises ValueError for a text without a byte: it has no bits per byte.
    """
    for name, text in texts.items():
        if not text:
            raise ValueError(f"{name}: no text to compress")
    return CompressionBaselines(
        domains={name: _baseline(text) for name, text in texts.items()},
        pooled=_baseline(b"".join(texts.values())),
    )


def _baseline(text: bytes) -> CompressionBaseline:
    # A fixed time stamp: the size does not depend on it, and the bytes become the same every time.
    gzipped = gzip.compress(text, compresslevel=9, mtime=0)
    xz = lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME)
    return CompressionBaseline(gzip=8 * len(gzipped) / len(text), xz=8 * len(xz) / len(text))
