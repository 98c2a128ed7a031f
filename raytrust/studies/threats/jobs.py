"""The model of the state "trained": trained without a defence, and kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from raytrust.config import TrainConfig
from raytrust.jobs.files import atomic_write
from raytrust.jobs.job import Job, Place, Result, Results
from raytrust.train.loop import Evaluation, Step, Trained, train
from raytrust.wire.channel import LocalChannel


@dataclass(frozen=True)
class TrainedModel(Job):
    """Train a model, and keep its weights and buffers as a checkpoint in the job's folder.

    Figures: "correct" of "n_test" test images, "losses" (nats, one a step).
    """

    kind: ClassVar[str] = "training"
    train: TrainConfig

    @property
    def name(self) -> str:
        return self.train.model.title

    @property
    def cost(self) -> float:
        return float(self.train.steps * self.train.batch_size)

    def checkpoint(self, store: Results) -> Path:
        return store.folder(self) / "model.pt"

    def run(self, store: Results, place: Place) -> Result:
        losses, figures = [], {}
        for record in train(self.train, place.images, LocalChannel(), place.device):
            match record:
                case Step(loss=loss):
                    losses.append(loss)
                case Trained(weights=weights, buffers=buffers):
                    path = self.checkpoint(store)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_write(path) as file:
                        torch.save({**weights, **buffers}, file)
                case Evaluation(correct=correct, n=n):
                    figures = {"correct": correct, "n_test": n}
        return Result({**figures, "losses": losses})
