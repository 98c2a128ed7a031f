"""The figure of accuracy against leakage: what it shows, and that it can be read."""

from __future__ import annotations

import time

import numpy as np
import pytest
from drawings import png_size, texts
from frontier_rows import FLOOR, audited, control, failed, finished, sweep
from matplotlib.colors import to_hex

from raytrust.reports.frontier_figure import STYLES, frontier_figure
from raytrust.reports.text import human_bytes
from raytrust.studies.frontier.row import split
from raytrust.studies.frontier.verdicts import judge_rows

FRONTIERS = {
    "as it should be": audited(),
    "the attack fails": [control(works=False), *sweep(10), failed()],
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


def names(fig):
    """The texts that stand before the lines."""
    return [t for t in fig.axes[0].texts if t.get_ha() == "right" and not t.get_text().startswith("floor ")]


def marks(fig, *shapes):
    return [line for line in fig.axes[0].lines if line.get_marker() in shapes]


def words(fig):
    return " ".join(t.get_text() for t in texts(fig))


@pytest.mark.parametrize("rows", FRONTIERS.values(), ids=FRONTIERS)
def test_frontier_figure_is_a_png_inside_which_all_text_lies(tmp_path, drawn, rows):
    path = tmp_path / "frontier.png"
    frontier_figure(rows, path, title="A $title$ with 100 %")
    width, height = png_size(path)
    assert width == 1400
    assert height > 400
    assert path.stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [path]
    (fig,) = drawn
    for artist in [*texts(fig), *fig.legends]:
        box = artist.get_window_extent()
        assert box.x0 >= 0, artist
        assert box.y0 >= 0, artist
        assert box.x1 <= width, artist
        assert box.y1 <= height, artist


@pytest.mark.parametrize("rows", FRONTIERS.values(), ids=FRONTIERS)
def test_what_must_be_read_is_large_enough_for_a_small_screen(tmp_path, drawn, rows):
    """Shrunk to 400 pixels, 10 points are 7 pixels high; only the notes at the foot are smaller."""
    frontier_figure(rows, tmp_path / "frontier.png")
    (fig,) = drawn
    small = [t.get_text() for t in texts(fig) if t.get_fontsize() < 10]
    notes = ("Accuracy: test images", "Failed, not plotted", "No defence finished.")
    assert not small or small[-1].startswith(notes)
    assert all(t in {t.get_text() for t in fig.texts} for t in small)


@pytest.mark.parametrize("name", ["as it should be", "14 defences", "a ruined model", "long names", "the attack fails"])
def test_every_defence_has_its_name_and_its_cost_beside_its_marks(tmp_path, drawn, name):
    rows = FRONTIERS[name]
    frontier_figure(rows, tmp_path / "frontier.png")
    (fig,) = drawn
    done, _ = split(rows)
    assert len(names(fig)) == len(done)
    boxes = [t.get_window_extent() for t in texts(fig)]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    fig.draw_without_rendering()
    places = [label.get_position()[1] for label in names(fig)]
    assert places == sorted(places)  # least leakage on top
    for y, row, label in zip(places, done, names(fig), strict=True):
        assert row["name"].startswith(" ".join(label.get_text().split()).removesuffix("..."))
        costs = [t.get_text() for t in fig.axes[1].texts if t.get_position()[1] == y]
        assert costs == [f"{100 * row['accuracy']:.1f} %", human_bytes(row["bytes_per_step"])]
        panel = fig.axes[0]
        assert label.get_window_extent().x1 < panel.get_window_extent().x0
        (mark,) = [m for m in marks(fig, "*", "o", "s", "D") if m.get_markersize() > 6 and m.get_ydata()[0] == y]
        assert mark.get_xdata()[0] == row["leakage_ssim"]


def test_names_are_cut_late_and_nothing_of_a_method_is_torn_apart(tmp_path, drawn):
    long = "DP-SGD noise 0.1, clip 1 + PowerSGD rank 4 + EF, epsilon 6.73e+03"
    short = "noise 0.003 + Top-K 17 % (bytes of rank 4) + EF"
    frontier_figure([finished(long, leakage=0.5), finished(short, leakage=0.6)], tmp_path / "frontier.png")
    first, second = (t.get_text() for t in names(drawn[0]))
    assert first == "DP-SGD noise 0.1, clip 1\n+ PowerSGD rank 4 + EF,\nepsilon 6.73e+03"
    assert second == "noise 0.003 + Top-K 17 %\n+ EF"


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.42, 0.75])
def test_the_floor_s_caption_lies_above_its_panel(tmp_path, drawn, floor):
    rows = [finished(str(x), leakage=x, floor_ssim=floor) for x in (0.1, 0.8)]
    frontier_figure(rows, tmp_path / "frontier.png")
    (caption,) = [t for t in drawn[0].axes[0].texts if t.get_text().startswith("floor ")]
    box, panel = caption.get_window_extent(), drawn[0].axes[0].get_window_extent()
    assert panel.x0 <= box.x0
    assert box.x1 <= panel.x1 + 1


