"""How the workers of a training group meet, what they talk through where they share a GPU, and from what they start."""

from __future__ import annotations

import os
import random
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import ray
import torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from torch import Tensor

from raytrust.wire.channel import Channel


class HostChannel:
    """Another channel, through host memory: what it is given may lie on any device, and what it returns lies there too.

    For gloo, and so for workers that share a GPU: NCCL refuses two ranks on one device.
    """

    def __init__(self, channel: Channel):
        self._channel = channel
        self.world_size = channel.world_size
        self.rank = channel.rank

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        mean = self._channel.all_mean(x.detach().cpu())
        return mean.to(x.device) if out is None else out.copy_(mean)

    def all_gather(self, xs: Sequence[Tensor], counts: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        devices = [x.device for x in xs]
        gathered = self._channel.all_gather([x.detach().cpu() for x in xs], counts)
        return [tuple(x.to(device) for x, device in zip(worker, devices, strict=True)) for worker in gathered]


class ProcessState:
    """What a process shares between the jobs that it does one after another, as it was at first.

    `raytrust.train.loop.train` uses none of the global generators; a network of the user's may, by dropout for one.
    """

    def __init__(self) -> None:
        self._generators = torch.random.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        self._on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
        self._threads, self._dtype = torch.get_num_threads(), torch.get_default_dtype()

    def restore(self) -> None:
        torch.random.set_rng_state(self._generators[0])
        np.random.set_state(self._generators[1])  # noqa: NPY002
        random.setstate(self._generators[2])
        if self._on_cuda:
            torch.cuda.set_rng_state_all(self._on_cuda)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = self._cudnn
        torch.set_num_threads(self._threads)
        torch.set_default_dtype(self._dtype)
        torch.set_grad_enabled(True)


@dataclass
class OnLoopback(TorchConfig):
    """The process group of workers that are all on this machine: nothing of it listens on another interface.

    torch's own meeting point, a TCPStore, listens on all interfaces and asks for nothing. These workers meet in a file
    in the directory `meeting`.
    """

    meeting: str = ""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OnLoopbackBackend


class _OnLoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: OnLoopback) -> None:
        group = {
            "backend": backend_config.backend,
            "world_size": len(worker_group),
            "init_method": "file://" + quote(f"{backend_config.meeting}/{uuid.uuid4().hex}"),
            "timeout_s": backend_config.timeout_s,
        }
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get([worker_group.execute_single_async(i, _meet, world_rank=i, **group) for i in range(len(worker_group))])


def _meet(**group: Any) -> None:
    interface = "lo0" if sys.platform == "darwin" else "lo"
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    _setup_torch_process_group(**group)
