"""Images as uint8 tensors: embedded digits, torchvision names, MedMNIST-style .npz files and folders of images.

Every source becomes the same four arrays, passes the same checks and is handed out as one `Dataset` in memory.
Whatever a user can get wrong is a `ValueError` of one line that names the file or argument, what it held and what was
expected.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import socket
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # importing torchvision takes more than a second, so the functions that need it do it
    from torchvision.datasets import ImageFolder

MIN_IMAGE_SIZE = 8  # the least height and width, in pixels, that the networks accept
DEFAULT_ROOT = Path("~/.cache/raytrust")

_TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST"}
_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
_DEFAULT_SIDE = 32  # of the sources whose images have no useful size of their own: digits and folders
_TIMEOUT = 10.0  # seconds that a server may stay silent

Arrays = Mapping[str, np.ndarray]  # _KEYS -> images (n, height, width[, channels]) and labels (n[, 1])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set of equally sized images. `load` guarantees what the fields say; all are on the CPU."""

    name: str  # "digits", "cifar10", or the stem of the file, or the name of the folder
    train_images: Tensor = field(repr=False)  # uint8 (n, channels, height, width), contiguous; channels is 1 or 3
    train_labels: Tensor = field(repr=False)  # int64 (n,)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    classes: int  # labels are 0..classes-1

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.train_images.shape[2], self.train_images.shape[3]

    @property
    def mean(self) -> Tensor:
        """Mean of each channel of `train_images` scaled to [0, 1]: float32 (channels,)."""
        return self._moments[0]

    @property
    def std(self) -> Tensor:
        """Population standard deviation of each channel, like `mean`; at least 1e-3, so that dividing by it is safe."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        # A pixel has 256 values, so a histogram gives both moments exactly and in little memory.
        flat = self.train_images.transpose(0, 1).flatten(1)
        share = torch.stack([channel.bincount(minlength=256) for channel in flat]).double() / flat.shape[1]
        level = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ level
        variance = (share * (level - mean[:, None]) ** 2).sum(dim=1)
        return mean.float(), variance.sqrt().clamp(min=1e-3).float()

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the four arrays, with their shapes, and `classes`.

        Equal pixels and labels in equal order give equal fingerprints, whatever the file, its format and its name.
        """
        digest = hashlib.sha256(f"{self.classes}".encode())
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            array = tensor.numpy(force=True)
            digest.update(f"|{array.dtype.name}{array.shape}|".encode())
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).data)
        return digest.hexdigest()[:16]


def load(source: str, *, image_size: int | None = None, root: Path | None = None, seed: int = 0) -> Dataset:
    """Load a dataset into memory. Equal arguments and files give equal tensors; no global RNG is read or written.

    `source` is one of
      - "digits": scikit-learn's 1797 digits, 1437 to train and 360 to test, enlarged from 8x8 to 32x32; no file needed;
      - "cifar10", "cifar100", "mnist": torchvision's, looked for under `root` (default ~/.cache/raytrust) and
        downloaded where they are absent;
      - FILE.npz with train_images, train_labels, test_images and test_labels, as MedMNIST has them: images uint8
        (n, height, width), (n, height, width, 1) or (n, height, width, 3), labels integer (n,) or (n, 1). Other keys
        are ignored and nothing is unpickled. `classes` is the largest training label + 1;
      - a directory of one folder of images a class, either twice (DIR/train, and DIR/test or else DIR/val) or once
        (DIR, of which a fifth becomes the test set). Classes are numbered in the order of the training folders' names.
        An image's shorter side is resized to `image_size` (default 32), antialiased, and its centre cropped. Images
        have 1 channel if all files are greyscale, else 3; transparency is dropped.
    A name wins over a directory called the same: write ./digits for the latter.

    `image_size` (pixels, at least 8) resizes images to that square, bilinear and antialiased; None keeps them as they
    are stored, bit for bit, but for the two defaults of 32 above. `seed` (0 to 2**63 - 1) draws the stratified split of
    digits and of a directory without a test set: of each class a fifth goes to test, to within one image.

    A download sets the process's default socket time-out while it runs, and gives up on a server that is silent for
    10 seconds.

    Raises ValueError, in one line, for every argument, file and download that does not give the above.
    """
    if image_size is not None and (not isinstance(image_size, int) or image_size < MIN_IMAGE_SIZE):
        raise ValueError(f"Expected image_size={image_size!r} to be None or an integer of at least {MIN_IMAGE_SIZE}.")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"Expected seed={seed!r} to be an integer in [0, 2**63).")

    path = Path(os.path.expanduser(source))  # leaves an unknown ~user as it is
    if source == "digits":
        return _dataset(source, source, _digits(seed), image_size or _DEFAULT_SIDE)
    if source in _TORCHVISION:
        folder = Path(os.path.expanduser(root or DEFAULT_ROOT))
        return _dataset(source, str(folder), _torchvision(source, folder), image_size)
    if path.suffix.lower() == ".npz":
        return _dataset(path.stem, str(path), _npz(path), image_size)
    if source and path.is_dir():
        name = os.path.basename(os.path.abspath(path))
        return _dataset(name, str(path), _folder(path, image_size or _DEFAULT_SIDE, seed), image_size)
    raise ValueError(
        f"Expected source={str(source)!r} to be digits, {', '.join(_TORCHVISION)}, a FILE.npz or an existing directory."
    )


