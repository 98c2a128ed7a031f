"""The results of a sweep on disk: what is finished, and what it found.

    DIR/sweep.json                             the sweep's configuration; a directory holds one sweep
    DIR/captures/<run>/config.json             <run> is the hash of the training config and of the data
    DIR/captures/<run>/step-000000/...         captures (see raytrust.capture)
    DIR/captures/<run>/training.json           written when training has finished
    DIR/captures/<run>/attacks/<attack>-<split>.json, .pt     an attack's figures and its reconstructions
    DIR/failures/<run>.json                    why a defence failed, until it is tried again

Every file is written whole or not at all, so whatever is there is finished: resuming a sweep is reading this store.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from raytrust.capture import Capture, atomic_write, load_capture
from raytrust.config import Defence, InversionConfig, SweepConfig, TrainConfig, digest, from_dict, to_dict
from raytrust.evaluate import InversionResult, evaluate_inversions

Split: TypeAlias = Literal["tuning", "evaluation"]


@dataclass(frozen=True)
class Store:
    """The directory of one sweep over one data set, whose fingerprint enters the hash of each training run."""

    root: Path
    fingerprint: str

    def run_id(self, train: TrainConfig) -> str:
        """The hash of the training config and the data: equal ids mean equal captures."""
        return digest(train, self.fingerprint)

    def run_directory(self, train: TrainConfig) -> Path:
        return self.root / "captures" / self.run_id(train)

    def begin(self, train: TrainConfig) -> Path:
        """The directory for the captures of this run, made ready."""
        directory = self.run_directory(train)
        path = directory / "config.json"
        if not path.exists():  # a run that goes on keeps its place in the order
            write_json(path, {"train": to_dict(train), "data": self.fingerprint, "begun": time.time_ns()})
        for stale in directory.glob("step-*"):  # of an interrupted run: its weights may differ from the new ones
            shutil.rmtree(stale)
        return directory

    def training(self, train: TrainConfig) -> dict[str, Any] | None:
        """The result of the finished training run, or None: see `raytrust.cluster.training` for its keys."""
        return read_json(self.run_directory(train) / "training.json")

    def finish_training(self, train: TrainConfig, result: dict[str, Any]) -> None:
        write_json(self.run_directory(train) / "training.json", result)
        self._failure_path(train).unlink(missing_ok=True)

    def captures(self, train: TrainConfig, step: int, split: Split) -> list[Capture]:
        n, m = train.capture.tuning, train.capture.evaluation
        indices = range(n) if split == "tuning" else range(n, n + m)
        return [load_capture(self.run_directory(train), step, i) for i in indices]

    def attack(self, train: TrainConfig, attack: InversionConfig, split: Split) -> dict[str, Any] | None:
        """The figures of a finished attack, or None."""
        return read_json(self._attack_path(train, attack, split).with_suffix(".json"))

    def attacks(self, train: TrainConfig, split: Split) -> list[dict[str, Any]]:
        """The figures of all finished attacks on this run, in the order of their ids."""
        paths = sorted((self.run_directory(train) / "attacks").glob(f"*-{split}.json"))
        return [found for path in paths if (found := read_json(path)) is not None]

    def run_attacks(
        self, train: TrainConfig, attacks: Sequence[InversionConfig], split: Split, device: str
    ) -> list[dict[str, Any]]:
        """The figures of these attacks: from the store, or by running those that are not in it, and storing them.

        Attacks on one step with equal iterations run as one batch.
        """
        batches: dict[tuple[int, int], list[InversionConfig]] = {}
        for attack in attacks:
            if self.attack(train, attack, split) is None:
                batches.setdefault((attack.capture_step, attack.iterations), []).append(attack)
        for (step, _), batch in batches.items():
            for result in evaluate_inversions(self.captures(train, step, split), batch, device):
                path = self._attack_path(train, result.attack, split)
                with atomic_write(path.with_suffix(".pt")) as file:
                    torch.save({"reconstructions": result.reconstructions, "originals": result.originals}, file)
                write_json(path.with_suffix(".json"), _figures(result, split))  # last: it says that it is finished
        figures = [self.attack(train, attack, split) for attack in attacks]
        return [f for f in figures if f is not None]

    def reconstructions(self, train: TrainConfig, attack: InversionConfig, split: Split) -> tuple[Tensor, Tensor]:
        """(reconstructions, originals), each (images, channels, height, width) in [0, 1], of a finished attack."""
        content = torch.load(self._attack_path(train, attack, split).with_suffix(".pt"), weights_only=True)
        return content["reconstructions"], content["originals"]

    def fail(self, train: TrainConfig, reason: str) -> None:
        write_json(self._failure_path(train), {"defence": to_dict(train.defence), "reason": reason})

    def failure(self, train: TrainConfig) -> str | None:
        found = read_json(self._failure_path(train))
        return found and found["reason"]

    def clear_failures(self) -> None:
        """Forget failures, so that the defences are tried again."""
        for path in (self.root / "failures").glob("*.json"):
            path.unlink()

    def defences(self, base: TrainConfig) -> list[Defence]:
        """The defences of all runs of this sweep that were begun, in the order in which they were begun."""
        found = []
        for path in (self.root / "captures").glob("*/config.json"):
            content = read_json(path)
            if content is None:
                continue
            train = from_dict(TrainConfig, content["train"])
            if content["data"] == self.fingerprint and replace(train, defence=base.defence) == base:
                found.append((content["begun"], train.defence))
        return [defence for _, defence in sorted(found, key=lambda pair: pair[0])]

    def _attack_path(self, train: TrainConfig, attack: InversionConfig, split: Split) -> Path:
        return self.run_directory(train) / "attacks" / f"{digest(attack)}-{split}"

    def _failure_path(self, train: TrainConfig) -> Path:
        return self.root / "failures" / f"{self.run_id(train)}.json"


def open_store(root: Path, sweep: SweepConfig, fingerprint: str, options: dict[str, Any] | None = None) -> Store:
    """Begin a sweep in `root`, or go on with the same one; how many trials it makes may differ.

    options: kept with it, for whoever resumes it. Raises ValueError if `root` holds another sweep.
    """
    path = root / "sweep.json"
    identity = {"sweep": to_dict(replace(sweep, trials=1)), "data": fingerprint}
    found = read_json(path)
    if found is None:
        write_json(path, {**identity, "options": options or {}})
    elif {k: found.get(k) for k in identity} != identity:
        raise ValueError(f"Expected output={str(root)!r} to be empty or to hold this sweep, but it holds another one.")
    return Store(root, fingerprint)


def write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file, None if there is no such file; ValueError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"Expected {path} to be JSON, but it can't be read: {error}.") from error


def _figures(result: InversionResult, split: Split) -> dict[str, Any]:
    return {
        "attack": to_dict(result.attack),
        "split": split,
        "ssim": result.ssim,
        "psnr": [min(p, 100.0) for p in result.psnr],  # dB; a perfect copy has no finite value
        "oracle_ssim": result.oracle_ssim,
        "objective": result.objective,
        "diverged": result.diverged,
        "seconds": result.seconds,
    }
