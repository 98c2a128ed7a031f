from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from raytrust.config import ModelConfig
from raytrust.models import build_model


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "convnet"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize(("channels", "pixels", "classes"), [(3, 8, 10), (1, 28, 4), (3, 33, 2)])
def test_logits(
    name: Literal["resnet18", "convnet"], stem: Literal["cifar", "imagenet"], channels: int, pixels: int, classes: int
) -> None:
    model = build_model(ModelConfig(name, stem, width=4), channels, classes, seed=0).eval()
    logits = model(torch.randn(2, channels, pixels, pixels))
    assert logits.shape == (2, classes)
    assert torch.isfinite(logits).all()


def test_resnet18_is_the_paper_s() -> None:
    model = build_model(ModelConfig("resnet18", "imagenet", width=64), channels=3, classes=1000, seed=0)
    assert size(model) == 11_689_512  # torchvision's table
    assert len(list(model.parameters())) == 62


def test_the_cifar_stem_keeps_the_resolution() -> None:
    model = build_model(ModelConfig(width=8), channels=3, classes=10, seed=0)
    seen: dict[str, torch.Size] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.shape[1:]}))
    model(torch.randn(1, 3, 32, 32))
    assert seen["maxpool"] == (8, 32, 32)
    assert [seen[f"layer{i}"] for i in (1, 2, 3, 4)] == [(8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4)]


def test_width_scales_every_stage() -> None:
    # Convolutions grow with the square of the width, but for the first.
    narrow, wide = (
        {n: p.numel() for n, p in build_model(ModelConfig(width=w), 3, 10, 0).named_parameters() if p.ndim == 4}
        for w in (4, 8)
    )
    assert {n: wide[n] / narrow[n] for n in narrow} == {n: 2 if n == "conv1.weight" else 4 for n in narrow}


def test_the_convnet_has_no_batch_norm() -> None:
    model = build_model(ModelConfig("convnet", width=6), channels=3, classes=10, seed=0)
    assert list(model.buffers()) == []
    assert [p.shape for p in model.parameters() if p.ndim > 1] == [(6, 3, 3, 3), (6, 6, 3, 3), (6, 6, 3, 3), (10, 96)]


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("name", ["resnet18", "convnet"])
def test_weights_depend_on_the_arguments_alone(name: Literal["resnet18", "convnet"]) -> None:
    first, again, other = (build_model(ModelConfig(name, width=4), 3, 10, seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))
