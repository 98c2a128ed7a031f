"""What every compressor guarantees, with and without error feedback, for one worker and for two."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import COMPRESSORS, DEFENCES, ENTRIES, SHAPES, distance, gradients
from two_workers import STEPS, Reduction, reductions

from raytrust.capture import seen_messages
from raytrust.channel import LocalChannel, Tap
from raytrust.compress import LinearView, Vantage, build
from raytrust.compress.interface import identity_view
from raytrust.config import CompressorConfig, Defence, DenseConfig, ModelConfig, PowerSGDConfig, Threat, TopKConfig
from raytrust.models import build_model

VANTAGES: list[Vantage] = ["link", "peer"]


@cache
def alone(name: str) -> list[Reduction]:
    return reductions(LocalChannel(), DEFENCES[name])


@pytest.fixture(params=[1, 2], ids=["one worker", "two workers"])
def workers(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def steps(workers: int, name: str, request: pytest.FixtureRequest) -> list[list[Reduction]]:
    """The reductions of each worker at each step."""
    if workers == 1:
        return [[step] for step in alone(name)]
    group: list[dict[str, Any]] = request.getfixturevalue("group")
    return [list(step) for step in zip(*(worker["reductions"][name] for worker in group), strict=True)]


def bytes_by_formula(config: CompressorConfig) -> int:
    def floats(rank: int) -> int:
        matrices = [(s[0], s[1:].numel()) for s in SHAPES if len(s) > 1]
        return sum(min(n, m, rank) * (n + m) for n, m in matrices) + sum(s[0] for s in SHAPES if len(s) == 1)

    match config:
        case DenseConfig():
            return 4 * ENTRIES
        case PowerSGDConfig(rank=rank):
            return 4 * floats(rank)
        case TopKConfig(level=None, equal_to_rank=rank, equal_by=equal_by):
            assert rank is not None
            return 8 * (floats(rank) // 2 if equal_by == "bytes" else floats(rank))
        case TopKConfig(level=level):
            assert level is not None
            return 8 * round(level * ENTRIES)


def is_topk(name: str) -> bool:
    return isinstance(DEFENCES[name].compressor, TopKConfig)


def mean_over_workers(parts: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(tensors).mean(0) for tensors in zip(*parts, strict=True)]


def view_of(name: str, step: Reduction, vantage: Vantage, victim: int = 0) -> LinearView:
    """As an attacker has it: a fresh compressor, its public state, and no payload that the vantage hides."""
    compressor = build(DEFENCES[name], SHAPES, seed=99)
    compressor.load_public_state(step.public_state)
    view = compressor.view(seen_messages(step.messages, Threat(vantage=vantage)), vantage, victim)
    assert isinstance(view, LinearView)
    return view


def observed_gradient(name: str, step: list[Reduction], vantage: Vantage, rank: int) -> list[Tensor]:
    """What the messages measure: one worker's input, or the mean of all inputs after an all-mean."""
    return (
        step[rank].inputs
        if vantage == "link" or is_topk(name)
        else mean_over_workers([worker.inputs for worker in step])
    )


def batch(*candidates: list[Tensor]) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*candidates, strict=True)]


every_defence = pytest.mark.parametrize("name", DEFENCES)


@every_defence
def test_what_was_not_sent_is_the_residual(name: str, steps: list[list[Reduction]]) -> None:
    for step in steps:
        for worker in step:
            if DEFENCES[name].error_feedback:
                assert worker.residual is not None
                for x, own, e in zip(worker.inputs, worker.own, worker.residual, strict=True):
                    assert torch.equal(e, x - own)
                    torch.testing.assert_close(own + e, x, rtol=0, atol=1e-6)
            else:
                assert worker.residual is None


@every_defence
def test_the_mean_is_the_mean_of_what_was_sent(name: str, steps: list[list[Reduction]]) -> None:
    for step in steps:
        mean = step[0].mean
        assert [m.shape for m in mean] == [o.shape for o in step[0].own] == SHAPES
        torch.testing.assert_close(mean, mean_over_workers([worker.own for worker in step]), rtol=1e-5, atol=1e-5)
        for worker in step:  # bitwise, or replicas drift apart
            assert all(map(torch.equal, worker.mean, mean))


