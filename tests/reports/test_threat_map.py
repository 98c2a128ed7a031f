"""The map of threats: its headline, its cells, and a picture that holds all its words, also of a single threat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from drawings import png_size
from frontier_rows import control, failed, finished
from matplotlib.text import Text

from raytrust.config import TrainConfig
from raytrust.config.threats import Cell
from raytrust.reports.threat_map import draw_map, headline, map_table
from raytrust.studies.frontier.verdicts import judge_rows
from raytrust.studies.threats.study import Mapped


def mapped(*rows: Any, works: bool = True) -> Mapped:
    return Mapped(Cell("untrained", TrainConfig(workers=1)), judge_rows([control(works), *rows]))


def test_the_headline_counts_and_says_no_more_than_there_is() -> None:
    one = mapped(finished("a", leakage=0.7), finished("b", leakage=0.05), failed())
    said = (
        "the attack works without a defence in 1; of 2 cells there, 1 leaks, 1 resists the attacks tried, 0 undecided."
    )
    assert headline([one]) == f"Of 1 threat, {said}"
    others = " In the others nothing can be said, but that what leaks, leaks."
    assert headline([one, mapped(works=False)]) == f"Of 2 threats, {said}{others}"
    assert headline([mapped()]) == "Of 1 threat, the attack works without a defence in 1."
    assert headline([mapped(works=False)]).endswith(
        "in 0; nothing can be said about any defence, but that what leaks, leaks."
    )


def test_a_cell_says_how_many_guessing_identifies() -> None:
    few = finished("few", leakage=0.05, n_images=64, identified=13, candidates=6)
    _, (_, none, cell, no_result) = map_table([mapped(few, failed(reason="no place"))])
    assert none == "leaks: 0.80 [0.70, 0.90], floor 0.20, 8 of 8 identified (by chance 0.08)"
    assert cell == "resists: 0.05 [-0.05, 0.15], floor 0.20, 13 of 64 identified (by chance 11)"
    assert no_result == "no result: no place"
    _, (_, _, alone) = map_table([mapped(finished("alone", leakage=0.05, candidates=1))])
    assert alone.endswith("identified")


@pytest.mark.parametrize("columns", [0, 1, 2])
@pytest.mark.parametrize("threats", [1, 3])
def test_all_words_lie_within_the_picture(tmp_path: Path, drawn: list[Any], columns: int, threats: int) -> None:
    rows = [finished("PowerSGD rank 4"), finished("DP-SGD noise 0.1, clip 1", leakage=0.05)][:columns]
    draw_map([mapped(*rows)] * threats, tmp_path / "map.png")
    (figure,) = drawn
    width, height = png_size(tmp_path / "map.png")
    words = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert len(words) > 6
    for text in words:
        box = text.get_window_extent()
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    heads = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert not any(a.overlaps(b) for i, a in enumerate(heads) for b in heads[:i])
