from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrust import lock
from raytrust.lock import NAME, SILENCE, exclusive

HOLD = """
import sys, time
from pathlib import Path
from raytrust.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
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


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_what_is_no_lock_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    assert f"Expected {tmp_path / NAME} to be a sweep's lock" in refused(tmp_path)
    assert (tmp_path / NAME).read_text() == content
    assert len(list(tmp_path.iterdir())) == 1
