"""What a training with DP-SGD says of its guarantee."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytrust.config import CaptureConfig, ModelConfig, TrainConfig, parse_defence
from raytrust.data import Dataset
from raytrust.metrics.accountant import epsilon
from raytrust.studies.frontier.jobs import begin, train_and_capture
from raytrust.studies.frontier.rows import naming
from raytrust.studies.frontier.store import Store
from raytrust.wire.channel import LocalChannel


@pytest.mark.parametrize("steps", [0, 3])
def test_epsilon_is_of_all_messages_of_a_training(data: Dataset, tmp_path: Path, steps: int) -> None:
    config = TrainConfig(
        parse_defence("dp-sgd:2+powersgd:1"), ModelConfig("convnet", width=2), capture=CaptureConfig((0,), 1, 1),
        workers=1, batch_size=16, steps=steps,
    )  # fmt: skip
    figures = train_and_capture(config, data, LocalChannel(), begin(Store(tmp_path), config), "cpu")
    named = naming(config.defence, figures)
    if steps == 0:
        # No epsilon of 0, which would claim that nothing leaks.
        assert named["epsilon"] is None
        assert named["remarks"] == []
    else:
        assert named["epsilon"] == pytest.approx(epsilon(2.0, 16 / 64, 3))
        assert named["remarks"] == [f"epsilon {named['epsilon']:.3g} at delta 1e-05 for all messages of all workers"]
    assert naming(parse_defence("clip:1+noise:1"), figures | {"epsilon": None})["epsilon"] is None
