"""Pieces of work: each a value, done in one process on one thread, with one file for its result.

    DIR/units/<id>.json           figures of a finished unit; <id> is the hash of the unit and of the data
    DIR/units/<id>.npz            an attack's images
    DIR/units/<id>.failed.json    why there are none, until it is tried again
    DIR/models/<id>-000060.pt     weights and buffers of a trained victim

Every file is written whole or not at all, so that resuming is reading what is there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from raytrust.config import CaptureConfig, Defence, InversionConfig, digest, to_dict
from raytrust.data import Dataset
from raytrust.jobs.files import atomic_write, read_json, write_json
from raytrust.leak.observation import Capture
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.studies.paper.plan import Victim
from raytrust.studies.paper.theory import examine
from raytrust.train.loop import Evaluation, Step, Trained, capture_images, train
from raytrust.wire.channel import LocalChannel

Figures = dict[str, Any]
_START = 10.0  # what beginning a unit costs; costs are in iterations of an image's attack at width 64


@dataclass(frozen=True)
class Training:
    """Train a victim, uncompressed, and keep its state after some steps."""

    kind: ClassVar[str] = "training"
    victim: Victim
    keep: tuple[int, ...]
    batch_size: int = 64

    @property
    def cost(self) -> float:
        return _START + self.victim.of * self.batch_size * 0.3 * (self.victim.width / 64) ** 2


@dataclass(frozen=True)
class Attack:
    """Attack test images, each alone. images: their indices."""

    kind: ClassVar[str] = "attack"
    victim: Victim
    defence: Defence
    attack: InversionConfig
    images: tuple[int, ...]

    @property
    def cost(self) -> float:
        per_image = self.attack.iterations * self.attack.restarts
        return _START + len(self.images) * per_image * (self.victim.width / 64) ** 2


@dataclass(frozen=True)
class Theory:
    """Section 3 of the paper at one state of training: see `raytrust.studies.paper.theory`."""

    kind: ClassVar[str] = "theory"
    victim: Victim
    defence: Defence
    attack: InversionConfig
    images: tuple[int, ...]

    @property
    def cost(self) -> float:
        return _START + 2 * len(self.images) * self.attack.iterations * (self.victim.width / 64) ** 2


Unit: TypeAlias = Training | Attack | Theory


class Watcher(Protocol):
    """Is told in the driver of each unit that ends; `seconds` is None for one that failed."""

    def ended(self, unit: Unit, seconds: float | None, reason: str = "") -> None: ...


@dataclass(frozen=True)
class UnitStore:
    """The results over one data set, whose fingerprint enters each unit's id."""

    root: Path
    fingerprint: str = field(default="")

    def id(self, unit: Unit) -> str:
        return digest(unit.kind, unit, self.fingerprint)

    def path(self, unit: Unit, suffix: str = ".json") -> Path:
        return self.root / "units" / f"{self.id(unit)}{suffix}"

    def figures(self, unit: Unit) -> Figures | None:
        """What a finished unit found, None if it is not finished."""
        found: Figures | None = read_json(self.path(unit))
        return found

    def failure(self, unit: Unit) -> str | None:
        found = read_json(self.path(unit, ".failed.json"))
        return None if found is None else str(found["reason"])

    def fail(self, unit: Unit, reason: str) -> None:
        write_json(self.path(unit, ".failed.json"), {"unit": to_dict(unit), "reason": reason})

    def clear_failures(self) -> None:
        """Forget failures, so that the units are tried again."""
        for path in (self.root / "units").glob("*.failed.json"):
            path.unlink()

    def missing(self, units: Iterable[Unit]) -> list[Unit]:
        """Those not done and not failed, each once, in their order."""
        return [
            u for u in dict.fromkeys(units) if not self.path(u).exists() and not self.path(u, ".failed.json").exists()
        ]

    def images(self, unit: Unit) -> dict[str, np.ndarray]:
        """ "originals" and "reconstructions", (n, channels, height, width) in [0, 1], of a finished attack."""
        with np.load(self.path(unit, ".npz"), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def run(self, unit: Unit, data: Dataset) -> float:
        """Do the unit, unless it is done; returns its processor time in seconds.

        Raises ValueError or FloatingPointError where it can't be done.
        """
        started = time.process_time()
        if not self.path(unit).exists():
            match unit:
                case Training():
                    found = self._train(unit, data)
                case Attack():
                    found = self._attack(unit, data)
                case Theory():
                    state = self._state(unit.victim)
                    found = examine(unit.victim, unit.defence, unit.attack, data, list(unit.images), state)
            seconds = time.process_time() - started
            content = {"kind": unit.kind, "unit": to_dict(unit), **found, "cpu_seconds": seconds}
            write_json(self.path(unit), content)  # last: it says that the unit is finished
        return time.process_time() - started

    def _train(self, unit: Training, data: Dataset) -> Figures:
        victim = unit.victim
        kept = tuple(step for step in unit.keep if step < victim.of)
        config = replace(
            victim.train_config(),
            capture=CaptureConfig(kept or (0,), tuning=1, evaluation=1),
            batch_size=unit.batch_size,
            steps=victim.of,
        )
        losses, found = [], {}
        for record in train(config, data, LocalChannel()):
            match record:
                case Capture(index=0, seen=seen):
                    self._keep_state(victim, seen.step, {**seen.weights, **seen.buffers})
                case Step(loss=loss):
                    losses.append(loss)
                case Trained(weights=weights, buffers=buffers):
                    self._keep_state(victim, victim.of, {**weights, **buffers})
                case Evaluation(correct=correct, n=n):
                    found = {"accuracy": correct / n, "n_test": n}
        return {**found, "loss": float(np.mean(losses[-10:]))}

    def _attack(self, unit: Attack, data: Dataset) -> Figures:
        chosen = torch.tensor(unit.images)
        captures = capture_images(
            unit.victim.train_config(unit.defence),
            data,
            data.test_images[chosen],
            data.test_labels[chosen],
            self._state(unit.victim),
            unit.victim.steps,
        )
        references = data.train_images[:99].float() / 255
        result = evaluate_inversion(captures, unit.attack, references=references)
        with atomic_write(self.path(unit, ".npz")) as file:
            np.savez(file, originals=result.originals.numpy(), reconstructions=result.reconstructions.numpy())
        sent = [x for m in captures[0].seen.messages for x in m.sent]
        return {
            "ssim": result.ssim,
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

    def _state_path(self, victim: Victim, step: int) -> Path:
        name = digest("state", replace(victim, batch_norm="eval", steps=0), self.fingerprint)
        return self.root / "models" / f"{name}-{step:06d}.pt"

    def _keep_state(self, victim: Victim, step: int, state: dict[str, Tensor]) -> None:
        with atomic_write(self._state_path(victim, step)) as file:
            torch.save(state, file)

    def _state(self, victim: Victim) -> dict[str, Tensor] | None:
        """Weights and buffers of a trained victim, None for the untrained one; ValueError if it was not trained."""
        if victim.steps == 0:
            return None
        path = self._state_path(victim, victim.steps)
        if not path.exists():
            raise ValueError(f"Expected the victim to be trained: {victim.name}.")
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return state
