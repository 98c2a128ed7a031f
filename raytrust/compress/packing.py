"""Small numbers as packed bits: what quantised methods put on the wire."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor


def compare(operation: np.ufunc, x: Tensor, value: float, out: Tensor) -> None:
    """Which entries of x are `operation` (numpy's less or greater_equal) `value`, bool, in `out`."""
    # On the CPU numpy does it faster than torch.
    if x.device.type == "cpu" and x.dtype == torch.float32:
        operation(x.numpy(), np.float32(value), out=out.numpy())
    else:
        torch.lt(x, value, out=out) if operation is np.less else torch.ge(x, value, out=out)


def pack_bits(bits: Tensor, out: Tensor) -> None:
    """(n,) of bool -> uint8 (ceil(n/8),): eight entries a byte, the first one in the lowest bit."""
    if bits.device.type == "cpu":
        out.numpy()[:] = np.packbits(bits.numpy(), bitorder="little")
    else:
        # torch has no packbits: a sum of shifted bits, on the device where they are.
        missing = -len(bits) % 8
        rows = torch.cat([bits, bits.new_zeros(missing)]).view(-1, 8)
        out.copy_((rows.long() << torch.arange(8, device=bits.device)).sum(1))


def unpack_signs(packed: Tensor, scale: float, out: Tensor, rows: Tensor) -> None:
    """uint8 (n/8,) -> float32 (n,) in `out`: -scale where the bit is set, else scale. rows: int64 (n/8,), scratch."""
    # A byte is a row of a table of 256: one lookup for eight entries, where shifts and masks would be eight passes.
    table, rows, eights = _signs(packed.device) * scale, rows.copy_(packed), out.view(-1, 8)
    if packed.device.type == "cpu":
        # numpy copies rows of 32 bytes as such, and takes half as long as torch. A byte is never beyond the table:
        # "clip" is for numpy to write to `out` straight away, not by way of a copy.
        np.take(table.numpy(), rows.numpy(), axis=0, out=eights.numpy(), mode="clip")
    else:
        torch.index_select(table, 0, rows, out=eights)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(n,) of 0..2**bits - 1, uint8 -> uint8 (ceil(n bits / 8),), for 1, 2, 4 or 8 bits.

    By planes: with L bytes in all, byte j holds the entries j, j + L, j + 2 L, ... from the lowest bits on.
    """
    # By planes, because then whole vectors are shifted; neighbours in one byte would be strided reads.
    planes = 8 // bits
    if planes == 1:
        return codes
    length = -(-len(codes) // planes)
    packed = codes[:length].clone()
    for i in range(1, planes):
        plane = codes[i * length : (i + 1) * length]
        packed[: len(plane)] |= plane << (i * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int, out: Tensor) -> Tensor:
    """Inverse of `pack_codes`, for as many codes as `out` is long, in its dtype. Returns `out`."""
    length = len(packed)
    for i in range(8 // bits):
        plane = out[i * length : (i + 1) * length]
        codes = packed[: len(plane)]
        # The last plane is what a shift leaves, and the first one needs none.
        if i > 0:
            codes = codes >> (i * bits)
        if (i + 1) * bits < 8:
            codes = codes & (2**bits - 1)
        plane.copy_(codes)
    return out


def pack_words(words: Tensor, width: int) -> Tensor:
    """(n,) of 0..2**width - 1, int64 -> uint8 (ceil(n width / 8),): one word after the other, up to 62 bits each."""
    # Word after word, as a width such as 25 bits fills no whole number of planes. There are few words, so that a bool a
    # bit on the way does not matter.
    bits = ((words[:, None] >> torch.arange(width, device=words.device)) & 1).bool().view(-1)
    packed = torch.empty(-(-len(bits) // 8), dtype=torch.uint8, device=words.device)
    pack_bits(bits, packed)
    return packed


def unpack_words(packed: Tensor, width: int, count: int) -> Tensor:
    """Inverse of `pack_words`: int64 (count,)."""
    shifts = torch.arange(8, device=packed.device)
    bits = ((packed[:, None].long() >> shifts) & 1).view(-1)[: count * width].view(count, width)
    return (bits << torch.arange(width, device=packed.device)).sum(1)


@cache
def _signs(device: torch.device) -> Tensor:
    """(256, 8): the signs that a byte stands for."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return 1.0 - 2.0 * bits
