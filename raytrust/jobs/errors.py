"""What is said of an error: one line."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The last line of an error's message, after its type unless it is ours, who say all in the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    if not lines:
        return kind
    return lines[-1] if isinstance(error, (ValueError, FloatingPointError)) else f"{kind}: {lines[-1]}"
