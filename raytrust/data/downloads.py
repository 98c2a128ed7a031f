"""torchvision's data sets, from a folder or from the network."""

from __future__ import annotations

import contextlib
import http.client
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raytrust.data.arrays import KEYS, Source
from raytrust.data.refusals import reason

DEFAULT_ROOT = Path("~/.cache/raytrust")
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST"}
TIMEOUT = 10.0  # seconds that a server may stay silent


def read_torchvision(name: str, root: Path) -> Source:
    """One of `TORCHVISION`, downloaded to `root` where it is not there."""
    from torchvision import datasets

    kind: Any = getattr(datasets, TORCHVISION[name])

    def read(download: bool) -> tuple[list[np.ndarray], list[str]]:
        # Some releases of torchvision print their progress; standard output is the program's own.
        with contextlib.redirect_stdout(sys.stderr):
            parts = [kind(root, train=train, download=download) for train in (True, False)]
        return [np.asarray(array) for part in parts for array in (part.data, part.targets)], parts[0].classes

    try:
        try:
            arrays, classes = read(download=False)
        except RuntimeError:
            # RuntimeError is torchvision's word for a data set that is not there.
            with _impatient(kind.url if hasattr(kind, "url") else kind.mirrors[0]):
                arrays, classes = read(download=True)
    except Exception as error:
        # The network, the disk and files of an interrupted download each raise their own types.
        raise ValueError(
            f"Expected {name} under {root} or a network to fetch it from, but the download failed ({reason(error)}); "
            f"give --data FILE.npz or put the intact files under {root}."
        ) from error
    # MNIST calls its classes "0 - zero" and so on, which is the number twice.
    names = tuple(name.split(" - ")[-1] for name in classes)
    return Source(dict(zip(KEYS, arrays, strict=True)), names, ("Test images: the data set's own.",))


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
            urllib.request.urlopen(request, timeout=TIMEOUT).close()  # noqa: S310
        except urllib.error.HTTPError as answer:
            answer.close()
        except (OSError, http.client.HTTPException) as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if thread.is_alive():
        raise TimeoutError(f"no answer from {url} in {TIMEOUT:g} s")
    if failures:
        raise failures[0]

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
