"""What makes the CPU wait for a GPU: numbers read from it, counted on a device that only says that it is one."""

from __future__ import annotations

from typing import Any

import torch
from far_device import FAR, far_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raytrust.compress.interface import CHUNK, chunks
from raytrust.compress.qsgd import _norms
from raytrust.compress.sparse import EXACT_BELOW, above, largest

WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select"}


class Waits(TorchDispatchMode):
    """How many operations need a result of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.removeprefix("aten::") in WAITS
        return func(*args, **(kwargs or {}))


def gradient(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


def test_the_largest_entries_are_found_without_a_wait() -> None:
    x, k = gradient(4 * EXACT_BELOW), 1000
    with far_device():
        far = x.to(FAR)
        with Waits() as waits:
            found = largest(far, k)
        found = found.cpu()
    assert torch.equal(found, largest(x, k))
    assert waits.count == 0
    with Waits() as waits:
        largest(x, k)
    assert waits.count > 0


def test_norms_of_buckets_are_found_without_a_wait() -> None:
    """Also of those whose squares leave float32."""
    rows = gradient(64).view(4, 16) * torch.tensor([1.0, 1e-30, 1e30, 0.0])[:, None]
    with far_device():
        far = rows.to(FAR)
        with Waits() as waits:
            found = _norms(far, "l2")
        found = found.cpu()
    torch.testing.assert_close(found, rows.double().norm(dim=1).float(), rtol=1e-6, atol=0)
    assert waits.count == 0
    with Waits() as waits:
        _norms(rows, "l2")
    assert waits.count == 1


def test_on_a_device_all_entries_are_one_chunk() -> None:
    n = 2 * CHUNK + 3
    assert [part.stop for part in chunks(n, device=torch.device("cpu"))] == [CHUNK, 2 * CHUNK, n]
    assert list(chunks(n, device=torch.device("cuda"))) == list(chunks(n, device=torch.device("meta"))) == [slice(0, n)]
    assert list(chunks(0, device=torch.device("cuda"))) == []
    with far_device():
        far = gradient(n).to(FAR)
        with Waits() as waits:
            found = above(far, 3.0)
        found = found.cpu()
    assert torch.equal(found, above(gradient(n), 3.0))
    assert waits.count == 1  # for how many there are