@pytest.mark.parametrize("name", [name for name in DEFENCES if "full" in name or "dense" in name])
def test_the_mean_of_a_lossless_method_is_the_mean_of_the_inputs(name: str, steps: list[list[Reduction]]) -> None:
    for step in steps:
        expected = mean_over_workers([worker.inputs for worker in step])
        torch.testing.assert_close(step[0].mean, expected, rtol=1e-5, atol=1e-5)


@every_defence
def test_workers_differ_in_what_they_sent(name: str, group: list[dict[str, Any]]) -> None:
    first, second = (worker["reductions"][name][0] for worker in group)
    assert distance(first.own, second.own) > 0.5


@every_defence
def test_the_wire_alone_says_what_was_sent(name: str, steps: list[list[Reduction]]) -> None:
    for step in steps:
        for worker in step:
            fresh = build(DEFENCES[name], SHAPES, seed=99)  # without any state of the sender
            (link,) = fresh.decode(worker.messages, "link")
            torch.testing.assert_close(link, worker.own, rtol=0, atol=1e-6)
            peer = fresh.decode(seen_messages(worker.messages, Threat(vantage="peer")), "peer")
            if is_topk(name):
                assert len(peer) == len(step)
                for sender, decoded in zip(step, peer, strict=True):
                    assert all(map(torch.equal, decoded, sender.own))
            else:
                assert len(peer) == 1
                torch.testing.assert_close(peer[0], worker.mean, rtol=0, atol=1e-6)


@every_defence
def test_bytes_on_the_wire(name: str, steps: list[list[Reduction]], workers: int) -> None:
    expected = bytes_by_formula(DEFENCES[name].compressor)
    for worker in (worker for step in steps for worker in step):
        assert worker.sent_bytes == expected
        assert sum(message.sent_bytes for message in worker.messages) == expected
        assert worker.wire_bytes == (expected if workers > 1 else 0)


@every_defence
@pytest.mark.parametrize("vantage", VANTAGES)
def test_a_view_measures_what_was_observed(name: str, vantage: Vantage, steps: list[list[Reduction]]) -> None:
    for step in steps:
        for rank, worker in enumerate(step):
            view = view_of(name, worker, vantage, rank)
            measured = view.measure(batch(observed_gradient(name, step, vantage, rank)))
            assert all(torch.isfinite(o).all() for o in view.observed)
            assert distance([m[0] for m in measured], list(view.observed)) < 1e-5


@every_defence
@pytest.mark.parametrize("vantage", VANTAGES)
def test_adjoint_of_a_view(name: str, vantage: Vantage, steps: list[list[Reduction]]) -> None:
    generator = torch.Generator().manual_seed(0)
    for step in steps:
        view = view_of(name, step[0], vantage)
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


@every_defence
@pytest.mark.parametrize("vantage", VANTAGES)
def test_distance_is_least_at_the_true_gradient(name: str, vantage: Vantage, steps: list[list[Reduction]]) -> None:
    for step in steps:
        view = view_of(name, step[-1], vantage, len(step) - 1)
        true = observed_gradient(name, step, vantage, len(step) - 1)
        near = [x + 0.3 * y for x, y in zip(true, gradients(8), strict=True)]
        scaled, negative = [3 * x for x in true], [-x for x in true]
        zero = [torch.zeros_like(x) for x in true]
        candidates = [true, scaled, near, gradients(7), negative, zero]
        together = batch(*candidates)
        for tensor in together:
            tensor.requires_grad_()
        d = view.distance(together)
        assert d.shape == (6,)
        torch.testing.assert_close(d, torch.cat([view.distance(batch(c)) for c in candidates]), rtol=0, atol=1e-6)
        at_true, at_scaled, at_near, at_other, at_negative, at_zero = d.tolist()
        assert at_true == pytest.approx(0, abs=1e-5)
        assert at_scaled == pytest.approx(0, abs=1e-5)  # the scale is not part of it
        assert 1e-3 < at_near < at_other
        assert at_negative == pytest.approx(2, abs=1e-5)
        assert at_zero == 1
        slope = torch.autograd.grad(d.sum(), together, allow_unused=True)
        assert all(s is None or torch.isfinite(s).all() for s in slope)


