"""The data set itself, the images that are shipped, .npz files, and what is refused of any source."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import random
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import arrays, equal, npz, pixels, refusal, rows, tree

from raytrust.data import Dataset, load
from raytrust.data.arrays import stratified_split

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"


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


# The summary


def test_summary_of_what_is_shipped():
    assert load("faces").summary().splitlines() == [
        "faces: 160 training and 40 test images, 25x25, grey. Test images: a fifth of each class, drawn by the seed.",
        "2 classes: face (80), no face (80).",
        "Few images: accuracy on 40 is known to within 15 points.",
    ]
    first, second, _ = load("digits").summary().splitlines()
    assert first.startswith("digits: 1437 training and 360 test images, 16x16, grey. Resized from 8x8. Test images:")
    assert second.startswith("10 classes: 0 (142), 1 (")


def test_summary_of_a_file_says_that_labels_begin_at_one(tmp_path):
    labels = {"train_labels": np.arange(12) % 3 + 1, "test_labels": np.arange(6) % 3 + 1}
    dataset = load(npz(tmp_path, **labels))
    assert dataset.classes == 4  # not renumbered: labels stay what they are in the user's file
    first, second, _ = dataset.summary().splitlines()
    assert first == "toy: 12 training and 6 test images, 9x10, 3 channels. Test images: as stored in the file."
    assert second == (
        "3 classes: 1 (4), 2 (4), 3 (4). Without training images: 0; the network has outputs for them all the same."
    )


def test_summary_counts_many_classes_and_is_silent_on_many_images(tmp_path):
    labels = np.concatenate([np.arange(100), np.arange(50)])
    images = np.zeros((150, 8, 8), np.uint8)
    tests = {"test_images": np.zeros((400, 8, 8), np.uint8), "test_labels": np.arange(400) % 100}
    dataset = load(npz(tmp_path, train_images=images, train_labels=labels, **tests))
    assert dataset.summary().splitlines()[1:] == ["100 classes of 1 to 2 training images each."]


def test_names_are_left_aside_where_classes_change():
    faces = load("faces")
    assert faces.class_name(1) == "no face"
    assert dataclasses.replace(faces, classes=3).class_name(1) == "1"
    assert dataclasses.replace(faces, class_names=("a", "b"), notes=()).fingerprint() == faces.fingerprint()


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
    assert first.image_size == (16, 16)
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


def test_faces_are_scikit_images_halves():
    from skimage.data import lfw_subset

    faces = load("faces")
    assert (faces.name, faces.class_names, faces.image_size) == ("faces", ("face", "no face"), (25, 25))
    assert faces.train_labels.bincount().tolist() == [80, 80]
    assert faces.test_labels.bincount().tolist() == [20, 20]
    expected = torch.tensor(np.rint(lfw_subset() * 255)).byte()[:, None]
    both = rows(faces.train_images, faces.train_labels) + rows(faces.test_images, faces.test_labels)
    assert both == rows(expected, torch.arange(200) // 100)
    assert load("faces", seed=1).fingerprint() != faces.fingerprint() == load("faces").fingerprint()
    assert load("faces", image_size=32).image_size == (32, 32)


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
            "got float32 of shape (12, 9, 10, 3); convert with (images * 255).round().astype('uint8').",
        ),
        (
            {"test_images": np.full((6, 9, 10, 3), np.nan)},
            "Expected test_images in FILE to be uint8 of shape (n, height, width[, 1 or 3]), "
            "got float64 of shape (6, 9, 10, 3) with NaN.",
        ),
        (
            {"train_images": np.zeros((12, 9, 10, 3), np.int16)},
            "got int16 of shape (12, 9, 10, 3); convert with images.astype(",
        ),
        ({"train_images": np.zeros((12, 9, 10, 3), bool)}, "got bool of shape (12, 9, 10, 3); convert with"),
        ({"train_images": np.zeros((12, 9, 10, 2), np.uint8)}, "got uint8 of shape (12, 9, 10, 2)."),
        (
            {"train_images": np.zeros((12, 3, 9, 10), np.uint8)},
            "got uint8 of shape (12, 3, 9, 10); convert with images.transpose(",
        ),
        (
            {"train_images": np.zeros((12, 90), np.uint8)},
            "got uint8 of shape (12, 90); convert with images.reshape(",
        ),
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
            "Expected train_labels in FILE to be integers of shape (n,) or (n, 1), got float32 of shape (12,); "
            "convert with labels.astype('int64').",
        ),
        ({"test_labels": np.full(6, np.nan)}, "got float64 of shape (6,) with NaN."),
        ({"train_labels": np.zeros(12, bool)}, "got bool of shape (12,); convert with labels.astype('int64')."),
        (
            {"train_labels": np.array(["cat"] * 12)},
            "got <U3 of shape (12,); convert with np.unique(labels",
        ),
        ({"train_labels": np.zeros((12, 14), int)}, "got int64 of shape (12, 14); an image has one label here."),
        ({"train_labels": np.zeros((1, 12), int)}, "got int64 of shape (1, 12); convert with labels.reshape(-1)."),
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


IMAGES = pixels(5, 12, 9, 10, 3)
GREY = pixels(6, 12, 9, 10)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (IMAGES / 255, IMAGES),
        (IMAGES.astype(np.float16), IMAGES),
        (IMAGES.astype(np.uint16) * 257, IMAGES),
        (IMAGES.astype(np.int64), IMAGES),
        (IMAGES.transpose(0, 3, 1, 2), IMAGES),
        (IMAGES.transpose(0, 3, 1, 2).astype(np.float32) / 255, IMAGES),
        (GREY[:, None], GREY[..., None]),
        (np.concatenate([IMAGES, IMAGES[..., :1]], axis=3), IMAGES),
        (GREY > 127, (GREY > 127) * np.uint8(255)),
        ((GREY - GREY.min()) / 50 - 1.5, None),  # normalised: what black and white were is lost
    ],
)
def test_the_conversion_of_images_that_a_refusal_names_works(tmp_path, stored, expected):
    message = refusal(npz(tmp_path, train_images=stored, test_images=stored[:6]))
    conversion = re.search(r"; convert with (.*)\.$", message)
    assert conversion, message
    images = eval(conversion.group(1), {"np": np, "images": stored})
    dataset = load(npz(tmp_path, train_images=images, test_images=images[:6]))
    loaded = dataset.train_images.permute(0, 2, 3, 1).numpy()
    if expected is None:
        assert (loaded.min(), loaded.max()) == (0, 255)
    else:
        np.testing.assert_array_equal(loaded, expected.reshape(loaded.shape))


@pytest.mark.parametrize(
    "stored",
    [
        np.eye(3, dtype=np.uint8)[np.arange(12) % 3],
        np.eye(3, dtype=np.float32)[np.arange(12) % 3],
        np.array(["ant", "bee", "cat"] * 4),
        (np.arange(12) % 3).astype(np.float64),
        (np.arange(12) % 3)[None],
    ],
)
def test_the_conversion_of_labels_that_a_refusal_names_works(tmp_path, stored):
    conversion = re.search(r"; convert with (.*)\.$", refusal(npz(tmp_path, train_labels=stored)))
    assert conversion
    labels = eval(conversion.group(1), {"np": np, "labels": stored})
    assert load(npz(tmp_path, train_labels=labels)).train_labels.tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_nothing_is_suggested_where_no_conversion_is_right(tmp_path, dtype):
    assert "convert" not in refusal(npz(tmp_path, train_images=np.zeros((12, 9, 10, 2), dtype)))
    several = np.ones((12, 3), dtype)  # every image of all classes
    assert "convert" not in refusal(npz(tmp_path, train_labels=several))
    assert "convert" not in refusal(npz(tmp_path, train_labels=np.arange(12) + 0.5))


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


@pytest.mark.parametrize(
    "source", ["", "CIFAR10", "no/such/directory", "toy.npy", "two\nlines", "\0", ".npz", "~no-such-user/x"]
)
def test_other_sources_are_refused(source):
    expected = "to be digits, faces, cifar10, cifar100, mnist, a FILE.npz or an existing directory."
    assert refusal(source) == f"Expected source={source!r} {expected}"


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
