"""Against plain Python: one bit, or one code, at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrust.compress.packing import (
    compare,
    pack_bits,
    pack_codes,
    pack_words,
    unpack_codes,
    unpack_signs,
    unpack_words,
)

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, float("inf"), -float("inf")]
lengths = st.integers(0, 70)


def bits_of(packed: list[int]) -> list[int]:
    """The lowest bit of the first byte first."""
    return [byte >> i & 1 for byte in packed for i in range(8)]


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=40))
def test_bits(bits: list[bool]) -> None:
    packed = torch.full((-(-len(bits) // 8),), 255, dtype=torch.uint8)
    pack_bits(torch.tensor(bits, dtype=torch.bool), packed)
    expected = bits_of(packed.tolist())
    assert expected[: len(bits)] == [int(b) for b in bits]
    assert not any(expected[len(bits) :])


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 2**40 - 1), st.sampled_from([1.0, 0.25, 3e30]))
def test_signs(length: int, pattern: int, scale: float) -> None:
    packed = list(pattern.to_bytes(5, "little"))[:length]
    out, rows = torch.empty(8 * length), torch.empty(length, dtype=torch.int64)
    unpack_signs(torch.tensor(packed, dtype=torch.uint8), scale, out, rows)
    assert out.tolist() == [float(np.float32(-scale if bit else scale)) for bit in bits_of(packed)]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@settings(deadline=None)
@given(lengths, st.integers(0, 99))
def test_codes(bits: int, length: int, seed: int) -> None:
    """Byte j of L holds the entries j, j + L, j + 2 L, ... from its lowest bits on."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (length,), generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    size = -(-length * bits // 8)
    assert (packed.dtype, packed.shape) == (torch.uint8, (size,))
    expected = [0] * size
    for i, code in enumerate(codes.tolist()):
        expected[i % size] |= code << bits * (i // size)
    assert packed.tolist() == expected
    for dtype in (torch.float32, torch.uint8):
        out = torch.full((length,), 77, dtype=dtype)
        assert unpack_codes(packed, bits, out) is out
        assert torch.equal(out, codes.to(dtype))


@settings(deadline=None)
@given(st.integers(1, 62), st.integers(0, 20), st.randoms(use_true_random=False))
def test_words(width: int, count: int, random: object) -> None:
    """One after the other, without a gap between them."""
    words = [random.getrandbits(width) for _ in range(count)]  # type: ignore[attr-defined]
    packed = pack_words(torch.tensor(words, dtype=torch.int64), width)
    assert (packed.dtype, packed.shape) == (torch.uint8, (-(-count * width // 8),))
    together = sum(word << i * width for i, word in enumerate(words))
    assert int.from_bytes(bytes(packed.tolist()), "little") == together
    assert unpack_words(packed, width, count).tolist() == words


@pytest.mark.parametrize(("operation", "value"), [(np.less, 0.0), (np.greater_equal, 1.0), (np.greater_equal, 1e-45)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_compare(operation: np.ufunc, value: float, dtype: torch.dtype) -> None:
    x = torch.tensor([x for x in SPECIAL if dtype == torch.float32 or abs(x) != 1e-45], dtype=dtype)
    value = value if dtype == torch.float32 else max(value, 0.0) and 1.0
    out = torch.empty(len(x), dtype=torch.bool)
    compare(operation, x, value, out)
    expected = [a < value if operation is np.less else a >= value for a in x.tolist()]
    assert out.tolist() == expected
