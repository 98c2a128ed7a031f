"""Small data sets on disk, and what `load` says of them."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raytrust.data import Dataset, load


def arrays(train: int = 12, test: int = 6, shape: tuple[int, ...] = (9, 10, 3), classes: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "train_labels": np.arange(train) % classes,
        "test_images": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "test_labels": np.arange(test) % classes,
    }


def npz(folder: Path, name: str = "toy.npz", **changes: Any) -> str:
    """Write a valid file with some keys replaced, or left out where the change is None."""
    held = {key: value for key, value in {**arrays(), **changes}.items() if value is not None}
    np.savez(folder / name, **held)
    return str(folder / name)


def picture(path: Path, array: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tree(folder: Path, counts: dict[str, int], *shape: int) -> Path:
    """Fill `folder` with so many different PNG files a class."""
    numbers = itertools.count()
    for name, count in counts.items():
        for index in range(count):
            picture(folder / name / f"{index:03}.png", pixels(next(numbers), *(shape or (32, 32, 3))))
    return folder


def refusal(source: str | Path, **options: Any) -> str:
    """The message with which `load` refuses `source`: a ValueError of one line in the house's form."""
    with pytest.raises(ValueError, match=r"\AExpected [^\n]*\.\Z") as info:
        load(str(source), **options)
    return str(info.value)


def equal(a: Dataset, b: Dataset) -> bool:
    fields = ("train_images", "train_labels", "test_images", "test_labels")
    return a.classes == b.classes and all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)


def rows(images: torch.Tensor, labels: torch.Tensor) -> Counter[tuple[bytes, int]]:
    return Counter(
        (image.numpy().tobytes(), int(label)) for image, label in zip(images.unbind(), labels.unbind(), strict=True)
    )
