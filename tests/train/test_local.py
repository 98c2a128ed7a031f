"""Local steps: what a worker hands to the compressor is what plain SGD by itself would have made of its weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import network
from torch import Tensor, nn
from toys import synthetic
from two_workers import LOCAL_TRAINING

from raytrust.config import CaptureConfig, LocalConfig, ModelConfig, Threat, TrainConfig
from raytrust.data import Dataset
from raytrust.leak.observation import Capture, decoded
from raytrust.train.gradient import gradient_of, update_of
from raytrust.train.local import pseudo_gradient
from raytrust.train.loop import Record, Step, Trained, capture_images, train
from raytrust.wire.channel import LocalChannel

TRAINING = TrainConfig(
    model=ModelConfig("resnet18", width=2),
    capture=CaptureConfig(steps=(0, 2), tuning=1, evaluation=1),
    threat=Threat(batch_size=2),
    workers=1,
    batch_size=6,
    steps=3,
    learning_rate=0.02,
)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 3, 16, 16, generator=generator).to(dtype), torch.randint(0, 4, (5,), generator=generator)


def by_hand(
    model: nn.Module, parts: list[Any], rate: float, x: Tensor, labels: Tensor
) -> tuple[list[Tensor], nn.Module]:
    """(weights before - weights after) / (steps * rate) of torch's own SGD on a copy, and that copy."""
    twin = copy.deepcopy(model)
    optimiser = torch.optim.SGD(twin.parameters(), lr=rate)
    for part in parts:
        optimiser.zero_grad()
        F.cross_entropy(twin(x[part]), labels[part]).backward()
        optimiser.step()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return [(p - q).detach() / (len(parts) * rate) for p, q in pairs], twin


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("local", "parts"),
    [
        (LocalConfig(3, 0.1), [slice(None)] * 3),
        (LocalConfig(3, 0.1, 5), [slice(None)] * 3),
        (LocalConfig(4, 0.1, 2), [[0, 1], [2, 3], [4, 0], [1, 2]]),
    ],
    ids=["whole", "large parts", "parts"],
)
def test_a_pseudo_gradient_is_what_sgd_makes_of_the_weights(
    local: LocalConfig, parts: list[Any], training: bool
) -> None:
    model, (x, labels) = network("resnet18", training, torch.float64), batch()
    expected, twin = by_hand(model, parts, 0.1, x, labels)
    before = [p.clone() for p in model.parameters()]
    loss, grads = update_of(model, x, labels, local)
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-10)
    assert all(map(torch.equal, model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())
    # Statistics move as they do in the worker's own steps.
    for moved, by_sgd in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(moved, by_sgd)
    assert loss.isfinite()


def test_one_step_is_the_gradient_to_the_bit() -> None:
    x, labels = batch(torch.float32)
    one, other = network("resnet18", True), network("resnet18", True)
    loss, grads = update_of(one, x, labels, LocalConfig(1, learning_rate=7.0))
    expected_loss, expected = gradient_of(other, x, labels)
    assert torch.equal(loss, expected_loss)
    assert all(map(torch.equal, grads, expected))
    assert all(map(torch.equal, one.buffers(), other.buffers()))


def test_weights_come_back_from_a_step_that_fails() -> None:
    weights = torch.ones(3)
    calls = iter([(torch.tensor(1.0), [torch.ones(3)])])

    def gradient(_: Any) -> tuple[Tensor, list[Tensor]]:
        return next(calls)

    with pytest.raises(StopIteration):
        pseudo_gradient([weights], LocalConfig(2), 4, gradient)
    assert torch.equal(weights, torch.ones(3))


def run(config: TrainConfig, data: Dataset) -> list[Record]:
    return list(train(config, data, LocalChannel()))


def test_training_steps_by_the_pseudo_gradient(data: Dataset) -> None:
    """One round of four local steps, by hand: the server's plain SGD makes of it the mean path, scaled."""
    local = LocalConfig(4, 0.05, 2)
    config = replace(
        TRAINING, model=ModelConfig("convnet", width=4), steps=1, momentum=0.0, weight_decay=0.0, local=local,
        capture=CaptureConfig(tuning=1, evaluation=1),
    )  # fmt: skip
    records = run(config, data)
    captured = next(r.seen for r in records if isinstance(r, Capture))
    (trained,) = [r for r in records if isinstance(r, Trained)]
    model = captured.build_model()
    # One step is at the peak of the schedule.
    moved = [(w - trained.weights[name]) / config.learning_rate for name, w in captured.weights.items()]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(config.seed + 1))[:6]
    x = (data.train_images[order].float() / 255 - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)
    expected, _ = by_hand(model, [[0, 1], [2, 3], [4, 5], [0, 1]], 0.05, x, data.train_labels[order])
    for found, e in zip(moved, expected, strict=True):
        torch.testing.assert_close(found, e, rtol=1e-3, atol=1e-4 * float(e.abs().max()) + 1e-6)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_captures_are_of_the_private_pseudo_gradient(batch_norm: Any, data: Dataset) -> None:
    local = LocalConfig(3, 0.05, 2)
    threat = Threat(batch_size=4, batch_norm=batch_norm, batch_statistics="known")
    config = replace(TRAINING, local=local, threat=threat)
    for capture in (r for r in run(config, data) if isinstance(r, Capture)):
        seen, truth = capture.seen, capture.truth
        assert seen.local == local
        x = (truth.images - seen.mean.view(-1, 1, 1)) / seen.std.view(-1, 1, 1)
        model = seen.build_model()
        expected, twin = by_hand(model, [[0, 1], [2, 3], [0, 1]], 0.05, x, truth.labels)
        found, true = (torch.cat([g.flatten() for g in grads]) for grads in (decoded(seen).gradient, expected))
        # Not entry by entry: batch norm of two images makes much of what kernels round differently, a step later.
        assert float((found - true).norm() / true.norm()) < (0.02 if batch_norm == "train" else 1e-3)
        if batch_norm == "train":
            assert seen.buffers_after is not None
            for name, buffer in twin.named_buffers():
                torch.testing.assert_close(seen.buffers_after[name], buffer, rtol=1e-2, atol=1e-3)


