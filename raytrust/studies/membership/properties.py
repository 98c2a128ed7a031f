"""Property inference (Melis et al. 2019): do messages say what a batch holds besides what the model is trained for?

A model is trained on half of the training images, to tell the upper half of the classes from the lower. The attacker
has the other half of the images, and asks whether a private batch holds an image of one class, the property.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrust.attacks.membership.properties import auxiliary_batches, property_scores
from raytrust.config import CaptureConfig, MembershipConfig, TrainConfig
from raytrust.data import Dataset
from raytrust.leak.observation import Capture
from raytrust.train.loop import train
from raytrust.train.private import private_batches
from raytrust.wire.channel import LocalChannel

# Images of a batch. Nearly all of larger ones would hold the property, and leave nothing to tell.
MOST = 8


@dataclass(frozen=True)
class Property:
    """label: the class that is looked for. classes: those that have images, in order; the upper half of them is what
    the model is trained to tell from the others."""

    label: int
    classes: tuple[int, ...]

    def task(self, labels: Tensor) -> Tensor:
        """What the model learns of each image, int64 (n,): 1 for the upper half of the classes. Labels without training
        images count as the next class above."""
        return (torch.bucketize(labels, torch.tensor(self.classes)) >= len(self.classes) // 2).long()


def choose_property(config: MembershipConfig, data: Dataset) -> Property:
    """The first class that property inference can be measured on, in all of the audit's property models.

    Its half must have another class: else the property is what the model is trained for. Raises ValueError if there is
    none, or if there are too few images.
    """
    counts = data.train_labels.bincount(minlength=data.classes)
    present = tuple(torch.nonzero(counts)[:, 0].tolist())
    middle = len(present) // 2
    candidates = [label for half in (present[:middle], present[middle:]) if len(half) > 1 for label in half]
    if not candidates:
        raise ValueError(
            f"Expected at least 3 classes for property inference, got {len(present)}: the class of an image would be "
            "the model's own task."
        )
    run = property_run(config, config.train)
    size = run.threat.batch_size
    least = max(run.batch_size, config.property_batches * size)
    if len(data.train_labels) // 2 < least:
        raise ValueError(
            f"Expected at least {2 * least} training images for property inference, half of them the attacker's, got "
            f"{len(data.train_labels)}."
        )
    models = range(config.property_models)
    # Every model has halves of its own, and the class must suffice in all of them, or one model would fail alone.
    halves = [data.train_labels[_halves(config, model, len(data.train_labels))[1]] for model in models]
    held = {label: min(int((labels == label).sum()) for labels in halves) for label in candidates}
    others = {label: min(int((labels != label).sum()) for labels in halves) for label in candidates}
    for label in candidates:
        if min(held[label], others[label]) >= size:
            return Property(label, present)
    best = max(candidates, key=lambda label: min(held[label], others[label]))
    raise ValueError(
        f"Expected at least {size} images of a class and of others among the attacker's {len(halves[0])} for property "
        f"inference, got {held[best]} and {others[best]} of class {data.class_name(best)}, the nearest."
    )


def property_run(config: MembershipConfig, base: TrainConfig) -> TrainConfig:
    """A model's training, from how `base` trains the audit's: a quarter of the steps, then batches are captured."""
    step = max(1, config.train.steps // 4)
    return replace(
        base,
        threat=replace(base.threat, batch_size=min(MOST, base.batch_size)),
        capture=CaptureConfig((step,), tuning=1, evaluation=config.property_batches - 1),
        # Nothing after the captured step is looked at, so that training ends there.
        steps=step + 1,
    )


def train_property(
    config: MembershipConfig, base: TrainConfig, model: int, data: Dataset, device: str = "cpu"
) -> dict[str, Any]:
    """Property inference against one model. base: how the models of a defence are trained, with this one's seed.

    The attacker has twice as many batches as it attacks, of images that were never trained on, which it compresses as
    the worker does, and, for comparison, as they are. Returns scores (batches,) of both attackers, "aware" and "naive",
    "holds", which batches hold the property, and "label", the class that it is.
    """
    wanted = choose_property(config, data)
    run = property_run(config, base)
    victims, own, generator = _halves(config, model, len(data.train_labels))
    task = wanted.task(data.train_labels)
    part = replace(
        data,
        train_images=data.train_images[victims],
        train_labels=task[victims],
        test_labels=wanted.task(data.test_labels),
        # The model learns two classes while the property is one of the original ones: it is no part of the task.
        classes=2,
    )
    captures = [r for r in train(run, part, LocalChannel(), device) if isinstance(r, Capture)]
    held = data.train_labels[victims][private_batches(run, len(victims))] == wanted.label

    has = data.train_labels == wanted.label
    index = own[auxiliary_batches(has[own], 2 * config.property_batches, run.threat.batch_size, generator)]
    images, labels, holds = data.train_images[index].float() / 255, task[index], has[index].any(1)
    seen = [c.seen for c in captures]
    # Against the same messages twice: the difference is what knowing the compressor is worth.
    scores = {
        name: property_scores(seen, images, labels, holds, compressed, device)
        for name, compressed in (("aware", True), ("naive", False))
    }
    return {**scores, "holds": held.any(1)[[c.index for c in captures]].numpy(), "label": wanted.label}


def _halves(config: MembershipConfig, model: int, images: int) -> tuple[Tensor, Tensor, np.random.Generator]:
    """Indices of the images that a model is trained on, and of the attacker's; and what its batches are drawn with."""
    generator = np.random.default_rng([config.train.seed, model])
    # The attacker's half is never trained on: else it would find members of the training set, not the property.
    order = torch.from_numpy(generator.permutation(images))
    return order[: images // 2], order[images // 2 :], generator
