from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrust.jobs import lock
from raytrust.jobs.lock import NAME, SILENCE, exclusive

HOLD = """
import os, sys, time
from pathlib import Path
from raytrust.jobs.lock import exclusive
if sys.argv[2] != "0":
    def link(*_):
        raise OSError(int(sys.argv[2]), "no links here")
    os.link = link
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(
    autouse=True, params=[0, errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS], ids=lambda n: errno.errorcode.get(n, "links")
)
def refusal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every test on a file system with links, and on those that refuse them, each in its way."""
    number: int = request.param

    def link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    if number:
        monkeypatch.setattr(os, "link", link)
    return number


@pytest.fixture
def holder(tmp_path: Path, refusal: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), str(refusal)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def write(path: Path, **changes: Any) -> None:
    holder = {"identity": "x", "host": socket.gethostname(), "pid": os.getpid(), "started": lock._started(os.getpid())}
    (path / NAME).write_text(json.dumps(holder | changes))


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=r"\AExpected [^\n]+\.\Z") as error, exclusive(path):
        pass
    return str(error.value)


def test_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    for _ in range(2):
        with exclusive(folder):
            assert f"process {os.getpid()} on {socket.gethostname()} runs a sweep" in refused(folder)
            with exclusive(tmp_path / "other"):
                pass
        assert list(folder.iterdir()) == []


def test_an_error_releases_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), exclusive(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert f"process {holder.pid} on" in refused(tmp_path)
    holder.kill()
    holder.wait()
    assert (tmp_path / NAME).exists()
    with exclusive(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_process_id_that_was_used_again_is_another_process(tmp_path: Path) -> None:
    write(tmp_path, started="1")
    with exclusive(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["identity"] != "x"


@pytest.mark.parametrize("silent", [0.0, SILENCE - 20, SILENCE + 20])
def test_another_machine_s_lock_counts_until_it_is_silent(tmp_path: Path, silent: float) -> None:
    """Its process id says nothing here."""
    write(tmp_path, host="elsewhere", pid=2**22 + 1, started="1")
    os.utime(tmp_path / NAME, (time.time() - silent, time.time() - silent))
    if silent < SILENCE:
        assert "on elsewhere runs a sweep" in refused(tmp_path)
        assert json.loads((tmp_path / NAME).read_text())["host"] == "elsewhere"
    else:
        with exclusive(tmp_path):
            pass
    assert {path.name for path in tmp_path.iterdir()} == ({NAME} if silent < SILENCE else set())


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with exclusive(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        until = time.monotonic() + 10
        while (tmp_path / NAME).stat().st_mtime < time.time() - 5 and time.monotonic() < until:
            time.sleep(0.02)
        assert (tmp_path / NAME).stat().st_mtime > time.time() - 5


def test_a_lock_that_was_taken_over_is_not_removed_by_its_old_holder(tmp_path: Path) -> None:
    with exclusive(tmp_path):
        write(tmp_path, identity="new")
    assert json.loads((tmp_path / NAME).read_text())["identity"] == "new"


def test_a_new_lock_in_the_place_of_a_stale_one_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that find the same stale lock: the slower one must not remove the faster one's."""
    write(tmp_path, started="1")
    rename = os.rename

    def slow(source: Path, target: Path) -> None:
        if Path(source).name == NAME:
            write(tmp_path, identity="faster")
        rename(source, target)

    monkeypatch.setattr(os, "rename", slow)
    refused(tmp_path)
    assert json.loads((tmp_path / NAME).read_text())["identity"] == "faster"
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


RACE = """
exec(sys.argv[3])
print("ready", flush=True)
go, stop = Path(sys.argv[4]) / "go", Path(sys.argv[4]) / "stop"
while not go.exists():
    pass
try:
    with exclusive(Path(sys.argv[1])):
        print("held", flush=True)
        while not stop.exists():
            time.sleep(0.01)
except ValueError as error:
    print(error, flush=True)
"""


def test_of_several_that_begin_at_once_one_holds_it(tmp_path: Path, refusal: int) -> None:
    """Where a dead process left its lock."""
    folder = tmp_path / "results"
    folder.mkdir()
    write(folder, started="1")
    prelude = HOLD.partition("with exclusive")[0]
    command = [sys.executable, "-c", "import sys\n" + RACE, str(folder), str(refusal), prelude, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    streams = [process.stdout for process in processes if process.stdout is not None]
    assert [stream.readline() for stream in streams] == ["ready\n"] * 4
    (tmp_path / "go").touch()
    said = [stream.readline() for stream in streams]
    (tmp_path / "stop").touch()
    for process in processes:
        process.communicate(timeout=60)
    assert sorted(text == "held\n" for text in said) == [False, False, False, True], said
    assert list(folder.iterdir()) == []


def test_a_lock_that_is_being_made_is_waited_for(tmp_path: Path) -> None:
    """Without links it is empty for a moment."""
    (tmp_path / NAME).touch()
    timer = threading.Timer(0.3, write, [tmp_path])
    timer.start()
    assert f"process {os.getpid()} on" in refused(tmp_path)
    timer.join()


def test_a_store_that_refuses_the_slower_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
    """An object store lets both create it, and says so when what the slower one wrote is sent."""
    if not refusal:
        return
    fsync = os.fsync

    def stale(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        write(tmp_path, host="elsewhere")
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "fsync", stale)
    assert "on elsewhere runs a sweep" in refused(tmp_path)
    assert json.loads((tmp_path / NAME).read_text())["host"] == "elsewhere"


def test_a_disk_that_is_full_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    if refusal:
        with pytest.raises(OSError, match="No space left"), exclusive(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_what_is_no_lock_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    assert f"Expected {tmp_path / NAME} to be a sweep's lock" in refused(tmp_path)
    assert (tmp_path / NAME).read_text() == content
    assert len(list(tmp_path.iterdir())) == 1
