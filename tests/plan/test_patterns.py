"""Which places `include` and `exclude` mean."""

from __future__ import annotations

import re
from typing import Any

import pytest

from padfree.errors import PadfreeError
from padfree.indices import DomainId, OpId
from padfree.plan.patterns import Exactly, Named, chosen
from padfree.types import Match, Skip, StridedDetail

NAMES = ["stem", "blocks.1", "blocks.1.conv", "blocks.10.conv", "head[0]", "Head"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("stem", ["stem"]),
        ("blocks.1", ["blocks.1", "blocks.1.conv"]),  # a module and what is below it, but not blocks.10
        ("blocks", ["blocks.1", "blocks.1.conv", "blocks.10.conv"]),
        ("blocks.*", ["blocks.1", "blocks.1.conv", "blocks.10.conv"]),
        ("*.conv", ["blocks.1.conv", "blocks.10.conv"]),
        ("blocks.?", ["blocks.1"]),
        ("head[[]0]", ["head[0]"]),
        ("head[0]", ["head[0]"]),  # a name as it stands, though as a wildcard it would mean `head0`
        ("[hH]ead*", ["head[0]", "Head"]),
        (r"re:blocks\.\d+", ["blocks.1"]),
        (r"re:.*\.conv", ["blocks.1.conv", "blocks.10.conv"]),
        (["stem", "Head"], ["stem", "Head"]),
        ((pattern for pattern in ("stem", "*")), NAMES),
        ((), []),
    ],
)
def test_what_patterns_mean(patterns: Any, expected: list[str]) -> None:
    assert chosen(NAMES, patterns, "include") == set(expected)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ("conv", "include='conv' matches none of the places found: stem, blocks.1,"),
        ("HEAD", "include='HEAD' matches none"),
        ("re:conv", "include='re:conv' matches none"),  # the whole name must match
        (["stem", "nothing"], "include='nothing' matches none"),
        ("re:(", "include='re:(' is not a regular expression: "),
        (3, "include takes module paths and patterns, not 3"),
        (["stem", None], "include takes module paths and patterns, not None"),
    ],
)
def test_what_is_no_pattern_or_means_nothing(patterns: Any, words: str) -> None:
    with pytest.raises(PadfreeError, match=re.escape(words)):
        chosen(NAMES, patterns, "include")
    with pytest.raises(PadfreeError, match="exclude='x' matches none of the places found: none"):
        chosen([], "x", "exclude")


def match(name: str, op: int = 0) -> Match:
    return Match("dense", name, "", DomainId(0), (9, 9), (5, 5), (4, 4), StridedDetail(OpId(op)))


def test_named_places() -> None:
    matches, skips = [match("a.x"), match("a.y"), match("b")], [Skip("c", "why")]
    assert Named().wanted(matches, skips) == {found.key for found in matches}
    assert Named("a").wanted(matches, skips) == {matches[0].key, matches[1].key}
    assert Named(None, "a.y").wanted(matches, skips) == {matches[0].key, matches[2].key}
    assert Named("a", ["*.x", "b"]).wanted(matches, skips) == {matches[1].key}
    assert Named("c").wanted(matches, skips) == frozenset()  # a place that was found, and left alone
    with pytest.raises(PadfreeError, match="exclude='d' matches none"):
        Named("a", "d").wanted(iter(matches), skips)


def test_the_places_of_a_plan() -> None:
    wanted = Exactly((match("a", 3),)).wanted([match("a", 4)], [])
    assert match("a", 3).key in wanted and match("a", 4).key not in wanted
