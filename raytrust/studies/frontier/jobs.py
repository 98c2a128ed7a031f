"""The jobs of a sweep: train a defence and capture private batches, then attack what was captured."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, cast

import torch

from raytrust.attacks.inversion.engine import same_model
from raytrust.config import InversionConfig, TrainConfig, to_dict
from raytrust.data import Dataset
from raytrust.jobs.captures import AUXILIARY, load_captures, save_capture
from raytrust.jobs.files import write_json
from raytrust.jobs.job import Figures, Job, Place, Result, Results
from raytrust.leak.observation import Capture
from raytrust.metrics.accountant import DELTA, epsilon
from raytrust.studies.evaluate import InversionFailure, InversionResult, evaluate_together
from raytrust.train.loop import Evaluation, Step, train
from raytrust.wire.channel import Channel, LocalChannel
from raytrust.wire.processes import in_processes

Split: TypeAlias = Literal["tuning", "evaluation"]


@dataclass(frozen=True)
class TrainingRun(Job):
    """Train with a defence, and capture private batches into the job's folder."""

    kind: ClassVar[str] = "captures"
    train: TrainConfig

    @property
    def name(self) -> str:
        return self.train.defence.name

    def run(self, store: Results, place: Place) -> Result:
        """Train in this process, or several workers in processes of their own. On Ray, warm groups do this instead."""
        folder = begin(store, self.train)
        work = partial(train_and_capture, self.train, place.images, folder=folder, device=place.device)
        # A single worker has nobody to exchange with, and is spared the start of a process.
        if self.train.workers == 1:
            return Result(work(LocalChannel()))
        # All workers hold the same model and send as much: the figures of the first stand for all.
        return Result(in_processes(work, self.train.workers)[0])


@dataclass(frozen=True)
class AttackRun(Job):
    """Attack the captures of a training run. Tuning images choose attacks, evaluation images report them."""

    kind: ClassVar[str] = "attacks"
    train: TrainConfig
    attack: InversionConfig
    split: Split

    @property
    def name(self) -> str:
        return self.train.defence.name

    @property
    def cost(self) -> float:
        return float(self.attack.passes(self.train.local))

    @property
    def shelf(self) -> str:
        # Tuning and evaluation results lie apart, so that listing the one can't take in the other.
        return self.split

    @property
    def parent(self) -> TrainingRun:
        return TrainingRun(self.train)

    def after(self) -> tuple[Job, ...]:
        return (self.parent,)

    def captures(self, store: Results) -> list[Capture]:
        n, m = self.train.capture.tuning, self.train.capture.evaluation
        # Disjoint batches: an attack that is reported on the images which chose it looks stronger than it is.
        indices = range(n) if self.split == "tuning" else range(n, n + m)
        return load_captures(store.folder(self.parent), self.attack.capture_step, indices)

    def run(self, store: Results, place: Place) -> Result:
        (result,) = self.run_together([self], store, place)
        if isinstance(result, Exception):
            raise result
        return result

    @classmethod
    def run_together(cls, jobs: Sequence[Job], store: Results, place: Place) -> list[Result | Exception]:
        """Attacks with equal iterations on equal models are one batch, as the untrained models of all runs are."""
        attacks = cast("Sequence[AttackRun]", jobs)
        results: dict[Job, Result | Exception] = {}
        # The attacks of a batch take their steps together, on one model: only those of equal length and step can join.
        for step, iterations in dict.fromkeys((j.attack.capture_step, j.attack.iterations) for j in attacks):
            alike = [j for j in attacks if (j.attack.capture_step, j.attack.iterations) == (step, iterations)]
            for batch in _of_equal_models(alike, store):
                requests = [(captures, [j.attack for j in of_run]) for of_run, captures in batch]
                outcomes = evaluate_together(requests, place.device, references(store))
                for (of_run, _), of_requests in zip(batch, outcomes, strict=True):
                    results |= {j: _result(j.split, o) for j, o in zip(of_run, of_requests, strict=True)}
        return [results[job] for job in jobs]


def begin(store: Results, train: TrainConfig) -> Path:
    """The folder for the captures of a training run, made ready."""
    folder = store.folder(TrainingRun(train))
    path = folder / "config.json"
    # A run that goes on keeps its place in the order of the report.
    if not path.exists():
        write_json(path, {"train": to_dict(train), "data": store.fingerprint, "begun": time.time_ns()})
    # Captures of an interrupted run may belong to other weights than the new ones.
    for stale in folder.glob("step-*"):
        shutil.rmtree(stale)
    (folder / AUXILIARY).unlink(missing_ok=True)
    return folder


