"""Private draws depend on all of their key, and are those of a Mersenne twister in the state that it gives."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
import torch

from raytrust.compress import build
from raytrust.config import parse_defence
from raytrust.defend import private_generator
from raytrust.wire.channel import LocalChannel

KEYS = [(7,), (7 + 2**32,), (7 + 2**100,), (7, 0), (0, 7), (7, 0, 0), (70,)]


def test_every_key_has_draws_of_its_own() -> None:
    """A seed of torch's own generator on a CPU counts by its lower 32 bits alone, which could be tried."""
    draws = [torch.randn(3, generator=private_generator(*key)).tolist() for key in KEYS]
    assert len({tuple(d) for d in draws}) == len(KEYS)
    assert torch.randn(3, generator=private_generator(*KEYS[2])).tolist() == draws[2]


def test_draws_are_those_of_a_mersenne_twister_in_that_state() -> None:
    generator = private_generator(3)
    words = generator.get_state()[24 : 24 + 8 * 624].view(torch.int64).numpy()
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words.astype(np.uint32), "pos": 624}}
    found = torch.randint(2**31, (2000,), generator=generator).numpy()
    # Torch takes two draws for an integer, of which the second has the lower bits.
    assert np.array_equal(found, twister.random_raw(4000)[1::2].astype(np.int64) % 2**31)
    uniform = torch.rand(100_000, generator=private_generator(3), dtype=torch.float64)
    assert abs(float(uniform.mean()) - 0.5) < 3.3 / np.sqrt(12 * 100_000)


@pytest.mark.parametrize("name", ["noise:1+randk:0.5", "noise:1+none"])
def test_whoever_has_the_seed_and_the_public_state_can_not_draw_the_noise(name: str) -> None:
    shapes, grads, seed = [torch.Size((30, 20))], [torch.zeros(30, 20)], secrets.randbits(31)
    worker, other = (build(parse_defence(name), shapes, seed) for _ in range(2))
    other.load_public_state(worker.public_state())
    sent, guessed = (c.reduce(grads, LocalChannel()).decoded_own[0].flatten() for c in (worker, other))
    kept = sent != 0
    assert abs(float(torch.corrcoef(torch.stack([sent[kept], guessed[kept]]))[0, 1])) < 0.3
