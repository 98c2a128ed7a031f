"""Image similarity: functions on arrays. All errors are ``ValueError``."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

# An array or a tensor: this room must not wait seconds for torch.
T = TypeVar("T", bound=Any)

# Slack of the [0, 1] check, for images that went through float32 arithmetic.
_TOLERANCE = 1e-6
WINDOW = 7  # side of the uniform SSIM window, in pixels
BESSEL = WINDOW**2 / (WINDOW**2 - 1)


def ssim_table(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Structural similarity of every image of ``a`` with every image of ``b``, over channels and window positions.

    To rounding it is ``skimage.metrics.structural_similarity(a, b, data_range=1.0, channel_axis=0)`` in float64, that
    is with a uniform 7x7 window and sample covariances (Wang et al., 2004, eq. 13, with K1 = 0.01 and K2 = 0.03).

    Args:
        a: (n, channels, height, width), values in [0, 1]. b: (m, channels, height, width).

    Returns:
        (n, m), in [-1, 1]; 1 for identical images.

    Raises:
        ValueError: shapes differ, or are smaller than the window; a value is NaN or outside [0, 1].
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    for images in (a, b):
        if images.ndim != 4 or images.shape[1:] != a.shape[1:] or min(images.shape[2:]) < WINDOW:
            raise ValueError(
                f"Expected images of one shape, at least {WINDOW}x{WINDOW} pixels, got {a.shape} and {b.shape}."
            )
        _check_range(images)
    mean_b = _window_means(b)
    variance_b = BESSEL * (_window_means(b * b) - mean_b**2)
    table = np.empty((len(a), len(b)))
    # The moments of `b` are taken once, which scikit-image's calls would do for each pair.
    for row, image in zip(table, a, strict=True):
        mean = _window_means(image)
        variance = BESSEL * (_window_means(image * image) - mean**2)
        covariance = BESSEL * (_window_means(image * b) - mean * mean_b)
        row[:] = ssim_of_moments(mean, mean_b, variance + variance_b, covariance)
    return table


def ssim_of_moments(mean_a: T, mean_b: T, variances: T, covariance: T) -> T:
    """SSIM from the moments of each window, (..., channels, height, width) -> (...); of arrays or of tensors.

    variances: the sum of both. They and the covariance are sample moments, that is `BESSEL` times the plain ones.
    """
    top = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
    return (top / ((mean_a**2 + mean_b**2 + 0.01**2) * (variances + 0.03**2))).mean((-3, -2, -1))


def mse(a: ArrayLike, b: ArrayLike) -> float:
    """Mean squared error of two (channels, height, width) images in [0, 1]; a number in [0, 1].

    Raises:
        ValueError: shapes differ, are not 3-dimensional or without a pixel; a value is NaN or outside [0, 1].
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 3 or x.size == 0:
        raise ValueError(
            f"Expected two non-empty (channels, height, width) images of one shape, got {x.shape}, {y.shape}."
        )
    _check_range(x)
    _check_range(y)
    return float(np.mean((x - y) ** 2))


def psnr(a: ArrayLike, b: ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB for a data range of 1: ``-10 log10(mse)``.

    Non-negative up to the [0, 1] tolerance; ``math.inf`` for identical images, which JSON can't hold.

    Raises:
        ValueError: as in :func:`mse`.
    """
    error = mse(a, b)
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def registered_psnr(a: ArrayLike, b: ArrayLike) -> float:
    """:func:`psnr` in dB once ``a`` is shifted onto ``b``, or the plain one where that is greater, so never below it.

    A shift by a few pixels shows as much, and costs pixelwise measures everything. The shift is one for the whole
    image, to a tenth of a pixel, by phase correlation of the mean channel in a Hann window (scikit-image's
    ``phase_cross_correlation``; Guizar-Sicairos et al., 2008), at most an eighth of the height and of the width;
    compared is where the two then overlap. In the manner of breaching, which fits a similarity transform instead.

    Raises:
        ValueError: as in :func:`mse`, and where scikit-image is missing.
    """
    plain = psnr(a, b)
    try:
        from skimage.registration import phase_cross_correlation
    except ModuleNotFoundError:
        raise ValueError("Expected scikit-image for a registered PSNR: pip install scikit-image.") from None
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    # Windowed and less their means, or the edges of the frame, which don't move, would be what correlates.
    window = np.outer(*(np.hanning(side + 2)[1:-1] for side in x.shape[1:]))
    moving, fixed = (window * (image.mean(0) - image.mean()) for image in (x, y))
    if not (moving.any() and fixed.any()):
        return plain
    # Not by optical flow: TV-L1 bends any image towards any other, by 2.8 dB for unrelated ones (docs/findings.md).
    shift, _, _ = phase_cross_correlation(fixed, moving, upsample_factor=10)
    # Estimates are off by a tenth where the frame's contents change with the shift: whole pixels are tried, too.
    return max(plain, *(_psnr_of_shifted(x, y, by) for by in (tuple(shift), tuple(np.round(shift)))))


def _psnr_of_shifted(x: NDArray[np.float64], y: NDArray[np.float64], by: tuple[float, float]) -> float:
    """Of x moved by so many pixels down and right, where it then overlaps with y; 0 beyond an eighth of the sides."""
    from scipy.ndimage import shift as shifted

    # What overlaps by a strip alone would match by luck.
    if any(abs(s) > side / 8 for s, side in zip(by, x.shape[1:], strict=True)):
        return 0.0
    # Cubic, as linear interpolation blurs, which takes noise away that was there.
    moved = np.clip(shifted(x, (0, *by), order=3, mode="nearest"), 0, 1)
    rows, columns = (
        slice(math.ceil(s), None) if s > 0 else slice(0, side - math.ceil(-s))
        for s, side in zip(by, x.shape[1:], strict=True)
    )
    return psnr(moved[:, rows, columns], y[:, rows, columns])


def _check_range(image: NDArray[np.float64]) -> None:
    low, high = float(image.min()), float(image.max())
    # This way round it refuses NaN, too.
    if not (low >= -_TOLERANCE and high <= 1.0 + _TOLERANCE):
        raise ValueError(f"Expected values in [0, 1], got [{low}, {high}].")


def _window_means(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of all 7x7 windows that lie inside, (..., height, width) -> (..., height - 6, width - 6)."""
    # Down and then across is 14 additions a window instead of 49.
    for axis in (-1, -2):
        x = sliding_window_view(x, WINDOW, axis=axis).mean(-1)
    return x
