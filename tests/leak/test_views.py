"""What an attacker learns from each compressor's messages: linear views are exact, orthants hold the gradient, and what
estimates it is compared as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import (
    DEFENCES,
    ENTRIES,
    SHAPES,
    batch,
    distance,
    gradients,
    is_estimate,
    is_gathered,
    is_linear,
    mean_over_workers,
)
from two_workers import Reduction, alone

from raytrust.compress import Vantage, build
from raytrust.config import HalfConfig, Threat
from raytrust.leak import LinearView, SparseView, View, identity_view, view_of
from raytrust.leak.observation import seen_messages
from raytrust.leak.views import SignView, TensorwiseView

VANTAGES: list[Vantage] = ["link", "peer"]
LINEAR = [name for name in DEFENCES if is_linear(DEFENCES[name].compressor)]
ESTIMATES = [name for name in DEFENCES if is_estimate(DEFENCES[name].compressor)]
SETS = [name for name in DEFENCES if name not in LINEAR + ESTIMATES]

every_defence = pytest.mark.parametrize("name", DEFENCES)
every_linear = pytest.mark.parametrize("name", LINEAR)
every_set = pytest.mark.parametrize("name", SETS)
every_vantage = pytest.mark.parametrize("vantage", VANTAGES)


def seen_view(name: str, step: Reduction, vantage: Vantage, victim: int = 0) -> View:
    """As an attacker has it: a fresh compressor, its public state, and no payload that the vantage hides."""
    compressor = build(DEFENCES[name], SHAPES, seed=99)
    compressor.load_public_state(step.public_state)
    return view_of(compressor, seen_messages(step.messages, Threat(vantage=vantage)), vantage, victim)


def linear_view_of(name: str, step: Reduction, vantage: Vantage, victim: int = 0) -> LinearView:
    view = seen_view(name, step, vantage, victim)
    assert isinstance(view, LinearView)
    return view


def observed_gradient(name: str, step: list[Reduction], vantage: Vantage, rank: int) -> list[Tensor]:
    """What the messages measure: one worker's input, or the mean of all inputs after an all-mean."""
    if vantage == "link" or is_gathered(DEFENCES[name].compressor):
        return step[rank].inputs
    return mean_over_workers([worker.inputs for worker in step])


def rounding(name: str) -> float:
    """Of the wire's format, relative."""
    config = DEFENCES[name].compressor
    return 1e-5 if not isinstance(config, HalfConfig) else torch.finfo(getattr(torch, config.dtype)).eps


@every_linear
@every_vantage
def test_a_linear_view_measures_what_was_observed(name: str, vantage: Vantage, steps: list[list[Reduction]]) -> None:
    for step in steps:
        for rank, worker in enumerate(step):
            view = linear_view_of(name, worker, vantage, rank)
            measured = view.measure(batch(observed_gradient(name, step, vantage, rank)))
            assert all(torch.isfinite(o).all() for o in view.observed)
            assert distance([m[0] for m in measured], list(view.observed)) < rounding(name)


@every_linear
@every_vantage
def test_adjoint_of_a_view(name: str, vantage: Vantage, steps: list[list[Reduction]]) -> None:
    generator = torch.Generator().manual_seed(0)
    for step in steps:
        view = linear_view_of(name, step[0], vantage)
        g = batch(gradients(7), gradients(8))
        measured = view.measure(g)
        assert [m.shape[1:] for m in measured] == [o.shape for o in view.observed]
        m = [torch.randn(x.shape, generator=generator) for x in measured]
        back = view.adjoint(m)
        assert [b.shape for b in back] == [x.shape for x in g]
        for i in range(2):
            there = sum(float((a[i] * b[i]).sum()) for a, b in zip(measured, m, strict=True))
            here = sum(float((a[i] * b[i]).sum()) for a, b in zip(g, back, strict=True))
            assert there == pytest.approx(here, abs=1e-3)


def candidates_of(true: list[Tensor]) -> list[list[Tensor]]:
    near = [x + 0.3 * y for x, y in zip(true, gradients(8), strict=True)]
    scaled, negative = [3 * x for x in true], [-x for x in true]
    return [true, scaled, near, gradients(7), negative, [torch.zeros_like(x) for x in true]]