def test_numbers_under_the_panels_are_apart(tmp_path, drawn):
    rows = [finished("one", 0.94, 0.99), finished("two", 0.99, 0.2)]
    frontier_figure(rows, tmp_path / "frontier.png")
    left, right = (
        [
            t.get_window_extent()
            for t in ax.get_xticklabels()
            if ax.get_xlim()[0] <= t.get_position()[0] <= ax.get_xlim()[1]
        ]
        for ax in drawn[0].axes
    )
    assert max(box.x1 for box in left) + 5 < min(box.x0 for box in right)


def test_the_figure_makes_its_point_in_words_and_by_a_line(tmp_path, drawn):
    """PowerSGD 1 looks private to the naive attack, and leaks to one who knows the compressor."""
    frontier_figure(audited(), tmp_path / "frontier.png")
    (fig,) = drawn
    assert "PowerSGD rank 1 looks private to an attacker who ignores the compressor (SSIM 0.12), and" in words(fig)
    assert {t.get_text() for t in names(fig) if t.get_weight() == "bold"} == {"none", "PowerSGD rank 1"}
    assert "attacker ignores the compressor" in [t.get_text() for t in fig.legends[0].get_texts()]
    colour, _, _ = STYLES["leaks"]
    lines = [line for line in fig.axes[0].lines if line.get_marker() == "None" and line.get_alpha() is None]
    (line,) = [line for line in lines if line.get_linewidth() > 2]
    assert to_hex(line.get_color()) == colour.lower()
    assert list(line.get_xdata()) == [0.12, 0.72]


def test_each_verdict_has_a_colour_and_a_form_and_the_floor_is_shown(tmp_path, drawn):
    rows = judge_rows(audited())
    frontier_figure(rows, tmp_path / "frontier.png")
    (fig,) = drawn
    for verdict, (colour, marker, label) in STYLES.items():
        expected = sum(row["verdict"] == verdict and row["compressor"] != "none" for row in rows)
        drawn_marks = [m for m in marks(fig, marker) if to_hex(m.get_color()) == colour.lower()]
        assert len(drawn_marks) == expected
        assert label in [t.get_text() for t in fig.legends[0].get_texts()]
    assert len(marks(fig, "*")) == 1
    assert f"floor {FLOOR:.2f}: reached without any attack" in words(fig)
    naive = [m for m in marks(fig, "o") if m.get_markersize() == 6]
    assert len(naive) == sum(row["status"] == "finished" for row in rows) - 1  # of every compressed defence
    edges = [m for m in marks(fig, "*", "o", "s", "D") if m.get_markeredgecolor() == "black"]
    assert len(edges) == sum(row["pareto"] for row in rows)


def test_the_figure_says_so_where_the_attack_fails(tmp_path, drawn):
    frontier_figure([control(works=False), *sweep(4), finished("low", leakage=0.05)], tmp_path / "frontier.png")
    frontier_figure([finished("low", leakage=0.05)], tmp_path / "frontier.png")
    failing, missing = drawn
    assert "THE ATTACK FAILS HERE" in words(failing)
    assert "nothing can be said about any defence" in words(failing)
    assert "NO CONTROL" in words(missing)
    for fig in drawn:
        legend = [t.get_text() for t in fig.legends[0].get_texts()]
        assert "undecided" in legend
        assert not {"resists the attacks tried", "black edge: Pareto set"} & set(legend)
        assert not [m for m in marks(fig, "*", "o", "s", "D") if m.get_markeredgecolor() == "black"]
        (shout,) = [t for t in texts(fig) if t.get_text() in ("THE ATTACK FAILS HERE", "NO CONTROL")]
        assert shout.get_fontsize() >= 24
        box = shout.get_window_extent()
        for mark in marks(fig, "*", "o", "s", "D"):  # the words hide no mark
            (place,) = fig.axes[0].transData.transform(np.column_stack(mark.get_data()))
            assert not box.contains(*place)


def test_frontier_figure_lists_a_failure_and_does_not_plot_it(tmp_path, drawn):
    frontier_figure([*sweep(3), failed("broken", reason="disk full")], tmp_path / "frontier.png")
    (fig,) = drawn
    note = " ".join(t.get_text() for t in fig.texts)
    assert "broken (disk full)" in note
    assert "n = 360" in note
    assert "n = 8" in note
    assert not any("broken" in t.get_text() for t in fig.axes[0].texts)
    assert len([m for m in marks(fig, "*", "o", "s", "D") if m.get_markersize() > 6]) == 3


def test_frontier_figure_shows_every_point(tmp_path, drawn):
    rows = [*sweep(10), finished("ruined", accuracy=0.2, leakage=0.9)]
    frontier_figure(rows, tmp_path / "frontier.png")
    leakage, accuracy = drawn[0].axes
    (x0, x1), (y0, y1) = leakage.get_xlim(), accuracy.get_xlim()
    for row in rows:
        assert x0 < row["naive_ssim"] < row["leakage_ssim"] < x1
        assert y0 < row["accuracy"] < y1
    assert max(tick for tick in accuracy.get_xticks() if tick <= y1) <= 1


def test_frontier_figure_of_a_large_sweep_takes_little_time(tmp_path):
    rows, seconds = [*sweep(22), finished("ruined", accuracy=0.3, leakage=0.02)], []
    for _ in range(3):
        start = time.process_time()
        frontier_figure(rows, tmp_path / "frontier.png")
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.5
