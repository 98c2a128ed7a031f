"""Clipping, noise and pruning do what they say, alone, in front of compressors, and between two workers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytrust.compress import build, ddp_comm_hook, for_private_batch
from raytrust.config import (
    ClipConfig,
    Defence,
    DenseConfig,
    NoiseConfig,
    PowerSGDConfig,
    PruneConfig,
    TopKConfig,
    parse_defence,
)
from raytrust.wire.channel import Channel, GroupChannel, LocalChannel, Tap
from raytrust.wire.processes import in_processes

SHAPES = [torch.Size(s) for s in [(40, 20), (7,), (5, 3, 3, 3), (1,)]]


def gradient(seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def sent(defence: Defence, grads: list[Tensor], seed: int = 0) -> list[Tensor]:
    return [g.clone() for g in build(defence, SHAPES, private_seed=seed).reduce(grads, LocalChannel()).decoded_own]


def norm(grads: list[Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in grads]).norm())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_clipped_gradient_keeps_its_direction_and_has_the_norm(scale: float) -> None:
    grads = gradient(scale=scale)
    clipped = sent(Defence(transforms=(ClipConfig(2.0),)), grads)
    assert norm(clipped) == pytest.approx(min(2.0, norm(grads)), rel=1e-5)
    factor = min(1.0, 2.0 / norm(grads))
    for before, after in zip(grads, clipped, strict=True):
        torch.testing.assert_close(after, before * factor)


def test_a_gradient_of_zero_can_be_clipped() -> None:
    assert norm(sent(Defence(transforms=(ClipConfig(1.0),)), [torch.zeros(s) for s in SHAPES])) == 0


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise_has_its_distribution(kind: Any) -> None:
    """By a test of its mean and variance, and of the whole distribution, that would fail once in a thousand times."""
    deviation, n = 0.03, 200_000
    compressor = build(Defence(transforms=(NoiseConfig(deviation, kind),)), [torch.Size((n,))], private_seed=5)
    grads = [torch.full((n,), 2.0)]
    draws = [compressor.reduce(grads, LocalChannel()).decoded_own[0].numpy() - 2.0 for _ in range(2)]
    for x in draws:
        assert abs(x.mean()) < 3.3 * deviation / math.sqrt(n)
        kurtosis = 3.0 if kind == "gaussian" else 6.0
        assert abs(x.var() / deviation**2 - 1) < 3.3 * math.sqrt((kurtosis - 1) / n)
        name, scale = ("norm", deviation) if kind == "gaussian" else ("laplace", deviation / math.sqrt(2))
        assert stats.kstest(x, name, args=(0, scale)).pvalue > 1e-3
    assert abs(np.corrcoef(draws)[0, 1]) < 3.3 / math.sqrt(n)


def test_noise_is_the_seed_s_the_step_s_the_worker_s_and_the_private_batch_s_own() -> None:
    defence, grads = Defence(transforms=(NoiseConfig(1.0),)), gradient()

    class Second(LocalChannel):
        rank = 1

    def first_entry(compressor: Any, channel: Channel) -> float:
        return float(compressor.reduce(grads, channel).decoded_own[0][0, 0])

    compressor = build(defence, SHAPES, private_seed=3)
    private = [for_private_batch(compressor, i) for i in range(2)]
    drawn = [
        first_entry(build(defence, SHAPES, private_seed=4), LocalChannel()),
        first_entry(build(defence, SHAPES, private_seed=3), Second()),
        *(first_entry(p, LocalChannel()) for p in private),
        *(first_entry(compressor, LocalChannel()) for _ in range(2)),
    ]
    assert len(set(drawn)) == len(drawn)
    assert first_entry(build(defence, SHAPES, private_seed=3), LocalChannel()) == drawn[-2]


@pytest.mark.usefixtures("global_rng_untouched")
def test_the_global_generator_is_left_alone() -> None:
    sent(parse_defence("clip:1+noise:0.1:kind=laplace+prune:0.5+none"), gradient())


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.999])
def test_pruning_keeps_the_largest_of_each_tensor(fraction: float) -> None:
    grads = gradient()
    for before, after in zip(grads, sent(Defence(transforms=(PruneConfig(fraction),)), grads), strict=True):
        kept = max(1, math.ceil((1 - fraction) * before.numel() - 1e-9))
        assert int((after != 0).sum()) == kept
        assert torch.equal(after[after != 0], before[after != 0])
        if kept < before.numel():
            assert before[after != 0].abs().min() >= before[after == 0].abs().max()


def test_pruning_of_all_is_top_k() -> None:
    grads = gradient()
    pruned = sent(Defence(transforms=(PruneConfig(0.9, "global"),)), grads)
    entries = sum(shape.numel() for shape in SHAPES)
    level = math.ceil(0.1 * entries) / entries
    for a, b in zip(pruned, sent(Defence(TopKConfig(level=level)), grads), strict=True):
        assert torch.equal(a, b)


def test_they_apply_in_their_order_and_before_the_compressor() -> None:
    grads = gradient()
    by_hand = build(Defence(PowerSGDConfig(2), error_feedback=True), SHAPES)
    together = build(parse_defence("prune:0.5+clip:1+powersgd:2:ef"), SHAPES)
    for _ in range(3):
        pruned = sent(Defence(transforms=(PruneConfig(0.5),)), grads)
        clipped = sent(Defence(transforms=(ClipConfig(1.0),)), pruned)
        expected, found = by_hand.reduce(clipped, LocalChannel()), together.reduce(grads, LocalChannel())
        for a, b in zip(expected.mean, found.mean, strict=True):
            torch.testing.assert_close(a, b)
    clipped_first = sent(parse_defence("clip:1+prune:0.5"), grads)
    assert norm(clipped_first) < 0.99 < norm(sent(parse_defence("prune:0.5+clip:1"), grads))


def test_a_state_goes_on_to_the_bit() -> None:
    defence = parse_defence("clip:1+noise:0.1+topk:0.2:ef")
    one, other = build(defence, SHAPES, private_seed=1), build(defence, SHAPES, private_seed=1)
    for step in range(2):
        one.reduce(gradient(step), LocalChannel())
    other.load_state_dict(one.state_dict())
    means = [[m.clone() for m in c.reduce(gradient(7), LocalChannel()).mean] for c in (one, other)]
    assert all(map(torch.equal, *means))
    with pytest.raises(ValueError, match=r"^Expected state of transforms=.*, got one of transforms=\[\]\.$"):
        build(defence, SHAPES).load_state_dict(build(parse_defence("topk:0.2:ef"), SHAPES).state_dict())


def test_a_gradient_that_is_not_finite_is_refused_and_the_caller_s_is_left_as_it_is() -> None:
    compressor, grads = build(parse_defence("clip:1+none"), SHAPES), gradient()
    before = [g.clone() for g in grads]
    compressor.reduce(grads, LocalChannel())
    assert all(map(torch.equal, grads, before))
    grads[0][0, 0] = math.nan
    with pytest.raises(ValueError, match="to be finite, got nan"):
        compressor.reduce(grads, LocalChannel())


def in_a_group(channel: Channel) -> dict[str, Any]:
    """Two workers, each with noise of its own, by the compressor itself and by DDP's hook."""
    defence = parse_defence("clip:1+noise:0.1+none")
    compressor = build(defence, SHAPES, private_seed=2)
    tap = Tap(channel, keep=True)
    reduced = compressor.reduce(gradient(channel.rank), tap)
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(ddp.module, ddp_comm_hook(build(parse_defence("clip:0.5"), ddp.module), GroupChannel()))
    ddp(torch.full((4, 3), 1.0 + channel.rank)).sum().backward()
    return {
        "sent": tap.messages[0].sent[0].clone(),
        "mean": torch.cat([m.flatten() for m in reduced.mean]),
        "own": torch.cat([m.flatten() for m in reduced.decoded_own]),
        "ddp": torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
    }


