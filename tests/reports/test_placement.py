from __future__ import annotations

import numpy as np
import pytest

from raytrust.reports import label_placement as placement


@pytest.mark.parametrize("seed", range(2))
def test_placed_labels_keep_apart_in_a_crowd(seed):
    rng = np.random.default_rng(seed)
    anchors = np.array([700.0, 500.0]) + rng.normal(size=(24, 2)) * [150, 60]
    sizes = np.column_stack([rng.uniform(60, 200, 24), rng.choice([20.0, 38.0], 24)])
    bounds = np.array([100.0, 100.0, 1500.0, 1000.0])
    centres = placement.place_labels(anchors, sizes, 13.0, bounds, clutter=np.empty((0, 2, 2)))
    low, high = centres - sizes / 2, centres + sizes / 2
    assert (low >= bounds[:2]).all()
    assert (high <= bounds[2:]).all()
    for i in range(24):
        for j in range(i):
            assert (low[i] >= high[j]).any() or (low[j] >= high[i]).any()


def test_length_within_a_box():
    segments = np.array([[[0, 0], [10, 0]], [[0, 0], [3, 4]], [[5, 5], [5, 5]], [[0, 9], [1, 9]]], dtype=float)
    boxes = np.array([[2, -1, 6, 1], [-1, -1, 20, 8], [4, 4, 6, 6]], dtype=float)
    expected = [[4, 10, 0], [0, 5, 0], [0, 0, 0], [0, 0, 0]]
    assert placement._length_within(segments, boxes) == pytest.approx(np.array(expected), abs=1e-6)


def test_crossing_lines():
    segments = np.array([[[1, -1], [1, 1]], [[3, -1], [3, 1]], [[0, 1], [9, 1]]], dtype=float)
    lines = np.array([[[0, 0], tip] for tip in ([2, 0], [4, 0], [4, 5], [-1, 0])], dtype=float)
    assert placement._crossing(lines, segments).tolist() == [1, 2, 1, 0]


def test_what_is_not_placed_is_in_no_way():
    box, line = np.array([[0.0, 0.0, 9.0, 9.0]]), np.array([[[0.0, 0.0], [9.0, 9.0]]])
    nobox, noline = np.full((3, 4), np.nan), np.full((3, 2, 2), np.nan)
    assert placement._touching(box, nobox).tolist() == [0]
    assert placement._crossing(line, noline).tolist() == [0]
    assert not placement._length_within(line, nobox).any()
    assert not placement._length_within(noline, box).any()
