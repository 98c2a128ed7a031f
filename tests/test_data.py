from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import itertools
import pickle
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raytrust.data import Dataset, downloads, load
from raytrust.data.arrays import stratified_split

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "data"


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


# Dataset


def test_dataset_is_frozen_and_prints_briefly(tmp_path):
    dataset = load(npz(tmp_path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.classes = 4  # type: ignore[misc]
    assert repr(dataset) == "Dataset(name='toy', classes=3)"
    assert dataset.channels == 3
    assert dataset.image_size == (9, 10)
    assert equal(pickle.loads(pickle.dumps(dataset)), dataset)


def test_mean_and_std_are_the_exact_moments_and_cached(tmp_path):
    dataset = load(npz(tmp_path))
    scaled = arrays()["train_images"].astype(np.float64) / 255
    for got, expected in ((dataset.mean, scaled.mean(axis=(0, 1, 2))), (dataset.std, scaled.std(axis=(0, 1, 2)))):
        assert got.dtype == torch.float32
        assert got.shape == (3,)
        np.testing.assert_array_equal(got.numpy(), expected.astype(np.float32))
    assert dataset.mean is dataset.mean
    assert dataset.std is dataset.std


def test_std_of_a_constant_channel_is_a_thousandth(tmp_path):
    images = arrays()["train_images"]
    images[..., 1] = 200
    dataset = load(npz(tmp_path, train_images=images))
    assert dataset.std[1] == pytest.approx(1e-3)
    assert dataset.mean[1] == pytest.approx(200 / 255)
    assert (dataset.std[[0, 2]] > 0.2).all()


def test_fingerprint_depends_on_content_only(tmp_path):
    first = load(npz(tmp_path))
    np.savez_compressed(tmp_path / "other.npz", extra=np.ones(3), **arrays())
    narrow = {f"{split}_labels": arrays()[f"{split}_labels"].astype(np.int8)[:, None] for split in ("train", "test")}
    assert len(first.fingerprint()) == 16
    assert int(first.fingerprint(), 16) >= 0
    assert load(str(tmp_path / "other.npz")).fingerprint() == first.fingerprint()
    assert load(npz(tmp_path, "narrow.npz", **narrow)).fingerprint() == first.fingerprint()
    strided = dataclasses.replace(first, train_images=first.train_images.contiguous(memory_format=torch.channels_last))
    assert not strided.train_images.is_contiguous()
    assert strided.fingerprint() == first.fingerprint()


def test_fingerprint_is_the_same_in_every_release():
    zeros, labels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])
    content = b"2" + (b"|uint8(2, 1, 8, 8)|" + bytes(128) + b"|int64(2,)|" + struct.pack("<2q", 0, 1)) * 2
    expected = hashlib.sha256(content).hexdigest()[:16]
    assert Dataset("any", zeros, labels, zeros, labels, classes=2).fingerprint() == expected


@pytest.mark.parametrize("change", ["pixel", "label", "shape", "order", "swap", "classes"])
def test_fingerprint_sees_every_change(tmp_path, change):
    dataset = load(npz(tmp_path))
    train, labels = dataset.train_images.clone(), dataset.test_labels.clone()
    train[5, 1, 2, 3] ^= 1
    labels[2] = 0
    changed: dict[str, Any] = {
        "pixel": {"train_images": train},
        "label": {"test_labels": labels},
        "shape": {"train_images": dataset.train_images.reshape(12, 3, 10, 9)},
        "order": {"train_images": dataset.train_images.flip(0)},
        "swap": {"train_images": dataset.test_images, "test_images": dataset.train_images},
        "classes": {"classes": 4},
    }[change]
    assert dataclasses.replace(dataset, **changed).fingerprint() != dataset.fingerprint()


# Digits and the split


