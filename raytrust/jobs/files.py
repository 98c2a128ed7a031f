"""Files that are whole or not there at all, and readable by their owner alone."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def make_private(directory: Path) -> None:
    """Make the directory; what is new of it and of its parents is the owner's alone."""
    # One by one, as `parents=True` gives the mode to the last folder alone and leaves its parents open to everybody.
    # Another process may be making the same folders.
    for folder in reversed([p for p in (directory, *directory.parents) if not p.exists()]):
        folder.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name only when the block ends without an error.

    Its mode is 0600, that of new directories 0700: captures hold gradients and images that are private.
    """
    make_private(path.parent)
    # In the same folder, because a file is renamed in one step only within one file system.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            # On the disk before it has its name: after a power cut the name could else belong to an empty file.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    # Also on Ctrl-C no half file may stay behind.
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write the bytes as `atomic_write` does: if that fails, the old file stays and no other is left behind."""
    with atomic_write(Path(path)) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    write_file(path, json.dumps(content, indent=1, allow_nan=False).encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file, None if there is no such file; ValueError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        # A stray file may lie where a folder would be, which holds as little as no file.
        return None
    except ValueError as error:
        raise ValueError(f"Expected {path} to be JSON, but it can't be read: {error}.") from error
