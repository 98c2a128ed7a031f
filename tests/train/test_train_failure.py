"""A worker whose loss or gradient is not finite ends training on all workers: each side of the exchange by itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from raytrust.config import CaptureConfig, ModelConfig, TrainConfig
from raytrust.data import Dataset
from raytrust.train.loop import Step, train
from raytrust.wire.channel import LocalChannel

CONFIG = TrainConfig(
    model=ModelConfig("convnet", width=4), capture=CaptureConfig((3,), 1, 1), workers=2, batch_size=8, steps=4
)


class Beside(LocalChannel):
    """The channel of the first of two workers; the second sends the same, and from step `ill` on that it is not well.

    sent: the sizes of what this worker sent, a step: its flag, then its gradient.
    """

    world_size = 2

    def __init__(self, ill: int | None = None):
        self._ill = ill
        self.sent: list[list[int]] = []

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if x.numel() == 1:
            self.sent.append([])
        self.sent[-1].append(x.numel())
        mean = super().all_mean(x, out)
        return mean / 2 if x.numel() == 1 and len(self.sent) - 1 == self._ill else mean


def steps_before_the_end(data: Dataset, channel: Beside, message: str) -> int:
    done: list[Step] = []
    with pytest.raises(FloatingPointError, match=message):
        done.extend(r for r in train(CONFIG, data, channel) if isinstance(r, Step))
    return len(done)


def test_another_worker_s_failure_ends_training_here(data: Dataset) -> None:
    channel = Beside(ill=2)
    message = r"^The training loss or gradient of another worker is not finite at step 2\.$"
    assert steps_before_the_end(data, channel, message) == 2
    assert [len(step) for step in channel.sent] == [2, 2, 1]  # its gradient of step 2 is not sent


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_told_to_the_others(
    value: float, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = Beside()
    loss = torch.nn.functional.cross_entropy

    def poisoned(logits: Tensor, labels: Tensor) -> Tensor:
        return loss(logits, labels) * (value if len(channel.sent) == 1 else 1)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", poisoned)
    assert steps_before_the_end(data, channel, rf"^The training loss became {value} at step 1\.$") == 1
    assert [len(step) for step in channel.sent] == [2, 1]


def test_a_gradient_that_is_not_finite_is_told_to_the_others(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    channel = Beside()
    grad = torch.autograd.grad

    def poisoned(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        grads = list(grad(loss, parameters))
        if len(channel.sent) == 1:
            grads[0].view(-1)[3] = torch.inf
        return grads

    monkeypatch.setattr("torch.autograd.grad", poisoned)
    message = r"^The gradient is not finite at step 1\. Expected the gradient of \S+ to be finite, got inf in 1 of"
    assert steps_before_the_end(data, channel, message) == 1
    assert [len(step) for step in channel.sent] == [2, 1]


def test_the_flag_is_not_counted(data: Dataset) -> None:
    steps = [r for r in train(CONFIG, data, Beside()) if isinstance(r, Step)]
    assert [step.sent_bytes for step in steps] == [step.gradient_bytes for step in steps]