def test_digits_are_scikit_learns_in_order():
    from sklearn.datasets import load_digits

    whole = load_digits()
    expected = torch.tensor(np.rint(whole.images * 255 / 16)).byte()[:, None]
    digits = load("digits", image_size=8)
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.classes == 10
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    both = rows(digits.train_images, digits.train_labels) + rows(digits.test_images, digits.test_labels)
    assert both == rows(expected, torch.tensor(whole.target))
    where = {image.numpy().tobytes(): i for i, image in enumerate(expected.unbind())}
    for images in (digits.train_images, digits.test_images):  # the original order is kept
        found = [where[image.numpy().tobytes()] for image in images.unbind()]
        assert found == sorted(found)


def test_digits_split_is_stratified_and_drawn_by_the_seed():
    first, again, other = load("digits"), load("digits", seed=0), load("digits", seed=1)
    assert first.name == "digits"
    assert first.image_size == (32, 32)
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != other.fingerprint()
    for digits in (first, other):
        assert (len(digits.train_labels), len(digits.test_labels)) == (1437, 360)
        test = digits.test_labels.bincount(minlength=10)
        fifth = (test + digits.train_labels.bincount(minlength=10)) / 5
        assert ((test - fifth).abs() < 1).all()


@pytest.mark.parametrize("counts", [(2, 2), (8, 8), (2, 3, 50), (5, 5, 5), (7, 2, 11, 4)])
def test_split_is_within_one_image_of_a_fifth_of_each_class(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.arange(len(labels))
    for seed in range(5):
        parts = stratified_split(images, labels, seed)
        assert sorted([*parts["train_images"], *parts["test_images"]]) == list(images)
        assert len(parts["test_images"]) == -(-len(labels) // 5)
        for split in ("train", "test"):
            np.testing.assert_array_equal(parts[f"{split}_labels"], labels[parts[f"{split}_images"]])
        train = np.bincount(parts["train_labels"], minlength=len(counts))
        assert (train >= 1).all()
        assert (np.abs(train - 0.8 * np.array(counts)) < 1).all()


def test_split_gives_every_image_its_fair_chance():
    labels = np.arange(50) % 2
    drawn = np.zeros(50)
    for seed in range(500):
        drawn[stratified_split(np.arange(50), labels, seed)["test_images"]] += 1
    assert (np.abs(drawn - 100) < 5 * np.sqrt(500 * 0.2 * 0.8)).all()  # binomial, five standard deviations


# .npz files


@pytest.mark.parametrize("shape", [(9, 10), (9, 10, 1), (9, 10, 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_is_loaded_bit_for_bit(tmp_path, shape, order):
    held = arrays(shape=shape)
    held["train_images"] = np.asarray(held["train_images"], order=order)
    dataset = load(npz(tmp_path, **held))
    channels = shape[2] if len(shape) == 3 else 1
    assert dataset.name == "toy"
    assert dataset.classes == 3
    for split in ("train", "test"):
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        stored = held[f"{split}_images"]
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert images.shape == (len(stored), channels, 9, 10)
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), stored.reshape(len(stored), 9, 10, channels))
        assert labels.dtype == torch.int64
        np.testing.assert_array_equal(labels.numpy(), held[f"{split}_labels"])


@pytest.mark.parametrize("dtype", ["int8", "uint8", ">i2", "int64", "uint64"])
@pytest.mark.parametrize("column", [False, True])
def test_npz_labels_of_any_integer_type(tmp_path, dtype, column):
    labels = arrays()["train_labels"].astype(dtype)
    dataset = load(npz(tmp_path, train_labels=labels[:, None] if column else labels))
    assert dataset.train_labels.dtype == torch.int64
    assert dataset.train_labels.tolist() == arrays()["train_labels"].tolist()


def test_npz_mixes_two_and_three_dimensional_greyscale(tmp_path):
    plain, trailing = arrays(shape=(9, 10)), arrays(shape=(9, 10, 1))
    both = load(npz(tmp_path, **{**trailing, "test_images": plain["test_images"]}))
    assert equal(both, load(npz(tmp_path, "plain.npz", **plain)))


def test_npz_may_miss_classes_but_not_exceed_the_training_ones(tmp_path):
    gap = np.array([0, 5] * 6)
    dataset = load(npz(tmp_path, train_labels=gap, test_labels=np.full(6, 4)))
    assert dataset.classes == 6


def test_npz_suffix_in_capitals_and_home_directory(tmp_path, monkeypatch):
    npz(tmp_path)
    (tmp_path / "toy.npz").rename(tmp_path / "toy.NPZ")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/toy.NPZ").name == "toy"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"train_images": np.zeros((12, 9, 10, 3), np.float32)},
            "Expected train_images in FILE to be uint8 of shape (n, height, width[, 1 or 3]), "
            "got float32 of shape (12, 9, 10, 3).",
        ),
        (
            {"test_images": np.full((6, 9, 10, 3), np.nan)},
            "Expected test_images in FILE to be uint8 of shape (n, height, width[, 1 or 3]), "
            "got float64 of shape (6, 9, 10, 3) with NaN.",
        ),
        ({"train_images": np.zeros((12, 9, 10, 3), np.int16)}, "got int16 of shape (12, 9, 10, 3)."),
        ({"train_images": np.zeros((12, 9, 10, 3), bool)}, "got bool of shape (12, 9, 10, 3)."),
        ({"train_images": np.zeros((12, 9, 10, 2), np.uint8)}, "got uint8 of shape (12, 9, 10, 2)."),
        ({"train_images": np.zeros((12, 3, 9, 10), np.uint8)}, "got uint8 of shape (12, 3, 9, 10)."),
        ({"train_images": np.zeros((12, 90), np.uint8)}, "got uint8 of shape (12, 90)."),
        ({"train_images": np.zeros((12, 9, 10, 3, 1), np.uint8)}, "got uint8 of shape (12, 9, 10, 3, 1)."),
        ({"train_images": np.uint8(3)}, "got uint8 of shape ()."),
        ({"train_images": np.array([None] * 12)}, "Expected train_images in FILE to be readable (Object"),
        ({"test_labels": np.array([{}] * 6)}, "Expected test_labels in FILE to be readable (Object"),
        (
            {"train_images": np.zeros((0, 9, 10, 3), np.uint8), "train_labels": np.zeros(0, int)},
            "Expected train_images in FILE to hold at least one image and pixel, got shape (0, 9, 10, 3).",
        ),
        (
            {"test_images": np.zeros((0, 9, 10, 3), np.uint8), "test_labels": np.zeros(0, int)},
            "Expected test_images in FILE to hold at least one image and pixel, got shape (0, 9, 10, 3).",
        ),
        ({"train_images": np.zeros((12, 0, 10), np.uint8)}, "at least one image and pixel, got shape (12, 0, 10)."),
        (
            {"test_images": np.zeros((6, 10, 9, 3), np.uint8)},
            "Expected test_images in FILE to be of 9x10 pixels and 3 channels as train_images are, got 10x9 and 3.",
        ),
        ({"test_images": np.zeros((6, 9, 10), np.uint8)}, "got 9x10 and 1."),
        (
            arrays(shape=(9, 7)),
            "Expected train_images in FILE to be of at least 8x8 pixels, got 9x7; give an image_size to enlarge them.",
        ),
        (
            {"train_labels": np.zeros(12, np.float32)},
            "Expected train_labels in FILE to be integers of shape (n,) or (n, 1), got float32 of shape (12,).",
        ),
        ({"test_labels": np.full(6, np.nan)}, "got float64 of shape (6,) with NaN."),
        ({"train_labels": np.zeros(12, bool)}, "got bool of shape (12,)."),
        ({"train_labels": np.array(["cat"] * 12)}, "got <U3 of shape (12,)."),
        ({"train_labels": np.zeros((12, 14), int)}, "got int64 of shape (12, 14)."),
        ({"train_labels": np.zeros((1, 12), int)}, "got int64 of shape (1, 12)."),
        ({"train_labels": np.int64(3)}, "got int64 of shape ()."),
        (
            {"train_labels": np.arange(11) % 3},
            "Expected train_labels in FILE to be one an image, got 11 labels for 12 images.",
        ),
        ({"train_labels": np.arange(13) % 3}, "got 13 labels for 12 images."),
        (
            {"test_labels": np.zeros(0, int)},
            "Expected test_labels in FILE to be one an image, got 0 labels for 6 images.",
        ),
        ({"train_labels": np.arange(12) - 1}, "Expected train_labels in FILE to be 0 or more, got -1."),
        ({"test_labels": np.full(6, -7, np.int8)}, "Expected test_labels in FILE to be 0 or more, got -7."),
        (
            {"train_labels": np.arange(12) + 1},
            "Expected train_labels in FILE to be below 12, the number of training images, got 12.",
        ),
        ({"train_labels": np.full(12, 2**64 - 1, np.uint64)}, "to fit into int64, got 18446744073709551615."),
        (
            {"train_labels": np.full(12, 4)},
            "Expected train_labels in FILE to name at least 2 classes, got 1: label 4.",
        ),
        (
            {"test_labels": np.full(6, 3)},
            "Expected test_labels in FILE to be at most 2, the largest in train_labels, got 3.",
        ),
        (
            {"test_labels": None, "train_images": None},
            "Expected FILE to hold train_images and test_labels, got only train_labels, test_images.",
        ),
        (dict.fromkeys(arrays()), "got only an empty archive."),
    ],
)
def test_npz_refusals(tmp_path, changes, expected):
    path = npz(tmp_path, **changes)
    message = refusal(path)
    expected = expected.replace("FILE", path)
    assert message == expected if expected.startswith("Expected") and expected.endswith(".") else expected in message


