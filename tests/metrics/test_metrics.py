from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage, stats
from skimage.metrics import structural_similarity

from raytrust.metrics import images as metrics
from raytrust.metrics import statistics
from raytrust.metrics.statistics import Figure, mean_figure


def images(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random(shape), rng.random(shape)


def ssim(a, b):
    return metrics.ssim_table(a[None], b[None])[0, 0]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 7, 11)])
def test_ssim_is_the_pinned_call(shape):
    a, b = images(shape)
    b = 0.7 * a + 0.3 * b
    assert ssim(a, b) == pytest.approx(structural_similarity(a, b, data_range=1.0, channel_axis=0), abs=1e-9)
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12)
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-12)


def test_ssim_of_one_window_is_the_papers_formula():
    a, b = images((1, 9, 9), seed=1)
    c1, c2 = 0.01**2, 0.03**2
    windows = [(a[0, i : i + 7, j : j + 7], b[0, i : i + 7, j : j + 7]) for i in range(3) for j in range(3)]
    values = []
    for x, y in windows:
        cov = np.cov(x.ravel(), y.ravel())
        top = (2 * x.mean() * y.mean() + c1) * (2 * cov[0, 1] + c2)
        values.append(top / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-10)


def test_ssim_falls_with_noise():
    a, noise = images((3, 16, 16), seed=2)
    mixed = [ssim(a, (1 - t) * a + t * noise) for t in (0.0, 0.1, 0.3, 1.0)]
    assert mixed == sorted(mixed, reverse=True)
    assert abs(mixed[-1]) < 0.2


def test_float32_images_are_scored_in_float64():
    a, b = (x.astype(np.float32) for x in images((3, 16, 16)))
    assert ssim(a, b) == ssim(a.astype(np.float64), b.astype(np.float64))


@pytest.mark.parametrize("offset", [0.5, 0.1, 0.01])
def test_mse_and_psnr_of_a_constant_offset(offset):
    a = np.full((3, 4, 4), 0.25)
    assert metrics.mse(a, a + offset) == pytest.approx(offset**2)
    assert metrics.psnr(a, a + offset) == pytest.approx(-20 * math.log10(offset))


def test_mse_and_psnr_limits():
    zeros, ones = np.zeros((1, 4, 4)), np.ones((1, 4, 4))
    assert metrics.mse(zeros, zeros) == 0.0
    assert metrics.psnr(zeros, zeros) == math.inf
    assert metrics.mse(zeros, ones) == 1.0
    assert metrics.psnr(zeros, ones) == 0.0


