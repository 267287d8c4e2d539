"""The layout of tables: columns, what is broken to fit, plurals."""

from __future__ import annotations

import pytest

from padfree.columns import broken, labelled, plural, table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("name", "figure"), ("a", "1.0"), ("longer", "10.25")]
    assert table(rows, right=[1]) == ["name    figure", "a          1.0", "longer   10.25"]
    assert table(rows, indent="- ") == ["- name    figure", "- a       1.0", "- longer  10.25"]
    assert table([]) == [] and table([()]) == []


def test_a_shorter_row_takes_the_columns_that_are_left() -> None:
    rows = [("a", "bb", "cc"), ("one", "why not here"), ("two", "x", "y")]
    assert table(rows, width=None) == ["a    bb  cc", "one  why not here", "two  x   y"]
    assert table(rows, width=12) == ["a    bb  cc", "one  why", "     not", "     here", "two  x   y"]


@pytest.mark.parametrize("width", [20, 30, 31, 80])
def test_what_does_not_fit_goes_on_below_and_nothing_is_lost(width: int) -> None:
    rows = [("place", "MACs"), ("features.stage1.block2.depthwise.conv", "12.5M"), ("b", "1M")]
    lines = table(rows, right=[1], width=width)
    assert max(map(len, lines)) <= width
    assert all(word in "".join("".join(lines).split()) for word in ("12.5M", "1M", "place", "MACs"))
    name = "".join(line[: width - 7].strip() for line in lines[1:-1]) if width < 44 else lines[1].split()[0]
    assert name == rows[1][0]
    assert lines[-1].split() == ["b", "1M"]


def test_labels_stand_beside_their_texts() -> None:
    pairs = [("a", "one two three"), ("a label that is long", "text"), ("bc", "")]
    assert labelled(pairs, width=12, longest=4) == [
        "a   one two",
        "    three",
        "a label that is long",
        "    text",
        "bc",
    ]
    assert labelled([("a", "b")], indent="  ") == ["  a  b"]
    assert labelled([]) == []


def test_texts_are_broken_between_words_and_words_only_where_they_are_too_long() -> None:
    assert broken("one two", 7) == ["one two"]
    assert broken("one two", 6) == ["one", "two"]
    assert broken("abcdefgh ij", 4) == ["abcd", "efgh", "ij"]
    assert broken("a-b c-d", 4) == ["a-b", "c-d"]
    assert broken("  one two", 6) == ["  one", "  two"]
    assert broken("  abcdef", 4) == ["  ab", "  cd", "  ef"]
    assert broken("    a", 3) == ["  a"]
    assert broken("", 4) == [""]


def test_plurals() -> None:
    assert [plural(number, "seed") for number in (0, 1, 2, 1200)] == ["0 seeds", "1 seed", "2 seeds", "1,200 seeds"]
