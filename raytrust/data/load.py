"""From a name, a file or a folder to a `Dataset`."""

from __future__ import annotations

import os
from pathlib import Path

from raytrust.data.arrays import digits, faces, read_npz
from raytrust.data.checks import MIN_IMAGE_SIZE, checked_dataset
from raytrust.data.dataset import Dataset
from raytrust.data.downloads import DEFAULT_ROOT, TORCHVISION, read_torchvision
from raytrust.data.folders import read_folder

# Digits: 8x8 pixels are too few for a stage of a network or two, and 32x32 cost four times as much as 16x16 and show
# nothing more. Folders: files have all sizes.
_DIGITS_SIDE, _FOLDER_SIDE = 16, 32


def load(source: str, *, image_size: int | None = None, root: Path | None = None, seed: int = 0) -> Dataset:
    """Load a dataset into memory. Equal arguments and files give equal tensors; no global RNG is read or written.

    `source` is one of
      - "digits": scikit-learn's 1797 digits, 1437 to train and 360 to test, enlarged from 8x8 to 16x16;
      - "faces": scikit-image's 100 faces and 100 pieces of background, 160 to train and 40 to test, grey, as they are
        stored: 25x25. Neither needs a file or a network;
      - "cifar10", "cifar100", "mnist": torchvision's, looked for under `root` (default ~/.cache/raytrust) and
        downloaded where they are absent;
      - FILE.npz with train_images, train_labels, test_images and test_labels, as MedMNIST has them: images uint8
        (n, height, width), (n, height, width, 1) or (n, height, width, 3), labels integer (n,) or (n, 1). Other keys
        are ignored and nothing is unpickled. `classes` is the largest training label + 1;
      - a directory of one folder of images a class, either once (DIR, of which a fifth becomes the test set) or in
        splits (DIR/train, and DIR/test or else DIR/val), in any usual spelling: see `raytrust.data.folders`. Classes
        are numbered in the order of the training folders' names. Hidden files and folders are left out. An image is
        turned as its EXIF orientation says, its shorter side is resized to `image_size` (default 32), antialiased,
        and its centre cropped. Images have 1 channel if all files are greyscale, else 3; transparency is dropped.
    A name wins over a directory called the same: write ./digits for the latter.

    `image_size` (pixels, at least 8) resizes images to that square, bilinear and antialiased; None keeps them as they
    are stored, bit for bit, but for the two defaults above. `seed` (0 to 2**63 - 1) draws the stratified split of
    digits, of faces and of a directory without a test set: of each class a fifth goes to test, to within one image.

    `Dataset.summary` says what was understood.

    A download sets the process's default socket time-out while it runs, and gives up on a server that is silent for
    10 seconds.

    Raises ValueError, in one line, for every argument, file and download that does not give the above.
    """
    if image_size is not None and (not isinstance(image_size, int) or image_size < MIN_IMAGE_SIZE):
        raise ValueError(f"Expected image_size={image_size!r} to be None or an integer of at least {MIN_IMAGE_SIZE}.")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"Expected seed={seed!r} to be an integer in [0, 2**63).")

    # Path.expanduser raises for an unknown ~user; this leaves it, to be refused as a missing file.
    path = Path(os.path.expanduser(source))
    if source == "digits":
        return checked_dataset(source, source, digits(seed), image_size or _DIGITS_SIDE)
    if source == "faces":
        return checked_dataset(source, source, faces(seed), image_size)
    if source in TORCHVISION:
        folder = Path(os.path.expanduser(root or DEFAULT_ROOT))
        return checked_dataset(source, str(folder), read_torchvision(source, folder), image_size)
    if path.suffix.lower() == ".npz":
        return checked_dataset(path.stem, str(path), read_npz(path), image_size)
    if source and path.is_dir():
        name = os.path.basename(os.path.abspath(path))
        return checked_dataset(name, str(path), read_folder(path, image_size or _FOLDER_SIDE, seed), image_size)
    raise ValueError(
        f"Expected source={str(source)!r} to be digits, faces, {', '.join(TORCHVISION)}, a FILE.npz or an existing "
        "directory."
    )
