"""Tables on the terminal, and as JSON."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from padfree.files.writing import check_target

from .console import Console
from .files import write_text
from .tables import INFERRED, OTHERS, Line

NARROW = 80  # columns of a table
WIDE = 180  # of the widest one


def narrow_console() -> Console:
    """Standard output of 80 columns, whatever the terminal has."""
    return Console(width=NARROW)


def wide_console() -> Console:
    """Standard output, wide enough that no figure is cut; a narrow terminal wraps the lines."""
    return Console(width=max(WIDE, Console().width))


def show_wide(lines: Sequence[Line], console: Console) -> None:
    """Print rows with all of their figures as one table, then the remarks and what is off."""
    headings = ["recipe", "variant", "count", "params", "published M", "diff", "FLOPs", "published M", "diff"]
    others = [key for key in OTHERS if any(key in line.measured for line in lines)]
    rows = []
    for line in lines:
        counts = [f"{line.measured[key]:,}" if key in line.measured else "" for key in others]
        rows.append([line.recipe, line.variant, line.convention, *_cells(line), *counts, *_top1(line), _mark(line)])
    plain_table([*headings, *others, "top-1", ""], rows, console, names=3)
    _notes(lines, console, soft_wrap=True)


def show_narrow(lines: Sequence[Line], console: Console) -> None:
    """Print a network a row in 80 columns, its padding-free form in the next columns, and what is to say of them."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.recipe.rpartition("/")[0], line.convention), []).append(line)
    for (table, convention), found in groups.items():
        within = f", a convention that is inferred: within {INFERRED[convention]:.2%}" if convention in INFERRED else ""
        console.print(f"{table or 'recipe'}: operations by {convention}{within}", style="bold", highlight=False)
        headings, rows = _by_network(found)
        plain_table(headings, rows, console)
        _notes(found, console, soft_wrap=False)
        console.print()
    console.print("Millions: measured (printed). All figures: --wide, or --json FILE.", highlight=False)


def _by_network(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: original and padding-free form beside each other, other variants below them."""
    rows: list[list[str]] = []
    by_recipe: dict[str, dict[str, Line]] = {}
    for line in lines:
        by_recipe.setdefault(line.recipe, {})[line.variant] = line
    for recipe, variants in by_recipe.items():
        rest = [name for name in variants if name not in ("original", "padfree")]
        first = "padfree" if "padfree" in variants or not rest else rest.pop(0)
        pairs = [(recipe.rpartition("/")[2], variants.get("original"), variants.get(first))]
        for name, original, other in (*pairs, *((f"  {name}", None, variants[name]) for name in rest)):
            mark = "".join(sorted({_mark(line) for line in (original, other) if line}, reverse=True))
            rows.append([name, *_millions(original), *_millions(other), mark])
    converted = next((line.variant for line in lines if line.variant != "original"), "padfree")
    right = "padfree" if any(line.variant == "padfree" for line in lines) else converted
    headings = ["model", "params", "FLOPs", f"{right}\nparams", f"{right}\nFLOPs", ""]
    kept = [index for index in range(len(headings)) if index == 0 or any(row[index] for row in rows)]
    headings, rows = [headings[index] for index in kept], [[row[index] for index in kept] for row in rows]
    others = 0
    for heading, *cells in list(zip(headings, *rows, strict=True))[1:]:
        others += max(map(len, [*heading.split("\n"), *cells])) + 1
    for row in rows:
        row[0] = "\n".join(textwrap.wrap(row[0], max(NARROW - others, 12), drop_whitespace=False))
    return headings, rows


def _millions(line: Line | None) -> list[str]:
    """Parameters and operations as `measured (printed)`."""
    cells = []
    for key, decimals in (("params", 3), ("flops", 1)):
        if line is None or key not in line.measured:
            cells.append("")
            continue
        printed = line.published.get(f"{key}_m")
        shown = "" if printed is None else f" ({printed:.{line.digits[key]}f})"
        cells.append(f"{_published_part(line, key) / 1e6:.{decimals}f}{shown}")
    return cells


def _published_part(line: Line, key: str) -> int:
    """What a printed figure is of: comparison rows' parameters are printed without the bare ones."""
    bare = key == "params" and "layer_params" in line.reference and "params" not in line.reference
    return line.measured["layer_params" if bare else key]


def _mark(line: Line) -> str:
    return "OFF" if line.off else "*" if line.remarks else ""


def _top1(line: Line) -> list[str]:
    return [f"{line.published['top1']:.2f}" if "top1" in line.published else ""]


def check_json(target: str | None) -> None:
    """Look at where `write_json` is to write, before the work is done.

    Raises:
        FileError: it cannot be written.
    """
    if target not in (None, "-"):
        check_target(str(target))


def write_json(data: Any, target: str) -> None:
    """Write JSON to a file (whole or not at all), or to standard output for "-"."""
    text = json.dumps(data, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(target), text)


def plain_table(headings: Sequence[str], rows: Iterable[Sequence[str]], console: Console, names: int = 1) -> None:
    """Print a table: its first columns are names, its others figures."""
    gap = 1 if console.width <= NARROW else 2
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, gap, 0, 0))
    for index, heading in enumerate(headings):
        justify: Literal["left", "right"] = "left" if index < names else "right"
        table.add_column(heading, justify=justify, no_wrap=True, vertical="top")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _notes(lines: Sequence[Line], console: Console, *, soft_wrap: bool) -> None:
    """Print remarks, and then what is off."""
    for mark, style in (("*", ""), ("OFF", "bold red")):
        for line in lines:
            for text in line.off if mark == "OFF" else line.remarks:
                note = f"{mark} {line.recipe} {line.variant}: {text}"
                console.print(note, style=style, highlight=False, markup=False, soft_wrap=soft_wrap)


def _cells(line: Line) -> list[str]:
    published, difference = line.published, line.differences()
    cells = []
    for key in ("params", "flops"):
        digits = line.digits[key]
        cells.append(f"{line.measured[key]:,}" if key in line.measured else "-")
        cells.append(f"{published[f'{key}_m']:.{digits}f}" if f"{key}_m" in published else "")
        cells.append(f"{difference[f'{key}_m']:+.{digits + 1}f}" if f"{key}_m" in difference else "")
    return cells
