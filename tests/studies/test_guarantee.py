"""The epsilon of a training's row."""

from __future__ import annotations

from raytrust.config import CaptureConfig, ModelConfig, TrainConfig, parse_defence
from raytrust.metrics.accountant import DELTA, epsilon
from raytrust.studies.frontier.jobs import _guarantee


def config(defence: str, steps: int, workers: int = 2) -> TrainConfig:
    return TrainConfig(
        parse_defence(defence), ModelConfig("convnet"), capture=CaptureConfig((0,), 1, 1), workers=workers,
        batch_size=8, steps=steps,
    )  # fmt: skip


def test_it_counts_each_worker_s_message_of_each_step() -> None:
    assert _guarantee(config("dp-sgd:2", 5), 64) == {"epsilon": epsilon(2.0, 8 / 64, 10), "delta": DELTA}


def test_without_a_training_or_dp_sgd_there_is_none() -> None:
    """An epsilon of 0 beside an attack on a private batch would say that nothing can leak."""
    assert _guarantee(config("dp-sgd:2", 0), 64) == {}
    assert _guarantee(config("noise:2", 5), 64) == {}
