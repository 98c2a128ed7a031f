"""The networks: torchvision's ResNet-18 at any width and with either stem, ResNet-20, LeNet, a small ConvNet, others.

Others are registered, or named by an import path; `torchvision:NAME` is torchvision's, with a first layer and a last
one that fit the images.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.config import ModelConfig
from raytrust.config.register import NETWORKS
from raytrust.networks.checkpoint import load_checkpoint


def build_model(config: ModelConfig, channels: int, classes: int, seed: int) -> nn.Module:
    """A freshly initialised network that maps (n, channels, height, width) to logits (n, classes).

    The weights depend on the arguments alone; the global random number generator is left as it was. Raises ValueError
    for a network that can't be imported or does not take its options.
    """
    options: dict[str, Any] = dict(config.options)
    # A network of somebody else's need not take a width.
    if config.width is not None:
        options["width"] = config.width
    if config.name == "resnet18":
        options["stem"] = config.stem
    if config.norm != "batch":
        options["norm"] = config.norm
    make = _maker(config.name)
    # Asked of the signature, as a TypeError of the call may be a fault inside the network.
    try:
        inspect.signature(make).bind(channels, classes, **options)
    except TypeError as error:
        given = ", ".join(["channels", "classes", *options])
        raise ValueError(f"Expected network={config.name!r} to take {given}, but {error}.") from None
    # torch's initialisation knows no generator but the global one, which is the user's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(channels, classes, **options)


def check_network(config: ModelConfig, image_shape: Sequence[int], classes: int) -> None:
    """Raises ValueError unless the network can be built and maps two such images, (channels, height, width), to logits,
    and its checkpoint fits.

    Those that are shipped need no check without a checkpoint.
    """
    if config.shipped and not config.checkpoint:
        return
    images = torch.zeros(2, *image_shape)
    model = build_model(config, image_shape[0], classes, seed=0).eval()
    if config.checkpoint:
        load_checkpoint(model, config.checkpoint)
    try:
        with torch.no_grad():
            logits = model(images)
    # A network raises whatever it likes for images that it can't take.
    except Exception as error:
        shape = tuple(images.shape)
        raise ValueError(f"Expected network={config.name!r} to take images {shape}, but {error}") from error
    if tuple(logits.shape) != (2, classes):
        raise ValueError(f"Expected network={config.name!r} to give logits (2, {classes}), got {tuple(logits.shape)}.")


def copy_of(network: nn.Module) -> nn.Module:
    """A copy that shares nothing with the network."""
    # What a layer computes before its forward, as `weight_norm` does its weight, is no leaf, which deepcopy refuses; it
    # is computed anew in the copy.
    memo: dict[int, Any] = {}
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(network, memo)


@torch.no_grad()
def with_state(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The network with these parameters and buffers, by name, in place."""
    # Not by `load_state_dict`, which refuses buffers that are not persistent.
    places = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, value in state.items():
        places[name].copy_(value)
    return network


def _maker(name: str) -> Callable[..., nn.Module]:
    library, _, network = name.partition(":")
    if library == "torchvision":
        return partial(_of_torchvision, network)
    make: Callable[..., nn.Module] = NETWORKS[name]
    return make


def _of_torchvision(network: str, channels: int, classes: int, **options: Any) -> nn.Module:
    """One of `torchvision.models.list_models()`, untrained; its first convolution is made to fit the channels."""
    from torchvision.models import get_model, list_models

    if network not in list_models():
        near = "".join(f", such as {n}" for n in get_close_matches(network, list_models(), n=1))
        raise ValueError(f"Expected network='torchvision:{network}' to name a network of torchvision{near}.")
    model: nn.Module = get_model(network, weights=None, num_classes=classes, **options)
    # Only the first convolution sees the image, and so has to fit its channels.
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            if layer.in_channels != channels:
                like: dict[str, Any] = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding")}
                first = nn.Conv2d(channels, layer.out_channels, bias=layer.bias is not None, **like)
                model.set_submodule(name, first)
            break
    return model


def _group_norm(channels: int) -> nn.GroupNorm:
    # A divisor of the channels, near an eighth of them.
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 8)), channels)


_NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "group": _group_norm}


def resnet18(channels: int, classes: int, width: int = 64, stem: str = "cifar", norm: str = "batch") -> nn.Module:
    # The import takes 1.5 s, and an attack on a ConvNet does not need it.
    from torchvision.models.resnet import BasicBlock, ResNet

    class ScaledResNet(ResNet):
        """torchvision's ResNet, whose first stage has 64 channels, with every stage scaled to `width` / 64."""

        def _make_layer(self, block: type, planes: int, *args: int, **kwargs: bool) -> nn.Sequential:
            # torchvision's constructor sets 64 input channels just before it makes the first stage.
            if planes == 64:
                self.inplanes = width
            return super()._make_layer(block, planes // 64 * width, *args, **kwargs)

    model = ScaledResNet(BasicBlock, [2, 2, 2, 2], num_classes=classes, norm_layer=_NORMS[norm])
    if stem == "cifar":
        model.conv1 = nn.Conv2d(channels, width, kernel_size=3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    else:
        model.conv1 = nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False)
    # As torchvision does in its constructor, which is over by now: a new layer has torch's other default.
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.bn1 = _NORMS[norm](width)
    model.fc = nn.Linear(8 * width, classes)
    return model


class ConvNet(nn.Module):
    """Three 3x3 convolutions with ReLU, the last two of stride 2, then 4x4 mean pooling and a linear layer; with a norm
    after each convolution or without."""

    def __init__(self, channels: int, classes: int, width: int, norm: str = ""):
        super().__init__()
        layers: list[nn.Module] = []
        for before, stride in ((channels, 1), (width, 2), (width, 2)):
            layers.append(nn.Conv2d(before, width, 3, stride=stride, padding=1))
            layers += [_NORMS[norm](width)] if norm else []
            layers.append(nn.ReLU())
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.classifier = nn.Linear(16 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def normed_convnet(channels: int, classes: int, width: int, norm: str = "batch") -> nn.Module:
    return ConvNet(channels, classes, width, norm)


class ResNet20(nn.Module):
    """He et al. 2016, section 4.2, with n = 3: 3x3 convolutions in three stages of `width`, 2 and 4 times as many
    channels, shortcuts without parameters (option A), and a linear layer on the mean over all positions."""

    def __init__(self, channels: int, classes: int, width: int, norm: str = "batch"):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = _NORMS[norm](width)
        sizes = [width] * 4 + [2 * width] * 3 + [4 * width] * 3
        self.blocks = nn.Sequential(*(_BasicBlock(a, b, _NORMS[norm]) for a, b in pairwise(sizes)))
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which takes every other pixel and adds channels of zeros where it must."""

    def __init__(self, before: int, after: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = norm(after)
        self.more = after - before

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(x + y)


class LeNet(nn.Module):
    """The network of Deep Leakage from Gradients (Zhu et al. 2019) and Learning to Invert (Wu et al. 2023): three 5x5
    convolutions with sigmoids, the first two of stride 2, and a linear layer on 8x8 positions, to which images of other
    sizes than 32x32 are pooled. Weights and biases are uniform in [-1/2, 1/2], without which sigmoids pass no gradient.
    """

    def __init__(self, channels: int, classes: int, width: int):
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