def distances(view: View, candidates: list[list[Tensor]]) -> list[float]:
    """All at once, as one at a time, with finite slopes."""
    together = batch(*candidates)
    for tensor in together:
        tensor.requires_grad_()
    d = view.distance(together)
    assert d.shape == (len(candidates),)
    torch.testing.assert_close(d, torch.cat([view.distance(batch(c)) for c in candidates]), rtol=1e-4, atol=1e-6)
    slope = torch.autograd.grad(d.sum(), together, allow_unused=True)
    assert all(s is None or torch.isfinite(s).all() for s in slope)
    assert not all(s is None for s in slope)
    return d.tolist()


@every_linear
@every_vantage
def test_a_linear_view_s_distance_is_least_at_the_true_gradient(
    name: str, vantage: Vantage, steps: list[list[Reduction]]
) -> None:
    for step in steps:
        view = seen_view(name, step[-1], vantage, len(step) - 1)
        true = observed_gradient(name, step, vantage, len(step) - 1)
        at_true, at_scaled, at_near, at_other, at_negative, at_zero = distances(view, candidates_of(true))
        assert at_true == pytest.approx(0, abs=1e-5)
        assert at_scaled == pytest.approx(0, abs=1e-5)  # the scale is not part of it
        assert 1e-4 < at_near < at_other
        assert at_negative == pytest.approx(2, abs=1e-4)
        assert at_zero == 1


@every_set
@every_vantage
def test_a_set_view_holds_the_true_gradient_and_not_others(
    name: str, vantage: Vantage, steps: list[list[Reduction]]
) -> None:
    for step in steps:
        view = seen_view(name, step[-1], vantage, len(step) - 1)
        at_true, at_scaled, at_near, at_other, at_negative, _ = distances(view, candidates_of(step[-1].inputs))
        assert abs(at_true) < 1e-6
        assert 1e-5 < at_near < at_negative
        assert 1e-2 < at_other < at_negative
        assert at_scaled < 1e-6


@pytest.mark.parametrize("name", ESTIMATES)
@every_vantage
def test_an_estimate_s_distance_is_least_where_it_is(name: str, vantage: Vantage, steps: list[list[Reduction]]) -> None:
    for step in steps:
        view = seen_view(name, step[-1], vantage, len(step) - 1)
        at_own, at_scaled, at_near, at_other, at_negative, at_zero = distances(view, candidates_of(step[-1].own))
        # Of a tensor that was rounded to zeros every candidate is at distance 1, where each counts by its entries.
        lost = sum(x.numel() for x in step[-1].own if isinstance(view, TensorwiseView) and not x.any()) / ENTRIES
        assert at_own == pytest.approx(lost, abs=1e-5)
        assert at_scaled == pytest.approx(lost, abs=1e-5)
        assert lost + 1e-4 < at_near < at_other
        assert at_negative == pytest.approx(2 - lost, abs=1e-4)
        assert at_zero == pytest.approx(1)
        at_true, _, _, at_other, at_negative, _ = distances(view, candidates_of(step[-1].inputs))
        assert at_true < at_other < at_negative


@every_defence
def test_a_view_is_of_the_victim(name: str, group: list[dict[str, Any]]) -> None:
    config = DEFENCES[name].compressor
    step = [worker["reductions"][name][-1] for worker in group]
    near, far = rounding(name) if name not in ESTIMATES else float("inf"), 0.1  # of estimates only the order is known
    for victim in range(2):
        true = batch(step[victim].inputs)
        for worker in step:  # whichever peer listens
            at_peer = float(seen_view(name, worker, "peer", victim).distance(true))
            other = float(seen_view(name, worker, "peer", 1 - victim).distance(true))
            if is_gathered(config):
                assert at_peer < min(near, other)
            else:
                assert at_peer > far  # after an all-mean the victim is hidden
        at_link = float(seen_view(name, step[victim], "link", victim).distance(true))
        other = float(seen_view(name, step[1 - victim], "link").distance(true))
        assert at_link < min(near, other)
        assert other > far


@pytest.mark.parametrize("name", [name for name in DEFENCES if name.startswith(("topk", "threshold", "dgc"))])
def test_entries_that_were_not_sent_are_at_most_the_bound(name: str, steps: list[list[Reduction]]) -> None:
    for step in steps:
        view = seen_view(name, step[0], "link")
        assert isinstance(view, SparseView)
        assert view.bound is not None
        for x, positions, bound in zip(
            step[0].inputs, view.positions, view.bound.expand(len(SHAPES)).tolist(), strict=True
        ):
            rest = x.flatten().abs().index_fill(0, positions, 0.0)
            assert float(rest.max()) <= bound
        if "layer" in name:
            assert view.bound.shape == (len(SHAPES),)
            assert len(set(view.bound.tolist())) > 1
        louder = [x.flatten().clone() for x in step[0].inputs]
        for x, positions in zip(louder, view.positions, strict=True):
            sent = x[positions]
            x *= 3
            x[positions] = sent
        candidates = batch(step[0].inputs, [3 * x for x in step[0].inputs], [-x for x in step[0].inputs])
        torch.testing.assert_close(view.excess(candidates), torch.zeros(3))  # also at another scale
        beyond = batch([x.view(shape) for x, shape in zip(louder, SHAPES, strict=True)])
        assert float(view.excess(beyond)) > 1e-3 or "full" in name
        assert view.distance(beyond).tolist() == pytest.approx([0], abs=1e-5)


