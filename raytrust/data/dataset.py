"""What every source becomes: a training and a test set of equally sized images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_LISTED = 20  # classes at most that a summary names
# Test images below which a summary says how uncertain their accuracy is: 98 / sqrt(400) is about five points.
_FEW = 400


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set of equally sized images. `load` guarantees what the fields say; all are on the CPU."""

    name: str  # "digits", "cifar10", or the stem of the file, or the name of the folder
    train_images: Tensor = field(repr=False)  # uint8 (n, channels, height, width), contiguous; channels is 1 or 3
    train_labels: Tensor = field(repr=False)  # int64 (n,)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    classes: int  # labels are 0..classes-1; not each needs to have images
    class_names: tuple[str, ...] = field(default=(), repr=False)  # by label; empty: classes have numbers alone
    notes: tuple[str, ...] = field(default=(), repr=False)  # sentences: where the test images are from, what was done

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.train_images.shape[2], self.train_images.shape[3]

    @property
    def mean(self) -> Tensor:
        """Mean of each channel of `train_images` scaled to [0, 1]: float32 (channels,)."""
        return self._moments[0]

    @property
    def std(self) -> Tensor:
        """Population standard deviation of each channel, like `mean`; at least 1e-3, so that dividing by it is safe."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        # A pixel has 256 values, so a histogram gives both moments exactly and in little memory.
        flat = self.train_images.transpose(0, 1).flatten(1)
        share = torch.stack([channel.bincount(minlength=256) for channel in flat]).double() / flat.shape[1]
        level = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ level
        variance = (share * (level - mean[:, None]) ** 2).sum(dim=1)
        return mean.float(), variance.sqrt().clamp(min=1e-3).float()

    def class_name(self, label: int) -> str:
        """What a class is called: its number where it has no name."""
        return self.class_names[label] if len(self.class_names) == self.classes else str(label)

    def summary(self) -> str:
        """Say in a few short lines what was understood: images, sizes and where from, the classes, what is missing."""
        height, width = self.image_size
        colours = "grey" if self.channels == 1 else f"{self.channels} channels"
        images = f"{len(self.train_labels)} training and {len(self.test_labels)} test images"
        lines = [" ".join((f"{self.name}: {images}, {height}x{width}, {colours}.", *self.notes)), self._classes_line()]
        if (tested := len(self.test_labels)) < _FEW:
            # The widest 95 % interval of a share, by the normal approximation at one half.
            uncertain = 98 / tested**0.5
            lines.append(f"Few images: accuracy on {tested} is known to within {min(100, round(uncertain))} points.")
        return "\n".join(lines)

    def _classes_line(self) -> str:
        """The classes with their numbers of training images, those without any last."""
        counts = self.train_labels.bincount(minlength=self.classes).tolist()
        held = {self.class_name(label): count for label, count in enumerate(counts) if count}
        empty = [self.class_name(label) for label, count in enumerate(counts) if not count]
        if len(held) <= _LISTED:
            line = f"{len(held)} classes: " + ", ".join(f"{name} ({count})" for name, count in held.items()) + "."
        else:
            line = f"{len(held)} classes of {min(held.values())} to {max(held.values())} training images each."
        if empty:
            shown = ", ".join(empty[:_LISTED]) + (", ..." if len(empty) > _LISTED else "")
            line += f" Without training images: {shown}; the network has outputs for them all the same."
        return line

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the four arrays, with their shapes, and `classes`.

        Equal pixels and labels in equal order give equal fingerprints, whatever the file, its format and its name.
        """
        digest = hashlib.sha256(f"{self.classes}".encode())
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            array = tensor.numpy(force=True)
            # With the shape, as equal bytes in another shape are other images.
            digest.update(f"|{array.dtype.name}{array.shape}|".encode())
            # In one byte order, so that the digits are the same on every machine.
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).data)
        return digest.hexdigest()[:16]