def test_two_workers_average_what_each_made_of_its_own() -> None:
    one, two = in_processes(in_a_group, 2, 120.0)
    torch.testing.assert_close(one["mean"], (one["own"] + two["own"]) / 2)
    assert torch.equal(one["mean"], two["mean"])
    for rank, worker in enumerate((one, two)):
        assert torch.equal(worker["sent"], worker["own"])
        clipped = torch.cat([g.flatten() for g in sent(parse_defence("clip:1+none"), gradient(rank))])
        noise = worker["own"] - clipped
        assert abs(float(noise.std()) / 0.1 - 1) < 0.15
    # Both gradients, along one direction, are longer than the norm.
    assert float(one["ddp"].norm()) == pytest.approx(0.5, rel=0.05)
    assert torch.equal(one["ddp"], two["ddp"])


def test_what_can_t_be_is_refused_in_a_line() -> None:
    with pytest.raises(ValueError, match=r"^Expected overlap=False with Transformed, whose step of one parameter"):
        build(parse_defence("clip:1+none"), SHAPES, overlap=True)
    with pytest.raises(ValueError, match=r"^Expected a defence without dp-sgd: DistributedDataParallel hands"):
        ddp_comm_hook(build(parse_defence("dp-sgd:1+powersgd:4"), SHAPES))
    # They begin with the first step: "clip 1 from step 3" would be untrue.
    with pytest.raises(ValueError, match=r"Expected start_step=3 to be 0 for transforms without a compressor"):
        parse_defence("clip:1+none:start_step=3")
    assert parse_defence("clip:1+powersgd:2:start_step=3").start_step == 3
    for wrong in (7, DenseConfig(), NoiseConfig):
        with pytest.raises(ValueError, match=r"^Expected transforms=.* to be of ClipConfig, DPSGDConfig, "):
            Defence(transforms=(wrong,))  # type: ignore[arg-type]