def _digits(seed: int) -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    return _split(images, digits.target, seed)


def _split(images: np.ndarray, labels: np.ndarray, seed: int) -> Arrays:
    """Draw ceil(n / 5) test images, within one of a fifth of each class; both parts keep the order of `images`."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    test = np.zeros(len(labels), dtype=bool)
    test[by_class[::5]] = True
    return dict(zip(_KEYS, (images[~test], labels[~test], images[test], labels[test]), strict=True))


def _torchvision(name: str, root: Path) -> Arrays:
    from torchvision import datasets

    kind: Any = getattr(datasets, _TORCHVISION[name])

    def read(download: bool) -> list[np.ndarray]:
        with contextlib.redirect_stdout(sys.stderr):  # some releases report their progress by print
            parts = [kind(root, train=train, download=download) for train in (True, False)]
        return [np.asarray(array) for part in parts for array in (part.data, part.targets)]

    try:
        try:
            arrays = read(download=False)
        except RuntimeError:  # torchvision's word for absent
            with _impatient(kind.url if hasattr(kind, "url") else kind.mirrors[0]):
                arrays = read(download=True)
    except Exception as error:  # from the network, the disk, or files that an interrupted download left behind
        raise ValueError(
            f"Expected {name} under {root} or a network to fetch it from, but the download failed ({_reason(error)}); "
            f"give --data FILE.npz or put the intact files under {root}."
        ) from error
    return dict(zip(_KEYS, arrays, strict=True))


@contextlib.contextmanager
def _impatient(url: str) -> Iterator[None]:
    """Raise OSError if the server of `url` does not answer in time; limit the silence of every socket in the block.

    A socket's time-out bounds neither the name's resolution nor how many addresses of a host are tried in turn, which
    can make minutes of it: hence a first question from a thread that can be left behind. Any answer will do.
    """
    failures: list[Exception] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")  # noqa: S310  # torchvision's own addresses
            urllib.request.urlopen(request, timeout=_TIMEOUT).close()  # noqa: S310
        except urllib.error.HTTPError as answer:
            answer.close()
        except (OSError, http.client.HTTPException) as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_TIMEOUT)
    if thread.is_alive():
        raise TimeoutError(f"no answer from {url} in {_TIMEOUT:g} s")
    if failures:
        raise failures[0]

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _npz(path: Path) -> Arrays:
    if not path.exists():
        raise ValueError(f"Expected {path} to be a .npz file, but there is no such file.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"Expected {path} to be a .npz file, got something else or a part of one.")
    arrays: dict[str, np.ndarray] = {}
    reading = "the index"
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            held = archive.files
            for reading in (key for key in _KEYS if key in held):
                arrays[reading] = archive[reading]
    except Exception as error:  # a damaged file can make zipfile, zlib and numpy raise nearly anything
        raise ValueError(f"Expected {reading} in {path} to be readable ({_reason(error)}).") from error
    missing = [key for key in _KEYS if key not in held]
    if missing:
        raise ValueError(
            f"Expected {path} to hold {' and '.join(missing)}, got only {', '.join(held) or 'an empty archive'}."
        )
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy's answer for a member that is no .npy
            raise ValueError(f"Expected {key} in {path} to be an array, got {type(array).__name__}.")
    return arrays


def _folder(folder: Path, size: int, seed: int) -> Arrays:
    test_folder = next((path for path in (folder / "test", folder / "val") if path.is_dir()), None)
    if test_folder is None or not (folder / "train").is_dir():
        tree = _tree(folder, least=2)
        labels = np.array(tree.targets)
        counts = np.bincount(labels)
        if counts.min() < 2:
            name = tree.classes[counts.argmin()]
            raise ValueError(f"Expected {folder / name} to hold at least 2 images, to train and to test, got 1.")
        return _split(_read_images(tree.samples, size), labels, seed)

    train, test = _tree(folder / "train", least=2), _tree(test_folder, least=1)
    strange = [name for name in test.classes if name not in train.class_to_idx]
    if strange:
        raise ValueError(f"Expected the classes in {test_folder} to be among those in train, got {', '.join(strange)}.")
    images = _read_images(train.samples + test.samples, size)  # together: one number of channels
    labels = np.array(train.targets + [train.class_to_idx[test.classes[target]] for target in test.targets])
    n = len(train.samples)
    return dict(zip(_KEYS, (images[:n], labels[:n], images[n:], labels[n:]), strict=True))


def _tree(folder: Path, least: int) -> ImageFolder:
    """List the files under `folder`, which must hold at least `least` classes, and images of each."""
    from torchvision.datasets import ImageFolder

    try:
        tree = ImageFolder(str(folder))
    except OSError as error:
        raise ValueError(f"Expected {folder} to hold one folder of images a class ({_reason(error)}).") from error
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
        raise ValueError(f"Expected {path} to be a readable 8-bit image ({_reason(error)}).") from error
    return np.asarray(center_crop(resize(pixels, [size]), [size])).reshape(size, size, -1)


def _dataset(name: str, where: str, arrays: Arrays, image_size: int | None) -> Dataset:
    """Check the arrays, which stem from `where`, and convert and resize them."""
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
    if top >= len(train):
        raise ValueError(
            f"Expected train_labels in {where} to be below {len(train)}, the number of training images, got {top}."
        )
    if test_top > top:
        raise ValueError(
            f"Expected test_labels in {where} to be at most {top}, the largest in train_labels, got {test_top}."
        )
    if image_size is not None:
        train, test = _resize(train, image_size), _resize(test, image_size)
    return Dataset(name, train, train_labels, test, test_labels, classes=top + 1)


def _check_images(what: str, images: np.ndarray) -> Tensor:
    """(n, height, width[, channels]) uint8 -> contiguous (n, channels, height, width)."""
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))):
        raise ValueError(f"Expected {what} to be uint8 of shape (n, height, width[, 1 or 3]), got {_describe(images)}.")
    if images.size == 0:
        raise ValueError(f"Expected {what} to hold at least one image and pixel, got shape {images.shape}.")
    channels_last = images if images.ndim == 4 else images[..., None]
    return torch.from_numpy(np.ascontiguousarray(channels_last.transpose(0, 3, 1, 2)))


def _check_labels(what: str, labels: np.ndarray, images: int) -> Tensor:
    """(n[, 1]) of any integer type -> int64 (n,)."""
    if labels.dtype.kind not in "iu" or not (labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)):
        raise ValueError(f"Expected {what} to be integers of shape (n,) or (n, 1), got {_describe(labels)}.")
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
        for part in images.split(256)  # bounds the memory that the floats take
    ]
    return torch.cat(resized)


def _describe(array: np.ndarray) -> str:
    nan = " with NaN" if array.dtype.kind in "fc" and np.isnan(array).any() else ""
    return f"{array.dtype} of shape {array.shape}{nan}"


def _reason(error: BaseException) -> str:
    """The message of someone else's error in one line, or its type if it has none."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
