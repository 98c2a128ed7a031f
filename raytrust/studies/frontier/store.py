"""The results of a sweep on disk: what is finished, and what it found.

    DIR/sweep.json                             the sweep's configuration; a directory holds one sweep
    DIR/captures/<run>/config.json             <run> is the hash of the training config and of the data
    DIR/captures/<run>/step-000000/...         captures (see raytrust.leak.observation)
    DIR/captures/<run>/training.json           written when training has finished
    DIR/captures/<run>/attacks/<attack>-<split>.json, .pt     an attack's figures and its reconstructions
    DIR/captures/<run>/attacks/<attack>-<split>.failed.json   why an attack has none, until it is tried again
    DIR/references.pt                          other images of the data set, for floors and identification
    DIR/failures/<run>.json                    why a defence failed, until it is tried again

Every file is written whole or not at all, so whatever is there is finished: resuming a sweep is reading this store.
Files can be read by their owner alone (mode 0600), as captures and reconstructions hold private data.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from raytrust.attacks.inversion.engine import same_model
from raytrust.config import Defence, InversionConfig, SweepConfig, TrainConfig, digest, from_dict, to_dict
from raytrust.jobs.captures import load_captures
from raytrust.jobs.files import atomic_write, read_json, write_json
from raytrust.leak.observation import Capture
from raytrust.studies.evaluate import InversionFailure, InversionResult, evaluate_together

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
        return load_captures(self.run_directory(train), step, indices)

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
        """The figures of these attacks, each once: from the store, or by running what is not in it, and storing it.

        Those that fail have no figures; why, is stored.
        """
        return self.run_together([(train, attacks)], split, device)[0]

    def run_together(
        self, requests: Sequence[tuple[TrainConfig, Sequence[InversionConfig]]], split: Split, device: str
    ) -> list[list[dict[str, Any]]]:
        """`run_attacks` on several runs: attacks with equal iterations on equal models are one batch, as the untrained
        models of all runs are."""
        requests = [(train, list(dict.fromkeys(attacks))) for train, attacks in requests]
        batches: dict[tuple[int, int], list[tuple[TrainConfig, list[InversionConfig]]]] = {}
        for train, attacks in requests:
            for step, iterations in dict.fromkeys((a.capture_step, a.iterations) for a in attacks):
                alike = [a for a in attacks if (a.capture_step, a.iterations) == (step, iterations)]
                if missing := [a for a in alike if not self.knows(train, a, split)]:
                    batches.setdefault((step, iterations), []).append((train, missing))
        for (step, _), batch in batches.items():
            for group in self._of_equal_models(batch, step, split):
                of_runs = evaluate_together([(c, attacks) for _, attacks, c in group], device, self.references())
                for (train, _, _), results in zip(group, of_runs, strict=True):
                    for result in results:
                        self._keep(train, result, split)
        figures = [[self.attack(train, attack, split) for attack in attacks] for train, attacks in requests]
        return [[f for f in of_run if f is not None] for of_run in figures]

    def knows(self, train: TrainConfig, attack: InversionConfig, split: Split) -> bool:
        """Whether this attack has figures, or is known to have failed."""
        return bool(self.attack(train, attack, split) or self.attack_failure(train, attack, split))

    def _of_equal_models(
        self, batch: Sequence[tuple[TrainConfig, list[InversionConfig]]], step: int, split: Split
    ) -> list[list[tuple[TrainConfig, list[InversionConfig], list[Capture]]]]:
        groups: list[list[tuple[TrainConfig, list[InversionConfig], list[Capture]]]] = []
        for train, attacks in batch:
            captures = self.captures(train, step, split)
            alike = (g for g in groups if same_model(g[0][2][0].seen, captures[0].seen))
            if (group := next(alike, None)) is None:
                groups.append(group := [])
            group.append((train, attacks, captures))
        return groups

    def _keep(self, train: TrainConfig, result: InversionResult | InversionFailure, split: Split) -> None:
        path = self._attack_path(train, result.attack, split)
        if isinstance(result, InversionFailure):
            content = {"attack": to_dict(result.attack), "split": split, "reason": str(result.error)}
            write_json(path.with_suffix(".failed.json"), content)
            return
        with atomic_write(path.with_suffix(".pt")) as file:
            torch.save({"reconstructions": result.reconstructions, "originals": result.originals}, file)
        write_json(path.with_suffix(".json"), _figures(result, split))  # last: it says that it is finished

    def attack_failure(self, train: TrainConfig, attack: InversionConfig, split: Split) -> str | None:
        """Why this attack has no figures, if it was tried in vain."""
        found = read_json(self._attack_path(train, attack, split).with_suffix(".failed.json"))
        return found and found["reason"]

    def attack_failures(self, train: TrainConfig, split: Split) -> list[str]:
        """Why attacks on this run have no figures, in the order of their ids."""
        paths = sorted((self.run_directory(train) / "attacks").glob(f"*-{split}.failed.json"))
        return [found["reason"] for path in paths if (found := read_json(path)) is not None]

    def keep_references(self, images: Tensor) -> None:
        """Other images than the private ones, uint8 (n, channels, height, width); those already kept stay."""
        path = self.root / "references.pt"
        if not path.exists():
            with atomic_write(path) as file:
                torch.save(images.clone(), file)

    def references(self) -> Tensor | None:
        """What was kept, in [0, 1]."""
        path = self.root / "references.pt"
        return torch.load(path, weights_only=True).float() / 255 if path.exists() else None

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
        """Forget failures, so that the defences and the attacks are tried again."""
        for pattern in ("failures/*.json", "captures/*/attacks/*.failed.json"):
            for path in self.root.glob(pattern):
                path.unlink()

    def defence(self, run: str) -> Defence:
        """That of a run of this id. Raises ValueError if there is none that was begun or has failed."""
        if (begun := read_json(self.root / "captures" / run / "config.json")) is not None:
            return from_dict(TrainConfig, begun["train"]).defence
        if (failed := read_json(self.root / "failures" / f"{run}.json")) is not None:
            return from_dict(Defence, failed["defence"])
        raise ValueError(f"Expected run={run!r} to be one of {self.root}, but there is no trace of it.")

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
    """Begin a sweep in `root`, or go on with the same one; how many trials it makes may differ, and its attacks, which
    are then made on what was captured.

    options: kept with it, for whoever resumes it. Raises ValueError if `root` holds another sweep.
    """
    path = root / "sweep.json"
    content = {"sweep": to_dict(sweep), "data": fingerprint, "options": options or {}}
    kept = read_json(path)
    if kept is not None and _identity(kept) != _identity(content):
        raise ValueError(f"Expected output={str(root)!r} to be empty or to hold this sweep, but it holds another one.")
    if kept != content:
        write_json(path, content)
    return Store(root, fingerprint)


def _identity(content: dict[str, Any]) -> dict[str, Any]:
    """What decides which runs a sweep trains and captures."""
    changeable = ("trials", "portfolio", "attack_trials")
    sweep = {k: v for k, v in (content.get("sweep") or {}).items() if k not in changeable}
    return {"sweep": sweep, "data": content.get("data")}


def _figures(result: InversionResult, split: Split) -> dict[str, Any]:
    names = [f.name for f in fields(result) if f.name not in ("attack", "reconstructions", "originals")]
    return {
        "attack": to_dict(result.attack),
        "split": split,
        **{name: getattr(result, name) for name in names},
        "psnr": [min(p, 100.0) for p in result.psnr],  # dB; a perfect copy has no finite value
    }
