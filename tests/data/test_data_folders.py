"""Folders of images: which are classes, which are splits, and how files are read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from image_files import equal, picture, pixels, refusal, tree
from PIL import Image

from raytrust.data import load


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
    assert refusal(tmp_path) == f"Expected {tmp_path} to hold one folder of images a class, got no folder."
    tree(tmp_path, {"a": 3})
    assert refusal(tmp_path) == f"Expected {tmp_path} to hold at least 2 folders, one a class, got a."
    (tmp_path / "b").mkdir()
    assert refusal(tmp_path).startswith(f"Expected {tmp_path / 'b'} to hold images (.jpg, ")
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


# Splits


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "valid"),
        ("train", "validation"),
        ("Train", "Test"),
        ("TRAIN", "VAL"),
        ("training", "testing"),
        ("Training Set", "test_set"),
        ("trainset", "testset"),
        ("train2017", "val2017"),
        ("train_images", "eval_images"),
        ("pets-train", "pets-test"),
        ("PetsTrain", "PetsDev"),
    ],
)
def test_splits_in_any_usual_spelling_are_splits(tmp_path, train, test):
    tree(tmp_path / train, {"cat": 3, "dog": 2})
    tree(tmp_path / test, {"cat": 1, "dog": 2})
    dataset = load(str(tmp_path))
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1]
    assert dataset.test_labels.tolist() == [0, 1, 1]
    assert f"Training images: {train}/. Test images: {test}/." in dataset.summary()


def test_test_wins_over_validation_and_what_is_left_out_is_said(tmp_path):
    for name, count in (("train", 3), ("valid", 2), ("test", 1), ("annotations", 1)):
        tree(tmp_path / name, {"a": count, "b": count})
    dataset = load(str(tmp_path))
    assert len(dataset.test_labels) == 2
    assert "Training images: train/. Test images: test/. Left out: annotations, valid." in dataset.summary()


def test_a_training_split_alone_is_split(tmp_path):
    tree(tmp_path / "Train", {"a": 5, "b": 5})
    dataset = load(str(tmp_path))
    assert (len(dataset.train_labels), len(dataset.test_labels), dataset.class_names) == (8, 2, ("a", "b"))
    assert "Read from Train/. Test images: a fifth of each class, drawn by the seed." in dataset.summary()


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "Training", "test"), "Expected DIR to hold one train split, got Training and train."),
        (("train", "val", "valid", "test"), "Expected DIR to hold one validation split, got val and valid."),
        (("val", "test"), "Expected DIR to hold a training split, got test and val without one."),
        (("test",), "Expected DIR to hold a training split, got test without one."),
        (
            ("train", "holdout"),
            "Expected DIR to hold either splits or classes, got train beside holdout; name",
        ),
        (
            ("train", "gallery", "query"),
            "got train beside gallery, query; name the test images",
        ),
    ],
)
def test_splits_that_can_be_read_in_two_ways_are_refused(tmp_path, folders, expected):
    for name in folders:
        tree(tmp_path / name, {"a": 2, "b": 2})
    assert expected.replace("DIR", str(tmp_path)) in refusal(tmp_path)


@pytest.mark.parametrize("folders", [("train", "valid"), ("train", "test"), ("train", "unlabelled")])
def test_splits_that_hold_no_folders_are_not_read_as_classes(tmp_path, folders):
    tree(tmp_path, dict.fromkeys(folders, 3))
    refusal(tmp_path)


def test_splits_below_classes_are_refused(tmp_path):
    for name in ("cat", "dog"):
        tree(tmp_path / name, {"train": 2, "test": 2})
    assert refusal(tmp_path) == (
        f"Expected the classes of {tmp_path} in its splits, as in {tmp_path / 'train' / 'cat'}, got test and train in "
        f"{tmp_path / 'cat'}; if these are a data set of their own, give {tmp_path / 'cat'}."
    )


@pytest.mark.parametrize("names", [("invalid", "valid"), ("control", "test"), ("bus", "car", "train")])
def test_a_class_may_be_called_as_a_split_is_and_it_is_said(tmp_path, names):
    tree(tmp_path, dict.fromkeys(names, 5))
    dataset = load(str(tmp_path))
    assert dataset.class_names == names
    assert f"The folder {next(n for n in names if n in ('valid', 'test', 'train'))} is read as a class." in (
        dataset.summary()
    )


@pytest.mark.parametrize("names", [("test pattern", "train station"), ("trains", "value"), ("invalid", "other")])
def test_words_that_only_look_like_splits_are_classes(tmp_path, names):
    tree(tmp_path, dict.fromkeys(names, 5))
    dataset = load(str(tmp_path))
    assert dataset.class_names == names
    assert dataset.classes == 2


# Files


def test_hidden_folders_and_files_are_left_out(tmp_path):
    tree(tmp_path, {"a": 5, "b": 5})
    plain = load(str(tmp_path))
    tree(tmp_path, {".ipynb_checkpoints": 3, "__MACOSX": 3})
    tree(tmp_path / "a", {".ipynb_checkpoints": 3, "__MACOSX/a": 2})
    (tmp_path / "b" / "._000.png").write_bytes(b"the Finder's notes on 000.png")
    assert equal(load(str(tmp_path)), plain)

    for split in ("train", "test"):
        tree(tmp_path / "splits" / split, {"a": 2, "b": 2, ".thumbnails": 2})
    tree(tmp_path / "splits", {".test": 2})
    assert load(str(tmp_path / "splits")).class_names == ("a", "b")


def test_images_beside_the_classes_are_left_out_and_said(tmp_path):
    tree(tmp_path, {"a": 5, "b": 5})
    picture(tmp_path / "loose.png", pixels(1, 32, 32, 3))
    (tmp_path / "labels.csv").write_text("")
    assert "Left out: images in no class's folder (1)." in load(str(tmp_path)).summary()


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    """The eight ways to hold a camera, of one scene: what is loaded is the scene."""
    scene = np.zeros((32, 32, 3), np.uint8)
    scene[:16, :16] = 255  # bright above on the left,
    scene[16:, :16] = 120  # grey below it
    stored = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.transpose(1, 0, 2),
        6: np.rot90(scene, 1),
        7: scene.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(scene, -1),
    }[orientation]
    tree(tmp_path, {"a": 4, "b": 5})
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a" / f"x.{suffix}", exif=exif, quality=95)
    dataset = load(str(tmp_path))
    images = torch.cat([dataset.train_images, dataset.test_images]).int()
    nearest = (images - torch.tensor(scene).permute(2, 0, 1)).abs().amax(dim=(1, 2, 3)).min()
    assert nearest <= 3  # JPEG


def test_folders_say_whether_images_were_resized(tmp_path):
    tree(tmp_path, {"a": 5, "b": 5})
    assert "resized" not in load(str(tmp_path)).summary()
    picture(tmp_path / "a" / "wide.png", pixels(1, 32, 40, 3))
    assert "Shorter sides resized to 32, centres cropped." in load(str(tmp_path)).summary()