@every_defence
def test_a_view_is_of_the_victim(name: str, group: list[dict[str, Any]]) -> None:
    step = [worker["reductions"][name][-1] for worker in group]
    for victim in range(2):
        true = batch(step[victim].inputs)
        for worker in step:  # whichever peer listens
            at_peer = float(view_of(name, worker, "peer", victim).distance(true))
            assert at_peer < 1e-5 if is_topk(name) else at_peer > 0.1  # after an all-mean the victim is hidden
        assert float(view_of(name, step[victim], "link", victim).distance(true)) < 1e-5
        assert float(view_of(name, step[1 - victim], "link").distance(true)) > 0.1


def test_the_identity_view_of_nothing_is_at_distance_one() -> None:
    zero = [torch.zeros(2, 3), torch.zeros(4)]
    assert identity_view(zero).distance(batch([torch.ones(2, 3), torch.ones(4)], zero)).tolist() == [1, 1]


def test_distance_is_one_minus_the_cosine() -> None:
    view = identity_view([torch.tensor([3.0, 0.0]), torch.tensor([4.0])])
    d = view.distance([torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0], [2.0]])])
    torch.testing.assert_close(d, torch.tensor([1 - 3 / 5, 1 - 8 / (5 * 8**0.5)]))


def assert_same(some: list[Reduction], others: list[Reduction]) -> None:
    """To the bit."""
    for a, b in zip(some, others, strict=True):
        assert all(map(torch.equal, (*a.mean, *a.own), (*b.mean, *b.own)))
        for m, n in zip(a.messages, b.messages, strict=True):
            assert all(map(torch.equal, (*m.sent, *m.received), (*n.sent, *n.received)))


@every_defence
def test_a_run_is_a_function_of_gradients_and_seed(name: str) -> None:
    torch.manual_seed(123)  # whatever the global generator holds
    assert_same(reductions(LocalChannel(), DEFENCES[name]), alone(name))


@every_defence
def test_what_a_step_returned_may_be_overwritten(name: str) -> None:
    """As an optimiser does that works in place."""
    assert_same(reductions(LocalChannel(), DEFENCES[name], scribble=True), alone(name))


@every_defence
def test_a_copy_goes_on_like_the_original(name: str) -> None:
    compressor = build(DEFENCES[name], SHAPES, seed=5)
    for step in range(2):
        compressor.reduce(gradients(step), LocalChannel())
    copied = copy.deepcopy(compressor)
    for _ in range(2):  # the original does not move with its copy
        copied.reduce(gradients(50), LocalChannel())
    other = copy.deepcopy(compressor)
    for step in (2, 3):
        mean, own = compressor.reduce(gradients(step), LocalChannel())
        again = other.reduce(gradients(step), LocalChannel())
        assert all(map(torch.equal, (*mean, *own), (*again.mean, *again.own)))
    undisturbed = build(DEFENCES[name], SHAPES, seed=5)
    for step in range(4):
        expected = undisturbed.reduce(gradients(step), LocalChannel())
    assert all(map(torch.equal, mean, expected.mean))


@every_defence
def test_the_public_state_is_what_a_peer_could_compute(name: str) -> None:
    """No residual in it, and nothing that depends on one worker alone."""
    state = alone(name)[-1].public_state
    assert sum(x.numel() for x in state.values()) <= bytes_by_formula(DEFENCES[name].compressor) // 4
    assert bool(state) == isinstance(DEFENCES[name].compressor, PowerSGDConfig)


