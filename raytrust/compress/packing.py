"""Small numbers as packed bits: what quantised methods put on the wire. Least significant bits first."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor


def pack_signs(x: Tensor, out: Tensor) -> None:
    """(n,) -> one bit an entry in `out`, uint8 (ceil(n/8),): 1 where the entry is negative, 0 where it is not.

    Zero counts as positive, on the wire as in whatever is computed from it.
    """
    negative = x < 0
    if x.device.type == "cpu":
        out.numpy()[:] = np.packbits(negative.numpy(), bitorder="little")
    else:
        out.copy_(_combine(negative.to(torch.uint8), 1))


def unpack_signs(packed: Tensor, start: int, stop: int) -> Tensor:
    """The entries start..stop as -1.0 or 1.0, float32 (stop - start,), new."""
    first = start // 8
    rows = packed[first : (stop + 7) // 8].to(torch.int32)
    return _signs(packed.device).index_select(0, rows).view(-1)[start - 8 * first : stop - 8 * first]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(n,) of 0..2**bits - 1, uint8 -> uint8 (ceil(n bits / 8),), for 1, 2, 4 or 8 bits."""
    return codes if bits == 8 else _combine(codes, bits)


def unpack_codes(packed: Tensor, bits: int, count: int, zero: int) -> Tensor:
    """The first `count` codes, less `zero`, as float32 (count,)."""
    if bits == 8:
        return packed[:count].float().sub_(zero)
    return (_codes(bits, packed.device) - zero).index_select(0, packed.to(torch.int32)).view(-1)[:count]


def pack_words(words: Tensor, width: int) -> Tensor:
    """(n,) of 0..2**width - 1, int64 -> uint8 (ceil(n width / 8),): one word after the other, up to 62 bits each."""
    bits = (words[:, None] >> torch.arange(width, device=words.device)) & 1
    return _combine(bits.view(-1).to(torch.uint8), 1)


def unpack_words(packed: Tensor, width: int, count: int) -> Tensor:
    """Inverse of `pack_words`: int64 (count,)."""
    shifts = torch.arange(8, device=packed.device)
    bits = ((packed[:, None].long() >> shifts) & 1).view(-1)[: count * width].view(count, width)
    return (bits << torch.arange(width, device=packed.device)).sum(1)


def _combine(codes: Tensor, bits: int) -> Tensor:
    """Pairs of codes become codes of twice the width until a code is a byte."""
    missing = -len(codes) % (8 // bits)
    codes = torch.cat([codes, codes.new_zeros(missing)]) if missing else codes
    while bits < 8:
        codes = codes[0::2] | (codes[1::2] << bits)
        bits *= 2
    return codes


@cache
def _signs(device: torch.device) -> Tensor:
    """(256, 8): the signs that a byte stands for."""
    return 1 - 2 * _codes(1, device)


@cache
def _codes(bits: int, device: torch.device) -> Tensor:
    """(256, 8 / bits): the codes that a byte stands for, float32."""
    bytes_ = torch.arange(256, device=device)[:, None]
    return ((bytes_ >> torch.arange(0, 8, bits, device=device)) & (2**bits - 1)).float()
