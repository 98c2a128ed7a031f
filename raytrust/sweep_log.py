"""What a sweep writes to MLflow, as it happens.

While the tracking store is away, what is to be sent waits, in order, and the sweep goes on; what could not be sent by
the end is sent by the next resumption, since all of it comes from the sweep's own store.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from raytrust.config import InversionConfig, SweepConfig, TrainConfig, digest, from_dict, to_dict
from raytrust.data import Dataset
from raytrust.figures import reconstructions_figure
from raytrust.frontier import Row, audited_defences, compressor_columns, drawing, train_of, trained_defences
from raytrust.store import Store
from raytrust.tracking import UNREACHABLE, Tracker

PAUSE = 5.0  # seconds between two tries to reach a tracking store that is away
PATIENCE = 120.0  # seconds to wait for it when everything else is done


class SweepLog:
    """A listener that writes what happens to MLflow."""

    def __init__(
        self, sweep: SweepConfig, store: Store, data: Dataset, uri: str, cpus: int, say: Callable[[str], None]
    ):
        self._sweep, self._store, self._data = sweep, store, data
        self._tracker = Tracker(uri, store.root, experiment=f"raytrust {data.name}")
        self._cpus, self._busy = cpus, 0.0
        self._say = say
        self._waiting: deque[Callable[[], None]] = deque()
        self._away_until: float | None = None  # when to try again
        self._trains: dict[str, TrainConfig] = {}

    @contextmanager
    def open_run(self) -> Iterator[None]:
        train = self._sweep.train
        parameters = {"data": self._data.name, "trials": self._sweep.trials, **self._nested(train)}
        tags = {"seeds": [train.seed], "data.fingerprint": self._store.fingerprint, "raytrust.kind": "sweep"}
        self._tracker.begin_sweep(f"{self._sweep.name} {self._store.root.name}", parameters, tags)
        try:
            self._catch_up()
            yield
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            self._send(lambda: self._tracker.end_sweep(status))
            raise

    def started(self, phase: str, key: str, what: str) -> None:
        pass

    def tick(self) -> None:
        if self._away_until is not None and time.monotonic() >= self._away_until:
            self._flush()

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        train = self._train(key)
        if phase == "evaluation":
            self._busy += sum(f["seconds"] for f in result["figures"]) / self._cpus
        else:
            self._busy += result.get("train_seconds", 0.0) + result["attack_seconds"] / self._cpus
        if phase == "defences":
            self._send(lambda: self._trained(key, train))
        elif phase == "attacks":
            figures = result["figures"]
            self._send(lambda: self._attacked(key, figures))

    def failed(self, phase: str, key: str, reason: str) -> None:
        train = self._train(key)
        if phase != "attacks":  # one failed attack fails no defence
            self._send(lambda: self._tracker.failed(key, train.defence.name, self._parameters(train), reason))

    def finish(self, rows: list[Row], artifacts: list[Path], wall: float) -> None:
        """Log the frontier and end the run; waits for a tracking store that is away, though not for ever."""
        self._send(lambda: self._finish(rows, artifacts, wall))
        until = time.monotonic() + PATIENCE
        while self._waiting and time.monotonic() < until:
            time.sleep(PAUSE)
            self._flush()
        if self._waiting:
            self._say("MLflow lacks the end of this sweep; --resume sends it")

    def _finish(self, rows: list[Row], artifacts: list[Path], wall: float) -> None:
        names = ("accuracy", "leakage_ssim", "naive_ssim", "aware_ssim", "oracle_ssim", "ssim_std", "psnr")
        for finished in (r for r in rows if r["status"] == "finished"):
            train = train_of(self._store, self._sweep, finished)
            key = finished["run"]
            images, ssim, originals = drawing(self._store, self._sweep, finished)
            figure = self._store.run_directory(train) / "reconstructions.png"
            reconstructions_figure(originals, [(finished["name"], images, ssim)], figure)
            directory = self._store.run_directory(train) / f"step-{finished['attack']['capture_step']:06d}"
            self._tracker.log_capture(key, directory)
            floors = ("mse", "identified_mse", "identified_ssim", "mean_image_ssim", "other_image_ssim", "aware_gain")
            metrics = {n: finished[n] for n in (*names, "attacks_tried", "n_images")}
            metrics |= {n: finished[n] for n in (*floors, "label_accuracy") if finished[n] is not None}
            tags = {"pareto": finished["pareto"], **{f"attack.{k}": v for k, v in finished["attack"].items()}}
            self._tracker.evaluated(key, metrics, tags, [figure])
        done = sum(r["status"] == "finished" for r in rows)
        metrics = {"defences_finished": done, "defences_failed": len(rows) - done, "wall_seconds": wall}
        metrics["overhead_seconds_per_trial"] = self.overhead(wall, len(rows))
        self._tracker.end_sweep("FINISHED", artifacts, metrics)

    def overhead(self, wall: float, trials: int) -> float:
        """Seconds a defence that the phases took beyond training and attacks, had these kept all CPUs busy."""
        return max(0.0, wall - self._busy) / trials

    def _send(self, action: Callable[[], None]) -> None:
        self._waiting.append(action)
        if self._away_until is None:
            self._flush()

    def _flush(self) -> None:
        """Send what waits, in order, as far as the tracking store can be reached."""
        while self._waiting:
            try:
                self._tracker.expect_server()
                self._waiting[0]()
            except UNREACHABLE as error:
                if self._away_until is None:
                    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                    self._say(f"MLflow can't be reached, what is to be logged waits: {reason}")
                self._away_until = time.monotonic() + PAUSE
                return
            self._waiting.popleft()
        if self._away_until is not None:
            self._say("MLflow is back and has everything")
            self._away_until = None

    def _catch_up(self) -> None:
        """Log what an interrupted sweep had finished but not logged."""
        for defence in trained_defences(self._sweep, self._store, audited_defences(self._sweep, self._store)):
            train = replace(self._sweep.train, defence=defence)
            self._send(partial(self._trained, self._store.run_id(train), train))

    def _trained(self, key: str, train: TrainConfig) -> None:
        training = self._store.training(train)
        assert training is not None
        self._tracker.trained(key, train.defence.name, self._parameters(train), training)
        for figures in self._store.attacks(train, "tuning"):
            self._attacked(key, figures)

    def _attacked(self, key: str, figures: dict[str, Any]) -> None:
        attack = from_dict(InversionConfig, figures["attack"])
        self._tracker.attacked(key, digest(attack), attack.name, figures)

    def _train(self, key: str) -> TrainConfig:
        if key not in self._trains:
            self._trains[key] = replace(self._sweep.train, defence=self._store.defence(key))
        return self._trains[key]

    def _parameters(self, train: TrainConfig) -> dict[str, Any]:
        columns = compressor_columns(train.defence, None)
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
        nested = {f"{k}.{n}": v for k in ("model", "threat", "capture") for n, v in to_dict(train)[k].items()}
        return flat | nested
