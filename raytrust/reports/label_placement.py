"""Places labels beside the points that they name: geometry in pixels, without matplotlib.

A box is (left, bottom, right, top); a line is its two ends.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class _Choices(NamedTuple):
    """Where one label may go, at k places."""

    centres: Array  # (k, 2)
    boxes: Array  # (k, 4): left, bottom, right, top, with a small margin
    lines: Array  # (k, 2 ends, 2): from the anchor to the label
    cost: Array  # (k,), as long as no other label is placed


def place_labels(anchors: Array, sizes: Array, radius: float, bounds: Array, clutter: Array) -> Array:
    """Centres (n, 2) for labels of ``sizes`` (n, 2) beside ``anchors`` (n, 2), in pixels and inside ``bounds``.

    Greedy, then refined: in each pass every label moves to the cheapest of its candidates, given the others, until
    none moves or six passes are over. Dearest is to cover a label or a point (a square of half side ``radius``), then
    a line through or across others, then ``clutter`` (m lines, 2 ends, 2) beneath, then distance. Of three orders to
    start from, the cheapest outcome is taken. Deterministic.
    """
    n = len(anchors)
    options = [_choices(anchors[i], sizes[i], np.delete(anchors, i, 0), radius, bounds, clutter) for i in range(n)]
    crowding = np.linalg.norm(anchors[:, None] - anchors, axis=2).sum(axis=1)  # least in the middle
    outcomes = []
    for order in (np.argsort(crowding), np.argsort(-crowding), np.argsort(anchors[:, 0])):
        chosen = np.full(n, -1)
        boxes, lines = np.full((n, 4), np.nan), np.full((n, 2, 2), np.nan)  # NaN: not placed, so in nobody's way
        for _ in range(6):
            before, total = chosen.copy(), 0.0
            for i in order:
                boxes[i] = lines[i] = np.nan
                cost = options[i].cost + _conflicts(options[i], boxes, lines)
                chosen[i] = best = int(np.argmin(cost))
                boxes[i], lines[i], total = options[i].boxes[best], options[i].lines[best], total + float(cost[best])
            if np.array_equal(before, chosen):
                break
        outcomes.append((total, chosen))
    _, chosen = min(outcomes, key=lambda outcome: outcome[0])
    return np.array([option.centres[best] for option, best in zip(options, chosen, strict=True)])


def _choices(anchor: Array, size: Array, others: Array, radius: float, bounds: Array, clutter: Array) -> _Choices:
    """The places of a label of ``size`` (2,) around its ``anchor`` (2,), among the points ``others`` (n - 1, 2)."""
    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    towards = np.column_stack([np.cos(angles), np.sin(angles)])
    reach = radius * np.array([1.2, 1.5, 2.1, 3.0, 4.2, 6.0, 8.5, 12.0, 17.0, 24.0, 32.0])
    half = size / 2 + 2
    centres = anchor + (reach[:, None, None] * towards + np.clip(1.5 * towards, -1, 1) * half).reshape(-1, 2)
    boxes = np.concatenate([centres - half, centres + half], axis=1)
    points = np.concatenate([others - radius, others + radius], axis=1)
    tips = np.clip(anchor, boxes[:, :2], boxes[:, 2:])
    lines = np.stack([np.broadcast_to(anchor, tips.shape), tips], axis=1)
    way = np.sort(np.abs(tips - anchor), axis=1)

    cost = 1e5 * (np.maximum(bounds[:2] - boxes[:, :2], boxes[:, 2:] - bounds[2:]).max(axis=1) > 0)
    cost += 3e3 * _touching(boxes, points) + 15 * _length_within(lines, points).sum(axis=1)
    cost += 100 * ((way[:, 0] < radius / 3) & (way[:, 1] > 2 * radius))  # a line that looks like an interval's bar
    cost += 0.3 * _length_within(clutter, boxes).sum(axis=0) + np.linalg.norm(way, axis=1)
    cost += np.tile(16 * (1 - np.abs(towards[:, 0])), len(reach))  # beside its point a label reads best
    return _Choices(centres, boxes, lines, cost)


def _conflicts(choices: _Choices, boxes: Array, lines: Array) -> Array:
    """What each choice (k,) costs for its conflicts with labels in ``boxes`` (n, 4) and with ``lines`` (n, 2, 2)."""
    cost = 1e4 * _touching(choices.boxes, boxes) + 5 * _length_within(choices.lines, boxes).sum(axis=1)
    cost += 5 * _length_within(lines, choices.boxes).sum(axis=0)
    return np.asarray(cost + 150 * _crossing(choices.lines, lines))


def _touching(boxes: Array, others: Array) -> NDArray[np.int64]:
    """How many of ``others`` (m, 4) each of ``boxes`` (n, 4) overlaps; a box is left, bottom, right, top."""
    overlap = (boxes[:, None, :2] < others[:, 2:]) & (others[:, :2] < boxes[:, None, 2:])
    return np.asarray((overlap[..., 0] & overlap[..., 1]).sum(axis=1))


def _length_within(segments: Array, boxes: Array) -> Array:
    """The length of each of ``segments`` (n, 2 ends, 2) inside each of ``boxes`` (m, 4): (n, m)."""
    start, way = segments[:, 0], segments[:, 1] - segments[:, 0]
    enter, leave = np.zeros((2, len(segments), len(boxes)))
    leave += 1
    for axis in (0, 1):  # where it meets the box's two sides, as shares of the segment
        step = np.where(way[:, axis] == 0, 1e-9, way[:, axis])[:, None]
        one, two = ((boxes[:, side] - start[:, axis, None]) / step for side in (axis, axis + 2))
        enter, leave = np.maximum(enter, np.minimum(one, two)), np.minimum(leave, np.maximum(one, two))
    return np.nan_to_num((leave - enter).clip(min=0) * np.hypot(*way.T)[:, None])


def _crossing(lines: Array, others: Array) -> NDArray[np.int64]:
    """How many of ``others`` (m, 2 ends, 2) each of ``lines`` (n, 2 ends, 2) crosses: (n,)."""

    def side(a: Array, b: Array, c: Array) -> Array:  # > 0 where c lies left of the line from a to b
        return np.sign((b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0])

    start, tip, one, two = lines[:, None, 0], lines[:, None, 1], others[:, 0], others[:, 1]
    apart = side(start, tip, one) * side(start, tip, two) < 0
    return np.asarray((apart & (side(one, two, start) * side(one, two, tip) < 0)).sum(axis=1))
