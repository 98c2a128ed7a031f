"""Gradients of many candidates, and their derivatives, against a plain loop; total variation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import candidates, network, one_at_a_time
from torch import Tensor
from toys import distance

from raytrust.attacks.inversion import (
    per_candidate_gradients,
    total_variation,
)
from raytrust.leak import identity_view


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["convnet", "resnet18", "mixed"])
def test_gradients_are_those_of_a_plain_loop(name: str, training: bool, batch: int) -> None:
    model = network(name, training)
    x, labels = candidates(batch, size=16 if name != "mixed" else 8)
    expected = one_at_a_time(model, x, labels)
    before = copy.deepcopy(model.state_dict())
    found = per_candidate_gradients(model, x, labels)
    assert [g.shape for g in found] == [(4, *p.shape) for p in model.parameters()]
    for i in range(4):
        assert distance([g[i] for g in found], [e[i] for e in expected]) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["convnet", "resnet18", "mixed"])
def test_candidates_do_not_mix(name: str, training: bool) -> None:
    model = network(name, training)
    x, labels = candidates(2, size=16 if name != "mixed" else 8)
    before = [g[0] for g in per_candidate_gradients(model, x, labels)]
    x[1:], labels[1:] = x[1:] * 10 + 1, (labels[1:] + 1) % 4
    after = [g[0] for g in per_candidate_gradients(model, x, labels)]
    assert distance(after, before) < 1e-6


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["convnet", "resnet18", "mixed"])
def test_the_second_derivative_is_that_of_a_plain_loop(name: str, training: bool) -> None:
    model = network(name, training, torch.float64)
    x, labels = candidates(2, size=16 if name != "mixed" else 8, dtype=torch.float64)
    target = [g[0] for g in one_at_a_time(model, x[:1] + 1, labels[:1])]

    def slope(gradients: Callable[[Tensor], list[Tensor]]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(identity_view(target).distance(gradients(leaf)).sum(), leaf)
        return found

    ours = slope(lambda leaf: per_candidate_gradients(model, leaf, labels))
    textbook = slope(lambda leaf: one_at_a_time(model, leaf, labels, create_graph=True))
    assert distance([ours], [textbook]) < 1e-9


def test_the_second_derivative_matches_finite_differences() -> None:
    model = network("resnet18", False, torch.float64)
    x, labels = candidates(1, size=8, dtype=torch.float64)
    target = [g[0] for g in one_at_a_time(model, x[:1] + 1, labels[:1])]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def value(t: float) -> Tensor:
        return identity_view(target).distance(per_candidate_gradients(model, x + t * direction, labels)).sum().detach()

    leaf = x.clone().requires_grad_()
    d = identity_view(target).distance(per_candidate_gradients(model, leaf, labels)).sum()
    (slope,) = torch.autograd.grad(d, leaf)
    step = 1e-6
    assert float((slope * direction).sum()) == pytest.approx(float(value(step) - value(-step)) / (2 * step), rel=1e-4)


def test_total_variation_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, -1.0]]).view(1, 1, 1, 2, 3)
    rows, columns = (2 + 1 + 4) / 3, (1 + 2 + 0 + 3) / 4
    assert total_variation(x).tolist() == pytest.approx([rows + columns])
    stacked = torch.stack([x[0], 2 * x[0], -x[0], torch.full_like(x[0], 5.0)])
    assert total_variation(stacked).tolist() == pytest.approx([rows + columns, 2 * (rows + columns), rows + columns, 0])


def test_total_variation_is_a_mean_over_images_and_channels() -> None:
    x = torch.rand(2, 3, 2, 9, 7, generator=torch.Generator().manual_seed(0))
    single = total_variation(x.reshape(12, 1, 1, 9, 7)).view(2, 6).mean(1)
    torch.testing.assert_close(total_variation(x), single)
