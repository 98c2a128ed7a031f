"""How often a training waits for its device: each number that is read stops the host until all before it is done."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from far_device import FAR, Log, far_device
from torch import Tensor

from raytrust.config import CaptureConfig, ModelConfig, TrainConfig, parse_defence
from raytrust.data import Dataset
from raytrust.train import feed
from raytrust.train.feed import Feed
from raytrust.train.loop import Record, Step, Trained, train
from raytrust.wire.channel import LocalChannel

TRAIN = TrainConfig(
    model=ModelConfig("convnet", width=4), capture=CaptureConfig((0,), tuning=1, evaluation=1), workers=1, batch_size=8
)


def far(
    steps: int, data: Dataset, defence: str = "none", until: type[Record] | None = None
) -> tuple[Log, list[Record]]:
    log, config = Log(), replace(TRAIN, steps=steps, defence=parse_defence(defence))
    with far_device(log):
        records = list[Record]()
        for record in train(config, data, LocalChannel(), str(FAR)):
            records.append(record)
            if isinstance(record, until or ()):
                break
    return log, records


def waits(log: Log) -> int:
    return sum(log.reads.values())


def test_a_step_waits_once(data: Dataset) -> None:
    """For its loss, with which comes whether all is finite."""
    (short, _), (long, _) = far(3, data), far(8, data)
    assert waits(long) - waits(short) == 5, long.reads - short.reads


def test_an_evaluation_waits_twice_whatever_its_size(data: Dataset) -> None:
    images, labels = data.test_images.repeat(30, 1, 1, 1), data.test_labels.repeat(30)
    for some in (data, replace(data, test_images=images, test_labels=labels)):
        (before, _), (after, records) = far(2, some, until=Trained), far(2, some)
        assert waits(after) - waits(before) == 2
        assert records[-1].n == len(some.test_labels)


@pytest.mark.parametrize("defence", ["none", "powersgd:1:ef", "topk:0.1:ef", "signsgd:momentum=0.9"])
def test_the_device_changes_no_number(data: Dataset, defence: str) -> None:
    config = replace(TRAIN, steps=4, defence=parse_defence(defence))
    here, (_, there) = list(train(config, data, LocalChannel())), far(4, data, defence)
    pairs = [(a.loss, b.loss) for a, b in zip(here, there, strict=True) if isinstance(a, Step) and isinstance(b, Step)]
    assert len(pairs) == 4
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-5)


@pytest.mark.parametrize("whole", [0.0, 0.25])
def test_images_are_the_same_whether_they_lie_on_the_device(
    data: Dataset, whole: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "WHOLE", whole)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # torch pins memory for real devices alone
    indices = torch.tensor([5, 0, 63])
    expected = (data.train_images[indices].float() / 255 - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)
    with far_device():
        feeding = Feed(data.train_images, data.train_labels, data, str(FAR))
        assert feeding._images.device == (FAR if whole else torch.device("cpu"))
        images, labels = feeding(indices)
        assert images.device == labels.device == FAR
        assert torch.equal(images.cpu(), expected)
        assert torch.equal(labels.cpu(), data.train_labels[indices])
    here = Feed(data.train_images, data.train_labels, data, "cpu")
    assert here._images is data.train_images  # no copy
    assert torch.equal(here(indices).x, expected)