def smooth_image(seed, size=32, margin=8):
    """Larger than it is looked at, so that it can be moved without an end."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.random((3, size + 2 * margin, size + 2 * margin)), (0, 1.5, 1.5))
    return (field - field.min()) / (field.max() - field.min())


def window(field, dy=0, dx=0, size=32, margin=8):
    return field[:, margin - dy : margin - dy + size, margin - dx : margin - dx + size]


@pytest.mark.parametrize(("dy", "dx"), [(2, 0), (-3, 4), (0, -1), (4, 4)])
def test_a_shifted_copy_is_registered(dy, dx):
    field = smooth_image(0)
    assert metrics.psnr(window(field, dy, dx), window(field)) < 26
    assert metrics.registered_psnr(window(field, dy, dx), window(field)) > 60
    assert metrics.registered_psnr(window(field), window(field, dy, dx)) > 60


def test_a_copy_that_is_shifted_by_parts_of_a_pixel_is_registered():
    field = smooth_image(1)
    moved = np.clip(ndimage.shift(field, (0, 1.4, -0.7), order=3), 0, 1)
    plain = metrics.psnr(window(moved), window(field))
    assert metrics.registered_psnr(window(moved), window(field)) > plain + 10


def test_no_registration_makes_noise_a_copy_nor_an_image_worse():
    truth = window(smooth_image(2))
    rng = np.random.default_rng(3)
    others = [rng.random(truth.shape) for _ in range(8)] + [window(smooth_image(seed)) for seed in range(4, 12)]
    others += [np.full_like(truth, 0.5), np.zeros_like(truth), np.clip(truth + 0.1, 0, 1), truth[:, ::-1].copy()]
    for other in others:
        gain = metrics.registered_psnr(other, truth) - metrics.psnr(other, truth)
        assert 0 <= gain < 1.5
    assert metrics.registered_psnr(truth, truth) == math.inf
    # Beyond an eighth of the side it is another image: what overlaps would be less and less.
    field = smooth_image(0)
    assert (
        metrics.registered_psnr(window(field, 6, 0), window(field))
        < metrics.psnr(window(field, 6, 0), window(field)) + 1.5
    )


@pytest.mark.parametrize("metric", [metrics.mse, metrics.psnr, metrics.registered_psnr])
def test_bad_images_are_refused(metric):
    good = np.full((1, 8, 8), 0.5)
    for bad in (np.full((1, 8, 9), 0.5), np.full((1, 1, 8, 8), 0.5), good + 0.6, good - 0.6, good * np.nan):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match="Expected"):
                metric(*pair)
    with pytest.raises(ValueError, match="shape"):
        metric(good[0], good[0])
    with pytest.raises(ValueError, match="non-empty"):
        metric(good[:0], good[:0])
    spoiled = good.copy()
    spoiled[0, 3, 3] = np.nan
    with pytest.raises(ValueError, match="nan"):
        metric(good, spoiled)


def test_range_has_a_tolerance():
    ones = np.ones((1, 8, 8))
    assert metrics.mse(ones, ones + 5e-7) < 1e-12
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        metrics.mse(ones, ones + 2e-6)


def test_ssim_needs_a_window():
    small = np.zeros((1, 6, 8))
    with pytest.raises(ValueError, match="7x7"):
        ssim(small, small)


@pytest.mark.parametrize(
    ("figure", "spec", "text"),
    [
        (Figure(0.531, 0.444, 0.612, 8), "", "0.53 [0.44, 0.61]"),
        (Figure(0.531, 0.444, 0.612, 8), ".3f", "0.531 [0.444, 0.612]"),
        (Figure(0.531, 0.444, 0.612, 8), ".1%", "53.1 [44.4, 61.2]"),
        (Figure(0.531, 0.444, 0.612, 8), "+.2f", "+0.53 [+0.44, +0.61]"),
        (Figure(0.531, 0.444, 0.612, 8), "n", "0.53 [0.44, 0.61] (n = 8)"),
        (Figure(0.531, n=1), ".1fn", "0.5 (n = 1)"),
        (Figure(0.531), "", "0.53"),
        (Figure(None, n=4), "n", "-"),
        (Figure(-0.001, -0.004, 0.2), "", "0.00 [0.00, 0.20]"),
        (Figure(-0.0004, -0.01, 0.2), ".1%", "0.0 [-1.0, 20.0]"),
        (Figure(0.1, -0.004, 0.2), "+.2f", "+0.10 [-0.00, +0.20]"),  # that it contains 0 must be seen
    ],
)
def test_a_figure_as_text(figure, spec, text):
    assert format(figure, spec) == text


def test_a_figure_prints_itself_and_is_the_mean_of_values():
    values = [0.2, 0.4, 0.9]
    figure = mean_figure(values)
    assert str(figure) == f"{figure}" == f"{figure:.2f}"
    assert (figure.value, figure.n) == (pytest.approx(0.5), 3)
    assert (figure.low, figure.high) == statistics.mean_interval(values)
    bootstrap = mean_figure(values, statistics.bootstrap_interval)
    assert (bootstrap.low, bootstrap.high) == statistics.bootstrap_interval(values)
    assert mean_figure([0.5]) == Figure(0.5, n=1)
    assert mean_figure([]) == Figure(None, n=0)


def test_mean_interval_against_a_t_table():
    # t(0.975, 3 degrees of freedom) = 3.182; the sample has mean 2.5 and standard deviation sqrt(5 / 3).
    low, high = statistics.mean_interval([1.0, 2.0, 3.0, 4.0])
    assert (low + high) / 2 == pytest.approx(2.5)
    assert (high - low) / 2 == pytest.approx(3.182 * math.sqrt(5 / 3) / 2, rel=1e-3)


@pytest.mark.parametrize(("n", "confidence"), [(2, 0.95), (5, 0.5), (40, 0.99)])
def test_mean_interval_against_scipy(n, confidence):
    x = np.random.default_rng(n).normal(size=n)
    expected = stats.t.interval(confidence, n - 1, loc=x.mean(), scale=stats.sem(x))
    assert statistics.mean_interval(x, confidence) == pytest.approx(expected)


def test_mean_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(loc=3.0, size=(2000, 4))
    hits = sum(low <= 3.0 <= high for low, high in map(statistics.mean_interval, draws))
    assert abs(hits / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_mean_interval_limits():
    assert statistics.mean_interval([0.3]) is None
    assert statistics.mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    for bad in ([], [[1.0, 2.0]], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="values"):
            statistics.mean_interval(bad)
    for confidence in (0.0, 1.0, 95, math.nan):
        with pytest.raises(ValueError, match="confidence"):
            statistics.mean_interval([1.0, 2.0], confidence)


def test_proportion_interval_against_a_textbook():
    # Newcombe (1998), Table I, method 3: the Wilson interval of 81/263, 15/148, 0/20 and 1/29.
    for successes, n, expected in [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ]:
        assert statistics.proportion_interval(successes, n) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("n", [1, 7, 360])
def test_proportion_interval_against_scipy_and_bounds(n):
    for successes in range(n + 1):
        low, high = statistics.proportion_interval(successes, n)
        twin = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        assert (low, high) == pytest.approx((twin.low, twin.high), abs=1e-12)
        assert 0.0 <= low <= successes / n <= high <= 1.0
        assert low < high


def test_proportion_interval_refuses():
    for successes, n in [(0, 0), (-1, 5), (6, 5)]:
        with pytest.raises(ValueError, match="Expected"):
            statistics.proportion_interval(successes, n)


@pytest.mark.parametrize("shape", [(1, 7, 7), (3, 8, 11), (3, 32, 32)])
def test_the_ssim_table_is_the_pinned_call_for_each_pair(shape):
    rng = np.random.default_rng(0)
    a, b = rng.random((3, *shape)), rng.random((4, *shape)).astype(np.float32)
    b[1] = 0.7 * a[2] + 0.3 * b[1]
    b[2] = 0.5  # constant
    b[3] = a[0]
    table = metrics.ssim_table(a, b)
    twin = [[structural_similarity(x, y, data_range=1.0, channel_axis=0) for y in b.astype(float)] for x in a]
    np.testing.assert_allclose(table, twin, atol=1e-9)


def test_the_ssim_table_refuses_bad_images():
    good = np.full((2, 1, 8, 8), 0.5)
    for bad in (good[:, :, :6], good[0], good + 0.6, good * np.nan, np.full((2, 3, 8, 8), 0.5)):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match="Expected"):
                metrics.ssim_table(*pair)


def test_the_bootstrap_interval_covers_the_mean():
    """As often as it says, for values that are far from normal; with the plain percentiles it would be 0.88."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = statistics.bootstrap_interval(rng.random(8) ** 2)
        covered += low <= 1 / 3 <= high
    assert 0.91 < covered / 400 < 0.98


