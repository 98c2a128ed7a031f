"""Folders of image files, one folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raytrust.data.arrays import KEYS, Arrays, stratified_split
from raytrust.data.refusals import reason

if TYPE_CHECKING:  # importing torchvision takes more than a second, so the functions that need it do it
    from torchvision.datasets import ImageFolder


def folder_arrays(folder: Path, size: int, seed: int) -> Arrays:
    test_folder = next((path for path in (folder / "test", folder / "val") if path.is_dir()), None)
    if test_folder is None or not (folder / "train").is_dir():
        tree = _tree(folder, least=2)
        labels = np.array(tree.targets)
        counts = np.bincount(labels)
        if counts.min() < 2:
            name = tree.classes[counts.argmin()]
            raise ValueError(f"Expected {folder / name} to hold at least 2 images, to train and to test, got 1.")
        return stratified_split(_read_images(tree.samples, size), labels, seed)

    train, test = _tree(folder / "train", least=2), _tree(test_folder, least=1)
    strange = [name for name in test.classes if name not in train.class_to_idx]
    if strange:
        raise ValueError(f"Expected the classes in {test_folder} to be among those in train, got {', '.join(strange)}.")
    images = _read_images(train.samples + test.samples, size)  # together: one number of channels
    labels = np.array(train.targets + [train.class_to_idx[test.classes[target]] for target in test.targets])
    n = len(train.samples)
    return dict(zip(KEYS, (images[:n], labels[:n], images[n:], labels[n:]), strict=True))


def _tree(folder: Path, least: int) -> ImageFolder:
    """List the files under `folder`, which must hold at least `least` classes, and images of each."""
    from torchvision.datasets import ImageFolder

    try:
        tree = ImageFolder(str(folder))
    except OSError as error:
        raise ValueError(f"Expected {folder} to hold one folder of images a class ({reason(error)}).") from error
    if len(tree.classes) < least:
        found = ", ".join(tree.classes)
        raise ValueError(f"Expected {folder} to hold at least {least} folders, one a class, got {found}.")
    return tree


def _read_images(samples: list[tuple[str, int]], size: int) -> np.ndarray:
    """Read (path, label) pairs as one uint8 array (n, size, size, channels)."""
    images = [_read_image(path, size) for path, _ in samples]
    channels = max(image.shape[2] for image in images)
    return np.stack([np.broadcast_to(image, (size, size, channels)) for image in images])


def _read_image(path: str, size: int) -> np.ndarray:
    """Read one file as uint8 (size, size, 1) if it is greyscale, else (size, size, 3)."""
    from PIL import Image
    from torchvision.transforms.functional import center_crop, resize

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # converting these would clip them at 255
                raise ValueError(f"mode {image.mode} has more than 8 bits a pixel and channel")
            pixels = image.convert("L" if image.mode in ("1", "L") else "RGB")
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        raise ValueError(f"Expected {path} to be a readable 8-bit image ({reason(error)}).") from error
    return np.asarray(center_crop(resize(pixels, [size]), [size])).reshape(size, size, -1)
