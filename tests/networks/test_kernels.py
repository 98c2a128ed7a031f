"""A kernel that corrupts memory is not used, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raytrust.config import ModelConfig
from raytrust.networks.build import build_model
from raytrust.networks.kernels import sound_kernels


@pytest.mark.parametrize(
    ("network", "hit"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), True),
        (nn.Conv2d(8, 4, 1, stride=2), True),
        (nn.Conv2d(8, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
        (build_model(ModelConfig("resnet18", width=4), 1, 4, seed=0), True),
        (build_model(ModelConfig("resnet18", width=16), 1, 4, seed=0), False),
    ],
)
@pytest.mark.parametrize(("capability", "old"), [("AVX2", True), ("AVX512", False)])
def test_it_is_not_used_where_it_is_wrong(
    network: nn.Module, hit: bool, capability: str, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    before = torch.backends.mkldnn.enabled
    with sound_kernels(network):
        assert torch.backends.mkldnn.enabled == (before and not (hit and old))
    assert torch.backends.mkldnn.enabled == before
