"""Tables and numbers as plain text."""

from __future__ import annotations

from raytrust.reports.text import span, text_table


def test_a_table_has_a_rule_under_its_head_and_no_space_at_the_ends() -> None:
    lines = [["name", "n"], ["a", "1"], ["longer", ""]]
    assert text_table(lines) == "name    n\n------  -\na       1\nlonger"


def test_a_head_may_have_several_lines() -> None:
    assert text_table([["bytes/\nstep", "n"], ["1 kB", "3"]]).splitlines() == [
        "bytes/  n",
        "step",
        "------  -",
        "1 kB    3",
    ]


def test_wide_columns_are_wrapped_to_fit_and_what_follows_is_set_in() -> None:
    lines = [["  defence", "n", "attack"], ["* PowerSGD rank 4 + EF", "12345", "aware tv=0.1 lr=0.2 r=3"]]
    table = text_table(lines, width=37, wrapped={0: 14, 2: 12})
    assert table.splitlines()[2:] == [
        "* PowerSGD rank  12345  aware tv=0.1",
        "    4 + EF              lr=0.2 r=3",
    ]
    assert max(map(len, table.splitlines())) <= 37
    assert text_table(lines, width=100, wrapped={0: 14, 2: 12}) == text_table(lines)


def test_ranges() -> None:
    assert [span(values) for values in ([4, 4, None], [8, 4], [None], [])] == ["4", "4 to 8", "?", "?"]
