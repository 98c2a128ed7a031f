"""Data sets in one .npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from raytrust.data.arrays import KEYS, Source
from raytrust.data.refusals import reason


def read_npz(path: Path) -> Source:
    """The four arrays of a file that has MedMNIST's keys."""
    if not path.exists():
        raise ValueError(f"Expected {path} to be a .npz file, but there is no such file.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"Expected {path} to be a .npz file, got something else or a part of one.")
    arrays: dict[str, np.ndarray] = {}
    reading = "the index"
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            held = archive.files
            for reading in (key for key in KEYS if key in held):
                arrays[reading] = archive[reading]
    except Exception as error:
        # A damaged file can make zipfile, zlib and numpy raise nearly anything.
        hint = "; save images and labels as plain arrays, np.stack(list(images))" if "pickle" in str(error) else ""
        raise ValueError(f"Expected {reading} in {path} to be readable ({reason(error)}){hint}.") from error
    missing = [key for key in KEYS if key not in held]
    if missing:
        raise ValueError(
            f"Expected {path} to hold {' and '.join(missing)}, got only {', '.join(held) or 'an empty archive'}."
        )
    for key, array in arrays.items():
        # For a member that is no .npy, numpy returns its bytes.
        if not isinstance(array, np.ndarray):
            raise ValueError(f"Expected {key} in {path} to be an array, got {type(array).__name__}.")
    return Source(arrays, notes=("Test images: as stored in the file.",))
