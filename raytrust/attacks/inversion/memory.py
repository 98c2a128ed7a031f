"""The allocator of a process that is ours."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of giving it back to the system, in the whole process.

    An attack allocates the same large tensors in every iteration, and the page faults of fresh memory cost more than
    the arithmetic on it. Elsewhere, no effect.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
        mallopt(parameter, value)
