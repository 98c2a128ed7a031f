"""A checkpoint may lie on another device than the gradients of the training that goes on from it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from far_device import FAR, far_device
from test_state import fresh
from torch import Tensor
from toys import DEFENCES, gradients

from raytrust.compress import Compressor
from raytrust.config import QSGDConfig
from raytrust.wire.channel import LocalChannel

STEPS = 3
# QSGD has nothing but a count of steps; its dice on a GPU are those of the GPU.
NAMES = [name for name, defence in DEFENCES.items() if not isinstance(defence.compressor, QSGDConfig)]


def run(compressor: Compressor, first: int, device: torch.device) -> list[list[Tensor]]:
    """Means on the CPU of the steps from `first` on."""
    means = []
    for i in range(first, first + STEPS):
        mean = compressor.reduce([g.to(device) for g in gradients(i)], LocalChannel()).mean
        assert {m.device for m in mean} == {device}
        means.append([m.cpu().clone() for m in mean])
    return means


def moved(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """As `torch.load(..., map_location=device)` has it."""
    return {key: x.to(device) if isinstance(x, Tensor) else copy.deepcopy(x) for key, x in state.items()}


CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("state_on", [CPU, FAR], ids=str)
@pytest.mark.parametrize("grads_on", [CPU, FAR], ids=str)
def test_a_state_may_lie_on_another_device(name: str, state_on: torch.device, grads_on: torch.device) -> None:
    compressor = fresh(name)
    run(compressor, 0, CPU)
    state, expected = compressor.state_dict(), run(compressor, STEPS, CPU)
    with far_device():
        restored = fresh(name, seed=6)
        restored.load_state_dict(moved(state, state_on))
        found = run(restored, STEPS, grads_on)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
