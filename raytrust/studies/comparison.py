"""Reconstructions beside their originals: which belongs to which, floors, identification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytrust.attacks.inversion import Candidates
from raytrust.leak.observation import Capture, Observation
from raytrust.metrics.images import mse, ssim_table
from raytrust.networks.classifier import final_linear

CHUNK = 25  # images in one pass
SMALLEST = 24  # pixels a side that ST-LPIPS takes

Features: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Floors:
    """What is known of the private images without any attack. batches: each (batch, ...); references: (m, ...).

    features: images -> (n, features), see `features_of`; None where the network has none.
    """

    def __init__(
        self,
        batches: Sequence[NDArray[np.float32]],
        references: NDArray[np.float32],
        features: Features | None = None,
    ):
        self.references = references
        self._features = features
        # Once for all attacks: passes of a hundred images through a large network take seconds.
        self._feature_tables = features and (features(np.concatenate(batches)), features(references))
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

    def identified_by_features(self, reconstructions: NDArray[np.float32]) -> list[bool] | None:
        """The reconstructions in the order of the private images; None without features."""
        if self._features is None or self._feature_tables is None:
            return None
        private, references = self._feature_tables
        found = self._features(reconstructions)
        rivals = [np.linalg.norm(references - one, axis=1).min() for one in found]
        truth = np.linalg.norm(private - found, axis=1)
        return [bool(t < rival) for t, rival in zip(truth, rivals, strict=True)]


def features_of(seen: Observation, device: str = "cpu") -> Features | None:
    """What the attacked network makes of images in [0, 1] before its last linear layer; None where it has none.

    device: where it does. In evaluation mode, so that an image's features are its own, whatever else is in its batch.
    """
    if seen.classes == 0 or seen.targets is not None or seen.task.argument is not None:
        return None
    network = seen.build_model().eval()
    try:
        _, layer = final_linear(network, seen.image_shape, seen.classes)
    except ValueError:
        return None
    # Moved once the layer is known, which a pass on the CPU tells.
    network = network.to(device)
    mean, std = (s.to(device).view(-1, 1, 1) for s in (seen.mean, seen.std))

    @torch.no_grad()
    def features(images: NDArray[np.float32]) -> NDArray[np.float32]:
        parts: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, inputs: parts.append(inputs[0].flatten(1)))
        # A few at a time, as a hundred large images would fill the memory with their activations.
        for some in torch.from_numpy(images).split(CHUNK):
            network((some.to(device) - mean) / std)
        handle.remove()
        return torch.cat(parts).cpu().numpy()

    return features


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
    return _distance("lpips", net="alex")


def shift_tolerant_distance(size: tuple[int, int]) -> Callable[[Tensor, Tensor], list[float]] | None:
    """ST-LPIPS (Ghildyal & Liu 2022) with AlexNet: as `perceptual_distance`, but hardly sees a shift by a pixel.

    It is no LPIPS, whose values are others, but the one such metric found that a package installs with all its weights:
    pip install "raytrust[lpips]". None without it, and for images (height, width) too small for its layers.
    """
    # The last two it imports without asking for them.
    installed = all(find_spec(name) for name in ("stlpips_pytorch", "torchsummary", "IPython"))
    if not installed or min(size) < SMALLEST:
        return None
    return _distance("stlpips_pytorch.stlpips", net="alex", variant="shift_tolerant")


def _distance(module: str, **options: str) -> Callable[[Tensor, Tensor], list[float]]:
    # Both draw random weights first, which the file's replace: the caller's generator must not notice.
    with torch.random.fork_rng(devices=[]):
        network = import_module(module).LPIPS(verbose=False, **options).eval()

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
