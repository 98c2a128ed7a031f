"""A membership audit: which models are trained on which points, and what is attacked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeAlias

from raytrust.config.defence import Defence
from raytrust.config.training import CaptureConfig, ModelConfig, Threat, TrainConfig
from raytrust.config.transforms import DPSGDConfig
from raytrust.config.values import expect

Arm: TypeAlias = Defence | DPSGDConfig


@dataclass(frozen=True)
class MembershipConfig:
    """Models that are each trained on a random half of one pool of points, for every defence.

    train: what all models share; its `defence` is ignored, its seed is that of the first model, and the following
        models take the following seeds, the same for every defence. Its captures are the attacked messages: at each
        step `capture.tuning + capture.evaluation` batches of `threat.batch_size` training images.
    defences: compressors, each with its models.
    dp_sgd: DP-SGD as a reference, each with its models.
    models: of each defence; one is attacked with the others as its shadows, in turn.
    points: images of the pool, of which each model is trained on about half.
    mislabelled: points with a wrong label: canaries, the most vulnerable there are (Aerni, Zhang & Tramer 2024).
    duplicates: points that come `copies` times where they come at all: canaries, too.
    copies: of a point that is duplicated.
    controls: candidates of each kind (held-out points, other training points) that a message is tested on.
    guesses: of the one-run epsilon, fixed here and so before any score is seen.
    property_models: how many models, of a task of two classes, property inference is measured on; 0 leaves it out.
    property_batches: victims' batches of each of these, and twice as many auxiliary ones of the attacker's own.
    """

    name: str = "membership"
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            model=ModelConfig("convnet", width=16),
            threat=Threat(batch_size=16),
            # Before training only messages tell members, which the first step shows. Uncompressed SGD of equal fit, to
            # compare a defence with, is looked for among all of these steps.
            capture=CaptureConfig(steps=(0, 50, 100, 200, 399), tuning=1, evaluation=3),
            workers=1,
            batch_size=32,
            steps=400,
            learning_rate=0.05,
        )
    )
    defences: tuple[Defence, ...] = (Defence(),)
    dp_sgd: tuple[DPSGDConfig, ...] = ()
    models: int = 8
    points: int = 2000
    # Averages hide the exposed: RMIA has an AUC of 0.94 on duplicated points, where LiRA has 0.70 over all points.
    mislabelled: int = 100
    duplicates: int = 100
    copies: int = 4
    controls: int = 32
    # Chosen after the scores are seen, for the largest epsilon, it gives one above 0 in about half of the runs on
    # pure noise.
    guesses: int = 200
    property_models: int = 4
    property_batches: int = 40

    def __post_init__(self) -> None:
        expect(len(self.defences) >= 1, "defences", self.defences, "to hold at least one defence")
        expect(len(set(self.defences)) == len(self.defences), "defences", self.defences, "to differ from each other")
        expect(len(set(self.dp_sgd)) == len(self.dp_sgd), "dp_sgd", self.dp_sgd, "to differ from each other")
        even = "to be even and at least 4: one is attacked, the others are its shadows"
        expect(self.models >= 4 and self.models % 2 == 0, "models", self.models, even)
        expect(self.mislabelled >= 0, "mislabelled", self.mislabelled, "to be at least 0")
        expect(self.duplicates >= 0, "duplicates", self.duplicates, "to be at least 0")
        expect(self.copies >= 2, "copies", self.copies, "to be at least 2")
        expect(self.controls >= 2, "controls", self.controls, "to be at least 2")
        canaries = self.mislabelled + self.duplicates
        expect(self.points > 2 * canaries, "points", self.points, f"to exceed twice the number of canaries, {canaries}")
        expect(2 <= self.guesses <= self.points, "guesses", self.guesses, f"in [2, {self.points}], the points")
        expect(0 <= self.property_models <= self.models, "property_models", self.property_models, "in [0, models]")
        expect(self.property_batches >= 10, "property_batches", self.property_batches, "to be at least 10")
        workers, model = self.train.workers, self.train.model.name
        expect(workers == 1, "workers", workers, "to be 1: the models, not the batches, are spread")
        one = "to be 1: attacks on messages take each of them for one gradient"
        expect(self.train.local.steps == 1, "local.steps", self.train.local.steps, one)
        # DP-SGD clips the gradient of each image by itself, which batch norm, where images depend on each other,
        # doesn't have.
        plain = "to be convnet with DP-SGD, which has no batch norm"
        expect(not self.dp_sgd or model == "convnet", "model", model, plain)
        for defence in self.defences:
            # For what it refuses, before anything is trained.
            replace(self.train, defence=defence)
            own = defence.of_images is None or defence.dp_sgd is not None
            expect(own, "defences", defence.name, "to leave images as they are: no attack here knows otherwise")
        names = [arm.name for arm in self.arms]
        expect(len(set(names)) == len(names), "defences", names, "to have names that tell them apart")

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Every defence, compressors first."""
        return (*self.defences, *self.dp_sgd)