def test_npz_that_is_no_npz(tmp_path):
    path = tmp_path / "toy.npz"
    assert refusal(path) == f"Expected {path} to be a .npz file, but there is no such file."
    whole = Path(npz(tmp_path, "whole.npz")).read_bytes()
    with open(tmp_path / "array.npy", "wb") as file:
        np.save(file, arrays()["train_images"])
    contents = {
        "empty": b"",
        "text": b"a,b\n1,2\n",
        "pickle": pickle.dumps(arrays()),
        "array": (tmp_path / "array.npy").read_bytes(),
        "truncated": whole[: len(whole) // 2],
    }
    expected = f"Expected {path} to be a .npz file, got something else or a part of one."
    for content in contents.values():
        path.write_bytes(content)
        assert refusal(path) == expected
    path.unlink()
    path.mkdir()
    assert refusal(path) == expected


def test_npz_member_that_is_no_array(tmp_path):
    import zipfile

    path = npz(tmp_path, test_labels=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("test_labels.npy", "0 1 2")
    assert refusal(path) == f"Expected test_labels in {path} to be an array, got bytes."


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_with_flipped_bytes_loads_as_it_was_or_is_refused(tmp_path, compressed):
    path = tmp_path / "toy.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays())
    whole, before = path.read_bytes(), load(str(path))
    rng, refused = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(whole))] ^= rng.randint(1, 255)
        path.write_bytes(damaged)
        try:
            assert equal(load(str(path)), before)  # the damage hit a time stamp or the like
        except ValueError:
            refusal(path)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("cifar10", (3, 32, 32), 10), ("cifar100", (3, 32, 32), 100), ("mnist", (1, 28, 28), 10)],
)
def test_npz_of_real_images(name, shape, classes):
    path = REAL / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    dataset = load(str(path))
    assert dataset.train_images.shape[1:] == shape
    assert (dataset.name, dataset.classes) == (name, classes)
    with np.load(path) as stored:
        np.testing.assert_array_equal(
            dataset.test_images.permute(0, 2, 3, 1).squeeze(-1).numpy(), stored["test_images"]
        )
        np.testing.assert_allclose(dataset.mean.mean(), stored["train_images"].mean() / 255, rtol=1e-6)


