from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_inversion import seen
from torch import Tensor, nn
from toys import synthetic

from raytrust.attacks.inversion import recover_labels
from raytrust.attacks.inversion.labels import classifier_gradient
from raytrust.compress import build
from raytrust.config import (
    CaptureConfig,
    CompressorConfig,
    Defence,
    DenseConfig,
    ModelConfig,
    PowerSGDConfig,
    Threat,
    TopKConfig,
    TrainConfig,
    parse_defence,
)
from raytrust.data import Dataset
from raytrust.leak.observation import Capture, Observation
from raytrust.networks.task import CROSS_ENTROPY
from raytrust.studies.audit.private import private
from raytrust.studies.audit.victim import State, Victim
from raytrust.train.loop import train
from raytrust.wire.channel import LocalChannel

COMPRESSORS = [DenseConfig(), PowerSGDConfig(1), TopKConfig(level=0.05)]


def observed(
    labels: list[list[int]], compressor: CompressorConfig | Defence, error_feedback: bool = False
) -> list[Observation]:
    """Of batches with these labels, of 10 classes, which the attacker isn't told; and the messages are compressed."""
    data = synthetic(train=64, test=8, classes=10, vivid=True)
    batch = len(labels[0])
    config = TrainConfig(
        defence=compressor if isinstance(compressor, Defence) else Defence(compressor, error_feedback),
        model=ModelConfig("convnet", width=8),
        threat=Threat(batch_size=batch, labels="unknown"),
        capture=CaptureConfig(tuning=1, evaluation=len(labels) - 1),
        workers=1,
        batch_size=1,
        steps=1,
    )
    flat = torch.tensor(labels).flatten()
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))  # as `private_batches` will draw them
    shuffled = torch.empty_like(flat)
    shuffled[order] = flat
    n = len(flat)
    private = Dataset("toy", data.train_images[:n], shuffled, data.test_images, data.test_labels, 10)
    records = train(config, private, LocalChannel())
    found = [r for r in (next(records) for _ in labels) if isinstance(r, Capture)]
    assert [sorted(c.truth.labels.tolist()) for c in found] == [sorted(x) for x in labels]
    assert all(c.seen.labels is None for c in found)
    return [c.seen for c in found]


def overlap(found: Tensor, labels: list[int]) -> float:
    return (Counter(found.tolist()) & Counter(labels)).total() / len(labels)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("method", ["idlg", "bias_sign", "counts"])
def test_the_label_of_one_image(compressor: CompressorConfig, method: str) -> None:
    labels = [[c] for c in (3, 0, 9, 5, 3, 7, 1)]
    for observation, expected in zip(observed(labels, compressor), labels, strict=True):
        assert recover_labels(observation, method).tolist() == expected


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("batch", [2, 4])
def test_distinct_labels_of_a_batch(compressor: CompressorConfig, batch: int) -> None:
    labels = [list(range(i, i + batch)) for i in range(4)]
    for observation, expected in zip(observed(labels, compressor), labels, strict=True):
        assert recover_labels(observation, "bias_sign").tolist() == expected
        assert recover_labels(observation, "counts").tolist() == expected


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize(
    "labels",
    [
        [[4, 4], [0, 7]],
        [[1, 1, 1, 1], [2, 2, 2, 8], [0, 0, 5, 5]],
        [[3] * 5 + [6] * 2 + [9], [0, 0, 1, 1, 2, 2, 3, 3]],
        [[7] * 16, [0] * 8 + [1] * 4 + [2] * 2 + [3, 4], list(range(10)) + [9] * 6],
    ],
    ids=["2", "4", "8", "16"],
)
def test_duplicate_labels_are_counted(compressor: CompressorConfig, labels: list[list[int]]) -> None:
    least = 0.75 if isinstance(compressor, TopKConfig) else 1.0
    shares = [
        overlap(recover_labels(o, "counts"), x) for o, x in zip(observed(labels, compressor), labels, strict=True)
    ]
    assert np.mean(shares) >= least
    for observation in observed(labels, compressor):
        found = recover_labels(observation, "counts")
        assert found.shape == (len(labels[0]),)
        assert torch.equal(found, found.sort().values)


