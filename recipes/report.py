"""Tables on the terminal, and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from padfree.files.writing import check_target

from .bsconv_table import BSConvLine
from .console import Console
from .files import write_text
from .tables import Line

WIDTH = 160  # of the widest table


def wide_console() -> Console:
    """Standard output, wide enough that no figure is cut; a narrow terminal wraps the lines."""
    return Console(width=max(WIDTH, Console().width))


def show_lines(lines: Sequence[Line], console: Console) -> None:
    """Print rows as a table, then the remarks and what is off."""
    headings = ["recipe", "variant", "count", "params", "published M", "diff", "FLOPs", "published M", "diff"]
    rows = [[line.recipe, line.variant, line.convention, *_cells(line)] for line in lines]
    plain_table([*headings, "top-1", ""], rows, console, names=3)
    _notes([(line, text) for line in lines for text in line.remarks], "*", "", console)
    _notes([(line, text) for line in lines for text in line.off], "OFF", "bold red", console)


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
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < names else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _notes(notes: Sequence[tuple[Line, str]], mark: str, style: str, console: Console) -> None:
    for line, text in notes:
        note = f"{mark} {line.recipe} {line.variant}: {text}"
        console.print(note, style=style, highlight=False, markup=False, soft_wrap=True)


def _cells(line: Line) -> list[str]:
    published, difference = line.published, line.differences()
    cells = []
    for key, digits in (("params", 3), ("flops", 1)):
        cells.append(f"{line.measured[key]:,}")
        cells.append(f"{published[f'{key}_m']:.{digits}f}" if f"{key}_m" in published else "")
        cells.append(f"{difference[f'{key}_m']:+.{digits + 1}f}" if f"{key}_m" in difference else "")
    cells.append(f"{published['top1']:.2f}" if "top1" in published else "")
    cells.append("OFF" if line.off else "*" if line.remarks else "")
    return cells


def show_bsconv(lines: Sequence[BSConvLine], console: Console) -> None:
    """Print BSConv's networks, original and padding-free side by side, then what is off."""
    rows = []
    for line in lines:
        cells = [line.architecture, f"{line.published['params_m']:.2f}", f"{line.original['params']:,}"]
        cells.append(f"{line.padfree['params']:,}" if line.padfree else "-")
        cells += [f"{line.published['flops_m']:.2f}", f"{line.original['flops']:,}"]
        cells.append(f"{line.padfree['flops']:,}" if line.padfree else "-")
        rows.append([*cells, "OFF" if line.off or line.skipped else ""])
    headings = ["architecture", "published M", "params", "padfree", "published M", "FLOPs", "padfree", ""]
    plain_table(headings, rows, console)
    for line in lines:
        for fault in (*line.off, *([line.skipped] if line.skipped else [])):
            note = f"OFF {line.architecture}: {fault}"
            console.print(note, style="bold red", highlight=False, markup=False, soft_wrap=True)