def test_the_bootstrap_interval_is_wider_than_the_plain_one():
    values = np.random.default_rng(1).random(6)
    low, high = statistics.bootstrap_interval(values)
    plain = stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    assert values.min() <= low < plain.low < plain.high < high <= values.max()
    t = statistics.mean_interval(values)
    assert high - low == pytest.approx(t[1] - t[0], rel=0.15)
    assert statistics.bootstrap_interval(values) == (low, high)  # by a fixed seed


def test_bootstrap_limits_and_refusals():
    assert statistics.bootstrap_interval([0.3]) is None
    assert statistics.bootstrap_interval([0.3] * 5) == (0.3, 0.3)
    for bad in ([], [math.nan, 1.0], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="Expected at least one finite value"):
            statistics.bootstrap_interval(bad)


@pytest.mark.parametrize("n", [1, 4, 9, 14])
def test_the_sign_flip_test_is_exact(n):
    rng = np.random.default_rng(n)
    a, b = rng.random(n) + 0.1, rng.random(n)
    found = statistics.paired_difference(a, b)
    assert found.difference == pytest.approx(np.mean(a - b))
    assert found.interval == statistics.bootstrap_interval(a - b)
    sums = [abs(np.dot(signs, a - b)) for signs in itertools.product((1, -1), repeat=n)]
    assert found.p_value == pytest.approx(np.mean(np.array(sums) >= abs((a - b).sum()) - 1e-12))
    if n > 1:  # SciPy refuses a single pair
        twin = stats.permutation_test((a - b,), np.sum, permutation_type="samples", n_resamples=2**n)
        assert found.p_value == pytest.approx(twin.pvalue)
    assert found.p_value >= 2 ** (1 - n)


def test_the_sign_flip_test_of_many_pairs_is_nearly_exact():
    rng = np.random.default_rng(0)
    for shift in (0.05, 0.12, 0.0):
        a, b = rng.random(40) + shift, rng.random(40)
        exact = stats.permutation_test(
            (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", n_resamples=20000, rng=1
        )
        assert statistics.paired_difference(a, b).p_value == pytest.approx(exact.pvalue, abs=0.02)


def test_paired_differences():
    assert statistics.paired_difference([0.5] * 10, [0.1] * 10).p_value == 2 / 2**10  # all signs alike
    nothing = statistics.paired_difference([0.5, 0.2], [0.5, 0.2])
    assert (nothing.difference, nothing.interval, nothing.p_value) == (0.0, (0.0, 0.0), 1.0)
    with pytest.raises(ValueError, match="Expected pairs, got 2 and 3 values"):
        statistics.paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
