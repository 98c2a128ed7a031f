"""One training run on Ray Train: worker actors that run `raytrust.train.train` over a process group."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
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
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": to_dict(config), "data": data, "directory": str(directory), "device": device},
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
