"""Stacked views against the views themselves: each candidate is at the distance of its own observation's view."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from networks import candidates, network, one_at_a_time
from test_inversion import captures
from torch import Tensor

from raytrust.attacks.inversion import GradientMatcher, invert, stacks
from raytrust.attacks.inversion.objectives import matching_distance
from raytrust.attacks.inversion.stacks import stack, stack_key
from raytrust.compress import build
from raytrust.config import InversionConfig, PowerSGDConfig, ThresholdConfig, TopKConfig, parse_defence
from raytrust.leak import SparseView, View, view_of
from raytrust.wire.channel import LocalChannel, Tap

SIGNS = ["signsgd", "scaledsign"]
DEFENCES = ["none", "powersgd:1", "powersgd:3", "topk:0.02", "topk:0.3:scope=layer", "threshold:0.1", "randk:0.1"]
OWNER = torch.tensor([0, 0, 2, 1])  # of four candidates, among three observations


def views_of(name: str, count: int, tensorwise: bool) -> tuple[list[View], InversionConfig]:
    """The views of the gradients of several images at one network."""
    model = network("resnet18", training=False)
    defence = parse_defence(name)
    grads = one_at_a_time(model, *candidates(1, size=16))
    config = InversionConfig(matching="tensors" if tensorwise else "cosine")
    result: list[View] = []
    for i in range(count):
        compressor = build(defence, model, seed=3)
        tap = Tap(LocalChannel(), keep=True)
        compressor.reduce([g[i] for g in grads], tap)
        result.append(view_of(build(defence, model, seed=3), tap.messages, "link"))
    return result, config


def check(name: str, tensorwise: bool) -> None:
    model = network("resnet18", training=False)
    views, config = views_of(name, 3, tensorwise)
    assert len({stack_key(view, config) for view in views}) == 1
    together = stack(views, config)
    alone = [matching_distance(view, config) for view in views]
    x, labels = candidates(1, size=16)
    x = x.flip(0) * 0.7 + 0.1  # other points than those that the observations are of
    matcher = GradientMatcher(model)
    assert matcher.fast
    values, slopes = matcher(x, labels, lambda grads: together.distance(grads, OWNER))

    def one_by_one(grads: list[Tensor]) -> Tensor:
        parts = zip(*(g.split([1] * 4) for g in grads), strict=True)
        return torch.cat([alone[o](part) for o, part in zip(OWNER.tolist(), parts, strict=True)])

    expected, expected_slopes = matcher(x, labels, one_by_one)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert float(values.std()) > 1e-4  # there is something to tell apart
    torch.testing.assert_close(slopes, expected_slopes, rtol=1e-3, atol=1e-3 * float(expected_slopes.abs().max()))

    plain = one_at_a_time(model, x, labels)  # what the slow path hands over
    torch.testing.assert_close(together.distance(plain, OWNER), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tensorwise", [False, True], ids=["cosine", "tensors"])
@pytest.mark.parametrize("name", DEFENCES)
def test_a_stack_is_its_views(name: str, tensorwise: bool) -> None:
    check(name, tensorwise)


@pytest.mark.parametrize("name", SIGNS)
def test_a_stack_of_signs_is_its_views(name: str) -> None:
    check(name, False)


@pytest.mark.parametrize("name", ["none", "powersgd:2", "topk:0.02", "scaledsign"])
@pytest.mark.parametrize("low_rank", [0.0, 1e9], ids=["formed", "from factors"])
def test_a_stack_is_its_views_by_either_way_to_a_product(
    name: str, low_rank: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytrust.persample import products

    monkeypatch.setattr(products, "LOW_RANK", low_rank)
    monkeypatch.setattr(products, "GATHER", 0 if low_rank else 1e9)
    check(name, False)


def test_the_owner_may_change() -> None:
    """As it does when restarts are dropped."""
    model = network("resnet18", training=False)
    views, config = views_of("powersgd:1", 3, False)
    together = stack(views, config)
    grads = one_at_a_time(model, *candidates(1, size=16))
    for owner in (OWNER, OWNER.flip(0), OWNER[:2]):
        found = together.distance([g[: len(owner)] for g in grads], owner)
        expected = [views[o].distance([g[i : i + 1] for g in grads]) for i, o in enumerate(owner.tolist())]
        torch.testing.assert_close(found, torch.cat(expected))


def sparse(*positions: list[int]) -> SparseView:
    """One entry of value 1 at each of these positions of some tensors of 3."""
    at = [torch.tensor(p, dtype=torch.int64) for p in positions]
    return SparseView([torch.ones(len(p)) for p in at], at, [torch.Size((3,))] * len(at))


@pytest.mark.parametrize("matching", ["cosine", "tensors"])
def test_what_a_view_does_not_hold_is_not_compared(matching: Literal["cosine", "tensors"]) -> None:
    """Even where it is infinite, and lies where shorter views of a stack are padded."""
    views, config = [sparse([1, 2]), sparse([1])], InversionConfig(matching=matching)
    g = torch.tensor([[5.0, 1.0, 2.0], [torch.inf, 2.0, -torch.inf]], requires_grad=True)
    found = stack(views, config).distance([g], torch.tensor([0, 1]))
    expected = [matching_distance(view, config)([g[i : i + 1]]) for i, view in enumerate(views)]
    torch.testing.assert_close(found, torch.cat(expected))
    (slope,) = torch.autograd.grad(found.sum(), g)
    assert slope.isfinite().all()


@pytest.mark.parametrize("matching", ["cosine", "tensors"])
def test_a_view_without_entries_is_at_distance_one(matching: Literal["cosine", "tensors"]) -> None:
    views, config = [sparse([], []), sparse([0], [])], InversionConfig(matching=matching)
    g = [torch.ones(2, 3), torch.ones(2, 3)]
    assert stack(views, config).distance(g, torch.tensor([0, 1])).tolist() == [1, 0]
    assert [matching_distance(view, config)(g).tolist() for view in views] == [[1, 1], [0, 0]]


def test_only_alike_views_share_a_key() -> None:
    keys = []
    for name in ("none", "powersgd:1", "powersgd:2", "topk:0.1"):
        (view,), config = views_of(name, 1, False)
        keys.append(stack_key(view, config))
        assert stack_key(view, replace(config, matching="l2")) is None
        assert stack_key(view, replace(config, bound=1.0)) is None
    assert None not in keys
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("compressor", [None, TopKConfig(level=0.1), PowerSGDConfig(1), ThresholdConfig(0.1)])
def test_an_attack_on_many_is_the_attack_on_each(
    compressor: TopKConfig | PowerSGDConfig | ThresholdConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both objectives, settings of their own, and restarts that are dropped on the way."""
    attack = InversionConfig("aware", tv=1e-2, step_size=0.05, iterations=12, signed="none", restarts=4, halving=True)
    attacks = [attack, replace(attack, objective="naive", tv=0.1, restarts=1)]
    jobs = [(c.seen, a.against(c.seen.defence)) for a in attacks for c in captures(compressor)]
    together = invert(jobs)
    monkeypatch.setattr(stacks, "LARGEST", 0)
    for job, candidate in zip(jobs, together, strict=True):
        (alone,) = invert([job])
        torch.testing.assert_close(candidate.images, alone.images, atol=2e-3, rtol=0)
        torch.testing.assert_close(candidate.objective, alone.objective, atol=1e-4, rtol=1e-3)
