"""The frontier as text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from frontier_rows import control, failed, finished, sweep

from raytrust.reports import frontier_table as report
from raytrust.reports.text import human_bytes, short

JUDGED = ("verdict", "verdict_reason", "control", "pareto")


def test_table_shows_a_row_in_full():
    table = report.frontier_table([finished(), control()])
    line, rest = next(pair for pair in pairwise(table.splitlines()) if "PowerSGD" in pair[0])
    low, high = (100 * x for x in finished()["accuracy_interval"])
    for text in (
        "* PowerSGD rank 4 + EF  leaks",
        f"93.0 [{low:.1f}, {high:.1f}]",
        "0.41 [0.31, 0.51]",
        "8/8",
        "0.20/0.41",
        "12.3 kB",
    ):
        assert text in line
    assert line.endswith("aware tv=0.01 lr=0.1")
    assert rest.strip() == "r=2 s=0"
    caption = " ".join(table.split("\n\n")[1].split())
    for text in ("n = 360", "n = 8", "seeds: 1", "95 %", "SSIM", "strongest of 7 attacks", "*: Pareto set"):
        assert text in caption


def test_table_names_no_best_where_the_attack_fails():
    table = report.frontier_table([finished(leakage=0.05), control(works=False)])
    words = " ".join(table.split())
    assert words.startswith("The attack fails here: nothing can be said about any defence; give it more (--iterations,")
    assert "Without compression: SSIM 0.15 (n = 8), -0.05 [-0.15, +0.05] over the floor 0.20, 0 of 8" in words
    assert "*" not in table
    assert "resists" not in table
    assert max(map(len, table.splitlines())) <= 120
    none = report.frontier_table([finished(leakage=0.05)])
    assert none.startswith("No control: add --defence none. Without it, nothing can be said about any defence.")
    assert "*" not in none


def test_table_says_what_an_accuracy_is_worth():
    rows = [control(), finished("ruined", accuracy=0.5) | {"remarks": ["sends more bytes than the gradient itself"]}]
    table = report.frontier_table(rows)
    assert "ruined: sends more bytes than the gradient itself." in table
    assert "ruined: accuracy 44 points below training without compression." in table


def test_table_puts_least_leakage_first_and_failures_last():
    rows = [
        failed("broken"),
        finished("high", leakage=0.7),
        finished("low", leakage=0.1),
        finished("middle", leakage=0.4),
    ]
    table = report.frontier_table(rows)
    names = ["low", "middle", "high", "broken"]
    assert sorted(names, key=table.index) == names


def test_table_gives_a_failure_its_reason_and_no_number():
    table = report.frontier_table([failed("sign", reason="out of memory")])
    line = next(line for line in table.splitlines() if "sign" in line)
    assert line.split() == ["sign", "failed:", "out", "of", "memory"]
    assert "No defence finished." in table


def test_table_says_what_is_missing():
    bare = finished(n_images=1, leakage_interval=None, aware_ssim=None, bytes_per_step=None, excess_interval=None)
    table = report.frontier_table([bare | {"attack": None, "seeds": None}])
    line = next(line for line in table.splitlines() if "PowerSGD" in line)
    assert "0.20/-" in line
    assert "undecided" in line
    assert line.count("[") == 1  # of the accuracy
    assert "none where n = 1" in table
    assert "seeds: ?" in table


def test_table_keeps_an_asymmetric_interval():
    assert "0.41 [0.00, 0.71]" in report.frontier_table([finished(leakage_interval=[-0.001, 0.71])])


def test_table_gives_ranges_where_rows_differ():
    assert "n = 4 to 8" in " ".join(report.frontier_table([finished(), finished(n_images=4)]).split())


@pytest.mark.parametrize("name", ["short", "a very long name of a defence " * 4, "x" * 200])
def test_table_fits_a_terminal(name):
    wide = finished(
        name=name,
        accuracy=1.0,
        leakage=-0.1,
        leakage_interval=[-0.25, 0.71],
        naive_ssim=-0.02,
        bytes_per_step=123_456_789,
        compression_ratio=12345.6,
        attack={
            "objective": "orthant-of-signs",
            "tv": 1.23e-5,
            "step_size": 0.0123,
            "restarts": 16,
            "capture_step": 12000,
        },
        attacks_tried=1234,
    )
    table = report.frontier_table([wide, failed(name, reason="a long reason " * 30), *sweep(14)])
    assert max(map(len, table.splitlines())) <= 120
    compact = "".join(table.split())
    assert compact.count("".join(name.split())[:16]) >= 1
    assert "123.5 MB" in table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1234, "1.2 kB"),
        (999_960, "1.0 MB"),
        (44.7e6, "44.7 MB"),
    ],
)
def test_bytes_are_in_decimal_units(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.01, "0.01"), (1e-4, "1e-4"), (2.13e-5, "2.1e-5"), (0.1, "0.1"), (3, "3")]
)
def test_settings_are_short(value, text):
    assert short(value) == text


def test_the_caption_and_the_attack_say_what_history_was_used():
    row = finished()
    assert "steps before" not in report.provenance([row, row | {"threat": {"history": 0}}])
    caption = report.provenance([row, row | {"threat": {"history": 2}}])
    assert " The attacker also had the messages of up to 2 steps before (used to avoid or weigh residuals)." in caption
    assert report.attack_text({"objective": "aware", "tv": 0.1, "residual": "avoid"}) == "aware tv=0.1 avoid"
    assert report.attack_text({"objective": "aware", "tv": 0.1, "residual": "ignore"}) == "aware tv=0.1"


def test_an_attack_that_solves_for_the_image_shows_no_setting_of_an_optimiser():
    attack = {"objective": "naive", "method": "analytic", "tv": 0.0, "step_size": 0.1, "restarts": 1, "capture_step": 0}
    assert report.attack_text(attack) == "naive analytic s=0"
    assert report.attack_text(attack | {"method": "mine"}) == "naive mine tv=0 lr=0.1 r=1 s=0"


def test_one_attack_is_no_plural():
    assert "under the strongest of 1 attack." in report.provenance([finished(attacks_tried=1)])


def test_the_caption_gives_the_floors_where_they_are_known():
    floors = {"mean_image_ssim": 0.031, "other_image_ssim": 0.014}
    text = "Floors, without any attack: the mean image 0.03, a random other image 0.01."
    assert text in report.provenance([finished() | floors, finished() | floors])
    unknown = finished() | dict.fromkeys(floors)
    for rows in ([unknown], [finished() | floors, unknown]):
        assert "mean image" not in report.provenance(rows)
    assert "bootstrap over images" in report.provenance([finished()])
