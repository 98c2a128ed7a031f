"""A gloo group of processes on this machine, for a training run without Ray."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raytrust.wire.channel import Channel, GroupChannel

TIMEOUT = 1800.0  # seconds that a worker waits for another in a collective


def in_processes(function: Callable[[Channel], Any], workers: int, timeout: float = TIMEOUT) -> list[Any]:
    """Call a function in new processes of one gloo group, and return what each returned, by rank.

    function: can be pickled. Each process has one thread. timeout: seconds, for every collective. Raises
    FloatingPointError with the reason if one of them fails, after all have ended.
    """
    with tempfile.TemporaryDirectory(prefix="raytrust-group-") as directory:
        try:
            mp.spawn(_work, (function, workers, directory, timeout), workers)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise FloatingPointError(_reason(error)) from error
        # Our own files in a directory that is ours alone: they may hold any object.
        return [torch.load(Path(directory, f"{rank}.pt"), weights_only=False) for rank in range(workers)]


def _work(rank: int, function: Callable[[Channel], Any], workers: int, directory: str, timeout: float) -> None:
    # More threads than cores slow each other down: workers times threads must not exceed them.
    torch.set_num_threads(1)
    # Nothing of the group listens on another interface, and the workers meet in a file: a TCPStore listens on all.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    store = dist.FileStore(f"{directory}/meeting", workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=timedelta(seconds=timeout))
    try:
        torch.save(function(GroupChannel()), f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    # All is done and saved. Threads that the function left in C++, as DistributedDataParallel does, may abort the
    # interpreter's own end ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _reason(error: Exception) -> str:
    """The last line of the traceback that multiprocessing hands over, without the error's type if that is ours."""
    line = str(error).strip().splitlines()[-1]
    for ours in ("ValueError: ", "FloatingPointError: "):
        line = line.removeprefix(ours)
    return line
