"""The jobs behind the tables: victims to train, attacks on chunks of images, section 3 at one state of training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from raytrust.config import CaptureConfig, Defence, InversionConfig
from raytrust.jobs.job import Job, Place, Result, Results
from raytrust.leak.observation import Capture
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.studies.paper.plan import Victim
from raytrust.studies.paper.theory import examine
from raytrust.train.loop import Evaluation, Step, Trained, capture_images, train
from raytrust.wire.channel import LocalChannel

# What beginning a job costs. Costs only order the jobs and share out the time, so that a rough unit will do: an
# iteration of an image's attack at width 64.
_START = 10.0


@dataclass(frozen=True)
class Training(Job):
    """Train a victim, uncompressed, and keep its state after some steps and at the end."""

    kind: ClassVar[str] = "training"
    victim: Victim
    keep: tuple[int, ...]
    batch_size: int = 64

    @property
    def name(self) -> str:
        return self.victim.name

    @property
    def cost(self) -> float:
        # The work of a convolution grows with the square of the width.
        return _START + self.victim.of * self.batch_size * 0.3 * (self.victim.width / 64) ** 2

    def run(self, store: Results, place: Place) -> Result:
        kept = tuple(step for step in self.keep if step < self.victim.of)
        config = replace(
            self.victim.train_config(),
            # A capture holds the weights at its step: so the common training loop keeps the states, and needs no other
            # hook.
            capture=CaptureConfig(kept or (0,), tuning=1, evaluation=1),
            batch_size=self.batch_size,
            steps=self.victim.of,
        )
        losses, figures, states = [], {}, {}
        for record in train(config, place.images, LocalChannel(), place.device):
            match record:
                # The weights are the same in all captures of a step.
                case Capture(index=0, seen=seen):
                    states[seen.step] = {**seen.weights, **seen.buffers}
                case Step(loss=loss):
                    losses.append(loss)
                case Trained(weights=weights, buffers=buffers):
                    states[self.victim.of] = {**weights, **buffers}
                case Evaluation(correct=correct, n=n):
                    figures = {"accuracy": correct / n, "n_test": n}
        arrays = {f"{step}/{name}": t.numpy() for step, state in states.items() for name, t in state.items()}
        # The loss of a single batch is noise; ten of them say where training has arrived.
        return Result({**figures, "loss": float(np.mean(losses[-10:]))}, arrays)


@dataclass(frozen=True)
class OnVictim(Job):
    """Work on test images, each alone, at one state of a victim. images: their indices. training: that of the victim,
    None if it is untrained."""

    victim: Victim
    defence: Defence
    attack: InversionConfig
    images: tuple[int, ...]
    training: Training | None = None

    @property
    def name(self) -> str:
        return f"{self.defence.name}, {self.victim.name}"

    def after(self) -> tuple[Job, ...]:
        return () if self.training is None else (self.training,)

    def state(self, store: Results) -> dict[str, Tensor] | None:
        """Weights and buffers of a trained victim, None for the untrained one; ValueError if it was not trained."""
        if self.training is None:
            return None
        arrays = store.arrays(self.training, f"{self.victim.steps}/")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class Attack(OnVictim):
    """Attack the images, and keep what it made of them beside the originals, (n, channels, height, width) in [0, 1]."""

    kind: ClassVar[str] = "attack"

    @property
    def cost(self) -> float:
        per_image = self.attack.iterations * self.attack.restarts
        return _START + len(self.images) * per_image * (self.victim.width / 64) ** 2

    def run(self, store: Results, place: Place) -> Result:
        data, chosen = place.images, torch.tensor(self.images)
        captures = capture_images(
            self.victim.train_config(self.defence),
            data,
            data.test_images[chosen],
            data.test_labels[chosen],
            self.state(store),
            self.victim.steps,
            device=place.device,
        )
        # References are training images, because test images are attacked: among them each would be its own rival.
        references = data.train_images[:99].float() / 255
        result = evaluate_inversion(captures, self.attack, place.device, references)
        sent = [x for m in captures[0].seen.messages for x in m.sent]
        figures = {
            "ssim": result.ssim,
            # A perfect copy has an infinite PSNR (in dB), which JSON can't hold.
            "psnr": [min(p, 100.0) for p in result.psnr],
            "oracle_ssim": result.oracle_ssim,
            "matching": result.matching,
            "mean_image_ssim": result.mean_image_ssim,
            "other_image_ssim": result.other_image_ssim,
            "identified": result.identified_ssim,
            "diverged": result.diverged,
            "bytes": sum(x.numel() * x.element_size() for x in sent),
            "gradient_bytes": sum(4 * w.numel() for w in captures[0].seen.weights.values()),
        }
        arrays = {"originals": result.originals.numpy(), "reconstructions": result.reconstructions.numpy()}
        return Result(figures, arrays)


@dataclass(frozen=True)
class Theory(OnVictim):
    """Section 3 of the paper at one state of training: see `raytrust.studies.paper.theory`."""

    kind: ClassVar[str] = "theory"

    @property
    def cost(self) -> float:
        return _START + 2 * len(self.images) * self.attack.iterations * (self.victim.width / 64) ** 2

    def run(self, store: Results, place: Place) -> Result:
        state, images = self.state(store), list(self.images)
        figures = examine(self.victim, self.defence, self.attack, place.images, images, state, place.device)
        return Result(figures)


Piece: TypeAlias = Training | Attack | Theory
KINDS = (Training.kind, Attack.kind, Theory.kind)
