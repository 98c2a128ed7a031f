from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from raytrust.config import ModelConfig
from raytrust.networks.build import build_model


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "convnet", "normed-convnet", "resnet20", "lenet"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize(
    ("channels", "pixels", "classes"), [(3, 8, 10), (1, 16, 10), (1, 25, 2), (1, 28, 4), (3, 33, 2)]
)
def test_logits(
    name: Literal["resnet18", "convnet", "normed-convnet", "resnet20", "lenet"],
    stem: Literal["cifar", "imagenet"],
    channels: int,
    pixels: int,
    classes: int,
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


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("lenet", 10, 15_826),  # 912 + 3612 + 3612 + 7690
        ("lenet", 100, 85_036),
        ("resnet20", 10, 269_722),  # 0.27M in table 6 of He et al.
        ("resnet18", 10, 11_173_962),
    ],
)
def test_the_papers_sizes_are_the_default(
    name: Literal["resnet18", "resnet20", "lenet"], classes: int, parameters: int
) -> None:
    assert size(build_model(ModelConfig(name), channels=3, classes=classes, seed=0)) == parameters


def test_resnet20_has_twenty_layers_in_three_stages() -> None:
    model = build_model(ModelConfig("resnet20"), channels=3, classes=10, seed=0)
    layers = [p for p in model.parameters() if p.ndim > 1]
    assert len(layers) == 20
    seen: list[torch.Size] = []
    for block in model.get_submodule("blocks").children():
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1:]))
    model(torch.randn(1, 3, 32, 32))
    assert seen == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


def test_a_shortcut_without_parameters_keeps_every_other_pixel() -> None:
    model = build_model(ModelConfig("resnet20", width=3), channels=3, classes=10, seed=0).eval()
    block = list(model.get_submodule("blocks").children())[3]
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(2, 3, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 1:4], x[:, :, ::2, ::2])
    assert not out[:, [0, 4, 5]].any()


def test_lenet_is_drawn_as_in_its_paper() -> None:
    model = build_model(ModelConfig("lenet"), channels=3, classes=10, seed=0)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert weights.abs().max() <= 0.5
    assert abs(float(weights.mean())) < 0.01
    assert float(weights.var()) == pytest.approx(1 / 12, rel=0.02)
    assert sum(isinstance(m, nn.Sigmoid) for m in model.modules()) == 3


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("name", ["resnet18", "convnet", "normed-convnet", "resnet20", "lenet"])
def test_weights_depend_on_the_arguments_alone(
    name: Literal["resnet18", "convnet", "normed-convnet", "resnet20", "lenet"],
) -> None:
    first, again, other = (build_model(ModelConfig(name, width=4), 3, 10, seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))