# image_size


@pytest.mark.parametrize("size", [8, 9, 16, 40])
def test_image_size_is_a_bilinear_antialiased_square(tmp_path, size):
    path = npz(tmp_path, **arrays(train=300, test=20, shape=(12, 9, 3)))  # more images than one step resizes
    native, resized = load(path), load(path, image_size=size)
    for split in ("train", "test"):
        images = getattr(native, f"{split}_images").double()
        exact = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
        got = getattr(resized, f"{split}_images")
        assert got.dtype == torch.uint8
        assert got.is_contiguous()
        assert ((got.double() - exact).abs() <= 0.5 + 1e-4).all()  # the nearest level
    assert torch.equal(native.train_labels, resized.train_labels)


def test_image_size_keeps_extremes_and_native_pixels(tmp_path):
    extremes = np.where(np.arange(12)[:, None, None] % 2, np.uint8(255), np.zeros((12, 9, 9), np.uint8))
    path = npz(tmp_path, **{**arrays(shape=(9, 9)), "train_images": extremes})
    native = load(path)
    assert equal(load(path, image_size=9), native)
    assert load(path, image_size=31).train_images.amax(dim=(1, 2, 3)).tolist() == [0, 255] * 6
    assert load(path, image_size=31).train_images.amin(dim=(1, 2, 3)).tolist() == [0, 255] * 6


