"""Reconstructions beside their originals: which belongs to which, floors, identification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytrust.attacks.inversion import Candidates
from raytrust.leak.observation import Capture
from raytrust.metrics.images import mse, ssim_table


class Floors:
    """What is known of the private images without any attack. batches: each (batch, ...); references: (m, ...)."""

    def __init__(self, batches: Sequence[NDArray[np.float32]], references: NDArray[np.float32]):
        self.references = references
        self.mean_image = ssim_table(np.concatenate(batches), references.mean(0, keepdims=True))[:, 0].tolist()
        self.other_image = [value for batch in batches for value in self._others(ssim_table(batch, references))]

    @staticmethod
    def _others(table: NDArray[np.float64]) -> list[float]:
        """What random other images reach, in the mean: as many as the batch has, assigned as reconstructions are."""
        size, m = table.shape
        starts = range(0, m - size + 1, size) if size > 1 else range(m)
        reached = []
        for start in starts:
            part = table[:, start : start + size]
            # Reconstructions of a batch are assigned to their best matches, which raises SSIM: chance gets the same
            # favour.
            rows, columns = assigned(part)
            reached.append(part[rows, columns])
        # With fewer references than images no whole batch can be drawn, and the plain mean has to do.
        return np.mean(reached or [table.mean(1)], axis=0).tolist()

    def identified(self, reconstructions: NDArray[np.float32], truth: list[float]) -> list[bool]:
        """By SSIM: truth holds that of each reconstruction with its original."""
        rivals = ssim_table(reconstructions, self.references).max(1)
        # A reconstruction as near to another image as to its own identifies nobody: a tie is lost.
        return [t > rival for t, rival in zip(truth, rivals.tolist(), strict=True)]

    def identified_by_mse(self, reconstructions: NDArray[np.float32], truth: list[float]) -> list[bool]:
        rivals = [min(mse(image, r) for r in self.references) for image in reconstructions]
        return [t < rival for t, rival in zip(truth, rivals, strict=True)]


def match(images: Tensor, truth: Tensor) -> tuple[Tensor, list[float]]:
    """The images in the truth's order, and their SSIM."""
    table = ssim_table(images.numpy(), truth.numpy())
    rows, columns = assigned(table)
    # By the truth's columns: the inverse permutation would pair images with strangers, and no error would say so.
    order = rows[np.argsort(columns)]
    return images[torch.from_numpy(order)], [float(table[i, j]) for j, i in enumerate(order)]


def label_accuracy(captures: Sequence[Capture], candidates: Sequence[Candidates]) -> list[float] | None:
    shares = []
    for capture, found in zip(captures, candidates, strict=True):
        # Labels that were granted were not recovered: their 100 % would be no merit of the attack.
        if capture.seen.labels is not None or capture.seen.targets is not None or found.labels is None:
            return None
        recovered, true = (Counter(x.tolist()) for x in (found.labels[found.pick()], capture.truth.labels))
        shares.append((recovered & true).total() / true.total())
    return shares


def perceptual_distance() -> Callable[[Tensor, Tensor], list[float]] | None:
    """LPIPS (Zhang et al. 2018) with AlexNet, of images in [0, 1]: (n, channels, height, width) twice -> n values.

    None unless the package `lpips` is installed and torchvision's AlexNet weights, which it builds on, are in torch's
    cache: nothing is downloaded. Images of one channel are repeated to three.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints"
    # Without its weights the network would download them; a measurement must not hang on a server.
    if find_spec("lpips") is None or not list(weights.glob("alexnet-*.pth")):
        return None
    network = import_module("lpips").LPIPS(net="alex", verbose=False).eval()

    def distance(a: Tensor, b: Tensor) -> list[float]:
        with torch.no_grad():
            pair = [x.expand(-1, 3, -1, -1) for x in (a, b)]
            return network(*pair, normalize=True).flatten().tolist()

    return distance


def assigned(table: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the assignment of greatest sum. Raises ValueError where SciPy is needed and missing."""
    # One image has no choice, so that an audit of single images works in an environment without SciPy.
    if table.shape == (1, 1):
        return np.array([0]), np.array([0])
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError:
        raise ValueError("Expected SciPy for batches of several images: pip install scipy.") from None
    rows, columns = linear_sum_assignment(table, maximize=True)
    return rows, columns
