"""The images that need neither a file nor a network."""

from __future__ import annotations

import numpy as np

from raytrust.data.arrays import Arrays, stratified_split


def digits(seed: int) -> Arrays:
    from sklearn.datasets import load_digits

    stored = load_digits()
    images = np.rint(stored.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    return stratified_split(images, stored.target, seed)
