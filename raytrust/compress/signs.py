"""What sign methods share: one bit an entry on the wire, encoded and decoded in pieces that a cache holds.

A zero counts as positive, on the wire as in everything computed from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from raytrust.compress.interface import CHUNK, FlatGradients, Layout, Scratch, chunks
from raytrust.compress.packing import compare, pack_bits, unpack_signs


class SignCode:
    """Gradients of one layout as bits: 1 where an entry is negative, 0 where it is not."""

    def __init__(self, layout: Layout, scratch: Scratch):
        self._layout = layout
        self._scratch = scratch
        self.pieces: list[tuple[int, slice]] = []  # (tensor, where in the flat gradient), within one tensor each
        start = 0
        for i, size in enumerate(layout.sizes):
            self.pieces += [(i, slice(start + part.start, start + part.stop)) for part in chunks(size)]
            start += size

    def encode(self, grads: Sequence[Tensor]) -> Tensor:
        """uint8 (ceil(entries / 8),)."""
        n = self._layout.entries
        like = grads[0] if grads else torch.empty(0)
        packed = self._scratch("packed", (n + 7) // 8, like, torch.uint8)
        if isinstance(grads, FlatGradients):
            for part in chunks(n):
                self.encode_part(grads.flat, part, packed)
            return packed
        negative = self._scratch("negative", n, like, torch.bool)
        # Tensor by tensor, as a bool an entry is a quarter of what one flat copy of the gradients would move.
        for g, part in zip(grads, negative.split(self._layout.sizes), strict=True):
            compare(np.less, g.detach().reshape(-1), 0.0, part)
        for part in chunks(n):
            pack_bits(negative[part], packed[part.start // 8 : (part.stop + 7) // 8])
        return packed

    def encode_part(self, flat: Tensor, part: slice, packed: Tensor) -> None:
        """The bits of some entries of the flat gradient, in their place in `packed`; it starts at a multiple of 8."""
        negative = self._scratch("negative", CHUNK + 8, flat, torch.bool)[: part.stop - part.start]
        compare(np.less, flat[part], 0.0, negative)
        pack_bits(negative, packed[part.start // 8 : (part.stop + 7) // 8])

    def write(self, out: Tensor, packed: Tensor, scales: Iterable[tuple[slice, float]]) -> Tensor:
        """out = scale x sign, for the entries of each slice. Returns out."""
        for part, scale in scales:
            self._unpack(packed, part, scale, out[part])
        return out

    def add(self, x: Tensor, packed: Tensor, scales: Iterable[tuple[slice, float]]) -> Tensor:
        """x += scale x sign, for the entries of each slice. Returns x."""
        for part, scale in scales:
            x[part].add_(self._unpack(packed, part, scale))
        return x

    def _unpack(self, packed: Tensor, part: slice, scale: float, out: Tensor | None = None) -> Tensor:
        """The signs of these entries times `scale`, in `out`, or in a buffer that the next call uses again."""
        first, last = part.start // 8, (part.stop + 7) // 8
        rows = self._scratch("rows", CHUNK // 8 + 2, packed, torch.int64)[: last - first]
        # Whole bytes are written where they belong. A tensor that begins or ends within a byte shares it with its
        # neighbour, so that its bytes are unpacked aside, and its own entries cut out.
        if out is not None and part.start % 8 == 0 and len(out) % 8 == 0:
            unpack_signs(packed[first:last], scale, out, rows)
            return out
        signs = self._scratch("signs", CHUNK + 16, packed)[: 8 * (last - first)]
        unpack_signs(packed[first:last], scale, signs, rows)
        signs = signs[part.start - 8 * first : part.stop - 8 * first]
        return signs if out is None else out.copy_(signs)