def test_a_gradient_bounds_the_counts() -> None:
    """With a hand-made bias gradient that leaves no doubt, whatever the model thinks of noise."""
    observation = observed([[0, 0, 0, 0], [1, 1, 1, 1]], DenseConfig())[0]
    for counts in ([4] + [0] * 9, [0, 1, 0, 3] + [0] * 6, [1, 1, 1, 1] + [0] * 6):
        slopes = 0.001 - torch.tensor(counts) / 4  # a model that gives each class a probability of almost nothing
        slopes[9] += 1 - 0.01
        assert recover_labels(with_bias(observation, slopes), "counts").tolist() == [
            c for c, n in enumerate(counts) for _ in range(n)
        ]


def with_bias(observation: Observation, slopes: Tensor) -> Observation:
    (message,) = observation.messages
    payload = torch.cat([message.sent[0][: -len(slopes)], slopes])  # the bias is the last parameter
    return replace(observation, messages=(replace(message, sent=(payload,)),))


@pytest.mark.parametrize("text", ["clip:0.05", "clip:100", "dp-sgd:1e-6:clip=0.05"])
def test_labels_are_counted_whatever_length_the_gradient_was_clipped_to(text: str) -> None:
    labels = [[4, 4, 4, 4], [2, 2, 5, 9], [1, 3, 3, 3]]
    for one, true in zip(observed(labels, parse_defence(text)), labels, strict=True):
        assert overlap(recover_labels(one, "counts"), true) == 1


def test_without_its_bias_gradient_the_rows_of_the_weights_serve() -> None:
    """An entry of exactly 0 was not sent."""
    labels = [[4, 4], [0, 7], [1, 5]]
    for observation, expected in zip(observed(labels, DenseConfig()), labels, strict=True):
        _, bias = classifier_gradient(observation)
        assert bias is not None
        whole = with_bias(observation, bias)
        assert recover_labels(whole, "counts").tolist() == expected
        assert recover_labels(with_bias(observation, torch.zeros(10)), "counts").tolist() == expected
        partly = bias.clone()
        partly[expected[0]] = 0
        assert recover_labels(with_bias(observation, partly), "counts").tolist() == expected


def test_idlg_is_for_one_image() -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        recover_labels(seen(threat=Threat(labels="unknown", batch_size=2))[0], "idlg")
    assert str(error.value) == "Expected batch_size=2 to be 1 for label_recovery='idlg'."


def test_the_model_must_end_in_a_classifier() -> None:
    observation = replace(seen(threat=Threat(labels="unknown"))[0], classes=5)
    with pytest.raises((ValueError, RuntimeError)):
        recover_labels(observation, "counts")


@pytest.mark.usefixtures("global_rng_untouched")
def test_recovery_leaves_the_observation_as_it_was() -> None:
    observation = seen(threat=Threat(labels="unknown", batch_size=2, batch_norm="train"), model="resnet18")[0]
    before = {name: b.clone() for name, b in observation.buffers.items()}
    assert torch.equal(recover_labels(observation, "counts"), recover_labels(observation, "counts"))
    assert all(torch.equal(observation.buffers[name], b) for name, b in before.items())


class TwoHeads(nn.Module):
    """With a head of as many outputs, defined last and called first, that only a training step would use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten())
        self.classifier = nn.Linear(8 * 49, 10)
        self.auxiliary = nn.Linear(8 * 49, 10)
        self.loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        self.loss = self.auxiliary(features).square().mean()
        logits: Tensor = self.classifier(features)
        return logits


def test_the_classifier_is_the_layer_whose_outputs_are_the_logits() -> None:
    torch.manual_seed(0)
    victim = Victim(TwoHeads(), CROSS_ENTROPY, torch.zeros(3), torch.ones(3))
    labels = torch.tensor([7, 2, 5])
    images = torch.rand((3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    state = State.of(victim.network)
    captures = victim.captures(
        victim.network, build(Defence(), [w.shape for w in state.weights.values()]), Defence(), None,
        Threat(labels="unknown"), private(images, labels, None, CROSS_ENTROPY), 10, state, 0,
    )  # fmt: skip
    assert [recover_labels(c.seen, "counts").item() for c in captures] == [7, 2, 5]