def test_captures_do_not_disturb_local_training(data: Dataset) -> None:
    config = replace(TRAINING, local=LocalConfig(2, 0.05), threat=Threat(batch_size=2, batch_norm="train"))
    often, once = (
        run(replace(config, capture=CaptureConfig(steps, tuning=1, evaluation=1)), data) for steps in [(0, 1, 2), (2,)]
    )
    assert [r.loss for r in often if isinstance(r, Step)] == [r.loss for r in once if isinstance(r, Step)]
    assert often[-1] == once[-1]


def test_local_steps_learn_more_in_as_many_rounds() -> None:
    config = replace(
        TRAINING, model=ModelConfig("convnet", width=4), batch_size=16, steps=12, learning_rate=0.02,
        capture=CaptureConfig(tuning=1, evaluation=1), momentum=0.0,
    )  # fmt: skip
    # The server's step is as long as the local path: four steps of 0.02.
    local = replace(config, learning_rate=0.08, local=LocalConfig(4, 0.02, 4))
    alone, several = ([r.loss for r in run(c, synthetic()) if isinstance(r, Step)] for c in (config, local))
    assert sum(several[-3:]) < sum(alone[-3:])


def test_two_workers_agree(group: list[dict[str, Any]]) -> None:
    first, second = (worker["local training"] for worker in group)
    (one,), (other,) = ([r for r in records if isinstance(r, Trained)] for records in (first, second))
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    # Each made steps of its own before: what they sent differs.
    captures = [next(r for r in records if isinstance(r, Capture)) for records in (first, second)]
    assert not torch.equal(*(decoded(c.seen).gradient[0] for c in captures))
    for capture in captures:
        seen, truth = capture.seen, capture.truth
        x = (truth.images - seen.mean.view(-1, 1, 1)) / seen.std.view(-1, 1, 1)
        expected, _ = by_hand(seen.build_model(), [[0], [1], [0]], 0.05, x, truth.labels)
        for found, e in zip(decoded(seen).gradient, expected, strict=True):
            torch.testing.assert_close(found, e, rtol=1e-3, atol=1e-3 * float(e.abs().max()) + 1e-6)
    assert LOCAL_TRAINING.local == captures[0].seen.local


def test_images_of_one_s_own_fill_private_batches(data: Dataset) -> None:
    config = replace(TRAINING, threat=Threat(batch_size=2), local=LocalConfig(2, 0.05, 1))
    found = capture_images(config, data, data.test_images[:6], data.test_labels[:6])
    assert [c.truth.labels.tolist() for c in found] == data.test_labels[:6].view(3, 2).tolist()


def test_the_private_batch_is_taken_whole() -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        replace(TRAINING, threat=Threat(batch_size=4), local=LocalConfig(3, 0.1, 1))
    assert str(error.value) == (
        "Expected 3 local steps of batch_size=1 to take each of the 4 images of a private batch."
    )
    # Where the batch is no larger than a part, each step takes all of it.
    assert LocalConfig(2, 0.1, 4).rows(3) == [slice(None)] * 2
