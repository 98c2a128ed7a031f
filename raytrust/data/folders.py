"""Folders of image files: one folder a class, in splits or in one tree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raytrust.data.arrays import DRAWN, KEYS, Source, stratified_split
from raytrust.data.layout import Splits, find_splits, folders_in, is_hidden, says_split
from raytrust.data.refusals import reason

# Those of torchvision's ImageFolder, so that a folder which that can read is read here, too.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class _Tree:
    """The image files of each class, by path. Classes are numbered in the order of their names.

    loose: how many images lie beside the folders of the classes, and so have none.
    """

    classes: tuple[str, ...]
    files: list[str]
    labels: list[int]
    loose: int

    @property
    def notes(self) -> tuple[str, ...]:
        notes = [f"The folder {name} is read as a class." for name in self.classes if says_split(name)]
        return (*notes, f"Left out: images in no class's folder ({self.loose}).") if self.loose else tuple(notes)


def read_folder(folder: Path, size: int, seed: int) -> Source:
    """The images in `folder`, `size` pixels wide and high. Raises ValueError if it can't be told what is what."""
    try:
        splits = find_splits(folder)
        if splits is None:
            return _read_one(folder, size, seed, ())
        left_out = (f"Left out: {', '.join(splits.left_out)}.",) if splits.left_out else ()
        if splits.test is None:
            return _read_one(splits.train, size, seed, (f"Read from {splits.train.name}/.", *left_out))
        return _read_two(splits, splits.test, size, left_out)
    except OSError as error:
        raise ValueError(f"Expected {folder} to be readable ({reason(error)}).") from error


def _read_one(folder: Path, size: int, seed: int, notes: tuple[str, ...]) -> Source:
    """One folder a class in `folder`, a part of which becomes the test set."""
    tree = _list_tree(folder, least=2)
    labels = np.array(tree.labels)
    counts = np.bincount(labels)
    if counts.min() < 2:
        name = tree.classes[counts.argmin()]
        raise ValueError(f"Expected {folder / name} to hold at least 2 images, to train and to test, got 1.")
    images, resized = _read_images(tree.files, size)
    return Source(stratified_split(images, labels, seed), tree.classes, (*resized, *tree.notes, *notes, DRAWN))


def _read_two(splits: Splits, test_folder: Path, size: int, notes: tuple[str, ...]) -> Source:
    """One folder a class in each of the two splits."""
    train, test = _list_tree(splits.train, least=2), _list_tree(test_folder, least=1)
    strange = [name for name in test.classes if name not in train.classes]
    if strange:
        raise ValueError(
            f"Expected the classes in {test_folder} to be among those in {splits.train.name}, got {', '.join(strange)}."
        )
    # Both together, because one file in colour gives all of them three channels.
    images, resized = _read_images(train.files + test.files, size)
    labels = np.array(train.labels + [train.classes.index(test.classes[label]) for label in test.labels])
    n = len(train.files)
    arrays = dict(zip(KEYS, (images[:n], labels[:n], images[n:], labels[n:]), strict=True))
    origin = f"Training images: {splits.train.name}/. Test images: {test_folder.name}/."
    return Source(arrays, train.classes, (*resized, origin, *train.notes, *test.notes, *notes))


def _list_tree(folder: Path, least: int) -> _Tree:
    """List the files under `folder`, which must hold at least `least` classes, and images of each."""
    classes = folders_in(folder)
    if not classes:
        raise ValueError(f"Expected {folder} to hold one folder of images a class, got no folder.")
    if len(classes) < least:
        names = ", ".join(path.name for path in classes)
        raise ValueError(f"Expected {folder} to hold at least {least} folders, one a class, got {names}.")
    files, labels = [], []
    for label, path in enumerate(classes):
        if not (images := _list_images(path)):
            raise ValueError(f"Expected {path} to hold images ({', '.join(SUFFIXES)}), got none.")
        files += images
        labels += [label] * len(images)
    loose = sum(_is_image(path.name) for path in folder.iterdir() if path.is_file())
    return _Tree(tuple(path.name for path in classes), files, labels, loose)


def _list_images(folder: Path) -> list[str]:
    """The image files in and below a folder, in the order of their names; none that is hidden."""
    files = []
    for place, below, names in os.walk(folder, followlinks=True):
        # os.walk reads this list to know where to go next: what is hidden is left out, and the order is fixed.
        below[:] = sorted(name for name in below if not is_hidden(name))
        files += [os.path.join(place, name) for name in sorted(names) if _is_image(name)]
    return files


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


def _read_images(files: Sequence[str], size: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read files as one uint8 array (n, size, size, channels); and a note if any was resized."""
    read = [_read_image(path, size) for path in files]
    channels = max(image.shape[2] for image, _ in read)
    images = np.stack([np.broadcast_to(image, (size, size, channels)) for image, _ in read])
    if all(as_stored for _, as_stored in read):
        return images, ()
    return images, (f"Shorter sides resized to {size}, centres cropped.",)


def _read_image(path: str, size: int) -> tuple[np.ndarray, bool]:
    """Read one file as uint8 (size, size, 1) if it is greyscale, else (size, size, 3); and whether that is its size."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import center_crop, resize

    try:
        with Image.open(path) as image:
            # Converting 16-bit and float images would clip them at 255.
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode} has more than 8 bits a pixel and channel; save it with 8")
            # Cameras store pixels as the sensor has them, and beside them how the camera was held.
            upright = ImageOps.exif_transpose(image)
            pixels = upright.convert("L" if upright.mode in ("1", "L") else "RGB")
    except Exception as error:
        # A damaged file can make Pillow raise nearly anything.
        raise ValueError(
            f"Expected {path} to be a readable 8-bit image ({reason(error)}); convert it, or take it out of the folder."
        ) from error
    resized = center_crop(resize(pixels, [size]), [size])
    return np.asarray(resized).reshape(size, size, -1), pixels.size == (size, size)
