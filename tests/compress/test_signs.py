"""signSGD with majority vote, Signum and the scaled sign of EF-signSGD."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import SHAPES, distance, gradients, norm

from raytrust.compress import Layout
from raytrust.compress.interface import CHUNK
from raytrust.compress.scaled_sign import ScaledSign
from raytrust.compress.signsgd import SignSGD
from raytrust.config import ScaledSignConfig, SignSGDConfig
from raytrust.wire.channel import LocalChannel, Tap


def votes(grads: list[Tensor], momentum: float = 0.0) -> list[list[Tensor]]:
    compressor = SignSGD(SignSGDConfig(momentum), Layout([g.shape for g in grads[:1]]))
    return [[m.clone() for m in compressor.reduce([g], LocalChannel()).mean] for g in grads]


class Electorate:
    """A channel to workers whose gradients are known: this one's is the first."""

    def __init__(self, others: list[Tensor]):
        self.world_size, self.rank = 1 + len(others), 0
        self._others = others

    def all_mean(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def all_gather(self, xs: Any, counts: Any = None) -> list[tuple[Tensor, ...]]:
        found = [tuple(xs)]
        for other in self._others:
            tap = Tap(LocalChannel(), keep=True)
            SignSGD(SignSGDConfig(), Layout([other.shape])).reduce([other], tap)
            found.append(tap.messages[0].sent)
        return found


def test_one_bit_an_entry_and_what_it_says() -> None:
    """The first entry in the lowest bit, 1 for a negative one; a zero of either sign is positive."""
    x, tap = torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-30, -1e-30, 5.0, 5.0, -2.0]), Tap(LocalChannel(), keep=True)
    mean, own = SignSGD(SignSGDConfig(), Layout([x.shape])).reduce([x], tap)
    (packed,) = tap.messages[0].sent
    assert (packed.dtype, packed.tolist()) == (torch.uint8, [0b00100010, 0b00000001])
    assert own[0].tolist() == mean[0].tolist() == [1, -1, 1, 1, 1, -1, 1, 1, -1]


def test_the_majority_decides_and_a_tie_is_zero() -> None:
    mine, second, third = torch.tensor([[1.0, 1, -1, -9], [1, -1, -1, 0], [1, -1, 1, 1]])
    signs = SignSGD(SignSGDConfig(), Layout([mine.shape]))
    assert signs.reduce([mine], Electorate([second, third])).mean[0].tolist() == [1, -1, -1, 1]
    assert signs.reduce([mine], Electorate([second])).mean[0].tolist() == [1, 0, -1, 0]


def test_signum_votes_on_its_momentum() -> None:
    """m = 0.75, -0.0625 after gradients of 3 and -2.5 (momentum 3/4): the sign turns one step late."""
    grads = [torch.tensor([3.0]), torch.tensor([-2.0]), torch.tensor([-2.5])]
    assert [v[0].tolist() for v in votes(grads, 0.75)] == [[1], [1], [-1]]
    assert [v[0].tolist() for v in votes(grads)] == [[1], [-1], [-1]]


def test_signs_have_no_scale() -> None:
    grads = gradients(0)
    first, second = (
        SignSGD(SignSGDConfig(), Layout(SHAPES)).reduce([f * g for g in grads], LocalChannel()).decoded_own
        for f in (1, 1e-9)
    )
    assert all(map(torch.equal, first, second))
    assert all(torch.equal(o, torch.where(g < 0, -1.0, 1.0)) for o, g in zip(first, grads, strict=True))


def test_the_scaled_sign_is_the_mean_magnitude_of_each_tensor() -> None:
    grads = [torch.tensor([[1.0, -3.0], [0.0, 4.0]]), torch.tensor([-6.0])]
    tap = Tap(LocalChannel(), keep=True)
    own = ScaledSign(ScaledSignConfig(), Layout([g.shape for g in grads])).reduce(grads, tap).decoded_own
    assert [o.tolist() for o in own] == [[[2, -2], [2, 2]], [-6]]
    scales, packed = tap.messages[0].sent
    assert (scales.dtype, scales.tolist()) == (torch.float32, [2, 6])
    assert packed.tolist() == [0b10010]


@pytest.mark.parametrize("seed", range(5))
def test_the_contraction_of_the_scaled_sign_is_an_identity(seed: int) -> None:
    """||x - own||^2 = (1 - ||x||_1^2 / (d ||x||_2^2)) ||x||^2, tensor by tensor (Karimireddy et al. 2019, Lemma 8)."""
    grads = gradients(seed)
    own = ScaledSign(ScaledSignConfig(), Layout(SHAPES)).reduce(grads, LocalChannel()).decoded_own
    for x, o in zip(grads, own, strict=True):
        d, l1, l2 = x.numel(), float(x.double().abs().sum()), float(x.double().norm())
        assert norm([x - o]) ** 2 == pytest.approx((1 - l1**2 / (d * l2**2)) * l2**2, rel=1e-4, abs=1e-6)


def test_a_tensor_of_one_magnitude_is_exact() -> None:
    grads = [g.sign() * (i + 1) for i, g in enumerate(gradients(0))]
    own = ScaledSign(ScaledSignConfig(), Layout(SHAPES)).reduce(grads, LocalChannel()).decoded_own
    assert distance(own, grads) < 1e-6


def test_tensors_that_begin_within_a_byte_and_end_beyond_a_chunk() -> None:
    """Each with its own scale, at any offset in the bits."""
    generator = torch.Generator().manual_seed(0)
    grads = [(i + 1) * torch.randn(n, generator=generator).sign() for i, n in enumerate([3, 300_001, 1, 13, 140_000])]
    layout = Layout([g.shape for g in grads])
    tap = Tap(LocalChannel(), keep=True)
    mean, own = ScaledSign(ScaledSignConfig(), layout).reduce(grads, tap)
    assert distance(own, grads) < 1e-6
    assert distance(mean, grads) < 1e-6
    assert distance(ScaledSign(ScaledSignConfig(), layout).decode(tap.messages, "peer")[0], grads) < 1e-6
    signs = SignSGD(SignSGDConfig(), layout).reduce(grads, LocalChannel()).decoded_own
    assert all(torch.equal(s, g.sign()) for s, g in zip(signs, grads, strict=True))


@pytest.mark.parametrize("sizes", [[5, CHUNK + 3, 7, 0, 2 * CHUNK + 9], [CHUNK, 8], [3, 2, 1, 4], [0, 1]])
def test_the_scaled_sign_to_the_bit(sizes: list[int]) -> None:
    """As one pass after another has it; tensors share a byte where a size is no multiple of 8, and cross chunks."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=generator) for n in sizes]
    tap = Tap(LocalChannel(), keep=True)
    mean, own = ScaledSign(ScaledSignConfig(), Layout([g.shape for g in grads])).reduce(grads, tap)
    scales, packed = tap.messages[0].sent
    totals = [sum((part.abs().sum() for part in g.split(CHUNK)), torch.zeros(())) for g in grads]
    assert torch.equal(scales, torch.stack(totals) / torch.tensor(sizes).clamp_min(1))
    assert packed.tolist() == np.packbits(torch.cat(grads).numpy() < 0, bitorder="little").tolist()
    for g, scale, m, o in zip(grads, scales, mean, own, strict=True):
        assert torch.equal(m, torch.where(g < 0, -scale, scale))
        assert torch.equal(o, m)
