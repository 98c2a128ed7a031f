from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import assert_unbiased, draws, relative_variance

from raytrust.compress import Layout
from raytrust.compress.interface import CHUNK
from raytrust.compress.packing import pack_codes
from raytrust.compress.qsgd import QSGD
from raytrust.config import QSGDConfig
from raytrust.wire.channel import LocalChannel, Tap

BITS: list[Literal[2, 4, 8]] = [2, 4, 8]
NORMS: list[Literal["l2", "max"]] = ["l2", "max"]
every_kind = pytest.mark.parametrize("config", [QSGDConfig(b, 8, n) for b in BITS for n in NORMS], ids=repr)


def gradient() -> Tensor:
    """Three buckets of 8, of which one is of zeros but for one entry, and half a one of another scale."""
    x = torch.randn(28, generator=torch.Generator().manual_seed(1))
    x[7] = -1  # not almost the largest: what is too rare a roll can't be tested
    x[8:16] = 0
    x[11] = -2
    x[24:] *= 1e-3
    return x


def sent(x: Tensor, config: QSGDConfig, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(norms, own, levels)."""
    tap = Tap(LocalChannel(), keep=True)
    (own,) = QSGD(config, Layout([x.shape]), seed).reduce([x], tap).decoded_own
    norms = tap.messages[0].sent[0]
    scales = norms.repeat_interleave(config.bucket)[: x.numel()].clamp_min(1e-30)
    return norms, own, own.flatten() * (2 ** (config.bits - 1) - 1) / scales


@every_kind
def test_it_is_unbiased_with_the_variance_of_stochastic_rounding(config: QSGDConfig) -> None:
    """f (1 - f) levels^2 an entry that lies a fraction f above a level; and so within the paper's bound."""
    x, s = gradient(), 2 ** (config.bits - 1) - 1
    copies = torch.cat([x, x.new_zeros(4)]).repeat(100)  # buckets stay what they are
    samples = draws(config, [copies], 40).view(4000, 32)[:, :28]
    assert_unbiased(samples, x.double())
    for start in range(0, len(x), config.bucket):
        part = x[start : start + config.bucket].double()
        d, length = len(part), float(part.norm())
        norm = length if config.norm == "l2" else float(part.abs().max())
        f = (part.abs() * s / norm).frac()
        expected = float((f * (1 - f)).sum()) * (norm / s) ** 2 / length**2
        found, error = relative_variance(samples[:, start : start + d], part)
        assert found == pytest.approx(expected, abs=4 * error + 1e-6)
        bound = min(d / s**2, d**0.5 / s) if config.norm == "l2" else d / (4 * s**2)  # Lemma 3.1
        assert found <= bound + 4 * error


@every_kind
def test_what_is_sent_is_a_norm_and_whole_levels(config: QSGDConfig) -> None:
    x, s = gradient(), 2 ** (config.bits - 1) - 1
    norms, own, levels = sent(x, config)
    buckets = [x[i : i + 8] for i in range(0, len(x), 8)]
    expected = [b.norm() if config.norm == "l2" else b.abs().max() for b in buckets]
    torch.testing.assert_close(norms, torch.stack(expected))
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert int(levels.abs().max().round()) <= s
    spacing = norms.repeat_interleave(8)[: len(x)] / s
    assert ((own - x).abs() <= spacing * (1 + 1e-5)).all()  # the interval that the view tells


@pytest.mark.parametrize("bits", BITS)
def test_the_ends_of_the_range_are_exact(bits: Literal[2, 4, 8]) -> None:
    """The largest magnitude of a bucket is a whole level, either sign; so is an entry that is alone in its bucket."""
    x = torch.tensor([3.0, -3.0, 0.0, 3.0, -0.5, 0.0, 0.0, 0.5, 7.0])
    for seed in range(20):
        assert torch.equal(sent(x, QSGDConfig(bits, 4, "max"), seed)[1], x)
        torch.testing.assert_close(sent(x, QSGDConfig(bits, 1), seed)[1], x)


def test_more_bits_lose_less() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    lost = [float((sent(x, QSGDConfig(bits, 100))[1] - x).norm()) for bits in BITS]
    assert lost[0] > 3 * lost[1] > 9 * lost[2]


def test_every_chunk_has_its_own_dice_and_place() -> None:
    """Over more entries than are worked on at a time, of an odd number of buckets."""
    n = 2**18 + 1237
    x = torch.linspace(-1, 1, n)
    config = QSGDConfig(bits=8, bucket=1000, norm="max")
    _, own, _ = sent(x, config)
    assert float((own - x).abs().max()) <= 1 / 127 * (1 + 1e-5)
    _, constant, _ = sent(torch.full((n,), 0.5).index_fill(0, torch.arange(0, n, 1000), 1.0), config)
    ups = (constant > 0.5).view(-1)
    halves = [ups[start : start + 2**16] for start in range(0, n - 2**16, 2**16)]
    assert all(abs(float(h.float().mean()) - 0.5) < 0.02 for h in halves)
    assert not any(torch.equal(a, b) for i, a in enumerate(halves) for b in halves[:i])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bucket", [512, 100])
@pytest.mark.parametrize("n", [8 * 512 * 64 + 1003, 777, 1])
def test_every_byte_and_entry_is_the_formula_s(bits: Literal[2, 4, 8], bucket: int, n: int) -> None:
    """floor(s x / norm + u) of numpy's own uniform numbers; the codes of a chunk by planes; level x norm / s."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    tap, s = Tap(LocalChannel(), keep=True), 2 ** (bits - 1) - 1
    mean, own = QSGD(QSGDConfig(bits=bits, bucket=bucket), Layout([x.shape]), seed=5).reduce([x], tap)
    norms, packed = tap.messages[0].sent
    rows = torch.nn.functional.pad(x, (0, -n % bucket)).view(-1, bucket)
    dice = np.random.Generator(np.random.SFC64([5, 0, 0])).random(rows.numel(), dtype=np.float32)
    assert torch.equal(norms, torch.linalg.vector_norm(rows, dim=1))
    levels = torch.addcmul(torch.from_numpy(dice).view_as(rows), rows, (s / norms)[:, None]) + s
    codes = levels.to(torch.int64).clamp(max=2 * s).view(-1)[:n]
    length = CHUNK // (8 * bucket) * 8 * bucket
    assert torch.equal(packed, torch.cat([pack_codes(part.to(torch.uint8), bits) for part in codes.split(length)]))
    decoded = (codes - s).float() * (norms / s).repeat_interleave(bucket)[:n]
    assert torch.equal(mean[0], decoded)
    assert torch.equal(own[0], decoded)
