"""Compression that makes larger: on small networks some methods send more than the gradient itself."""

from __future__ import annotations

from raytrust.config import Defence, PowerSGDConfig, TopKConfig
from raytrust.config.compressors import AtomoConfig, DGCConfig, ThresholdConfig, VqSGDConfig


def expansion_remark(defence: Defence, sent_bytes: float, dense_bytes: float) -> str | None:
    """One sentence if a defence sends more than the gradient that it is of, else None.

    sent_bytes, dense_bytes: of one worker over the same steps, counted on the wire: with compression and without it.
    It says by how much, and what would send less. Raises ValueError unless both are positive.
    """
    for name, value in (("sent_bytes", sent_bytes), ("dense_bytes", dense_bytes)):
        if not value > 0:
            raise ValueError(f"Expected {name}={value!r} to be positive.")
    if sent_bytes <= dense_bytes:
        return None
    remark = f"{defence.name} sends {sent_bytes / dense_bytes:.3g} times the bytes of the gradient itself"
    reason = _reason(defence)
    return f"{remark}: {reason}." if reason else f"{remark}."


def _reason(defence: Defence) -> str:
    match defence.compressor:
        case PowerSGDConfig() | AtomoConfig():
            return "rank x (n + m) numbers exceed the n x m of a small matrix, so take a lower rank"
        case TopKConfig() | ThresholdConfig() | DGCConfig():
            return "a value and its position are 8 bytes, an entry is 4, so send less than half of the entries"
        case VqSGDConfig():
            return "a vertex takes log2(2 x entries) bits, so take fewer samples"
        # Such as a few bytes a tensor where tensors hold few entries: nothing that an option would change.
        case _:
            return ""
