"""The results of a sweep on disk: a job store, and what a sweep asks of it.

DIR/sweep.json                         the sweep's configuration; a directory holds one sweep
DIR/captures/<run>.json                figures of a training run; <run> is the hash of its config and of the data
DIR/captures/<run>/config.json         written when it is begun
DIR/captures/<run>/step-000000/...     captures (see raytrust.jobs.captures)
DIR/captures/<run>/attacks/<key>.json, .npz     an attack's figures and its reconstructions
DIR/references.pt                      other images of the data set, for floors and identification
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytrust.config import Defence, InversionConfig, SweepConfig, TrainConfig, from_dict, to_dict
from raytrust.jobs.files import atomic_write, read_json
from raytrust.jobs.job import Figures, Place, Result
from raytrust.jobs.runner import work
from raytrust.jobs.store import JobStore, claim
from raytrust.leak.observation import Capture
from raytrust.studies.frontier.jobs import AttackRun, Split, TrainingRun, begin, references_path


@dataclass(frozen=True)
class Store(JobStore):
    """The directory of one sweep over one data set, asked by training configs and attacks."""

    def run_id(self, train: TrainConfig) -> str:
        """The hash of the training config and the data: equal ids mean equal captures."""
        return self.key(TrainingRun(train))

    def run_directory(self, train: TrainConfig) -> Path:
        return self.folder(TrainingRun(train))

    def begin(self, train: TrainConfig) -> Path:
        """The directory for the captures of this run, made ready."""
        return begin(self, train)

    def training(self, train: TrainConfig) -> Figures | None:
        """The figures of the finished training run, else None: see `jobs.train_and_capture` for their keys."""
        return self.result(TrainingRun(train))

    def finish_training(self, train: TrainConfig, figures: Figures) -> None:
        self.put(TrainingRun(train), Result(figures))

    def fail_run(self, train: TrainConfig, reason: str) -> None:
        self.fail(TrainingRun(train), reason)

    def failure_of_run(self, train: TrainConfig) -> str | None:
        return self.failure(TrainingRun(train))

    def attack(self, train: TrainConfig, attack: InversionConfig, split: Split) -> Figures | None:
        """The figures of a finished attack, or None."""
        return self.result(AttackRun(train, attack, split))

    def attacks(self, train: TrainConfig, split: Split) -> list[Figures]:
        """The figures of all finished attacks on this run, in the order of their keys."""
        return self.results(split, TrainingRun(train))

    def attack_failure(self, train: TrainConfig, attack: InversionConfig, split: Split) -> str | None:
        """Why this attack has no figures, if it was tried in vain."""
        return self.failure(AttackRun(train, attack, split))

    def attack_failures(self, train: TrainConfig, split: Split) -> list[str]:
        """Why attacks on this run have no figures, in the order of their keys."""
        return [str(f["reason"]) for f in self.failures(split, TrainingRun(train))]

    def run_attacks(
        self, train: TrainConfig, attacks: Sequence[InversionConfig], split: Split, device: str
    ) -> list[Figures]:
        """The figures of these attacks, each once: from the store, or by running what is not in it, and storing it.

        Those that fail have no figures; why, is stored.
        """
        jobs = [AttackRun(train, attack, split) for attack in dict.fromkeys(attacks)]
        work(self, jobs, Place(device=device))
        return [figures for job in jobs if (figures := self.result(job)) is not None]

    def reconstructions(self, train: TrainConfig, attack: InversionConfig, split: Split) -> tuple[Tensor, Tensor]:
        """(reconstructions, originals), each (images, channels, height, width) in [0, 1], of a finished attack."""
        arrays = self.arrays(AttackRun(train, attack, split))
        return torch.from_numpy(arrays["reconstructions"]), torch.from_numpy(arrays["originals"])

    def captures(self, train: TrainConfig, step: int, split: Split) -> list[Capture]:
        return AttackRun(train, InversionConfig(capture_step=step), split).captures(self)

    def keep_references(self, images: Tensor) -> None:
        """Other images than the private ones, uint8 (n, channels, height, width); those already kept stay."""
        path = references_path(self)
        # Floors and identification of the rows that are there rest on the first references: others would not compare.
        if not path.exists():
            with atomic_write(path) as file:
                torch.save(images.clone(), file)

    def defence(self, run: str) -> Defence:
        """That of a run of this id. Raises ValueError if there is none that was begun or has failed."""
        folder = self.root / TrainingRun.kind
        begun, failed = read_json(folder / run / "config.json"), read_json(folder / f"{run}.failed.json")
        if (content := begun or (failed or {}).get("job")) is None:
            raise ValueError(f"Expected run={run!r} to be one of {self.root}, but there is no trace of it.")
        return from_dict(TrainConfig, content["train"]).defence

    def defences(self, base: TrainConfig) -> list[Defence]:
        """The defences of all runs of this sweep that were begun, in the order in which they were begun."""
        begun = []
        for path in (self.root / TrainingRun.kind).glob("*/config.json"):
            if (content := read_json(path)) is not None and content["data"] == self.fingerprint:
                train = from_dict(TrainConfig, content["train"])
                # Runs that differ in more than the defence are no rows of one frontier.
                if replace(train, defence=base.defence) == base:
                    begun.append((content["begun"], train.defence))
        # Sorted by the date alone, as defences have no order of their own to break a tie by.
        return [defence for _, defence in sorted(begun, key=lambda pair: pair[0])]


def open_store(root: Path, sweep: SweepConfig, fingerprint: str, options: dict[str, Any] | None = None) -> Store:
    """Begin a sweep in `root`, or go on with the same one; how many trials it makes may differ, and its attacks, which
    are then made on what was captured.

    options: kept with it, for whoever resumes it. Raises ValueError if `root` holds another sweep.
    """
    content = {"sweep": to_dict(sweep), "data": fingerprint, "options": options or {}}
    claim(root / "sweep.json", content, _identity, "sweep")
    return Store(root, fingerprint)


def _identity(content: dict[str, Any]) -> dict[str, Any]:
    """What decides which runs a sweep trains and captures."""
    # More trials and other attacks work on captures that are there; anything else would need other captures.
    changeable = ("trials", "portfolio", "attack_trials")
    sweep = {k: v for k, v in (content.get("sweep") or {}).items() if k not in changeable}
    return {"sweep": sweep, "data": content.get("data")}
