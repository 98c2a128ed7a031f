"""What the messages of refusals say of arrays and of other libraries' errors."""

from __future__ import annotations

import numpy as np


def describe(array: np.ndarray) -> str:
    nan = " with NaN" if array.dtype.kind in "fc" and np.isnan(array).any() else ""
    return f"{array.dtype} of shape {array.shape}{nan}"


def reason(error: BaseException) -> str:
    """The message of someone else's error in one line, or its type if it has none."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
