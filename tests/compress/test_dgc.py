from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import SHAPES, Echo, distance, gradients, norm

from raytrust.compress import Layout
from raytrust.compress.dgc import DGC
from raytrust.config import DGCConfig
from raytrust.wire.channel import LocalChannel, Tap


def run(config: DGCConfig, grads: list[list[float]], workers: int = 1) -> list[list[float]]:
    """What is sent of gradients of one parameter, step by step."""
    compressor = DGC(config, Layout([torch.Size((len(grads[0]),))]))
    return [compressor.reduce([torch.tensor(g)], Echo(workers)).decoded_own[0].tolist() for g in grads]


def test_at_full_level_it_is_the_gradient() -> None:
    """Masking clears the momentum of what was sent, so all of it each step."""
    compressor = DGC(DGCConfig(level=1.0), Layout(SHAPES))
    for step in range(3):
        grads = gradients(step)
        assert distance(compressor.reduce(grads, LocalChannel()).mean, grads) < 1e-6


def test_at_full_level_without_masking_it_is_momentum_sgd() -> None:
    """The step of an optimiser with momentum, taken before the wire: u = m u + g."""
    compressor = DGC(DGCConfig(level=1.0, masking=False), Layout(SHAPES))
    parameters = [torch.zeros(s, requires_grad=True) for s in SHAPES]
    optimiser = torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
    total = [torch.zeros(s) for s in SHAPES]
    for step in range(4):
        for p, g in zip(parameters, gradients(step), strict=True):
            p.grad = g
        optimiser.step()
        for t, m in zip(total, compressor.reduce(gradients(step), LocalChannel()).mean, strict=True):
            t -= m
        assert distance(total, parameters) < 1e-6


def test_momentum_corrects_what_waits() -> None:
    """(Lin et al. 2018, section 3.1) An entry that waits gathers v = g (1 + (1 + m) + ...), as by momentum."""
    config = DGCConfig(level=0.5, momentum=0.5)
    assert run(config, [[10.0, 1.0], [0.0, 1.0]]) == [[10, 0], [0, 1 + 1.5]]
    assert run(config, [[10.0, 1.0], [10.0, 1.0], [0.0, 1.0]])[-1] == [0, 1 + 1.5 + 1.75]


def test_masking_stops_the_momentum_of_what_was_sent() -> None:
    """(Section 3.3.1) Without it a stale gradient goes on."""
    grads = [[10.0, 1.0], [0.0, 0.0]]
    assert run(DGCConfig(level=0.5, momentum=0.5), grads)[-1] == [0, 1.5]
    assert run(DGCConfig(level=0.5, momentum=0.5, masking=False), grads)[-1] == [5, 0]


@pytest.mark.parametrize(("workers", "clipped"), [(1, 2.0), (4, 1.0)])
def test_the_gradient_is_clipped_before_it_is_added(workers: int, clipped: float) -> None:
    """(Section 3.2) To clip / sqrt(workers), so that the sum over independent workers has the norm `clip`."""
    config = DGCConfig(level=1.0, momentum=0.0, clip=2.0)
    (sent,) = run(config, [[30.0, 40.0]], workers)
    assert sent == pytest.approx([0.6 * clipped, 0.8 * clipped])
    assert run(config, [[0.3, 0.4]], workers)[0] == pytest.approx([0.3, 0.4])


def test_the_warm_up_falls_by_a_quarter_four_times() -> None:
    compressor = DGC(DGCConfig(level=0.001, warmup_steps=8), Layout([torch.Size((100_000,))]))
    ks = []
    for _ in range(10):
        tap = Tap(LocalChannel(), keep=True)
        ks.append(compressor.k)
        compressor.reduce([torch.randn(100_000, generator=torch.Generator().manual_seed(0))], tap)
        assert len(tap.messages[0].sent[0]) == ks[-1]
    assert ks == [25_000] * 2 + [6_250] * 2 + [1_562] * 2 + [391] * 2 + [100] * 2


def test_the_warm_up_does_not_fall_below_the_level() -> None:
    compressor = DGC(DGCConfig(level=0.1, warmup_steps=4), Layout(SHAPES))
    ks = []
    for step in range(5):
        ks.append(compressor.k)
        compressor.reduce(gradients(step), LocalChannel())
    assert ks == [61, 24, 24, 24, 24]


def test_nothing_is_lost_for_good() -> None:
    """Without momentum it is error feedback with Top-K: all that was sent and what waits are all that came in."""
    compressor = DGC(DGCConfig(level=0.05, momentum=0.0), Layout(SHAPES))
    came: list[Tensor] = [torch.zeros(s) for s in SHAPES]
    for step in range(20):
        own = compressor.reduce(gradients(step), LocalChannel()).decoded_own
        came = [c + g - o for c, g, o in zip(came, gradients(step), own, strict=True)]
    waiting = [compressor.state_dict()[f"v.{i}"] for i in range(len(SHAPES))]
    assert distance(waiting, came) < 1e-5
    assert norm(waiting) > 1
