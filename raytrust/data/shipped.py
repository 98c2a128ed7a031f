"""The images that scikit-learn and scikit-image ship: they need neither a file nor a network."""

from __future__ import annotations

import numpy as np

from raytrust.data.arrays import DRAWN, Source, stratified_split


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
