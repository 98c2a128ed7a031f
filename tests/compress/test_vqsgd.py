from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import assert_unbiased, draws, relative_variance

from raytrust.compress import Layout
from raytrust.compress.packing import pack_words, unpack_words
from raytrust.compress.vqsgd import VqSGD
from raytrust.config import VqSGDConfig
from raytrust.wire.channel import LocalChannel, Message, Tap

GRADIENT = torch.tensor([[3.0, -1.0, 0.5], [0.0, -2.0, 0.1]])


@pytest.mark.parametrize("samples", [1, 7])
def test_it_is_unbiased_with_the_variance_of_its_vertices(samples: int) -> None:
    """A vertex is of norm sqrt(d) ||x||, so E||own - x||^2 = (d - 1) / samples ||x||^2."""
    found = draws(VqSGDConfig(samples), [GRADIENT], 2500)
    x = GRADIENT.flatten().double()
    assert_unbiased(found, x)
    variance, error = relative_variance(found, x)
    assert variance == pytest.approx(5 / samples, abs=4 * error + 1e-6)


def vertices(x: Tensor, samples: int, seed: int = 0) -> Tensor:
    tap = Tap(LocalChannel(), keep=True)
    VqSGD(VqSGDConfig(samples), Layout([x.shape]), seed).reduce([x], tap)
    norm, packed = tap.messages[0].sent
    torch.testing.assert_close(norm, x.norm().view(1))
    return unpack_words(packed, max(1, (2 * x.numel() - 1).bit_length()), samples)


def test_the_probability_of_every_vertex() -> None:
    """|x_i| / (||x|| sqrt(d)) along the sign of x_i, and an even share of the rest for all 2d (equation 7)."""
    x, count = GRADIENT.flatten(), 200_000
    counts = vertices(GRADIENT, count).bincount(minlength=12).double()
    along = x.abs().double() / (float(x.norm()) * 6**0.5)
    expected = torch.full((12,), float(1 - along.sum()) / 12, dtype=torch.float64)
    for i, value in enumerate(x.tolist()):
        expected[2 * i + (value < 0)] += along[i]
    assert float(expected.sum()) == pytest.approx(1)
    z = (counts - count * expected) / (count * expected * (1 - expected)).sqrt()
    assert float(z.abs().max()) < 4.5


@pytest.mark.parametrize("value", [-3.0, 2.0])
def test_one_entry_is_exact(value: float) -> None:
    """Of one dimension the polytope is an interval with the gradient at its end."""
    x = torch.tensor([value])
    torch.testing.assert_close(draws(VqSGDConfig(5), [x], 10), x.double().expand(10, 1))


def test_entries_beyond_the_first_chunk_are_drawn() -> None:
    """And none of zero mass, whatever the rounding of sums: where one entry holds all, half of the draws are its."""
    x = torch.zeros(2**18 + 999)
    x[-5], x[7] = -1.0, 1.0
    # All mass is 2 / (sqrt(2) sqrt(d)), a share of about 0.0028.
    found = vertices(x, 100_000).bincount(minlength=2 * len(x))
    last, first = int(found[2 * (len(x) - 5) + 1]), int(found[14])
    expected = 100_000 / (2 * len(x)) ** 0.5
    for count in (last, first):
        assert abs(count - expected) < 5 * expected**0.5
    assert int(found.max()) == max(last, first)
    halves = found.view(2, -1).sum(1) if len(found) % 2 == 0 else found[:-1].view(2, -1).sum(1)
    assert abs(int(halves[0] - halves[1])) < 5 * 100_000**0.5


def decoded(norm: Tensor, drawn: Tensor) -> Tensor:
    """Of vertices of 12 dimensions' polytope, all in one message."""
    message = Message("all_gather", (norm, pack_words(drawn, 5)), ())
    return VqSGD(VqSGDConfig(len(drawn)), Layout([torch.Size((12,))])).decode([message], "link")[0][0]


def test_vertices_drawn_many_times_add_up_to_the_bit_in_any_order() -> None:
    """As a GPU adds them in any; in float32 the sum of 3 l, -l and 5 l is one of several."""
    generator = torch.Generator().manual_seed(0)
    drawn, norm = torch.randint(24, (4001,), generator=generator), torch.tensor([0.7])
    expected = decoded(norm, drawn)
    counts = drawn.bincount(minlength=24).view(12, 2)
    length = norm * (12**0.5 / 4001)
    assert torch.equal(expected, (counts[:, 0] - counts[:, 1]) * length)
    for _ in range(5):
        assert torch.equal(decoded(norm, drawn[torch.randperm(4001, generator=generator)]), expected)


@pytest.mark.gpu
def test_a_gpu_decodes_to_the_bits_of_the_cpu() -> None:
    drawn, norm = torch.randint(24, (400_001,), generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    expected = decoded(norm, drawn)
    for _ in range(20):
        assert torch.equal(decoded(norm.cuda(), drawn.cuda()).cpu(), expected)
