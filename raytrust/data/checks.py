"""From a source's four arrays to a `Dataset`, if they hold what they must."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raytrust.data.arrays import Source
from raytrust.data.dataset import Dataset
from raytrust.data.refusals import describe, image_conversion, label_conversion

MIN_IMAGE_SIZE = 8  # the least height and width, in pixels, that the networks accept


def checked_dataset(name: str, where: str, source: Source, image_size: int | None) -> Dataset:
    """Check what was read from `where`, and convert and resize it. Raises ValueError, in one line."""
    arrays, notes = source.arrays, source.notes
    train, test = (_check_images(f"{key}_images in {where}", arrays[f"{key}_images"]) for key in ("train", "test"))
    if train.shape[1:] != test.shape[1:]:
        (c, h, w), (c2, h2, w2) = train.shape[1:], test.shape[1:]
        raise ValueError(
            f"Expected test_images in {where} to be of {h}x{w} pixels and {c} channels as train_images are, "
            f"got {h2}x{w2} and {c2}."
        )
    if image_size is None and min(train.shape[2:]) < MIN_IMAGE_SIZE:
        h, w = train.shape[2:]
        raise ValueError(
            f"Expected train_images in {where} to be of at least {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE} pixels, "
            f"got {h}x{w}; give an image_size to enlarge them."
        )
    train_labels = _check_labels(f"train_labels in {where}", arrays["train_labels"], len(train))
    test_labels = _check_labels(f"test_labels in {where}", arrays["test_labels"], len(test))
    top, test_top, found = int(train_labels.max()), int(test_labels.max()), len(train_labels.unique())
    if found < 2:
        raise ValueError(f"Expected train_labels in {where} to name at least 2 classes, got {found}: label {top}.")
    # Years or identifiers that are taken for labels would make a last layer of thousands of outputs without an image.
    if top >= len(train):
        raise ValueError(
            f"Expected train_labels in {where} to be below {len(train)}, the number of training images, got {top}."
        )
    if test_top > top:
        raise ValueError(
            f"Expected test_labels in {where} to be at most {top}, the largest in train_labels, got {test_top}."
        )
    if image_size is not None:
        if train.shape[2:] != (image_size, image_size):
            notes = (f"Resized from {train.shape[2]}x{train.shape[3]}.", *notes)
        train, test = _resize(train, image_size), _resize(test, image_size)
    return Dataset(name, train, train_labels, test, test_labels, top + 1, source.class_names, notes)


def _check_images(what: str, images: np.ndarray) -> Tensor:
    """(n, height, width[, channels]) uint8 -> contiguous (n, channels, height, width)."""
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))):
        raise ValueError(
            f"Expected {what} to be uint8 of shape (n, height, width[, 1 or 3]), got {describe(images)}"
            f"{image_conversion(images)}."
        )
    if images.size == 0:
        raise ValueError(f"Expected {what} to hold at least one image and pixel, got shape {images.shape}.")
    channels_last = images if images.ndim == 4 else images[..., None]
    return torch.from_numpy(np.ascontiguousarray(channels_last.transpose(0, 3, 1, 2)))


def _check_labels(what: str, labels: np.ndarray, images: int) -> Tensor:
    """(n[, 1]) of any integer type -> int64 (n,)."""
    if labels.dtype.kind not in "iu" or not (labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)):
        raise ValueError(
            f"Expected {what} to be integers of shape (n,) or (n, 1), got {describe(labels)}{label_conversion(labels)}."
        )
    if len(labels) != images:
        raise ValueError(f"Expected {what} to be one an image, got {len(labels)} labels for {images} images.")
    if labels.min() < 0:
        raise ValueError(f"Expected {what} to be 0 or more, got {labels.min()}.")
    if labels.max() > np.iinfo(np.int64).max:
        raise ValueError(f"Expected {what} to fit into int64, got {labels.max()}.")
    return torch.from_numpy(labels.reshape(-1).astype(np.int64))


def _resize(images: Tensor, size: int) -> Tensor:
    """Bilinear and antialiased, to (n, channels, size, size), rounded to the nearest level."""
    if tuple(images.shape[2:]) == (size, size):
        return images
    resized = [
        torch.nn.functional.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().byte()
        # In parts: as floats all images at once would take four times their memory.
        for part in images.split(256)
    ]
    return torch.cat(resized)
