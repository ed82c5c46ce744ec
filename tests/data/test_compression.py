"""Bits per byte of general compressors."""

import random
import shutil
import subprocess

import pytest

from moe.data.compression import compression_baselines

TEXT = b"The quick brown fox jumps over the lazy dog, again and again. " * 40


def test_random_bytes_cost_eight_bits_each_and_the_header() -> None:
    noise = random.Random(0).randbytes(50_000)
    found = compression_baselines({"noise": noise}).pooled
    assert 8 < found.gzip < 8.01
    assert 8 < found.xz < 8.02


def test_pooled_is_the_concatenation_so_a_repeated_domain_is_nearly_free() -> None:
    noise = random.Random(0).randbytes(10_000)
    found = compression_baselines({"one": noise, "two": noise})
    assert found.domains["one"] == found.domains["two"]
    # The second copy is a reference to the first, within both windows: half the bits per byte.
    assert found.pooled.xz == pytest.approx(found.domains["one"].xz / 2, rel=0.02)
    assert found.pooled.gzip == pytest.approx(found.domains["one"].gzip / 2, rel=0.05)


@pytest.mark.skipif(shutil.which("xz") is None, reason="needs the program xz")
def test_xz_equals_the_command_line() -> None:
    compressed = subprocess.run(["xz", "-9e", "-c", "-T1"], input=TEXT, capture_output=True, check=True).stdout
    assert compression_baselines({"text": TEXT}).pooled.xz == 8 * len(compressed) / len(TEXT)


@pytest.mark.skipif(shutil.which("gzip") is None, reason="needs the program gzip")
def test_gzip_is_close_to_the_command_line() -> None:
    compressed = subprocess.run(["gzip", "-9", "-c"], input=TEXT, capture_output=True, check=True).stdout
    assert compression_baselines({"text": TEXT}).pooled.gzip == pytest.approx(8 * len(compressed) / len(TEXT), rel=0.05)


def test_an_empty_text_has_no_bits_per_byte() -> None:
    with pytest.raises(ValueError, match="docs"):
        compression_baselines({"python": TEXT, "docs": b""})
