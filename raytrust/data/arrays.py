"""What every source is read as, and how one array of images is split in two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
DRAWN = "Test images: a fifth of each class, drawn by the seed."  # the note on `stratified_split`

Arrays = Mapping[str, np.ndarray]  # KEYS -> images (n, height, width[, channels]) and labels (n[, 1])


@dataclass(frozen=True)
class Source:
    """What was read, not yet checked. class_names: by label, empty where classes have numbers alone. notes: sentences
    on how it was understood, for `Dataset.summary`."""

    arrays: Arrays
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def stratified_split(images: np.ndarray, labels: np.ndarray, seed: int) -> Arrays:
    """Draw ceil(n / 5) test images, within one of a fifth of each class; both parts keep the order of `images`."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    test = np.zeros(len(labels), dtype=bool)
    # Every fifth in the order of classes: rounding is carried on from class to class, so that even small ones give a
    # fair share.
    test[by_class[::5]] = True
    return dict(zip(KEYS, (images[~test], labels[~test], images[test], labels[test]), strict=True))
