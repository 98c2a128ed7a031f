"""The private images of an audit, checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrust.metrics.images import WINDOW
from raytrust.networks.task import Sample, Targets, Task, row_of


@dataclass(frozen=True)
class Private:
    """Images (n, channels, height, width) in [0, 1] and what belongs to each, (n, ...) tensors."""

    images: Tensor
    targets: Targets

    def batch(self, index: int, size: int) -> Private:
        rows = slice(index * size, (index + 1) * size)
        return Private(self.images[rows], row_of(self.targets, rows))

    def without(self, index: int, size: int) -> Private:
        """All but one batch."""
        rows = [i for i in range(len(self.images)) if i // size != index]
        return Private(self.images[rows], row_of(self.targets, rows))


def private(images: Any, labels: Any, inputs: Mapping[str, Any] | None, task: Task) -> Private:
    """Checked: ValueError for images that are no images in [0, 1], and for labels or inputs of another number."""
    target = labels if isinstance(labels, tuple | dict) else _tensor(labels)
    # numpy's default integers and torch's class indices are both int64; others are taken for them.
    if isinstance(target, Tensor) and task.loss is None:
        if target.is_floating_point() or target.ndim != 1:
            mend = "give loss= for anything but classes"
            if target.ndim == 2:
                mend = (
                    "labels[:, 0] of a column"
                    if target.shape[1] == 1
                    else "labels.argmax(1) of one-hot labels, or loss="
                )
            got = f"{tuple(target.shape)} of {target.dtype}"
            raise ValueError(f"Expected labels of shape (n,) and integers, got {got}; {mend}.")
        target = target.long()
    x = images_of(images)
    others = {name: _tensor(value) for name, value in (inputs or {}).items()}
    named = {"labels": target, **others}
    for name, value in named.items():
        if isinstance(value, Tensor) and value.shape[:1] != x.shape[:1]:
            raise ValueError(f"Expected {name} for {len(x)} images, got shape {tuple(value.shape)}.")
    return Private(x, target if isinstance(target, Tensor) and not others else Sample(target, others))


def images_of(images: Any) -> Tensor:
    """(n, channels, height, width) in [0, 1], from a tensor or an array, of floats or of bytes.

    Raises ValueError for anything else.
    """
    x = _tensor(images)
    if x.ndim != 4 or 0 in x.shape or min(x.shape[2:]) < WINDOW:
        raise ValueError(
            f"Expected images of shape (n, channels, height, width), of {WINDOW} pixels or more a side, got "
            f"{tuple(x.shape)}{'; images.permute(0, 3, 1, 2)' * (x.ndim == 4 and x.shape[3] in (1, 3))}."
        )
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    if not bool(x.isfinite().all()):
        raise ValueError("Expected images in [0, 1], got NaN or infinity in them.")
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"Expected images in [0, 1], got [{low:.3g}, {high:.3g}]; where the model takes normalised ones, give mean "
            "and std instead of normalising them."
        )
    return x


def _tensor(value: Any) -> Tensor:
    try:
        return value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected a tensor or an array of numbers, got {type(value).__name__}: {error}") from None
