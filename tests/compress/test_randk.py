from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import SHAPES, assert_unbiased, draws, gradients, relative_variance

from raytrust.compress import Layout
from raytrust.compress.randk import RandK
from raytrust.config import RandKConfig
from raytrust.wire.channel import LocalChannel, Tap

GRADIENT = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def flat(config: RandKConfig, count: int) -> tuple[Tensor, Tensor]:
    return draws(config, [GRADIENT], count), GRADIENT.flatten().double()


def test_the_error_is_what_was_not_sent() -> None:
    """E||x - own||^2 = (1 - k/N) ||x||^2 (Stich et al. 2018, Lemma A.1), where k = 5 of N = 20."""
    variance, error = relative_variance(*flat(RandKConfig(level=0.25), 2000))
    assert variance == pytest.approx(0.75, abs=4 * error)
    assert error < 0.01


def test_scaled_it_is_unbiased() -> None:
    """E||own - x||^2 = (N/k - 1) ||x||^2."""
    samples, x = flat(RandKConfig(level=0.25, unbiased=True), 2000)
    assert_unbiased(samples, x)
    variance, error = relative_variance(samples, x)
    assert variance == pytest.approx(3, abs=4 * error)
    assert error < 0.05


def test_every_step_sends_exactly_k_entries_as_they_are() -> None:
    """Drawn without replacement, evenly, and any two of them together, too."""
    samples, x = flat(RandKConfig(level=0.25), 2000)
    chosen = samples != 0
    assert (chosen.sum(1) == 5).all()
    assert torch.equal(samples, torch.where(chosen, x, 0.0))
    counts = chosen.double()
    deviation = (2000 * 0.25 * 0.75) ** 0.5
    assert float((counts.sum(0) - 500).abs().max()) < 4 * deviation
    pairs = (counts.T @ counts).fill_diagonal_(2000 * 5 / 20 * 4 / 19)
    assert float((pairs - 2000 * 5 / 20 * 4 / 19).abs().max()) < 5 * (2000 * 0.0526) ** 0.5


def test_only_values_travel() -> None:
    compressor, tap = RandK(RandKConfig(level=0.1), Layout(SHAPES), seed=1), Tap(LocalChannel(), keep=True)
    compressor.reduce(gradients(0), tap)
    (message,) = tap.messages
    assert [(x.dtype, x.shape) for x in message.sent] == [(torch.float32, (24,))]


@pytest.mark.parametrize(("level", "k"), [(1e-9, 1), (0.01, 2), (0.5, 122), (1.0, 245)])
def test_level_is_the_fraction_of_entries(level: float, k: int) -> None:
    assert RandK(RandKConfig(level=level), Layout(SHAPES)).k == k


def test_where_many_entries_are_few_are_drawn_over_all_of_them() -> None:
    x = torch.ones(300_000)
    (own,) = RandK(RandKConfig(level=0.01), Layout([x.shape])).reduce([x], LocalChannel()).decoded_own
    assert int(own.sum()) == 3000
    thirds = own.view(3, -1).sum(1)
    assert float((thirds - 1000).abs().max()) < 4 * (3000 * 2 / 9) ** 0.5
