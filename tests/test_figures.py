from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from frontier_rows import failed, finished, sweep
from matplotlib.figure import Figure

from raytrust import figures, report


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, for a look at their artists."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda fig, *args, **kwargs: (saved.append(fig), save(fig, *args, **kwargs)))
    return saved


def texts(fig):
    return [t for t in [*fig.texts, *(t for ax in fig.axes for t in ax.texts)] if t.get_text()]


FRONTIERS = {
    "14 defences": [*sweep(14), failed()],
    "all failed": [failed("one"), failed("two", reason="reason " * 60)],
    "nothing": [],
    "single": [finished()],
    "single without intervals": [finished(accuracy_interval=None, leakage_interval=None, n_images=1)],
    "one image": sweep(5, n_images=1, leakage_interval=None),
    "long names": [row | {"name": f"{row['name']} {'very ' * 12}long ${i}_x$"} for i, row in enumerate(sweep(6))],
    "equal points": [finished(name=f"twin {i}") for i in range(4)],
    "equal bytes, unknown compressors": [finished(f"d{i}", compressor=f"new{i}") for i in range(12)],
    "a ruined model": [*sweep(9), finished("ruined", accuracy=0.3, leakage=0.02)],
    "bytes unknown": sweep(3, bytes_per_step=None),
    "perfect": [finished(accuracy=1.0, leakage=1.0), finished("zero", accuracy=0.0, leakage=-0.05)],
}


@pytest.mark.parametrize("rows", FRONTIERS.values(), ids=FRONTIERS)
def test_frontier_figure_is_a_png_inside_which_all_text_lies(tmp_path, drawn, rows):
    path = tmp_path / "frontier.png"
    figures.frontier_figure(rows, path, title="A $title$ with 100 %")
    width, height = png_size(path)
    assert width == 1800
    assert height > 1000
    assert path.stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [path]
    (fig,) = drawn
    for artist in [*texts(fig), *(ax.get_legend() for ax in fig.axes if ax.get_legend())]:
        box = artist.get_window_extent()
        assert box.x0 >= 0, artist
        assert box.y0 >= 0, artist
        assert box.x1 <= width, artist
        assert box.y1 <= height, artist


@pytest.mark.parametrize("name", ["14 defences", "a ruined model", "long names"])
def test_frontier_labels_name_every_point_without_overlap(tmp_path, drawn, name):
    rows = FRONTIERS[name]
    figures.frontier_figure(rows, tmp_path / "frontier.png")
    labels = [t for t in drawn[0].axes[0].texts if "compressed" not in t.get_text()]
    assert len(labels) == sum(row["status"] == "finished" for row in rows)
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert ("compressed" in " ".join(t.get_text() for t in texts(drawn[0]))) == (name == "a ruined model")


def test_frontier_figure_lists_a_failure_and_does_not_plot_it(tmp_path, drawn):
    figures.frontier_figure([*sweep(3), failed("broken", reason="disk full")], tmp_path / "frontier.png")
    (fig,) = drawn
    note = " ".join(t.get_text() for t in fig.texts)
    assert "broken (disk full)" in note
    assert "n = 360" in note
    assert "n = 4" in note
    assert not any("broken" in t.get_text() for t in fig.axes[0].texts)
    markers = [line for line in fig.axes[0].lines if line.get_marker() not in ("None", None, "")]
    assert len(markers) == 3


def test_frontier_figure_shows_every_point_and_its_pareto_stairs(tmp_path, drawn):
    rows = [*sweep(10), finished("ruined", accuracy=0.2, leakage=0.9)]
    figures.frontier_figure(rows, tmp_path / "frontier.png")
    ax = drawn[0].axes[0]
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    for row in rows:
        assert x0 < row["leakage_ssim"] < x1
        assert y0 < 100 * row["accuracy"] < y1
    (stairs,) = [line for line in ax.lines if line.get_color() == figures._STAIRS]
    x, y = stairs.get_xdata(), stairs.get_ydata()
    assert (np.diff(x) >= 0).all()
    assert (np.diff(y) >= 0).all()
    best = {(row["leakage_ssim"], 100 * row["accuracy"]) for row in report.mark_pareto(rows) if row["pareto"]}
    assert best <= set(zip(x, y, strict=True))


def test_frontier_figure_leaves_out_the_scale_of_unknown_bytes(tmp_path, drawn):
    some = [*sweep(3), *sweep(3, seed=1, bytes_per_step=None)]
    for rows in (sweep(3), some, sweep(3, bytes_per_step=None)):
        figures.frontier_figure(rows, tmp_path / "frontier.png")
    legends = [[t.get_text() for t in fig.axes[0].get_legend().get_texts()] for fig in drawn]
    assert [len(fig.axes) for fig in drawn] == [2, 2, 1]
    assert ["grey: bytes unknown" in legend for legend in legends] == [False, True, True]


def test_frontier_figure_of_a_large_sweep_takes_little_time(tmp_path):
    rows, seconds = [*sweep(22), finished("ruined", accuracy=0.3, leakage=0.02)], []
    for _ in range(3):
        start = time.process_time()
        figures.frontier_figure(rows, tmp_path / "frontier.png")
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.5


def pictures(n, channels, side=8, seed=0):
    return np.random.default_rng(seed).random((n, channels, side, side))


@pytest.mark.parametrize(("n", "channels", "defences"), [(1, 1, 1), (4, 3, 6), (10, 1, 24), (3, 1, 0)])
def test_reconstructions_figure(tmp_path, drawn, n, channels, defences):
    truth = pictures(n, channels)
    rows = [(f"defence {i} " + "long " * i, pictures(n, channels, seed=i), [0.5] * n) for i in range(defences)]
    path = tmp_path / "reconstructions.png"
    figures.reconstructions_figure(truth, rows, path)
    width, height = png_size(path)
    assert path.stat().st_size > 2000
    assert list(tmp_path.iterdir()) == [path]
    (fig,) = drawn
    assert len(fig.axes[0].images) == n * (defences + 1)
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


def test_reconstructions_figure_refuses(tmp_path):
    truth, path = pictures(2, 1), tmp_path / "r.png"
    for bad in (truth[0], pictures(2, 2), truth[:0], truth + 1, truth * np.nan):
        with pytest.raises(ValueError, match="Expected"):
            figures.reconstructions_figure(bad, [], path)
    for images, ssim in [(pictures(2, 3), [0, 0]), (truth[:1], [0]), (truth, [0]), (truth - 1, [0, 0])]:
        with pytest.raises(ValueError, match="Expected"):
            figures.reconstructions_figure(truth, [("bad", images, ssim)], path)
    assert not path.exists()
