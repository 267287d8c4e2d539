"""Text in columns: the one layout of everything that is printed as a table.

Nothing is cut: what does not fit into the width is broken onto further lines.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence

WIDTH = 80  # characters of a line, where nothing else is said
_GAP = 2
_LEAST = 8  # characters of a column that is broken
_LABEL = 40  # characters of a label that texts stand beside


def table(
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[int] = (),
    width: int | None = WIDTH,
    fold: int = 0,
    indent: str = "",
) -> list[str]:
    """The lines of a table.

    Args:
        rows: cells, the headings first. The last cell of a row that is shorter than the headings takes the columns
            that are left.
        right: columns that are set to the right.
        width: characters of the longest line; None: as many as it takes.
        fold: the column that is broken onto further lines where a row is too long.
        indent: what each line begins with.
    """
    found = [tuple(row) for row in rows]
    columns = max(map(len, found), default=0)
    if not columns:
        return []
    widths = [max(len(row[at]) for row in found if len(row) == columns) for at in range(columns)]
    if width is not None:
        rest = width - len(indent) - sum(widths) + widths[fold] - _GAP * (columns - 1)
        widths[fold] = min(widths[fold], max(rest, _LEAST))
    lines = []
    for row in found:
        spans = [*widths[: len(row) - 1], sum(widths[len(row) - 1 :]) + _GAP * (columns - len(row))]
        # of a row, the last cell that spans several columns and the column that is broken may be too long
        parts = [
            broken(cell, span) if at == fold or (len(row) < columns and at == len(row) - 1 and width) else [cell]
            for at, (cell, span) in enumerate(zip(row, spans, strict=True))
        ]
        for number in range(max(map(len, parts))):
            cells = [part[number] if number < len(part) else "" for part in parts]
            placed = (
                cell.rjust(span) if at in right and len(row) == columns else cell.ljust(span)
                for at, (cell, span) in enumerate(zip(cells, spans, strict=True))
            )
            lines.append((indent + (" " * _GAP).join(placed)).rstrip())
    return lines


def labelled(
    pairs: Iterable[tuple[str, str]], *, width: int = WIDTH, indent: str = "", longest: int = _LABEL
) -> list[str]:
    """Labels, and a text beside each that goes on below itself; a label that is too long has a line of its own.

    Args:
        pairs: (label, text).
        width: characters of the longest line.
        indent: what each line begins with.
        longest: characters of a label that its text stands beside.
    """
    found = list(pairs)
    column = max((len(label) for label, _ in found if len(label) <= longest), default=0)
    beside = indent + " " * (column + _GAP)
    lines = []
    for label, text in found:
        head, texts = indent + label.ljust(column + _GAP), broken(text, width - len(beside))
        if len(label) > column:
            lines.append(indent + label)
            head = beside
        lines += [(head if at == 0 else beside) + part for at, part in enumerate(texts)]
    return [line.rstrip() for line in lines]


def broken(text: str, width: int) -> list[str]:
    """A text on lines of a width: between words, and inside of a word that is longer than that.

    Args:
        text: its lines begin with the spaces that it begins with.
        width: characters of the longest line.
    """
    if len(text) <= width:
        return [text]
    bare = text.lstrip(" ")
    indent = " " * min(len(text) - len(bare), width - 1)
    lines = textwrap.wrap(bare, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return lines or [""]


def plural(number: int, word: str) -> str:
    """A number and what there are so many of: "1 seed", "2 seeds"."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"
