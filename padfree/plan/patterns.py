"""Which places `include` and `exclude` mean."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from padfree.errors import PadfreeError
from padfree.indices import OpId
from padfree.types import Match, Skip

Patterns = str | Iterable[str] | None
Key = tuple[str, str, tuple[OpId, ...]]  # of a match


@dataclass(frozen=True)
class Named:
    """The places that patterns name."""

    include: Patterns = None
    exclude: Patterns = None
    unwanted = "is not among the included modules, or is excluded"

    def wanted(self, matches: Iterable[Match], skips: Iterable[Skip]) -> frozenset[Key]:
        """The keys of the matches that are wanted.

        Raises:
            PadfreeError: a pattern means no place that was found.
        """
        matches = tuple(matches)
        names = [*(match.name for match in matches), *(skip.name for skip in skips)]
        wanted = chosen(names, self.include, "include") if self.include is not None else set(names)
        wanted -= chosen(names, self.exclude, "exclude") if self.exclude is not None else set()
        return frozenset(match.key for match in matches if match.name in wanted)


@dataclass(frozen=True)
class Exactly:
    """The places of a plan."""

    matches: tuple[Match, ...]
    unwanted = "is not in the plan, or is another operation there"

    def wanted(self, matches: Iterable[Match], skips: Iterable[Skip]) -> frozenset[Key]:
        """The keys of the matches that are wanted."""
        return frozenset(match.key for match in self.matches)

    def as_planned(self, found: list[Match], earlier: Iterable[Match | Skip]) -> list[Match]:
        """What a rule finds now, and instead what it found in earlier versions where the plan says that."""
        planned = {match.key: (match.block, match.detail) for match in self.matches}
        older = [match for match in earlier if isinstance(match, Match)]
        said = {match.key: match for match in older if planned.get(match.key) == (match.block, match.detail)}
        return [*(match for match in found if match.key not in said), *said.values()]


def chosen(names: list[str], patterns: Patterns, what: str) -> set[str]:
    """The names that the patterns mean.

    Raises:
        PadfreeError: one is no pattern, or means none of them.
    """
    listed = list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]
    chosen: set[str] = set()
    for pattern in listed:
        if not isinstance(pattern, str):
            raise PadfreeError(f"{what} takes module paths and patterns, not {pattern!r}")
        try:
            hits = {name for name in names if _fits(pattern, name)}
        except re.error as error:
            raise PadfreeError(f"{what}={pattern!r} is not a regular expression: {error}") from error
        if not hits:
            some = ", ".join(dict.fromkeys(names)) or "none"
            raise PadfreeError(f"{what}={pattern!r} matches none of the places found: {some}")
        chosen |= hits
    return chosen


def _fits(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)
