"""The networks: torchvision's ResNet-18 at any width and with either stem, and a small ConvNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raytrust.config import ModelConfig


def build_model(config: ModelConfig, channels: int, classes: int, seed: int) -> nn.Module:
    """A freshly initialised network that maps (n, channels, height, width) to logits (n, classes).

    The weights depend on the arguments alone; the global random number generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match config.name:
            case "resnet18":
                return _resnet18(config, channels, classes)
            case "convnet":
                return _ConvNet(config.width, channels, classes)


def _resnet18(config: ModelConfig, channels: int, classes: int) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet  # 1.5 s to import, and attacks on a ConvNet don't need it

    width = config.width

    class ScaledResNet(ResNet):
        """torchvision's ResNet, whose first stage has 64 channels, with every stage scaled to `width` / 64."""

        def _make_layer(self, block: type, planes: int, *args: int, **kwargs: bool) -> nn.Sequential:
            if planes == 64:
                self.inplanes = width
            return super()._make_layer(block, planes // 64 * width, *args, **kwargs)

    model = ScaledResNet(BasicBlock, [2, 2, 2, 2], num_classes=classes)
    if config.stem == "cifar":
        model.conv1 = nn.Conv2d(channels, width, kernel_size=3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    else:
        model.conv1 = nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as ResNet does
    model.bn1 = nn.BatchNorm2d(width)
    model.fc = nn.Linear(8 * width, classes)
    return model


class _ConvNet(nn.Module):
    """Three 3x3 convolutions with ReLU, the last two of stride 2, then 4x4 mean pooling and a linear layer."""

    def __init__(self, width: int, channels: int, classes: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(16 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))
