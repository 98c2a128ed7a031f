"""Which folders of a directory are splits, and which are classes.

A folder is a split if its name says so in any usual spelling and case: train, Training, valid, val, validation, eval,
dev, test, testing, test_set, train2017, or pets-train beside pets-test. What can be read in two ways is refused: a
split that is taken for a class makes a task of "train" against "valid", which trains, is attacked and means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Role: TypeAlias = Literal["train", "test", "validation"]

_WORDS: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "eval", "evaluation", "dev"), "validation"),
}
_NOUNS = ("set", "data", "dataset", "split", "images", "image", "imgs", "img", "samples")  # say nothing beside a word
_COMPOUND = re.compile(f"({'|'.join(_WORDS)})({'|'.join(_NOUNS)})?")


@dataclass(frozen=True)
class Splits:
    """A directory in splits. test: None if a part of the training images is to be drawn for it."""

    train: Path
    test: Path | None
    left_out: tuple[str, ...]  # names of other folders


def folders_in(directory: Path) -> list[Path]:
    """The folders in a directory by name, without hidden ones: what a program or a system left there is no class."""
    return sorted(path for path in directory.iterdir() if path.is_dir() and not is_hidden(path.name))


def says_split(name: str) -> bool:
    """Whether a folder's name is that of a split, so that it must be said where it is read as a class."""
    return _parse(name) is not None


def is_hidden(name: str) -> bool:
    """Whether a name is that of a file or folder which nobody put there to be read: .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def find_splits(directory: Path) -> Splits | None:
    """The splits in a directory; None if its folders are classes. Raises ValueError where that can't be told."""
    folders = folders_in(directory)
    named = _split_folders(folders)
    plain = [path.name for path in folders if path not in [p for paths in named.values() for p in paths]]
    for role, paths in named.items():
        if len(paths) > 1:
            raise ValueError(f"Expected {directory} to hold one {role} split, got {_listed(paths)}.")
    if not named:
        _refuse_splits_in_classes(directory, folders)
        return None
    every = [path for paths in named.values() for path in paths]
    if plain and len(every) == 1:
        (path,) = every
        # Images may lie in it as in the other classes: of vehicles one is a train, and documents are valid or invalid.
        if not folders_in(path) and not ("train" in named and len(plain) == 1):
            return None
        raise ValueError(
            f"Expected {directory} to hold either splits or classes, got {path.name} beside {', '.join(plain)}; name "
            f"the test images test, or give {path} to read it alone."
        )
    if "train" not in named:
        raise ValueError(f"Expected {directory} to hold a training split, got {_listed(every)} without one.")
    (train,) = named["train"]
    test = next((named[role][0] for role in ("test", "validation") if role in named), None)
    return Splits(train, test, tuple(sorted({path.name for path in folders} - {train.name, test.name if test else ""})))


def _split_folders(folders: Sequence[Path]) -> dict[Role, list[Path]]:
    """The folders whose names say a split. What else two names say must be the same: pets-train, pets-test."""
    stems: dict[tuple[str, ...], dict[Role, list[Path]]] = {}
    for path in folders:
        if (parsed := _parse(path.name)) is not None:
            role, stem = parsed
            stems.setdefault(stem, {}).setdefault(role, []).append(path)
    named: dict[Role, list[Path]] = {}
    for stem, roles in stems.items():
        # A folder named "test pattern" or "train station" is a class, not a split.
        if not stem or ("train" in roles and len(roles) > 1):
            for role, paths in roles.items():
                named.setdefault(role, []).extend(paths)
    return named


def _parse(name: str) -> tuple[Role, tuple[str, ...]] | None:
    """The split that a name says, and its other words; None if it says none, or two."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W\d_]+", spaced.casefold())
    matches = [match for word in words if (match := _COMPOUND.fullmatch(word))]
    if len(matches) != 1:
        return None
    rest = [word for word in words if word != matches[0].group() and word not in _NOUNS]
    return _WORDS[matches[0].group(1)], tuple(rest)


def _refuse_splits_in_classes(directory: Path, folders: Sequence[Path]) -> None:
    for path in folders:
        inner = _split_folders(folders_in(path))
        if "train" in inner and len(inner) > 1:
            names = _listed([p for paths in inner.values() for p in paths])
            raise ValueError(
                f"Expected the classes of {directory} in its splits, as in {directory / 'train' / path.name}, got "
                f"{names} in {path}; if these are a data set of their own, give {path}."
            )


def _listed(paths: Sequence[Path]) -> str:
    return " and ".join(sorted(path.name for path in paths))
