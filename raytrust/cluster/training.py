"""One training run on Ray Train: worker actors that run `raytrust.train.train` over a process group."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from ray.train.v2.api.config import LoggingConfig  # not exported elsewhere

from raytrust.capture import Capture, save_capture
from raytrust.channel import GroupChannel
from raytrust.config import TrainConfig, from_dict, to_dict
from raytrust.train import Evaluation, Step, train

if TYPE_CHECKING:
    from raytrust.store import Store  # a worker needs none of what it imports


def train_on_cluster(config: TrainConfig, data: ray.ObjectRef, store: Store, device: str) -> dict[str, Any]:
    """Train once, with the captures written by the workers into the store, and return the result.

    A run that the store holds is not trained again. Keys: "correct", "n_test", "test_loss" (nats), "losses" (of worker
    0, nats, one a step), "bytes_per_step" (mean payload bytes that a worker handed to collectives), "dense_bytes" (of
    the gradient), "seconds" (in the training loop) and "total_seconds" (with the start and stop of the workers).
    """
    if (found := store.training(config)) is not None:
        return found
    started = time.perf_counter()
    directory = store.begin(config)
    on_loopback = ip_address(ray.util.get_node_ip_address()).is_loopback
    with tempfile.TemporaryDirectory(prefix="raytrust-") as meeting:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": to_dict(config), "data": data, "directory": str(directory), "device": device},
            torch_config=_OnLoopback(meeting=meeting) if on_loopback else None,
            scaling_config=ScalingConfig(
                num_workers=config.workers,
                use_gpu=device == "cuda",
                resources_per_worker={"CPU": 1} if device == "cpu" else None,
            ),
            run_config=RunConfig(
                name=store.run_id(config),
                storage_path=str(store.root / "ray" / "train"),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        result: dict[str, Any] = trainer.fit().return_value
    result["total_seconds"] = time.perf_counter() - started
    store.finish_training(config, result)
    return result


def _worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What each Train worker runs. Returns the result of `train_on_cluster`, less its total time."""
    torch.set_num_threads(1)  # workers times threads stay within the cores
    config = from_dict(TrainConfig, arguments["config"])
    data = ray.get(arguments["data"])
    device = arguments["device"]
    if device == "cuda":
        device = str(ray.train.torch.get_device())
    steps: list[Step] = []
    started = time.perf_counter()
    for record in train(config, data, GroupChannel(), device):
        match record:
            case Step():
                steps.append(record)
            case Capture():
                save_capture(Path(arguments["directory"]), record)
            case Evaluation(correct=correct, n=n, loss=loss):
                evaluation = {"correct": correct, "n_test": n, "test_loss": loss}
    return {
        **evaluation,
        "losses": [s.loss for s in steps],
        "bytes_per_step": sum(s.sent_bytes for s in steps) / len(steps),
        "dense_bytes": steps[0].gradient_bytes,
        "seconds": time.perf_counter() - started,
    }


@dataclass
class _OnLoopback(TorchConfig):
    """The process group of workers that are all on this machine: nothing of it listens on another interface.

    torch's own meeting point, a TCPStore, listens on all interfaces and asks for nothing. These workers meet in a file
    in the directory `meeting`.
    """

    meeting: str = ""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OnLoopbackBackend


class _OnLoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: _OnLoopback) -> None:
        group = {
            "backend": "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo",
            "world_size": len(worker_group),
            "init_method": f"file://{backend_config.meeting}/{uuid.uuid4().hex}",  # a new one after a worker was lost
            "timeout_s": backend_config.timeout_s,
        }
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get([worker_group.execute_single_async(i, _meet, world_rank=i, **group) for i in range(len(worker_group))])


def _meet(**group: Any) -> None:
    interface = "lo0" if sys.platform == "darwin" else "lo"
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    _setup_torch_process_group(**group)
