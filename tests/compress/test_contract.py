"""What every compressor guarantees of a step, with and without error feedback, for one worker and for two.

Views are in test_views.py, states in test_state.py, unusual gradients in test_compressor_shapes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import (
    COMPRESSORS,
    DEFENCES,
    LOSSLESS,
    SHAPES,
    Echo,
    bytes_by_formula,
    contract_of,
    distance,
    gradients,
    is_estimate,
    is_gathered,
    mean_over_workers,
    rounding,
)
from two_workers import Reduction, alone

from raytrust.compress import Reduced, build
from raytrust.compress.contract import check
from raytrust.compress.topk import TopK
from raytrust.config import (
    AtomoConfig,
    CompressorConfig,
    Defence,
    DenseConfig,
    ModelConfig,
    PowerSGDConfig,
    QSGDConfig,
    RandKConfig,
    SignSGDConfig,
    Threat,
    TopKConfig,
    VqSGDConfig,
)
from raytrust.config.register import METHODS
from raytrust.leak import view_of
from raytrust.leak.observation import seen_messages
from raytrust.networks.build import build_model
from raytrust.wire.channel import Channel, LocalChannel, Tap

every_defence = pytest.mark.parametrize("name", DEFENCES)


@every_defence
def test_what_was_not_sent_is_the_residual(name: str, steps: list[list[Reduction]]) -> None:
    """To the bit, but where what was sent is subtracted term by term, and never materialised."""
    fused = isinstance(DEFENCES[name].compressor, (PowerSGDConfig, AtomoConfig, VqSGDConfig))
    for worker in (worker for step in steps for worker in step):
        if DEFENCES[name].error_feedback or "dgc" in name:
            assert worker.residual is not None
            for x, own, e in zip(worker.inputs, worker.own, worker.residual, strict=True):
                torch.testing.assert_close(e, x - own, rtol=0, atol=1e-5 if fused or "dgc" in name else 0)
                torch.testing.assert_close(own + e, x, rtol=0, atol=1e-5)
        else:
            assert worker.residual is None


@every_defence
def test_the_mean_is_the_mean_of_what_was_sent(name: str, steps: list[list[Reduction]]) -> None:
    config = DEFENCES[name].compressor
    for step in steps:
        mean, expected = step[0].mean, mean_over_workers([worker.own for worker in step])
        if isinstance(config, SignSGDConfig):  # a majority vote
            expected = [x.sign() for x in expected]
        assert [m.shape for m in mean] == [o.shape for o in step[0].own] == SHAPES
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=rounding(config))
        for worker in step:  # bitwise, or replicas drift apart
            assert all(map(torch.equal, worker.mean, mean))


@pytest.mark.parametrize("name", LOSSLESS)
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
    """A fresh compressor of another seed, with the public state but nothing of the sender's."""
    for step in steps:
        for worker in step:
            fresh = build(DEFENCES[name], SHAPES, seed=99)
            fresh.load_public_state(worker.public_state)
            (link,) = fresh.decode(worker.messages, "link")
            torch.testing.assert_close(link, worker.own, rtol=0, atol=1e-6)
            peer = fresh.decode(seen_messages(worker.messages, Threat(vantage="peer")), "peer")
            if is_gathered(DEFENCES[name].compressor):
                assert len(peer) == len(step)
                for sender, decoded in zip(step, peer, strict=True):
                    assert all(map(torch.equal, decoded, sender.own))
            else:
                assert len(peer) == 1
                torch.testing.assert_close(peer[0], worker.mean, rtol=0, atol=1e-6)


@every_defence
def test_bytes_on_the_wire(name: str, steps: list[list[Reduction]], workers: int) -> None:
    """The formula, the messages and what torch.distributed was given: all the same integer."""
    for i, step in enumerate(steps):
        for worker in step:
            expected = bytes_by_formula(DEFENCES[name].compressor, SHAPES, i, worker.messages)
            assert worker.sent_bytes == expected
            assert sum(message.sent_bytes for message in worker.messages) == expected
            assert worker.wire_bytes == (expected if workers > 1 else 0)


def test_bytes_of_one_step() -> None:
    """By hand, as a formula in a test may be wrong, too. 245 entries: 7 tensors, 207 + 4 + 7 of them in 5 matrices."""
    found = {name: alone(name)[0].sent_bytes for name in COMPRESSORS}
    known = {
        "dense": 980,
        "fp16": 490,
        "bf16": 490,
        "powersgd-1": 4 * (33 + 6 + 14 + 1 + 10 + 8 + 9),
        "topk": 8 * 24,
        "topk-layer": 8 * 49,
        "randk": 4 * 49,
        "randk-unbiased": 4 * 49,
        "threshold": 4 + 8 * 24,
        "dgc": 8 * 12,
        "dgc-warm-up": 8 * 61,
        "signsgd": 31,
        "signum": 31,
        "scaledsign": 31 + 28,
        "qsgd": 123 + 4 * 8,
        "qsgd-8": 245 + 4 * 3,
        "qsgd-2-max": 62 + 4 * 31,
        "vqsgd": 4 + 1125,  # 1000 of 490 vertices: 9 bits each
    }
    assert {name: found[name] for name in known} == known


@every_defence
def test_the_contract(name: str, workers: int, request: pytest.FixtureRequest) -> None:
    """What a method from outside the package is held to."""
    if workers == 1:
        check(DEFENCES[name], **contract_of(DEFENCES[name]))
    else:
        assert [worker["contract"][name] for worker in request.getfixturevalue("group")] == ["", ""]