def test_image_size_enlarges_what_is_too_small(tmp_path):
    assert load(npz(tmp_path, **arrays(shape=(4, 5))), image_size=8).image_size == (8, 8)


@pytest.mark.parametrize("size", [7, 0, -32, 32.0, "32", True])
def test_image_size_refusals(size):
    message = f"Expected image_size={size!r} to be None or an integer of at least 8."
    assert refusal("digits", image_size=size) == message


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, None, False])
def test_seed_refusals(seed):
    assert refusal("digits", seed=seed) == f"Expected seed={seed!r} to be an integer in [0, 2**63)."


# Directories


@pytest.mark.parametrize("other", ["test", "val"])
def test_directory_with_both_parts_is_loaded_bit_for_bit(tmp_path, other):
    tree(tmp_path / "pets" / "train", {"dog": 2, "cat": 3})
    tree(tmp_path / "pets" / other, {"dog": 2, "cat": 1})
    dataset = load(str(tmp_path / "pets"))
    assert dataset.name == "pets"
    assert dataset.classes == 2
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1]  # cat, dog
    assert dataset.test_labels.tolist() == [0, 1, 1]
    for images, seeds in ((dataset.train_images, [2, 3, 4, 0, 1]), (dataset.test_images, [2, 0, 1])):
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        expected = np.stack([pixels(seed, 32, 32, 3) for seed in seeds])
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), expected)


def test_directory_prefers_test_to_val_and_numbers_by_the_training_folders(tmp_path):
    tree(tmp_path / "train", {"a": 1, "b": 1, "c": 1})
    tree(tmp_path / "val", {"a": 5})
    tree(tmp_path / "test", {"c": 2})
    dataset = load(str(tmp_path))
    assert dataset.test_labels.tolist() == [2, 2]
    assert dataset.classes == 3


def test_directory_without_a_test_set_is_split_by_the_seed(tmp_path):
    counts = {"a": 10, "b": 20, "train": 5}  # a class may be called train
    tree(tmp_path, counts, 32, 32)
    first, again, other = (load(str(tmp_path), seed=seed) for seed in (0, 0, 1))
    assert equal(first, again)
    assert first.fingerprint() != other.fingerprint()
    for dataset in (first, other):
        assert dataset.train_labels.bincount().tolist() == [8, 16, 4]
        assert dataset.test_labels.bincount().tolist() == [2, 4, 1]
        together = torch.cat([dataset.train_images, dataset.test_images])
        stored = [pixels(seed, 32, 32).tobytes() for seed in range(35)]
        assert Counter(image.numpy().tobytes() for image in together.unbind()) == Counter(stored)