def train_and_capture(config: TrainConfig, data: Dataset, channel: Channel, folder: Path, device: str) -> Figures:
    """Train as one of the workers, write the captures into `folder`, and return the figures of the run.

    Keys: "correct", "n_test", "test_loss" (nats), "losses" (of this worker, nats, one a step), "bytes_per_step" (mean
    payload bytes that a worker handed to collectives), "dense_bytes" (of the gradient), "seconds" (in the training
    loop) and "cpu_seconds" (of all workers meanwhile); of DP-SGD "epsilon" and "delta", for all messages of all
    workers.
    """
    steps: list[Step] = []
    sent, dense = [], 0
    started, cpu = time.perf_counter(), time.process_time()
    for record in train(config, data, channel, device):
        match record:
            case Step():
                steps.append(record)
            case Capture(seen=seen):
                save_capture(folder, record)
                sent.append(sum(m.sent_bytes for m in seen.messages))
                dense = sum(w.numel() * w.element_size() for w in seen.weights.values())
            case Evaluation(correct=correct, n=n, loss=loss):
                evaluation = {"correct": correct, "n_test": n, "test_loss": loss}
    return {
        **evaluation,
        **guarantee(config, len(data.train_labels)),
        "losses": [s.loss for s in steps],
        # A mean, as threshold dropping sends another number of entries at every step. Without any step, that of the
        # private batches is what there is.
        "bytes_per_step": sum(s.sent_bytes for s in steps) / len(steps) if steps else sum(sent) / max(1, len(sent)),
        "dense_bytes": steps[0].gradient_bytes if steps else dense,
        "seconds": time.perf_counter() - started,
        # The other workers run in processes of their own, but do the same: one is measured for all.
        "cpu_seconds": config.workers * (time.process_time() - cpu),
    }


def guarantee(config: TrainConfig, n_train: int) -> Figures:
    """Epsilon and delta of a training by DP-SGD on so many images; empty where nothing is guaranteed."""
    private = config.defence.dp_sgd
    # Without training there is nothing that it would be the guarantee of: private batches are no sample of anything.
    if private is None or config.steps == 0:
        return {}
    # Each worker's message of each step is a sum over a Poisson sample of its own, and what follows is made of these.
    rate, releases = config.batch_size / n_train, config.steps * config.workers
    # The local steps of a round see one sample: together they are one release with so much less noise.
    spent = epsilon(private.noise / math.sqrt(config.local.steps), rate, releases)
    # So little noise that no epsilon can be written down guarantees nothing.
    return {"epsilon": spent, "delta": DELTA} if math.isfinite(spent) else {}


def references(store: Results) -> torch.Tensor | None:
    """Other images than the private ones, (n, channels, height, width) in [0, 1], if `keep_references` kept any."""
    path = references_path(store)
    return torch.load(path, weights_only=True).float() / 255 if path.exists() else None


def references_path(store: Results) -> Path:
    return store.root / "references.pt"


_Batch: TypeAlias = list[tuple[list[AttackRun], list[Capture]]]


def _of_equal_models(jobs: Sequence[AttackRun], store: Results) -> list[_Batch]:
    """The jobs by run and split, with its captures, those of equal models together."""
    batches: list[_Batch] = []
    for config, split in dict.fromkeys((j.train, j.split) for j in jobs):
        of_run = [j for j in jobs if (j.train, j.split) == (config, split)]
        captures = of_run[0].captures(store)
        # By the weights themselves: runs of different defences share the untrained model, which no config tells.
        alike = (batch for batch in batches if same_model(batch[0][1][0].seen, captures[0].seen))
        if (batch := next(alike, None)) is None:
            batches.append(batch := [])
        batch.append((of_run, captures))
    return batches


def _result(split: Split, outcome: InversionResult | InversionFailure) -> Result | Exception:
    if isinstance(outcome, InversionFailure):
        return outcome.error
    arrays = {name: getattr(outcome, name).numpy() for name in ("reconstructions", "originals")}
    return Result(figures_of(outcome, split), arrays)


def figures_of(outcome: InversionResult, split: Split) -> Figures:
    """The figures of an attack, which JSON can hold."""
    names = [f.name for f in fields(outcome) if f.name not in ("attack", "reconstructions", "originals")]
    return {
        "attack": to_dict(outcome.attack),
        "split": split,
        **{name: getattr(outcome, name) for name in names},
        # A perfect copy has an infinite PSNR (in dB), which JSON can't hold.
        "psnr": [min(p, 100.0) for p in outcome.psnr],
        "registered_psnr": outcome.registered_psnr and [min(p, 100.0) for p in outcome.registered_psnr],
    }
