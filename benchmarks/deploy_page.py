"""The tables of `benchmarks.deploy`, and where they stand in docs/deploy.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.clock import title
from benchmarks.deploy_runtimes import RUNTIMES
from benchmarks.latency import PAPER
from padfree.files.writing import replacing

Cell = dict[str, Any]
Row = tuple[str, str, int]  # runtime, bits, side
BEGIN, END = "<!-- the tables of benchmarks.deploy -->", "<!-- end of the tables -->"
WHOLE, DOWNSAMPLING = FORMS = ("padfree", "downsampling-only")
_AGREES = {"fp32": 1e-3, "int8": 1.0}  # of the largest output; in int8 the figure itself says how far it is


def page(cells: list[Cell]) -> str:
    """The tables of all cells, as Markdown."""
    networks = sorted({cell["key"]["network"] for cell in cells}, key=lambda name: (*map(name.__ne__, PAPER), name))
    forms: dict[str, dict[Row, dict[str, Cell]]] = {form: {} for form in FORMS}
    for cell in cells:
        key = cell["key"]
        rows = forms[key.get("form", WHOLE)]
        rows.setdefault((key["runtime"], key["bits"], key["side"]), {})[key["network"]] = cell
    machines = sorted({title(cell["machine"]) for cell in cells if "machine" in cell})
    versions = {name: version for cell in cells for name, version in cell.get("versions", {}).items()}
    where = ["Batch 1, one core", *machines, *(f"{name} {versions[name]}" for name in sorted(versions))]
    lines = [", ".join(where) + ".", ""]
    lines += [
        "Time, padding-free over original, with the control (the original over itself, built again) in brackets:",
        "",
    ]
    lines += _table(networks, forms[WHOLE], _time, "the paper's four")
    if forms[DOWNSAMPLING]:
        lines += ["", "The same for downsampling alone, with the original's stem (`--form downsampling-only`):", ""]
        lines += _table(networks, forms[DOWNSAMPLING], _time, "the paper's four")
        lines += ["", "The fastest of original, downsampling alone and both, where both were measured:", ""]
        lines += _table(networks, _fastest(forms), _named_time, None)
    lines += [
        "",
        "Megabytes of the file, original / padding-free, and the largest difference to PyTorch, of the largest output:",
        "",
    ]
    lines += _table(networks, forms[WHOLE], _file, None)
    reasons = _reasons(cells)
    lines += ["", *reasons] if reasons else []
    return "\n".join(lines)


def _table(
    networks: list[str],
    rows: dict[Row, dict[str, Cell]],
    figure: Callable[[Cell], str],
    mean: str | None,
) -> list[str]:
    head = ["runtime", "", "side", *(name.removeprefix("timm:") for name in networks), *([mean] if mean else [])]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in sorted(rows, key=lambda row: (row[2], row[1], list(RUNTIMES).index(row[0]))):
        found = rows[row]
        texts = [figure(found[name]) if name in found else "" for name in networks]
        texts += [geometric(found)] if mean else []
        if any(text not in ("", "-") for text in texts):
            lines.append(f"| {' | '.join([row[0], row[1], str(row[2]), *texts])} |")
    return lines


def _fastest(forms: dict[str, dict[Row, dict[str, Cell]]]) -> dict[Row, dict[str, Cell]]:
    """By row and network the cell of the form with the lowest ratio, of those that have both."""
    whole, alone = forms[WHOLE], forms[DOWNSAMPLING]
    return {
        row: {
            name: min(whole[row][name], cell, key=lambda cell: cell["ratio"]["median"])
            for name, cell in alone[row].items()
            if "ratio" in cell and "ratio" in whole[row].get(name, {})
        }
        for row in alone
        if row in whole
    }


def _named_time(cell: Cell) -> str:
    if cell["ratio"]["median"] > 1:
        return "original"
    return f"{'both' if cell['key'].get('form', WHOLE) == WHOLE else 'downsampling'} {cell['ratio']['median']:.2f}"


def _time(cell: Cell) -> str:
    if cell["failed"]:
        return "fails"
    return f"{cell['ratio']['median']:.2f} ({cell['control']['median']:.2f})" if "ratio" in cell else "-"


def _file(cell: Cell) -> str:
    if cell["failed"]:
        return "fails"
    sizes = [size for size in cell["size"].values() if size is not None]
    parts = [" / ".join(f"{size / 1e6:.1f}" for size in sizes)] if sizes else []
    differences = [value for value in cell["difference"].values() if value is not None]
    if differences:
        agree = max(differences) <= _AGREES[cell["key"]["bits"]]
        parts.append(" / ".join(f"{value:.0e}" for value in differences) + ("" if agree else " **differs**"))
    return "; ".join(parts)


def geometric(found: dict[str, Cell]) -> str:
    """Geometric means of ratio and control over the paper's networks, "" where one of them is missing."""
    cells = [found.get(name, {}) for name in PAPER]
    if not all("ratio" in cell for cell in cells):
        return ""
    means = [
        math.exp(sum(math.log(cell[what]["median"]) for cell in cells) / len(cells)) for what in ("ratio", "control")
    ]
    return f"{means[0]:.2f} ({means[1]:.2f})"


def _reasons(cells: list[Cell]) -> list[str]:
    """What fails and why, and which runtimes have no int8 here."""
    lines = []
    for cell in cells:
        for form, reason in cell["failed"].items():
            key = cell["key"]
            lines.append(f"- {key['runtime']} {key['bits']}, {key['network']}, {_named(key, form)}: {reason}")
    measured = {cell["key"]["runtime"] for cell in cells}
    lines += [
        f"- no int8 in {name}: {RUNTIMES[name].without}"
        for name in RUNTIMES
        if name in measured and RUNTIMES[name].without
    ]
    return lines


def _named(key: Cell, form: str) -> str:
    """Which of a cell's networks: the original, or the form that stands beside it."""
    return key.get("form", form) if form == WHOLE else form


def write(path: Path, tables: str, begin: str = BEGIN, end: str = END) -> None:
    """Put the tables between the marks of a page.

    Raises:
        ValueError: the page does not have both.
    """
    with replacing(path) as temporary:
        temporary.write_text(insert(path.read_text(encoding="utf-8"), tables, begin, end), encoding="utf-8")


def insert(text: str, tables: str, begin: str = BEGIN, end: str = END) -> str:
    """A page with the tables between its marks.

    Raises:
        ValueError: the page does not have both.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page needs the lines {begin} and {end}, once each")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"
