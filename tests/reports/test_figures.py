"""The private images beside what the attacks made of them."""

from __future__ import annotations

import numpy as np
import pytest
from drawings import png_size, texts

from raytrust.reports import reconstructions as figures
from raytrust.reports.reconstructions import Drawn


def pictures(n, channels, side=8, seed=0):
    return np.random.default_rng(seed).random((n, channels, side, side))


@pytest.mark.parametrize(("n", "channels", "defences"), [(1, 1, 1), (4, 3, 6), (10, 1, 24), (3, 1, 0)])
def test_reconstructions_figure(tmp_path, drawn, n, channels, defences):
    truth = pictures(n, channels)
    rows = [
        Drawn(f"defence {i} " + "long " * i, pictures(n, channels, seed=i), [0.5] * n, [i % 2 == 0] * n, "aware")
        for i in range(defences)
    ]
    path = tmp_path / "reconstructions.png"
    figures.reconstructions_figure(truth, rows, path)
    width, height = png_size(path)
    assert path.stat().st_size > 2000
    assert list(tmp_path.iterdir()) == [path]
    (fig,) = drawn
    shown = min(n, figures.MOST_SHOWN)
    assert len(fig.axes[0].images) == shown * (defences + 1)
    assert all(image.get_window_extent().width > 130 for image in fig.axes[0].images)  # pixels: large enough to see
    artists = [*texts(fig), *fig.axes[0].images]
    boxes = np.array([artist.get_window_extent().extents for artist in artists])
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= [width, height]).all()
    overlap = (boxes[:, None, :2] < boxes[:, 2:] - 0.5) & (boxes[:, :2] < boxes[:, None, 2:] - 0.5)
    assert overlap.all(axis=2).sum() == len(boxes)  # each with itself


def test_reconstructions_figure_shows_the_numbers_and_the_pixels(tmp_path, drawn):
    truth = pictures(2, 1)
    figures.reconstructions_figure(truth, [("sign", truth[::-1], [0.25, -0.02])], tmp_path / "r.png")
    words = [t.get_text() for t in texts(drawn[0])]
    assert words == ["original", "sign\nmean SSIM 0.12 (n = 2)", "0.25", "-0.02"]
    images = drawn[0].axes[0].images
    assert all(image.get_interpolation() == "nearest" for image in images)
    for image, expected in zip(images, [truth[0], truth[1], truth[1], truth[0]], strict=True):
        assert np.array_equal(image.get_array()[..., 0], expected[0])
        assert np.array_equal(image.get_array()[..., 2], expected[0])


def test_identified_images_are_framed_and_the_attacker_is_named(tmp_path, drawn):
    truth = pictures(3, 1)
    row = Drawn("PowerSGD rank 1", truth, [0.5, 0.6, 0.7], [True, False, True], "naive")
    figures.reconstructions_figure(truth, [row], tmp_path / "r.png")
    (fig,) = drawn
    assert len(fig.axes[0].lines) == 2
    words = " ".join(t.get_text() for t in texts(fig))
    assert "attacker ignores the compressor" in words
    assert "2 of 3 identified" in " ".join(words.split())
    assert "Framed: identified" in words


def test_of_many_images_the_first_are_drawn_and_all_are_counted(tmp_path, drawn):
    truth = pictures(12, 1)
    figures.reconstructions_figure(truth, [Drawn("none", truth, [0.0] * 6 + [1.0] * 6)], tmp_path / "r.png")
    words = " ".join(t.get_text() for t in texts(drawn[0]))
    assert "mean SSIM 0.50 (n = 12)" in words
    assert "The first 8 of 12 images." in words


def test_the_strip_tells_the_story_in_few_rows(tmp_path, drawn):
    truth = pictures(2, 1)

    def both(name, naive, aware):
        return [Drawn(name, truth, [ssim] * 2, None, kind) for kind, ssim in (("naive", naive), ("aware", aware))]

    rows = [
        *both("PowerSGD rank 1", 0.1, 0.7),
        Drawn("none", truth, [0.8] * 2),
        *both("Top-K level 1", 0.2, 0.5),
        *both("PowerSGD rank 4", 0.5, 0.7),
        Drawn("signSGD", truth, [0.3] * 2, None, "naive"),
    ]
    for names in (None, ["Top-K level 1"]):
        figures.strip_figure(truth, rows, tmp_path / "strip.png", names)
    chosen = [[t.get_text().split("\n")[0] for t in texts(fig) if "mean SSIM" in t.get_text()] for fig in drawn]
    assert chosen[0] == ["none", "PowerSGD rank 1", "PowerSGD rank 1", "Top-K level 1", "Top-K level 1"]
    assert chosen[1] == ["none", "Top-K level 1", "Top-K level 1"]


def test_reconstructions_figure_refuses(tmp_path):
    truth, path = pictures(2, 1), tmp_path / "r.png"
    for bad in (truth[0], pictures(2, 2), truth[:0], truth + 1, truth * np.nan):
        with pytest.raises(ValueError, match="Expected"):
            figures.reconstructions_figure(bad, [], path)
    for images, ssim in [(pictures(2, 3), [0, 0]), (truth[:1], [0]), (truth, [0]), (truth - 1, [0, 0])]:
        with pytest.raises(ValueError, match="Expected"):
            figures.reconstructions_figure(truth, [("bad", images, ssim)], path)
    with pytest.raises(ValueError, match="Expected"):
        figures.reconstructions_figure(truth, [Drawn("bad", truth, [0, 0], [True])], path)
    assert not path.exists()