@pytest.mark.parametrize("options", [{}, {"image_size": 20}])
@pytest.mark.parametrize("shape", [(70, 50, 3), (20, 90, 3), (9, 9, 3)])
def test_directory_resizes_the_shorter_side_and_crops_the_centre(tmp_path, shape, options):
    from torchvision.transforms import CenterCrop, Compose, Resize

    size = options.get("image_size", 32)
    tree(tmp_path / "train", {"a": 1, "b": 1}, *shape)
    tree(tmp_path / "test", {"a": 1, "b": 1}, *shape)
    dataset = load(str(tmp_path), **options)
    assert dataset.image_size == (size, size)
    expected = Compose([Resize(size), CenterCrop(size)])(Image.fromarray(pixels(0, *shape)))
    np.testing.assert_array_equal(dataset.train_images[0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_directory_has_one_channel_if_all_files_are_greyscale(tmp_path):
    tree(tmp_path / "train", {"a": 1, "b": 1}, 40, 50)
    tree(tmp_path / "test", {"a": 1, "b": 1}, 40, 50)
    picture(tmp_path / "train" / "a" / "bits.png", pixels(9, 32, 32) > 127)
    grey = load(str(tmp_path))
    assert grey.channels == 1
    assert set(grey.train_images[1].unique().tolist()) == {0, 255}

    picture(tmp_path / "test" / "b" / "coloured.png", pixels(3, 32, 32, 4))
    mixed = load(str(tmp_path))
    assert mixed.channels == 3
    assert torch.equal(mixed.train_images, grey.train_images.expand(-1, 3, -1, -1))
    np.testing.assert_array_equal(mixed.test_images[-1].permute(1, 2, 0).numpy(), pixels(3, 32, 32, 4)[..., :3])


def test_directory_accepts_palettes_and_jpeg(tmp_path):
    tree(tmp_path, {"a": 2, "b": 2})
    for mode, name in (("P", "c.png"), ("CMYK", "d.jpg")):
        Image.fromarray(pixels(0, 32, 32, 3)).convert(mode).save(tmp_path / "a" / name)
    assert load(str(tmp_path)).channels == 3


def test_a_name_wins_over_a_directory(tmp_path, monkeypatch):
    tree(tmp_path / "digits", {"a": 2, "b": 2})
    monkeypatch.chdir(tmp_path)
    assert load("digits").classes == 10
    assert load("./digits").classes == 2
    monkeypatch.chdir(tmp_path / "digits")
    assert load(".").name == "digits"


def test_directory_refusals(tmp_path):
    assert "to hold one folder of images a class (Couldn't find any class folder" in refusal(tmp_path)
    tree(tmp_path, {"a": 3})
    assert refusal(tmp_path) == f"Expected {tmp_path} to hold at least 2 folders, one a class, got a."
    (tmp_path / "b").mkdir()
    assert "Found no valid file for the classes b" in refusal(tmp_path)
    picture(tmp_path / "b" / "1.png", pixels(0, 32, 32))
    assert refusal(tmp_path) == f"Expected {tmp_path / 'b'} to hold at least 2 images, to train and to test, got 1."


def test_directory_refuses_a_class_that_is_tested_only(tmp_path):
    tree(tmp_path / "train", {"a": 1, "b": 1})
    tree(tmp_path / "test", {"a": 1, "b": 1, "c": 1, "d": 1})
    assert refusal(tmp_path) == f"Expected the classes in {tmp_path / 'test'} to be among those in train, got c, d."


def test_directory_refuses_a_part_without_images(tmp_path):
    tree(tmp_path / "train", {"a": 1, "b": 1})
    (tmp_path / "test").mkdir()
    assert refusal(tmp_path).startswith(f"Expected {tmp_path / 'test'} to hold one folder of images a class")


@pytest.mark.parametrize("content", ["text", "empty", "truncated", "deep", "float"])
def test_directory_refuses_an_unreadable_image(tmp_path, content):
    tree(tmp_path, {"a": 2, "b": 2})
    path = tmp_path / "b" / ("001.tif" if content == "float" else "001.png")
    whole = (tmp_path / "b" / "001.png").read_bytes()
    if content == "deep":
        Image.fromarray(pixels(0, 32, 32).astype(np.uint16) * 257).save(path)
    elif content == "float":
        Image.fromarray(pixels(0, 32, 32).astype(np.float32)).save(path)
    else:
        path.write_bytes({"text": b"GIF89a? No.", "empty": b"", "truncated": whole[: len(whole) // 2]}[content])
    message = refusal(tmp_path)
    assert message.startswith(f"Expected {path} to be a readable 8-bit image (")
    assert ("has more than 8 bits" in message) == (content in ("deep", "float"))


def test_directory_refuses_a_decompression_bomb(tmp_path, monkeypatch):
    tree(tmp_path, {"a": 2, "b": 2})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "decompression bomb" in refusal(tmp_path)


@pytest.mark.parametrize(
    "source", ["", "CIFAR10", "no/such/directory", "toy.npy", "two\nlines", "\0", ".npz", "~no-such-user/x"]
)
def test_other_sources_are_refused(source):
    expected = "to be digits, cifar10, cifar100, mnist, a FILE.npz or an existing directory."
    assert refusal(source) == f"Expected source={source!r} {expected}"


# torchvision


def mnist_files() -> dict[str, bytes]:
    """A tiny MNIST in its IDX format, and its pixels are `arrays(shape=(28, 28))`."""
    held = arrays(shape=(28, 28))
    files = {}
    for part, split in (("train", "train"), ("t10k", "test")):
        images, labels = held[f"{split}_images"], held[f"{split}_labels"].astype(np.uint8)
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">4I", 2051, *images.shape) + images.tobytes()
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">2I", 2049, len(labels)) + labels.tobytes()
    return files


@pytest.fixture
def offline(monkeypatch):
    def urlopen(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service\nnot known")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


@pytest.mark.usefixtures("offline")
def test_mnist_is_read_from_root_without_a_network(tmp_path, capsys):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in mnist_files().items():
        (raw / name).write_bytes(content)
    dataset = load("mnist", root=tmp_path)
    assert dataset.name == "mnist"
    assert dataset.fingerprint() == load(npz(tmp_path, **arrays(shape=(28, 28)))).fingerprint()
    assert load("mnist", root=tmp_path, image_size=32).image_size == (32, 32)
    assert capsys.readouterr().out == ""

    for content in (b"", b"\0", mnist_files()["train-images-idx3-ubyte"][:-1], bytes(20)):  # a broken-off download
        (raw / "train-images-idx3-ubyte").write_bytes(content)
        assert f"put the intact files under {tmp_path}" in refusal("mnist", root=tmp_path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "kind", "label"), [("cifar10", "CIFAR10", "labels"), ("cifar100", "CIFAR100", "fine_labels")]
)
def test_cifar_is_read_from_root_without_a_network(tmp_path, monkeypatch, name, kind, label):
    from torchvision import datasets

    cls = getattr(datasets, kind)
    held = arrays(shape=(32, 32, 3))
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    for split in ("train", "test"):
        planes = held[f"{split}_images"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        content = {"data": planes, label: held[f"{split}_labels"].tolist()}
        (folder / split).write_bytes(pickle.dumps(content))
        monkeypatch.setattr(cls, f"{split}_list", [[split, None]])
    (folder / "meta").write_bytes(pickle.dumps({"names": ["a", "b", "c"]}))
    monkeypatch.setattr(cls, "meta", {"filename": "meta", "key": "names", "md5": None})
    assert load(name, root=tmp_path).fingerprint() == load(npz(tmp_path, **held)).fingerprint()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist"])
def test_no_network_is_said_in_one_line(tmp_path, name):
    before = socket.getdefaulttimeout()
    assert refusal(name, root=tmp_path) == (
        f"Expected {name} under {tmp_path} or a network to fetch it from, but the download failed "
        f"(<urlopen error Name or service not known>); give --data FILE.npz or put the intact files under {tmp_path}."
    )
    assert socket.getdefaulttimeout() == before


@pytest.mark.parametrize("error", [urllib.error.URLError("gone"), RuntimeError("gone"), TimeoutError("gone")])
def test_whatever_torchvision_raises_is_a_refusal(tmp_path, monkeypatch, capsys, error):
    from torchvision import datasets

    def raises(*_: Any, **__: Any) -> None:
        print("Downloading")
        raise error

    monkeypatch.setattr(datasets.CIFAR10, "__init__", raises)
    monkeypatch.setattr(urllib.request, "urlopen", raises if isinstance(error, OSError) else lambda *_, **__: _Answer())
    assert "gone" in refusal("cifar10", root=tmp_path)
    assert capsys.readouterr().out == ""


class _Answer:
    def close(self) -> None:
        pass


@pytest.mark.usefixtures("offline")
def test_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "the download failed" in refusal("mnist", root=tmp_path / "file")


@pytest.mark.usefixtures("offline")
def test_default_root_is_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"under {tmp_path / '.cache' / 'raytrust'}" in refusal("mnist")


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[[dict[str, bytes], bool], list[float | None]]]:
    """Let a local server be MNIST's only mirror; it stalls in the middle of every file if told so.

    What comes back fills up with the default time-out of sockets as it was at each request.
    """
    from torchvision import datasets

    stop, servers = threading.Event(), []
    monkeypatch.setenv("no_proxy", "*")

    def start(files: dict[str, bytes], stall: bool) -> list[float | None]:
        timeouts: list[float | None] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_error(403)

            def do_GET(self) -> None:
                timeouts.append(socket.getdefaulttimeout())
                content = files[self.path.lstrip("/")]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:20] if stall else content)
                if stall:
                    stop.wait(5)

            def log_message(self, *_: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        resources = [(name, hashlib.md5(content).hexdigest()) for name, content in files.items()]
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(datasets.MNIST, "resources", resources)
        return timeouts

    yield start
    stop.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def test_mnist_is_downloaded_once(tmp_path, serve):
    before = socket.getdefaulttimeout()
    requests = serve({f"{name}.gz": gzip.compress(content) for name, content in mnist_files().items()}, False)
    dataset = load("mnist", root=tmp_path / "new" / "root")
    assert dataset.fingerprint() == load(npz(tmp_path, **arrays(shape=(28, 28)))).fingerprint()
    assert set(requests) == {downloads.TIMEOUT}
    assert socket.getdefaulttimeout() == before
    requests.clear()
    assert equal(load("mnist", root=tmp_path / "new" / "root"), dataset)
    assert not requests


def test_download_that_stalls_is_given_up(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.5)
    before = socket.getdefaulttimeout()
    serve({f"{name}.gz": gzip.compress(content) for name, content in mnist_files().items()}, True)
    start = time.monotonic()
    assert "the download failed (timed out)" in refusal("mnist", root=tmp_path)
    assert time.monotonic() - start < 3
    assert socket.getdefaulttimeout() == before


def test_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz")
        start = time.monotonic()
        assert "the download failed (" in refusal("cifar10", root=tmp_path)
        assert time.monotonic() - start < 2


def test_name_that_is_never_resolved_is_given_up(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: release.wait(5) and _Answer())
    start = time.monotonic()
    assert "no answer from https://" in refusal("cifar10", root=tmp_path)
    assert time.monotonic() - start < 2
    release.set()


# The module


@pytest.mark.parametrize("kind", ["digits", "npz", "directory"])
def test_global_generators_are_untouched_and_unread(tmp_path, kind):
    source = {"digits": "digits", "npz": npz(tmp_path), "directory": str(tree(tmp_path / "t", {"a": 3, "b": 3}))}[kind]
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    first = load(source, image_size=16)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[2], strict=True))  # noqa: NPY002
    torch.manual_seed(2)
    assert equal(load(source, image_size=16), first)


def test_import_is_light():
    code = "import sys, raytrust.data; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(result.stdout.split())
    assert "raytrust.data" in imported
    assert imported.isdisjoint({"torchvision", "sklearn", "PIL", "ray", "mlflow", "optuna"})