class Broken(TopK):
    """Top-K that breaks one guarantee."""

    fault = ""

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        if self.fault == "refusal":
            grads = [g.nan_to_num(0.0, 0.0) for g in grads]
        if self.fault == "global generator":
            torch.rand(1)
        if self.fault == "gradients":
            for g in grads:
                g.zero_()
        reduced = super().reduce(grads, channel)
        if self.fault == "mean":
            reduced.mean = [2 * m for m in reduced.mean]
        if self.fault == "own":
            return Reduced(reduced.mean, lambda: list(grads))
        if self.fault == "repeats":
            calls.append(0)
            reduced.mean = [m + len(calls) for m in reduced.mean]
        return reduced

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"step": torch.zeros(1)} if self.fault == "state" else state


calls: list[int] = []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("refusal", r"a gradient that holds nan is refused"),
        ("global generator", r"the global generator stays as it is"),
        ("gradients", r"the gradients stay as they are"),
        ("mean", r"the mean is that of what the workers sent"),
        ("own", r"the mean is that of what the workers sent|the wire alone says what was sent"),
        ("repeats", r"the mean is that of what the workers sent|a step depends on"),
    ],
)
def test_a_method_that_breaks_the_contract(monkeypatch: pytest.MonkeyPatch, fault: str, said: str) -> None:
    monkeypatch.setitem(METHODS._things, "topk", Broken)
    monkeypatch.setattr(Broken, "fault", fault)
    with pytest.raises(AssertionError, match=rf"^Expected of Top-K 10 %: ({said})\.$"):
        check(Defence(TopKConfig(level=0.1)))


def sends(config: CompressorConfig, seed: int = 5, rank: int = 0, steps: int = 1) -> Tensor:
    """The bytes that a worker sends at the last of some steps, of the same gradient in each."""
    compressor = build(Defence(config), SHAPES, seed)
    for _ in range(steps):
        tap = Tap(Echo(2, rank), keep=True)
        compressor.reduce(gradients(0), tap)
    return torch.cat([x.view(torch.uint8).view(-1) for m in tap.messages for x in m.sent])


@pytest.mark.parametrize("name", ["qsgd", "qsgd-8", "qsgd-2-max", "vqsgd", "atomo"])
def test_the_dice_are_of_seed_step_and_rank(name: str) -> None:
    config = COMPRESSORS[name]
    rolls = [sends(config), sends(config, seed=6), sends(config, rank=1), sends(config, steps=2)]
    assert torch.equal(rolls[0], sends(config))
    for i in range(4):
        assert not any(torch.equal(rolls[i], roll) for roll in rolls[:i])


@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_workers_send_of_the_same_gradient(name: str, group: list[dict[str, Any]]) -> None:
    """The same, Rand-K too; but the dice that a method rolls to be unbiased are each worker's own."""
    first, second = (worker["same gradient"][name] for worker in group)
    own_dice = isinstance(COMPRESSORS[name], (QSGDConfig, VqSGDConfig, AtomoConfig))
    same = all(all(map(torch.equal, m.sent, n.sent)) for m, n in zip(first, second, strict=True))
    assert same == (not own_dice)


def test_rand_k_draws_anew_at_each_step_and_for_each_seed() -> None:
    config = RandKConfig(level=0.2)
    rolls = [sends(config), sends(config, seed=6), sends(config, steps=2)]
    assert torch.equal(rolls[0], sends(config, rank=1))
    for i in range(3):
        assert not any(torch.equal(rolls[i], roll) for roll in rolls[:i])


@every_defence
def test_two_workers_with_nothing_to_send(name: str, group: list[dict[str, Any]]) -> None:
    for worker in group:
        without_parameters, without_entries, zeros = worker["nothing"][name]
        assert without_parameters == []
        assert [m.shape for m in without_entries] == [(0,), (3, 0)]
        expected = 1.0 if isinstance(DEFENCES[name].compressor, SignSGDConfig) else 0.0  # there a zero is positive
        assert all(torch.equal(m, torch.full_like(m, expected)) for m in zeros)


def test_error_feedback_changes_the_second_step_and_not_the_first() -> None:
    for name in COMPRESSORS:
        if f"{name}+EF" not in DEFENCES:
            continue
        plain, fed = alone(name), alone(f"{name}+EF")
        assert all(map(torch.equal, plain[0].mean, fed[0].mean))
        if name not in LOSSLESS:
            assert distance(fed[1].mean, plain[1].mean) > (1e-5 if name in ("fp16", "bf16") else 5e-3)


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
    tap = Tap(LocalChannel())
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
    """But for QSGD, whose dice are another generator there: of it only what one message says."""
    compressor = build(DEFENCES[name], SHAPES, seed=5)
    for step, expected in enumerate(alone(name)):
        tap = Tap(LocalChannel(), keep=True)
        state = compressor.public_state()
        reduced = compressor.reduce([g.cuda() for g in gradients(100 * step)], tap)
        assert tap.sent_bytes == bytes_by_formula(DEFENCES[name].compressor, SHAPES, step, tap.messages)
        fresh = build(DEFENCES[name], SHAPES)
        fresh.load_public_state({key: x.cpu() for key, x in state.items()})
        (decoded,) = fresh.decode(tap.messages, "link")
        torch.testing.assert_close(decoded, reduced.decoded_own, rtol=1e-5, atol=1e-5)
        if "qsgd" not in name or "vq" in name:
            torch.testing.assert_close([m.cpu() for m in reduced.mean], expected.mean, rtol=1e-3, atol=1e-3)
        if step == 0 and not is_estimate(DEFENCES[name].compressor):
            d = view_of(fresh, tap.messages, "link").distance([x.cuda()[None] for x in expected.inputs])
            assert float(d) < 1e-3