@every_defence
def test_the_public_state_is_the_same_on_all_workers(name: str, group: list[dict[str, Any]]) -> None:
    for step in range(STEPS):
        first, second = (worker["reductions"][name][step].public_state for worker in group)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@every_defence
def test_a_state_that_was_handed_out_does_not_change(name: str) -> None:
    compressor, other = build(DEFENCES[name], SHAPES, seed=5), build(DEFENCES[name], SHAPES, seed=6)
    state = compressor.public_state()
    other.load_public_state(state)
    before = copy.deepcopy(state)
    for moved in (compressor, other):
        moved.reduce(gradients(0), LocalChannel())
    assert all(torch.equal(state[key], before[key]) for key in state)


@every_defence
def test_a_state_that_was_handed_out_may_be_overwritten(name: str) -> None:
    compressor, other = build(DEFENCES[name], SHAPES, seed=5), build(DEFENCES[name], SHAPES, seed=6)
    state = compressor.public_state()
    other.load_public_state(state)
    for x in state.values():
        x.fill_(torch.nan)
    for c in (compressor, other):
        assert all(map(torch.equal, c.reduce(gradients(0), LocalChannel()).mean, alone(name)[0].mean))


def test_error_feedback_changes_the_second_step_and_not_the_first() -> None:
    for name in COMPRESSORS:
        plain, fed = alone(name), alone(f"{name}+EF")
        assert all(map(torch.equal, plain[0].mean, fed[0].mean))
        if "full" not in name and name != "dense":
            assert distance(fed[1].mean, plain[1].mean) > 0.05


# Integers of the full ResNet-18: CIFAR stem, width 64.
FLOATS = pytest.mark.parametrize(
    ("rank", "floats"), [(1, 45_935), (2, 82_260), (4, 154_910), (30, 1_088_647), (50, 1_802_887)]
)


@pytest.fixture(scope="module")
def resnet18() -> list[Tensor]:
    """Random gradients."""
    generator = torch.Generator().manual_seed(0)
    model = build_model(ModelConfig(), channels=3, classes=10, seed=0)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def bytes_sent(config: CompressorConfig, grads: list[Tensor]) -> int:
    tap = Tap(LocalChannel(), keep=False)
    build(Defence(config), [g.shape for g in grads]).reduce(grads, tap)
    return tap.sent_bytes


def test_size_of_resnet18(resnet18: list[Tensor]) -> None:
    assert len(resnet18) == 62
    assert sum(g.numel() for g in resnet18) == 11_173_962
    assert bytes_sent(DenseConfig(), resnet18) == 4 * 11_173_962


@FLOATS
def test_bytes_of_powersgd_on_resnet18(rank: int, floats: int, resnet18: list[Tensor]) -> None:
    assert bytes_sent(PowerSGDConfig(rank=rank), resnet18) == 4 * floats


@FLOATS
def test_bytes_of_topk_on_resnet18(rank: int, floats: int, resnet18: list[Tensor]) -> None:
    assert bytes_sent(TopKConfig(equal_to_rank=rank), resnet18) == 8 * (floats // 2)


def test_bytes_of_topk_on_resnet18_with_as_many_values(resnet18: list[Tensor]) -> None:
    assert bytes_sent(TopKConfig(equal_to_rank=4, equal_by="values"), resnet18) == 8 * 154_910


@pytest.mark.gpu
@every_defence
def test_on_a_gpu_as_on_the_cpu(name: str) -> None:
    compressor = build(DEFENCES[name], SHAPES, seed=5)
    for step, expected in enumerate(alone(name)):
        tap = Tap(LocalChannel())
        state = compressor.public_state()
        reduced = compressor.reduce([g.cuda() for g in gradients(100 * step)], tap)
        torch.testing.assert_close([m.cpu() for m in reduced.mean], expected.mean, rtol=1e-3, atol=1e-3)
        fresh = build(DEFENCES[name], SHAPES)
        fresh.load_public_state({key: x.cpu() for key, x in state.items()})
        distances = fresh.view(tap.messages, "link").distance([x.cuda()[None] for x in expected.inputs])
        assert float(distances) < 1e-3
