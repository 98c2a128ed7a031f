"""The networks: torchvision's ResNet-18 at any width and with either stem, ResNet-20, LeNet and a small ConvNet."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
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
            case "resnet20":
                return _ResNet20(config.width, channels, classes)
            case "lenet":
                return _LeNet(config.width, channels, classes)


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


class _ResNet20(nn.Module):
    """He et al. 2016, section 4.2, with n = 3: 3x3 convolutions in three stages of `width`, 2 and 4 times as many
    channels, shortcuts without parameters (option A), and a linear layer on the mean over all positions."""

    def __init__(self, width: int, channels: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        sizes = [width] * 4 + [2 * width] * 3 + [4 * width] * 3
        self.blocks = nn.Sequential(*(_BasicBlock(a, b) for a, b in pairwise(sizes)))
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which takes every other pixel and adds channels of zeros where it must."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.more = after - before

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(x + y)


class _LeNet(nn.Module):
    """The network of Deep Leakage from Gradients (Zhu et al. 2019) and Learning to Invert (Wu et al. 2023): three 5x5
    convolutions with sigmoids, the first two of stride 2, and a linear layer on 8x8 positions, to which images of other
    sizes than 32x32 are pooled. Weights and biases are uniform in [-1/2, 1/2], without which sigmoids pass no gradient.
    """

    def __init__(self, width: int, channels: int, classes: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(width, width, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(width, width, 5, padding=2),
            nn.Sigmoid(),
            nn.AdaptiveAvgPool2d(8),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(64 * width, classes)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))
