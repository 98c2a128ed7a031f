"""Which device to compute on, and how a CUDA device is made to compute exactly: in full float32, the same in each run.

By default cuDNN's convolutions round their inputs to TF32, with 10 bits of mantissa, while products of matrices do not:
a gradient and the same gradient by another formula then differ by a thousandth, which is what identities are tested to.
And some of cuDNN's kernels add in any order, so that equal seeds would give unequal tables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
# Two buffers of a fixed size, without which cuBLAS may choose another algorithm each time. Read at its first call.
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


def usable(device: Device) -> str:
    """The device as torch names it: "auto" is "cuda" where torch can use one, else "cpu".

    Raises ValueError for "cuda" where torch can use none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"Expected device={device!r} to be one that torch can use.")
    return device


@contextmanager
def exact(device: str | torch.device) -> Iterator[None]:
    """Within the block, CUDA computes in float32 without TF32, and convolutions by kernels that repeat to the bit.

    For the whole process; afterwards all is as it was. On any other device nothing changes. What sums up at indices
    (`index_add_`) repeats to the bit on no GPU: code that must, sums otherwise.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    variable, wanted = WORKSPACE
    workspace, before = os.environ.get(variable), _Precision()
    cudnn = torch.backends.cudnn
    kernels = cudnn.deterministic, cudnn.benchmark
    try:
        before.raise_to_full()
        cudnn.deterministic, cudnn.benchmark = True, False
        # Who has chosen a workspace, has chosen.
        os.environ.setdefault(variable, wanted)
        yield
    finally:
        before.restore()
        cudnn.deterministic, cudnn.benchmark = kernels
        if workspace is None:
            os.environ.pop(variable, None)


class _Precision:
    """What float32 is rounded to, as it was when this was made.

    torch has an older and a newer way to say it, and refuses to answer in the older one where the two disagree: so both
    are kept, and both are set.
    """

    def __init__(self) -> None:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        self._newer: list[Any] = [matmul, cudnn.conv, cudnn.rnn] if hasattr(cudnn, "conv") else []
        self._each = [owner.fp32_precision for owner in self._newer]
        self._matmul = _answer(torch.get_float32_matmul_precision)
        self._cudnn = _answer(lambda: cudnn.allow_tf32)

    def raise_to_full(self) -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for owner in self._newer:
            owner.fp32_precision = "ieee"

    def restore(self) -> None:
        if self._matmul is not None:
            torch.set_float32_matmul_precision(self._matmul)
        if self._cudnn is not None:
            torch.backends.cudnn.allow_tf32 = self._cudnn
        for owner, value in zip(self._newer, self._each, strict=True):
            owner.fp32_precision = value


def _answer(ask: Callable[[], Any]) -> Any:
    """None where torch refuses."""
    try:
        return ask()
    except RuntimeError:
        return None
