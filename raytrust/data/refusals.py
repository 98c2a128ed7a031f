"""What the messages of refusals say of arrays, of what makes them acceptable, and of other libraries' errors."""

from __future__ import annotations

import numpy as np


def describe(array: np.ndarray) -> str:
    nan = " with NaN" if array.dtype.kind in "fc" and np.isnan(array).any() else ""
    return f"{array.dtype} of shape {array.shape}{nan}"


def reason(error: BaseException) -> str:
    """The message of someone else's error in one line, or its type if it has none."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def image_conversion(images: np.ndarray) -> str:
    """The numpy expression that makes images acceptable, after "; ", where there is one; else nothing."""
    steps = ""
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        if images.shape[1] in (1, 3):
            steps += ".transpose(0, 2, 3, 1)"
        elif images.shape[3] == 4:
            steps += "[..., :3]"
        else:
            return ""
    elif images.ndim == 2:
        steps += ".reshape(n, height, width)"
    elif images.ndim not in (3, 4):
        return ""
    kind = images.dtype.kind
    if images.dtype == np.uint8:
        expression = f"images{steps}"
    elif kind not in "biuf" or images.size == 0 or (kind == "f" and not np.isfinite(images).all()):
        return ""
    elif kind == "b":
        expression = f"images{steps}.astype('uint8') * 255"
    else:
        least, most = images.min(), images.max()
        if kind == "f" and least >= 0 and most <= 1:
            expression = f"(images{steps} * 255).round().astype('uint8')"
        elif least >= 0 and most <= 255:
            expression = f"images{steps}" + (".round()" if kind == "f" else "") + ".astype('uint8')"
        elif images.dtype == np.uint16:
            # 65535 is 255 times 257, so that the whole range of 16 bits falls evenly onto that of 8.
            expression = f"(images{steps} // 257).astype('uint8')"
        else:
            scale = f"(images{steps} - images.min()) * (255.0 / np.ptp(images))"
            expression = f"({scale}).round().astype('uint8')"
    return f"; convert with {expression}"


def label_conversion(labels: np.ndarray) -> str:
    """As `image_conversion`, for labels."""
    kind = labels.dtype.kind
    if labels.ndim == 2 and labels.shape[1] > 1 and kind in "biuf" and labels.shape[0] > 1:
        one_hot = ((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all()
        return "; convert with labels.argmax(1)" if one_hot else "; an image has one label here"
    if labels.ndim == 2 and labels.shape[0] == 1 and kind in "iu":
        return "; convert with labels.reshape(-1)"
    if labels.ndim == 1 and kind in "US":
        return "; convert with np.unique(labels, return_inverse=True)[1]"
    if labels.ndim in (1, 2) and (kind == "b" or (kind == "f" and np.isfinite(labels).all())):
        return "; convert with labels.astype('int64')" if (labels == np.round(labels)).all() else ""
    return ""
