"""Networks that the gradient tests share, and gradients by the textbook loop."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.config import ModelConfig
from raytrust.networks.build import build_model


class Mixed(nn.Module):
    """A group norm, a batch norm without weights, a grouped convolution, pooling, a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.positions = nn.Parameter(torch.randn(8, 1, 1))
        self.head = nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        return self.head(torch.sigmoid(self.grouped(x) + self.positions))


class Strange(nn.Module):
    """Whatever the fast path knows, used in unusual ways: strides, dilation, odd padding, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, (3, 5), stride=(1, 2), padding=(0, 3), bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 5, 2, dilation=2, padding=1)
        self.third = nn.Conv2d(5, 6, 1, stride=2)
        self.hidden = nn.Linear(6, 7, bias=False)
        self.out = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        x = x + F.pad(self.second(F.silu(x)), (0, 0))[:, :4]
        x = self.third(F.elu(torch.cat([x, x[:, :1] ** 2], 1), inplace=True))
        return self.out(torch.tanh(self.hidden(x.amax((2, 3)))))


def network(name: str, training: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    own = {"mixed": Mixed, "strange": Strange}
    model = own[name]() if name in own else build_model(ModelConfig(name, width=3), 3, 4, seed=0)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.to(dtype).train(training)


def candidates(batch: int, size: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, batch, 3, size, size, generator=generator).to(dtype)
    return x, torch.randint(0, 4, (4, batch), generator=generator)


def one_at_a_time(model: nn.Module, x: Tensor, labels: Tensor, create_graph: bool = False) -> list[Tensor]:
    """The textbook loop."""
    rows = []
    for images, targets in zip(x, labels, strict=True):
        twin = copy.deepcopy(model)
        loss = F.cross_entropy(twin(images), targets)
        parameters = list(twin.parameters())
        found = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]
