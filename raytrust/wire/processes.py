"""Gloo groups on this machine: of new processes, for a training run without Ray, and of this one alone."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from raytrust.wire.channel import Channel, GroupChannel

_INTERFACE, _LOOPBACK = "GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo"
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


@contextmanager
def default_group() -> Iterator[int]:
    """The default process group while the block runs: the one there is, or else one of this process alone.

    Yields its number of workers.
    """
    if dist.is_initialized():
        yield dist.get_world_size()
        return
    before, hook = os.environ.get(_INTERFACE), sys.excepthook
    os.environ[_INTERFACE] = _LOOPBACK
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    finally:
        # A group that the caller makes later may be of several machines.
        os.environ.pop(_INTERFACE)
        if before is not None:
            os.environ[_INTERFACE] = before
    try:
        yield 1
    finally:
        dist.destroy_process_group()
        # Each new group puts "[rank0]: " before the lines of a traceback, and none takes it away.
        sys.excepthook = hook


def copied(state: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of a communication hook's state, which shares process groups and modules with the original.

    Raises ValueError for what can't be copied.
    """
    if state is None or isinstance(state, dist.ProcessGroup | nn.Module):
        return state
    if isinstance(state, dict):
        return {key: copied(value, memo) for key, value in state.items()}
    if isinstance(state, list | tuple) and type(state) in (list, tuple):
        return type(state)(copied(value, memo) for value in state)
    slots = [slot for kind in type(state).__mro__ for slot in getattr(kind, "__slots__", ())]
    names = [name for name in (*slots, *getattr(state, "__dict__", ())) if hasattr(state, name)]
    try:
        # Attribute by attribute: the state of torch's PowerSGD copies itself for a file, and then asks for a default
        # process group, which there may not be.
        if not names or hasattr(state, "__deepcopy__"):
            return copy.deepcopy(state, memo)
        twin = object.__new__(type(state))
    except TypeError as error:
        raise ValueError(f"Expected state of {type(state).__name__} to be one that can be copied: {error}.") from error
    for name in names:
        object.__setattr__(twin, name, copied(getattr(state, name), memo))
    return twin


def _work(rank: int, function: Callable[[Channel], Any], workers: int, directory: str, timeout: float) -> None:
    # More threads than cores slow each other down: workers times threads must not exceed them.
    torch.set_num_threads(1)
    # Nothing of the group listens on another interface, and the workers meet in a file: a TCPStore listens on all.
    os.environ.setdefault(_INTERFACE, _LOOPBACK)
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
