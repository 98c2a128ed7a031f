"""What every source is read as; and those that are arrays already: .npz files, and what scikit-learn and scikit-image
ship, which needs neither a file nor a network."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raytrust.data.refusals import reason

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


def read_npz(path: Path) -> Source:
    """The four arrays of a file that has MedMNIST's keys."""
    if not path.exists():
        raise ValueError(f"Expected {path} to be a .npz file, but there is no such file.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"Expected {path} to be a .npz file, got something else or a part of one.")
    arrays: dict[str, np.ndarray] = {}
    reading = "the index"
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            held = archive.files
            for reading in (key for key in KEYS if key in held):
                arrays[reading] = archive[reading]
    except Exception as error:
        # A damaged file can make zipfile, zlib and numpy raise nearly anything.
        hint = "; save images and labels as plain arrays, np.stack(list(images))" if "pickle" in str(error) else ""
        raise ValueError(f"Expected {reading} in {path} to be readable ({reason(error)}){hint}.") from error
    missing = [key for key in KEYS if key not in held]
    if missing:
        raise ValueError(
            f"Expected {path} to hold {' and '.join(missing)}, got only {', '.join(held) or 'an empty archive'}."
        )
    for key, array in arrays.items():
        # For a member that is no .npy, numpy returns its bytes.
        if not isinstance(array, np.ndarray):
            raise ValueError(f"Expected {key} in {path} to be an array, got {type(array).__name__}.")
    return Source(arrays, notes=("Test images: as stored in the file.",))


def digits(seed: int) -> Source:
    """The 1797 digits of the UCI's test set, 8x8 pixels, in ten classes (Alpaydin & Kaynak 1998)."""
    from sklearn.datasets import load_digits

    stored = load_digits()
    images = np.rint(stored.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    return Source(stratified_split(images, stored.target, seed), notes=(DRAWN,))


def faces(seed: int) -> Source:
    """100 faces and 100 pieces of background, 25x25 pixels, grey, of Labeled Faces in the Wild (Huang et al. 2012)."""
    from skimage.data import lfw_subset

    images = np.rint(lfw_subset() * 255).astype(np.uint8)  # stored as floats in [0, 1], the faces first
    labels = np.repeat([0, 1], 100)
    return Source(stratified_split(images, labels, seed), ("face", "no face"), (DRAWN,))
