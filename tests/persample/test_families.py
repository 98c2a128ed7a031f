"""A small network of each of torchvision's families: by the fast path, with the gradients of plain autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from test_layers import check
from test_tasks import seeded
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import SwinTransformerBlockV2

CLASSES = 4


def narrow(layers: nn.Module) -> nn.Module:
    """A head for few features in the place of VGG's and AlexNet's."""
    return nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(CLASSES))


def mobilenet_v3() -> nn.Module:
    block = partial(InvertedResidualConfig, width_mult=1.0)
    settings = [block(16, 3, 16, 16, True, "RE", 2, 1), block(16, 5, 24, 16, False, "HS", 1, 1)]
    return tv.MobileNetV3(settings, 32, num_classes=CLASSES)


def efficientnet() -> nn.Module:
    blocks = [FusedMBConvConfig(2, 3, 1, 8, 8, 1), MBConvConfig(2, 3, 2, 8, 16, 1)]
    return tv.EfficientNet(blocks, 0.0, last_channel=32, num_classes=CLASSES)


def swin(**options: object) -> nn.Module:
    return tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [3, 3], 2.0, num_classes=CLASSES, **options)  # type: ignore[arg-type]


def resnet(block: type[BasicBlock | Bottleneck], **options: int) -> nn.Module:
    """Its first two stages, as their widths are fixed."""
    model = tv.ResNet(block, [1, 1, 1, 1], CLASSES, **options)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.LazyLinear(CLASSES)
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vgg": lambda: narrow(tv.vgg.make_layers([8, "M", 16, "M"], batch_norm=True)),
    "resnet": lambda: resnet(BasicBlock),
    "resnext": lambda: resnet(Bottleneck, groups=4, width_per_group=4),
    "densenet": lambda: tv.DenseNet(8, (2, 2), 16, num_classes=CLASSES),
    "densenet, with checkpoints": lambda: tv.DenseNet(8, (2, 2), 16, num_classes=CLASSES, memory_efficient=True),
    "mobilenet_v2": lambda: tv.MobileNetV2(CLASSES, 0.25, [[2, 16, 1, 2], [2, 24, 2, 2]]),
    "mobilenet_v3": mobilenet_v3,
    "efficientnet": efficientnet,
    "shufflenet": lambda: tv.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], CLASSES),
    "mnasnet": lambda: tv.MNASNet(0.25, CLASSES, 0.0),
    "squeezenet": lambda: tv.SqueezeNet("1_1", CLASSES),
    "regnet": lambda: tv.RegNet(BlockParams([1, 1], [16, 32], [8, 8], [1.0, 1.0], [2, 2], 0.25), CLASSES),
    "convnext": lambda: tv.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], 0.0, 0.5, CLASSES),
    "vit": lambda: tv.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES),
    "swin": swin,
    "swin_v2": lambda: swin(block=SwinTransformerBlockV2, downsample_layer=tv.swin_transformer.PatchMergingV2),
    "maxvit": lambda: tv.MaxVit((32, 32), 8, 4, [16], [1], 8, 0.0, num_classes=CLASSES),
}


def network(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[name]()
        # What batch norms have seen in evaluation mode is of the size that comes in, as after training.
        model.train()(torch.randn(8, 3, 32, 32))
        for p in model.parameters():
            if p.ndim <= 1:
                p.data.add_(0.1 * torch.rand_like(p))
        return model.double().eval()


@pytest.fixture
def differentiable_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's hard sigmoid isn't; ours is tested in test_layers.py."""
    monkeypatch.setattr(F, "hardsigmoid", lambda x, inplace=False: F.relu6(x + 3) / 6)


@pytest.mark.usefixtures("differentiable_twice")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_fast_and_right(name: str) -> None:
    x = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64, generator=seeded(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(network(name), x, torch.tensor([[0], [3]])).fast
