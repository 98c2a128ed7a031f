"""A map of threats: which private batches, modes, local steps and states of a model leak, under which defence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal, TypeAlias, get_args

from raytrust.config.attacks import InversionConfig
from raytrust.config.compressors import PowerSGDConfig
from raytrust.config.defence import Defence
from raytrust.config.training import CaptureConfig, TrainConfig
from raytrust.config.values import ADDED, expect

State: TypeAlias = Literal["untrained", "trained"]


@dataclass(frozen=True)
class Cell:
    """One threat: a state of the model, and how the private gradient comes about. train: without a defence."""

    state: State
    train: TrainConfig

    @property
    def name(self) -> str:
        """Such as "trained, 4 images, batch norm in training mode, 5 local steps"."""
        threat, steps = self.train.threat, self.train.local.steps
        size = "1 image" if threat.batch_size == 1 else f"{threat.batch_size} images"
        mode = {"eval": "evaluation", "train": "training"}[threat.batch_norm]
        labels = "" if threat.labels == "known" else ", labels unknown"
        known = "" if threat.batch_statistics == "unknown" else f", statistics {threat.batch_statistics}"
        local = "1 step" if steps == 1 else f"{steps} local steps"
        peer = f", the mean of {self.train.workers} workers" if threat.vantage == "peer" else ""
        return f"{self.state}, {size}, batch norm in {mode} mode{known}, {local}{labels}{peer}"

    @property
    def short(self) -> str:
        """For a picture, such as "trained, 4 images, BN train, 5 steps"."""
        words = {"batch norm in evaluation mode": "BN eval", "batch norm in training mode": "BN train", "local ": ""}
        name = self.name
        for long, brief in words.items():
            name = name.replace(long, brief)
        return name


@dataclass(frozen=True)
class ThreatMapConfig:
    """Every defence under every threat, with the same attacker.

    train: the model, the data's order and the captures; its steps train the model of the state "trained", without a
        defence and by one worker, and its threat says what the map does not vary.
    defences: the columns of the map; without compression comes first, as it is the control.
    portfolio: attacks that every defence meets, in each way through local steps.
    private_batches: images of a private batch.
    batch_norms: modes in which the private gradient is taken.
    local_steps: how many a worker makes before it sends.
    labels: whether the attacker has them.
    batch_statistics: what he has of a private batch's in training mode; in evaluation mode there are none.
    vantages: where he stands; "peer" sees the mean of all workers' private batches, of which there are at least 2 then.
    states: of the model.
    """

    train: TrainConfig = field(default_factory=lambda: TrainConfig(workers=1, capture=CaptureConfig((0,), 1, 4)))
    defences: tuple[Defence, ...] = (Defence(), Defence(PowerSGDConfig(4)))
    portfolio: tuple[InversionConfig, ...] = (InversionConfig(),)
    private_batches: tuple[int, ...] = (1, 4, 16)
    batch_norms: tuple[Literal["eval", "train"], ...] = ("eval", "train")
    local_steps: tuple[int, ...] = (1, 5)
    labels: tuple[Literal["known", "unknown"], ...] = ("known",)
    states: tuple[State, ...] = ("untrained", "trained")
    batch_statistics: tuple[Literal["unknown", "known", "proxy"], ...] = field(default=("unknown",), metadata=ADDED)
    vantages: tuple[Literal["link", "peer"], ...] = field(default=("link",), metadata=ADDED)

    def __post_init__(self) -> None:
        for name, least in (("private_batches", 1), ("local_steps", 1)):
            value = getattr(self, name)
            expect(len(value) > 0 and min(value, default=0) >= least, name, value, f"to be numbers from {least} on")
        for name, choices in (
            ("batch_norms", ("eval", "train")), ("labels", ("known", "unknown")), ("states", get_args(State)),
            ("batch_statistics", ("unknown", "known", "proxy")), ("vantages", ("link", "peer")),
        ):  # fmt: skip
            value = getattr(self, name)
            expect(len(value) > 0 and set(value) <= {*choices}, name, value, f"to be among {', '.join(choices)}")
        axes = ("private_batches", "batch_norms", "local_steps", "labels", "states", "batch_statistics", "vantages")
        for name in (*axes, "defences"):
            value = getattr(self, name)
            expect(len(set(value)) == len(value), name, value, "to hold each once")
        expect(self.defences[:1] == (Defence(),), "defences", self.defences, "to begin with none, the control")
        expect(len(self.portfolio) > 0, "portfolio", self.portfolio, "to hold at least one attack")
        several = self.train.workers > 1 or "peer" not in self.vantages
        expect(several, "workers", self.train.workers, "to be at least 2 for the vantage 'peer'")
        trains = self.train.steps > 0 or "trained" not in self.states
        expect(trains, "steps", self.train.steps, "to be at least 1 for the state 'trained'")

    def cells(self) -> list[Cell]:
        """In the order in which a reader goes from what leaks most to what leaks least."""
        capture = replace(self.train.capture, steps=(0,))
        cells = []
        modes = [(m, s) for m in self.batch_norms for s in (self.batch_statistics if m == "train" else ("unknown",))]
        for state, steps, (mode, statistics), labels, vantage, size in product(
            self.states, self.local_steps, modes, self.labels, self.vantages, self.private_batches
        ):
            threat = replace(
                self.train.threat,
                vantage=vantage,
                batch_size=size,
                batch_norm=mode,
                labels=labels,
                batch_statistics=statistics,
            )
            parts = None if steps == 1 else self.train.local.batch_size
            local = replace(self.train.local, steps=steps, batch_size=parts)
            cells.append(Cell(state, replace(self.train, steps=0, capture=capture, threat=threat, local=local)))
        return cells

    @property
    def training(self) -> TrainConfig:
        """Of the model of the state "trained"."""
        plain = replace(self.train.local, steps=1, batch_size=None)
        threat = replace(self.train.threat, vantage="link")
        return replace(
            self.train, defence=Defence(), threat=threat, capture=CaptureConfig((0,), 1, 1), local=plain, workers=1
        )
