"""Plans and comparisons for people: rich tables on a terminal, plain lines in a pipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter

from padfree.columns import WIDTH, labelled, plural, table
from padfree.geometry import size_text
from padfree.report.comparison import Comparison
from padfree.types import PlanData, words

_NARROW = 60  # columns; below, tables would cut names to pieces


def show(title: str, plan: PlanData, comparison: Comparison | None) -> None:
    """Print a plan and, if there is one, the comparison of the networks before and after it."""
    width = shutil.get_terminal_size().columns
    if sys.stdout.isatty() and width >= _NARROW:
        _rich(title, plan, comparison, width)
    else:
        print("\n".join(_plain(title, plan, comparison)))


def summary(title: str, plan: PlanData) -> str:
    """One line: what is converted by which rule, and how much is left alone."""
    rules = Counter(match.rule for match in plan.matches)
    parts = ", ".join(f"{number} {rule}" for rule, number in rules.items()) or "none"
    size = size_text(plan.input_size)
    places = f"{plural(len(plan.matches), 'place')} to convert"
    return f"{title} at {size}: {places} ({parts}), {len(plan.skips)} left alone"


def _plain(title: str, plan: PlanData, comparison: Comparison | None) -> list[str]:
    lines = [summary(title, plan)]
    lines += [f"  {item}" for item in (*plan.matches, *plan.skips, *plan.outputs)]
    if comparison is not None:
        lines += labelled(comparison.rows())
        if comparison.places:
            lines += ["", *table(comparison.place_rows(), right=range(1, 6))]
    return lines


def _rich(title: str, plan: PlanData, comparison: Comparison | None, width: int) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(width=width, color_system=None if os.environ.get("NO_COLOR") else "auto")
    console.print(Text(summary(title, plan), style="bold"))
    sizes = (Column(name, no_wrap=True) for name in ("reads", "wrote", "writes"))
    places = Table(Column("rule", no_wrap=True), Column("module", overflow="fold"), *sizes, box=None, pad_edge=False)
    for match in plan.matches:
        maps = (size_text(size) for size in (match.size, match.out_before, match.out_after))
        if not words(match):
            places.add_row(match.rule, Text(match.name), *maps)
    if places.row_count:
        console.print(places)
    replaced = Table(
        Column("rule", no_wrap=True),
        Column("module", overflow="fold"),
        Column("replaced", overflow="fold"),
        box=None,
        pad_edge=False,
    )
    for match in plan.matches:
        if words(match):
            replaced.add_row(match.rule, Text(match.name), Text(words(match)))
    if replaced.row_count:
        console.print(replaced)
    if plan.skips:
        skipped = Table(
            Column("left alone", overflow="fold"), Column("reason", overflow="fold"), box=None, pad_edge=False
        )
        for skip in plan.skips:
            skipped.add_row(Text(skip.name), Text(skip.reason))
        console.print(skipped)
    for output in plan.outputs:
        console.print(Text(str(output)))
    if comparison is not None:
        figures = Table("", Column("before -> after", overflow="fold"), box=None, pad_edge=False)
        for label, text in comparison.rows():
            figures.add_row(label, Text(text))
        console.print(figures)
        for line in table(comparison.place_rows(), right=range(1, 6), width=min(width, WIDTH)):
            console.print(Text(line))
