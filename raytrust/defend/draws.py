"""Private draws: a generator whose state is all of a key, and not 32 bits of it."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_WORDS = 624  # of 32 bits, the state of a Mersenne twister


def private_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` that is a function of the whole key, of integers of any size from 0 on.

    It is no cryptographic one: who learns hundreds of draws to the last bit can compute the others.
    """
    # Hashed, as a seed sequence takes (1, 2) and (1, 2, 0) for one key.
    mixed = hashlib.sha256(repr(key).encode()).digest()
    words, generator = np.random.SeedSequence(int.from_bytes(mixed, "big"), pool_size=8), torch.Generator(device)
    if generator.device.type != "cpu":
        return generator.manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))
    # `manual_seed` on a CPU takes the lower 32 bits alone: all of them could be tried, and of 2^17 steps two are likely
    # to have the same noise. So the state itself is set, behind the three words of seed and place.
    state = generator.manual_seed(0).get_state()
    twister = torch.from_numpy(words.generate_state(_WORDS).astype(np.int64)).view(torch.uint8)
    state[24 : 24 + 8 * _WORDS] = twister
    return generator.set_state(state)
