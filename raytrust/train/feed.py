"""Batches of a data set, as a model sees them, on the device of a training."""

from __future__ import annotations

import torch
from torch import Tensor

from raytrust.data import Dataset
from raytrust.persample.memory import free_bytes
from raytrust.train.mixing import Images

# Of what is free on a GPU: a data set that takes no more of it lies there whole.
WHOLE = 0.25


class Feed:
    """Some images of a data set by their indices: normalised, on the device, with their labels.

    images: uint8 (n, channels, height, width). labels: (n,). On a GPU a set that is small beside its memory is copied
    there once; a larger one stays in pinned memory, from which each batch is copied while the GPU computes.
    """

    def __init__(self, images: Tensor, labels: Tensor, data: Dataset, device: str):
        self._device = torch.device(device)
        self._mean, self._std = (s.to(device).view(-1, 1, 1) for s in (data.mean, data.std))
        if self._device.type != "cpu" and images.numel() + 8 * labels.numel() <= WHOLE * free_bytes(device):
            images, labels = images.to(device), labels.to(device)
        self._images, self._labels = images, labels

    def __call__(self, indices: Tensor) -> Images:
        """indices: (batch,), on the CPU."""
        if self._images.device != self._device:
            # By way of pinned memory, or the copy would wait for all that the device has to do.
            x, labels = (t[indices].pin_memory() for t in (self._images, self._labels))
        else:
            chosen = indices.to(self._device, non_blocking=True)
            x, labels = self._images[chosen], self._labels[chosen]
        x = x.to(self._device, non_blocking=True).float().div_(255)
        return Images((x - self._mean) / self._std, labels.to(self._device, non_blocking=True))
