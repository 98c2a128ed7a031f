"""What an image looks like: priors on candidates."""

from __future__ import annotations

from torch import Tensor


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of vertical plus of horizontal neighbours (anisotropic TV, as in Geiping et al. 2020).

    x: (candidates, batch, channels, height, width). Returns (candidates,), at least 0, and 0 for constant images.
    """
    rows = (x[..., 1:, :] - x[..., :-1, :]).abs()
    columns = (x[..., :, 1:] - x[..., :, :-1]).abs()
    return rows.flatten(1).mean(1) + columns.flatten(1).mean(1)
