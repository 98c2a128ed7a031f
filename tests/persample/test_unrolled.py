"""Local steps, simulated from candidates: all at once and one by one agree with a loop of plain autograd."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from networks import candidates, network
from torch import Tensor, nn
from torch.func import functional_call

from raytrust.attacks.inversion import GradientMatcher
from raytrust.config import LocalConfig
from raytrust.networks.task import CROSS_ENTROPY
from raytrust.persample import PerSampleGradients
from raytrust.persample.plain import PlainPath
from raytrust.persample.unrolled import UnrolledPath

LOCAL = LocalConfig(3, 0.05, 2)
PARTS = [[0, 1], [2, 0], [1, 2]]


def naive(model: nn.Module, x: Tensor, labels: Tensor, parts: Sequence[Sequence[int]] = PARTS) -> list[Tensor]:
    """The pseudo-gradients (candidates, *shape), differentiable in x: the definition."""
    rows = []
    for images, targets in zip(x, labels, strict=True):
        start = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        weights = start
        for part in parts:
            loss = F.cross_entropy(
                functional_call(model, {**buffers, **weights}, images[list(part)]), targets[list(part)]
            )
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {name: w - 0.05 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
        rows.append([(start[name] - weights[name]) / (len(parts) * 0.05) for name in start])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def to_target(model: nn.Module) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in model.parameters()]


def distance(target: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    inner = torch.stack([(g * t).flatten(1).sum(1) for g, t in zip(grads, target, strict=True)]).sum(0)
    norm = torch.stack([g.square().flatten(1).sum(1) for g in grads]).sum(0).sqrt()
    return 1 - inner / norm


@pytest.mark.parametrize("path", [PlainPath, UnrolledPath])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["convnet", "resnet18", "mixed", "strange"])
def test_both_ways_are_exact(name: str, training: bool, path: type[PlainPath] | type[UnrolledPath]) -> None:
    model = network(name, training, torch.float64)
    x, labels = candidates(3, size=16 if name != "mixed" else 8, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    target = to_target(model)
    leaf = x.clone().requires_grad_()
    expected = distance(target, naive(model, leaf, labels))
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    leaf = x.clone().requires_grad_()
    values, (dx,) = path(model, torch.float64, CROSS_ENTROPY, LOCAL).match(
        leaf, labels, lambda grads: distance(target, grads), [leaf]
    )
    torch.testing.assert_close(values, expected.detach(), rtol=1e-9, atol=1e-11)
    for i in range(len(x)):
        assert float((dx[i] - slope[i]).norm()) < 1e-8 * float(slope[i].norm())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_matcher_takes_all_at_once(training: bool) -> None:
    model = network("resnet18", training, torch.float64)
    x, labels = candidates(3, dtype=torch.float64)
    target = to_target(model)
    matcher = GradientMatcher(model, local=LOCAL)
    values, dx = matcher(x, labels, lambda grads: distance(target, grads))
    assert matcher.fast
    assert isinstance(matcher._path, UnrolledPath)
    leaf = x.clone().requires_grad_()
    expected = distance(target, naive(model, leaf, labels))
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), leaf)[0])


class Random(nn.Module):
    """Vmap refuses it: it asks for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.layer(x) * float(x.detach().abs().max() > 0)


def test_a_model_that_vmap_cannot_take_goes_one_by_one() -> None:
    torch.manual_seed(0)
    model = Random().double()
    x, labels = candidates(3, size=8, dtype=torch.float64)
    target = to_target(model)
    matcher = GradientMatcher(model, local=LOCAL)
    with pytest.warns(UserWarning, match="^Slow path: "):
        values, _ = matcher(x, labels, lambda grads: distance(target, grads))
    torch.testing.assert_close(values, distance(target, naive(model, x, labels)).detach())


def test_frozen_parameters_stay_and_have_no_gradient() -> None:
    model = network("convnet", False, torch.float64)
    frozen = next(model.parameters()).requires_grad_(False)
    x, labels = candidates(3, dtype=torch.float64)
    found = [p(model, torch.float64, CROSS_ENTROPY, LOCAL) for p in (PlainPath, UnrolledPath)]
    one, other = (PerSampleGradients._formed(PerSampleGradients(model), p.gradients(x, labels)[1], x) for p in found)
    assert not bool(one[0].any())
    assert one[0].shape == (4, *frozen.shape)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)
    assert not frozen.requires_grad


def test_gradients_without_a_graph_and_soft_labels() -> None:
    model = network("convnet", False, torch.float64)
    x, labels = candidates(3, dtype=torch.float64)
    dense = PerSampleGradients(model, local=LOCAL).dense(x, labels)
    for found, e in zip(dense, naive(model, x, labels), strict=True):
        torch.testing.assert_close(found, e.detach())
    target = to_target(model)
    # Logits of near certainty are labels.
    logits = 60 * F.one_hot(labels, 4).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, dx, dlogits = GradientMatcher(model, local=LOCAL).jointly(x, logits, lambda g: distance(target, g))
    torch.testing.assert_close(values, distance(target, naive(model, x, labels)).detach())
    assert dx.shape == x.shape
    assert dlogits.shape == logits.shape
