"""One sweep in a directory at a time, by a lock with a lease, as the package filelock has none: its flock() binds one
machine alone on many shared file systems, and its soft lock outlives a machine that was lost.

DIR/sweep.lock names the process and the machine that hold it. The holder touches it every few seconds. It is stale, and
taken over, if its process has ended on this machine, or if a holder elsewhere has given no sign of life for long.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAME = "sweep.lock"
# Seconds that a lock may be there without its content, on file systems where it can't be linked into place.
BIRTH = 1.0
BEAT = 10.0  # seconds between two signs of life
# What link() says where a file system has no links.
LINKLESS = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
# Seconds without a sign of life until a holder on another machine is taken for dead: network file systems may show an
# old time for 60 of them.
SILENCE = 180.0


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the directory for the time of the block. Raises ValueError if somebody else holds it."""
    path = directory / NAME
    identity = uuid.uuid4().hex
    _acquire(path, identity)
    stop = threading.Event()
    beat = threading.Thread(target=_keep, args=(path, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        holder = _read(path)
        # Another run may have taken the lock over, because this machine seemed dead: it is then no longer ours to
        # remove.
        if holder is not None and holder["identity"] == identity:
            path.unlink(missing_ok=True)


def _acquire(path: Path, identity: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mine = path.with_name(f".{NAME}.{identity}")
    holder = {"identity": identity, "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    mine.write_text(json.dumps(holder))
    try:
        # Between the removal of a stale lock and the claim another run may be faster, and its lock may be stale in
        # turn.
        for _ in range(3):
            try:
                _claim(path, mine)
                return
            except FileExistsError:
                _take_over(path, mine)
        raise _refusal(path)
    finally:
        mine.unlink(missing_ok=True)


def _claim(path: Path, mine: Path) -> None:
    """Make the lock with the content of `mine`. Raises FileExistsError if there is one."""
    try:
        # A link appears whole, with its content, over NFS too; a file that is opened and then written does not.
        os.link(mine, path)
    except OSError as error:
        if isinstance(error, FileExistsError) or error.errno not in LINKLESS:
            raise
        # Object stores and memory cards have file systems without links.
        _create(path, mine.read_bytes())


def _create(path: Path, content: bytes) -> None:
    """Make a file that was not there. Raises FileExistsError if it was, or if another machine made it meanwhile.

    Where files live in an object store, both may create it, and the store then refuses what the slower one writes.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno == errno.ESTALE:
            raise FileExistsError(errno.EEXIST, "made by another machine meanwhile", str(path)) from error
        # Where the disk is full, say, no half-made file may stay behind.
        path.unlink(missing_ok=True)
        raise
    if path.read_bytes() != content:
        raise FileExistsError(errno.EEXIST, "made by another machine meanwhile", str(path))


def _take_over(path: Path, mine: Path) -> None:
    """Remove the lock if it is stale; raises ValueError if it is not."""
    with suppress(FileNotFoundError):
        if path.stat().st_size == 0:
            # Without links a lock is there for a moment before its content is.
            time.sleep(BIRTH)
    holder = _read(path)
    # It was released between the claim and this look at it.
    if holder is None:
        return
    if not _stale(path, holder, mine):
        raise _refusal(path)
    aside = mine.with_suffix(".aside")
    try:
        os.rename(path, aside)
    # Somebody else took it over first.
    except FileNotFoundError:
        return
    # Somebody else took the stale lock over in between, and this is theirs: give it back.
    if _read(aside) != holder:
        os.rename(aside, path)
        raise _refusal(path)
    aside.unlink()


def _stale(path: Path, holder: dict[str, Any], mine: Path) -> bool:
    if holder["host"] == socket.gethostname():
        return _started(holder["pid"]) != holder["started"]
    # Machines disagree about the time; the file system's clock is the one that all of them read.
    os.utime(mine)
    return mine.stat().st_mtime - path.stat().st_mtime > SILENCE


def _refusal(path: Path) -> ValueError:
    holder = _read(path) or {"pid": "unknown", "host": "unknown"}
    return ValueError(
        f"Expected output={str(path.parent)!r} to be free, but process {holder['pid']} on {holder['host']} runs a "
        f"sweep in it; on another machine than that, its lock counts for {SILENCE:.0f} s after its last sign of life."
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or set(found) != {"identity", "host", "pid", "started"}:
        raise ValueError(f"Expected {path} to be a sweep's lock; remove it if no sweep runs in this directory.")
    return found


def _started(pid: int) -> str | None:
    """When the process was started, as the system counts; None if it has ended. Process ids are used again."""
    try:
        # The program's name stands in brackets and may hold brackets and spaces itself: fields are counted after the
        # last.
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if stat[0] == "Z" else stat[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        # Signal 0 asks whether a process lives, on systems that have no /proc to look at.
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def _keep(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        # A storage may be away for a while; the next beat may reach it.
        with suppress(OSError):
            os.utime(path)
