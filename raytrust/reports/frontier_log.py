"""What a sweep writes to MLflow, as it happens.

A tracking store that is away, or that refuses, does not end a sweep (`reports.outbox`); what could not be sent by the
end is sent by the next resumption, since all of it comes from the sweep's own store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from raytrust.config import InversionConfig, SweepConfig, TrainConfig, digest, from_dict, to_dict
from raytrust.data import Dataset
from raytrust.jobs.listener import Silent
from raytrust.reports.mlflow import Tracker
from raytrust.reports.outbox import Outbox, tracked
from raytrust.reports.reconstructions import drawn_attacks, reconstructions_figure
from raytrust.studies.frontier.row import Row
from raytrust.studies.frontier.rows import audited_defences, naming, train_of, trained_defences
from raytrust.studies.frontier.store import Store

_METRICS = (
    "accuracy", "leakage_ssim", "naive_ssim", "aware_ssim", "oracle_ssim", "ssim_std", "psnr",
    "registered_psnr", "attacks_tried", "n_images", "mse", "identified_mse", "identified_ssim", "identified_features",
    "mean_image_ssim", "other_image_ssim", "aware_gain", "floor_ssim", "excess", "identified", "label_accuracy",
)  # fmt: skip


class SweepLog(Silent):
    """A listener that writes what happens to MLflow."""

    def __init__(self, sweep: SweepConfig, store: Store, data: Dataset, uri: str, say: Callable[[str], None]):
        self._sweep, self._store, self._data = sweep, store, data
        self._tracker = Tracker(uri, store.root, experiment=f"raytrust {data.name}")
        self._outbox = Outbox(self._tracker, say)
        self._trains: dict[str, TrainConfig] = {}

    @contextmanager
    def open_run(self) -> Iterator[None]:
        train = self._sweep.train
        parameters = {"data": self._data.name, "trials": self._sweep.trials, **self._nested(train)}
        tags = {"seeds": [train.seed], "data.fingerprint": self._store.fingerprint, "raytrust.kind": "sweep"}
        with tracked(self._tracker, self._outbox, f"{self._sweep.name} {self._store.root.name}", parameters, tags):
            self._catch_up()
            yield

    def tick(self) -> None:
        self._outbox.tick()

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        train = self._train(key)
        if phase == "defences":
            self._outbox.send(lambda: self._trained(key, train))
        elif phase == "attacks":
            figures = result["figures"]
            self._outbox.send(lambda: self._attacked(key, figures))

    def failed(self, phase: str, key: str, reason: str) -> None:
        train = self._train(key)
        # One failed attack fails no defence.
        if phase != "attacks":
            self._outbox.send(lambda: self._tracker.failed(key, train.defence.name, self._parameters(train), reason))

    def finish(self, rows: list[Row], artifacts: list[Path], metrics: dict[str, float], status: str) -> None:
        """Log the frontier and end the run with this status, and with `metrics` of the whole.

        Waits for a tracking store that is away, though not for ever.
        """
        for finished in (r for r in rows if r["status"] == "finished"):
            self._outbox.send(partial(self._evaluated, finished))
        done = sum(r["status"] == "finished" for r in rows)
        metrics = {"defences_finished": done, "defences_failed": len(rows) - done, **metrics}
        self._outbox.send(lambda: self._tracker.end_sweep(status, artifacts, metrics))
        self._outbox.finish()

    def _evaluated(self, finished: Row) -> None:
        train = train_of(self._store, self._sweep, finished)
        key = finished["run"]
        # Somebody may have deleted its run meanwhile.
        if self._tracker.lacks(key):
            self._trained(key, train)
        drawn, originals = drawn_attacks(self._store, self._sweep, finished)
        figure = self._store.run_directory(train) / "reconstructions.png"
        reconstructions_figure(originals, drawn, figure)
        directory = self._store.run_directory(train) / f"step-{finished['attack']['capture_step']:06d}"
        self._tracker.log_capture(key, directory)
        figures: dict[str, Any] = {**finished}
        metrics = {name: figures[name] for name in _METRICS if figures[name] is not None}
        tags = {name: figures[name] for name in ("verdict", "verdict_reason", "control", "pareto")}
        tags |= {f"attack.{k}": v for k, v in finished["attack"].items()}
        self._tracker.evaluated(key, metrics, tags, [figure])

    def _catch_up(self) -> None:
        """Log what an interrupted sweep had finished but not logged."""
        for defence in trained_defences(self._sweep, self._store, audited_defences(self._sweep, self._store)):
            train = replace(self._sweep.train, defence=defence)
            self._outbox.send(partial(self._trained, self._store.run_id(train), train))

    def _trained(self, key: str, train: TrainConfig) -> None:
        training = self._store.training(train)
        assert training is not None
        name = naming(train.defence, training)["name"]
        self._tracker.trained(key, name, self._parameters(train), training)
        for figures in self._store.attacks(train, "tuning"):
            self._attacked(key, figures)

    def _attacked(self, key: str, figures: dict[str, Any]) -> None:
        attack = from_dict(InversionConfig, figures["attack"])
        self._tracker.attacked(key, digest(attack), attack.name, figures)

    def _train(self, key: str) -> TrainConfig:
        # A trial reports many attacks, and the store would read a file for each.
        if key not in self._trains:
            self._trains[key] = replace(self._sweep.train, defence=self._store.defence(key))
        return self._trains[key]

    def _parameters(self, train: TrainConfig) -> dict[str, Any]:
        columns = naming(train.defence, None)
        # Few names, and one rank for all methods: the comparison page starts with the first three that differ.
        defence = {
            "compressor": columns["compressor"],
            "error_feedback": train.defence.error_feedback,
            "level": columns["level"],
            "rank": columns["rank"] or columns["equal_to_rank"],
        }
        return defence | {"data": self._data.name} | self._nested(train)

    @staticmethod
    def _nested(train: TrainConfig) -> dict[str, Any]:
        flat = {k: v for k, v in to_dict(train).items() if not isinstance(v, dict)}
        # Those that are left out by default are only there where they say something.
        groups = ("model", "threat", "capture", "local")
        nested = {f"{k}.{n}": v for k in groups for n, v in to_dict(train).get(k, {}).items()}
        return flat | nested
