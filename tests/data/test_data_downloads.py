"""torchvision's data sets: read from a folder, downloaded, and what is said where neither works."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import pickle
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from image_files import arrays, equal, npz, refusal

from raytrust.data import downloads, load


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
