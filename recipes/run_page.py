"""`padfree-recipes report`: one HTML page about finished runs, in the dress of padfree-convert --report."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from padfree.borders.results import BorderEffect
from padfree.errors import PadfreeError
from padfree.files.writing import check_target
from padfree.page.effects import effects_content
from padfree.page.pictures import palette, picture
from padfree.page.writing import check_extra, render, write_html

from .charts import Curve, chart
from .checkpoints import RunError
from .files import dump
from .measures import SHIFTS, Measured, measure
from .runs import FinishedRun, Group, groups, read_runs, run_folders

CELLS = 20  # classes up to which a confusion matrix is a table with its numbers
_PAIRS = 10  # of classes that are confused most
_CHARTS = (("test_top1", "test top-1 (%)"), ("test_loss", "test loss"), ("train_loss", "training loss"))

Row = tuple[str, ...]


def report(
    given: Sequence[Path],
    target: Path,
    *,
    data_root: str | None = None,
    cpu: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    """Measure finished runs, and write a self-contained page about them.

    Args:
        given: run folders, or folders of run folders, all of the same test images.
        target: the page, FILE.html.
        data_root: where the data lie now, if not where the recipes say.
        cpu: leave accelerators alone.
        progress: called with what is being measured.

    Raises:
        PadfreeError: a folder is no run's or its run is not finished, runs are of different data sets, the data are
            not right, or the page cannot be written; nothing is written then.
    """
    if target.suffix not in (".html", ".htm"):
        raise PadfreeError(f"--out {target}: the name must end in .html")
    check_target(target)
    check_extra()
    found = groups(read_runs(run_folders(given), data_root))
    measured: list[list[Measured]] = []
    for group in found:
        measured.append([])
        for run in group.runs:
            progress(str(run.folder))
            counted = measured[-1][0].counted if measured[-1] else None  # seeds cost the same
            measured[-1].append(measure(run.found, cpu, counted))
    _check_classes(found, measured)
    command = ["padfree-recipes", "report", *map(str, given), "--out", str(target)]
    command += ["--data-root", data_root] if data_root is not None else []
    template = (resources.files("padfree.recipes") / "runs.html").read_text(encoding="utf-8")
    write_html(target, render(page(found, measured, shlex.join(command)), template))


def page(found: Sequence[Group], measured: Sequence[Sequence[Measured]], command: str) -> dict[str, Any]:
    """Everything that the template shows: strings, numbers, lists and dictionaries of them."""
    first = found[0].runs[0].found
    recipes = list(dict.fromkeys(group.runs[0].name for group in found))
    pairs = list(zip(found, measured, strict=True))
    borders = [(group, [each.border for each in some]) for group, some in pairs]
    shown = [(group.label, effect) for group, (effect, *_) in borders if isinstance(effect, BorderEffect)]
    missing = {str(effect): None for _, some in borders for effect in some if isinstance(effect, PadfreeError)}
    return {
        "title": f"{', '.join(recipes)}: {'training' if len(recipes) == 1 else 'trainings'}",
        "data": first.recipe.data.dataset,
        "images": f"{first.progress.epochs[-1].test_images:,}",
        "classes": first.recipe.model.num_classes,
        "summary": _summary(pairs),
        "charts": [chart(title, _curves(found, key)) for key, title in _CHARTS],
        "runs": _runs(pairs),
        "confusions": [_confusion(group, some) for group, some in pairs],
        "effect": effects_content(shown) if shown else None,
        "effects": _border_table([(group.label, some) for group, some in borders]),
        "missing": list(missing),
        "notes": _notes(pairs),
        "command": command,
        "how": [_how(group) for group in found],
    }


def _curves(found: Sequence[Group], key: str) -> list[Curve]:
    return [
        Curve(
            group.label,
            tuple(tuple(getattr(epoch, key) for epoch in run.found.progress.epochs) for run in group.runs),
        )
        for group in found
    ]


def _summary(pairs: Sequence[tuple[Group, Sequence[Measured]]]) -> list[Row]:
    """A group a row: its seeds, last and best accuracy, and what its network costs."""
    rows: list[Row] = [("network", "seeds", "last top-1 %", "best top-1 %", "parameters", "multiply-adds")]
    for group, (some, *_) in pairs:
        epochs = [run.found.progress.epochs for run in group.runs]
        last = spread([each[-1].test_top1 for each in epochs])
        best = spread([max(epoch.test_top1 for epoch in each) for each in epochs])
        rows.append((group.label, str(len(epochs)), last, best, *_costs(some)))
    return rows


def _runs(pairs: Sequence[tuple[Group, Sequence[Measured]]]) -> list[Row]:
    heading = ("folder", "recipe", "variant", "seed", "best %", "of epoch", "last %", "epochs")
    rows: list[Row] = [(*heading, "parameters", "multiply-adds", "images/s")]
    for group, some in pairs:
        for run, each in zip(group.runs, some, strict=True):
            progress = run.found.progress
            best, last = progress.best, progress.epochs[-1]
            assert best is not None  # a finished run has epochs
            speed = statistics.median(epoch.images_per_s for epoch in progress.epochs)
            accuracies = (f"{best.test_top1:.2f}", str(best.epoch), f"{last.test_top1:.2f}", str(progress.done))
            rows.append((str(run.folder), run.name, run.variant, run.seed, *accuracies, *_costs(each), f"{speed:,.0f}"))
    return rows


def _costs(measured: Measured) -> Row:
    counted = measured.counted
    return f"{counted.params:,}", f"{counted.conv_linear or 0:,}"


def _confusion(group: Group, measured: Sequence[Measured]) -> dict[str, Any]:
    """The matrix of all runs of a group, summed, and what is confused most."""
    matrix = sum((each.confusion for each in measured[1:]), measured[0].confusion)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    names = measured[0].classes
    right = f"{100 * float(matrix.trace()) / max(1, int(matrix.sum())):.2f}"
    return {
        "title": group.label,
        "runs": len(measured),
        "right": right,
        "names": names,
        "rows": _cells(matrix, shares, names) if len(names) <= CELLS else [],
        "picture": picture(shares) if len(names) > CELLS else "",
        "pairs": _most_confused(matrix, shares, names),
    }


def _cells(matrix: Tensor, shares: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    colours = palette()
    rows = []
    for name, counts, parts in zip(names, matrix.tolist(), shares.tolist(), strict=True):
        cells = []
        for value, part in zip(counts, parts, strict=True):
            red, green, blue = colours[round(255 * part)]
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 128
            cells.append({"value": int(value), "back": f"rgb({red},{green},{blue})", "bright": bright})
        rows.append({"name": name, "cells": cells})
    return rows


def _most_confused(matrix: Tensor, shares: Tensor, names: Sequence[str]) -> list[Row]:
    wrong = matrix.clone().fill_diagonal_(0).flatten()
    counts, places = wrong.topk(min(_PAIRS, len(wrong)))
    rows: list[Row] = [("class", "taken for", "times", "of the class")]
    for times, place in zip(counts.tolist(), places.tolist(), strict=True):
        if times:
            true, taken = divmod(place, len(names))
            rows.append((names[true], names[taken], f"{int(times):,}", f"{float(shares[true, taken]):.1%}"))
    return rows


def _border_table(found: Sequence[tuple[str, Sequence[BorderEffect | PadfreeError]]]) -> list[Row]:
    """The last map and the predictions, a group a row, over its runs; the heading alone where nothing was measured."""
    heading = ["network", "sides of the last map", "its centre"]
    rows: list[Row] = [(*heading, *(f"same class after {shift} px, %" for shift in SHIFTS))]
    for label, some in found:
        effects = [effect for effect in some if isinstance(effect, BorderEffect) and effect.layers]
        if not effects:
            continue
        sides = spread([sum(effect.layers[-1].sides) / 4 for effect in effects])
        cells = [sides, spread([effect.layers[-1].centre for effect in effects])]
        for pixels in SHIFTS:
            same = [100 * shift.consistency for effect in effects for shift in effect.shifts if shift.pixels == pixels]
            cells.append(spread(same) if same else "")
        rows.append((label, *cells))
    return rows


def spread(values: Sequence[float]) -> str:
    """The mean, and the sample standard deviation where there are several; no line ends inside."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _notes(pairs: Sequence[tuple[Group, Sequence[Measured]]]) -> list[str]:
    """Runs whose weights give another accuracy now than when they were trained."""
    notes = []
    for group, some in pairs:
        for run, each in zip(group.runs, some, strict=True):
            logged = run.found.progress.epochs[-1].test_top1
            if round(each.top1, 2) != round(logged, 2):
                notes.append(
                    f"{run.folder}: {each.top1:.2f} % evaluated here, {logged:.2f} % when it was trained; the data, "
                    "the device or a library's version may be another"
                )
    return notes


def _how(group: Group) -> dict[str, str]:
    """How the first run of a group was made: its command, packages and recipe."""
    run = group.runs[0]
    words = run.found.about.get("command")
    command = [str(word) for word in words] if isinstance(words, list) and words else []
    if command:
        command[0] = Path(command[0]).name
    versions = run.found.about.get("versions")
    packages = (
        ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""
    )
    return {
        "title": group.label,
        "command": shlex.join(command),
        "packages": packages,
        "recipe": dump(run.found.recipe),
    }


def _check_classes(found: Sequence[Group], measured: Sequence[Sequence[Measured]]) -> None:
    runs: list[FinishedRun] = [run for group in found for run in group.runs]
    each = [item for some in measured for item in some]
    for run, item in zip(runs[1:], each[1:], strict=True):
        if item.classes != each[0].classes:
            raise RunError(
                f"{run.folder} and {runs[0].folder} are of different data sets: their classes have other names; "
                "make a report of each"
            )