def test_the_bound_of_rand_k_is_unknown() -> None:
    view = seen_view("randk", alone("randk")[0], "link")
    assert isinstance(view, SparseView)
    assert view.bound is None
    assert view.excess(batch(gradients(7))).tolist() == [0]


def test_the_excess_over_the_bound() -> None:
    """Of 2, 1 and 1, the 2 was sent: at twice their size, the others would be 1.5 too large."""
    view = SparseView([torch.tensor([2.0])], [torch.tensor([1])], [torch.Size((3,))], bound=torch.tensor(1.0))
    g = torch.tensor([[1.0, 2.0, -1.0], [-5.0, 4.0, 0.0], [0.1, 0.0, 0.0]])
    assert view.excess([g]).tolist() == [0, 1.5**2 / 4, 0]


def test_the_identity_view_of_nothing_is_at_distance_one() -> None:
    zero = [torch.zeros(2, 3), torch.zeros(4)]
    assert identity_view(zero).distance(batch([torch.ones(2, 3), torch.ones(4)], zero)).tolist() == [1, 1]


def test_distance_is_one_minus_the_cosine() -> None:
    view = identity_view([torch.tensor([3.0, 0.0]), torch.tensor([4.0])])
    d = view.distance([torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0], [2.0]])])
    torch.testing.assert_close(d, torch.tensor([1 - 3 / 5, 1 - 8 / (5 * 8**0.5)]))


def test_the_distance_to_an_orthant_is_a_share_of_each_tensor_s_norm() -> None:
    """Tensors weigh as many as they have entries, 2 and 1; zeros are sent as 1."""
    view = SignView([torch.tensor([1.0, -1.0]), torch.tensor([1.0])])
    candidates = [torch.tensor([[1.0, -1.0], [-1.0, 0.0], [-1.0, 2.0], [0.0, 0.0]]), torch.tensor([2.0, 3.0, -1, 0.0])]
    candidates[1] = candidates[1][:, None]
    shares = torch.tensor([0, 2 / 3, 1, 1 / 3])
    torch.testing.assert_close(view.distance(candidates), shares)
    scaled = SignView(view.signs, scales=torch.tensor([1.0, 2.0]))  # L1 norms of 2 and 2
    cosines = torch.tensor([1, 4 / (10 * 2) ** 0.5, 4 / (10 * 2) ** 0.5, 0])  # of the norms 2 2, 1 3, 3 1, 0 0
    torch.testing.assert_close(scaled.distance(candidates), shares + 1 - cosines)


def test_tensors_are_compared_one_by_one() -> None:
    """Each weighs as many as it has entries, 2 and 1, or as it is told; the scale of each is open."""
    observed = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    g = [torch.tensor([[2.0, 0.0], [0.0, 1.0], [9.0, 0.0]]), torch.tensor([[0.1], [5.0], [-1.0]])]
    by_entries = TensorwiseView(identity_view(observed)).distance(g)
    torch.testing.assert_close(by_entries, torch.tensor([0, 2 / 3, 2 / 3]))
    weighed = TensorwiseView(identity_view(observed), [9.0, 16.0]).distance(g)
    torch.testing.assert_close(weighed, torch.tensor([0, 9 / 25, 32 / 25]))


@pytest.mark.parametrize("weights", [None, [0.0, 0.0]])
def test_nothing_that_was_observed_tensor_by_tensor(weights: list[float] | None) -> None:
    """Every candidate is at distance 1, and there is a slope to follow nowhere."""
    view = TensorwiseView(
        SparseView([torch.zeros(0)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2, SHAPES[:2]), weights
    )
    g = [torch.ones(3, *shape, requires_grad=True) for shape in SHAPES[:2]]
    d = view.distance(g)
    assert d.tolist() == [1, 1, 1]
    assert not any(slope.any() for slope in torch.autograd.grad(d.sum(), g))
