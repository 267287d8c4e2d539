"""The ablation's figures as a page and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.clock import title
from benchmarks.training import Cell, asked, draw, spread
from padfree import recipes

FEW = 3  # seeds
OTHERS = ("stem-only", "downsampling-only", "padfree")
NAMES = {"photos": "photos (16 classes)", "mnist5k": "mnist5k (10 classes)"}
CONDITIONS = {
    "half": "as they are",
    "noise": "noise of standard deviation 0.3",
    **{f"shift{pixels}": f"moved by {pixels} px" for pixels in (1, 2, 3, 4)},
    "border": "border only",
    "kept": "same class after 1 px",
}
PAPER = [
    f"cifar100-ablation/{name}" for name in ("mobilenetv3-large", "ghostnet", "shufflenetv2-x1.0", "parc-mobilenetv2")
]


def page(found: Sequence[Cell], about: dict[str, Any], picture: str | None) -> str:
    """The Markdown of all cells."""
    lines = [
        "# Ablation: stem, downsampling, and both",
        "",
        f"Written by `python -m benchmarks.ablation {asked(found, 'data')}`, which goes on from what it has",
        "(`--report` measures nothing; the default is 5 seeds and all data sets):",
        f"networks of `padfree.recipes.small` trained from scratch on {_steps(found)} batches of 64 at 32 pixels, SGD",
        "with a learning rate of 0.1 and a cosine to 0, the last step's weights; photos are grey crops.",
        "The variants of a seed share the source network's initial values, batches and augmentation. Figures are mean",
        "± sample standard deviation over seeds; differences are taken seed by seed, against the original of the same",
        "seed, in points.",
        f"On {title(about)}.",
        "",
    ]
    if len({cell["key"]["seed"] for cell in found}) < FEW:
        lines += [f"**There are fewer than {FEW} seeds here so far, so no difference of a few points is settled.**", ""]
    for data in dict.fromkeys(cell["key"]["data"] for cell in found):
        mine = [cell for cell in found if cell["key"]["data"] == data]
        lines += [f"## {NAMES[data]}", "", *_differences(mine), "", *_conditions(mine, data), ""]
    if picture:
        lines += [f"![Test accuracy by steps]({picture})", ""]
    return "\n".join([*lines, *paper()]) + "\n"


def paper() -> list[str]:
    """The paper's own ablation, from its recipes."""
    lines = [
        "## The paper's own, on CIFAR-100",
        "",
        "As published (300 epochs, whole networks); nothing here was measured by this project. GhostNet's original has",
        "76.0 in the paper's ablation and 74.0 in its main table, which makes the difference of its whole row.",
        "",
    ]
    lines += ["| network | original % | stem only | downsampling only | padding-free |", "|---|---|---|---|---|"]
    for name in PAPER:
        figures = recipes.load(name).figures
        assert figures is not None
        rows = {variant: row.published.top1 for variant, row in figures.rows.items()}
        base = rows["original"]
        cells = [f"{rows[variant] - base:+.1f}" if rows.get(variant) is not None else "" for variant in OTHERS]
        lines.append(f"| {name.partition('/')[2]} | {base:.1f} | " + " | ".join(cells) + " |")
    return lines


def _differences(found: Sequence[Cell]) -> list[str]:
    lines = [
        "| network | seeds | original % | stem only | downsampling only | padding-free | parameters |",
        "|" + "---|" * 7,
    ]
    for family in _families(found):
        by = _by_variant(found, family)
        seeds = sorted(set(by.get("original", {})) & set(by.get("padfree", {})))
        if not seeds:
            continue
        cells = [spread([by["original"][seed]["clean"] for seed in seeds])]
        for variant in OTHERS:
            pairs = [seed for seed in seeds if seed in by.get(variant, {})]
            cells.append(_paired(by, variant, pairs, "clean"))
        parameters = " -> ".join(f"{by[name][seeds[0]]['parameters']:,}" for name in ("original", "padfree"))
        lines.append(f"| {family} | {len(seeds)} | " + " | ".join([*cells, parameters]) + " |")
    return lines


def _conditions(found: Sequence[Cell], data: str) -> list[str]:
    what = (
        "what comes in is the mean; border only: the 16x16 pixels in the middle are set to the mean"
        if data == "photos"
        else "what comes in is black; border only: digits moved by 6 pixels, up to the image's border"
    )
    lines = [
        "On half of the test images, under conditions that no network was trained for. Moved: to four sides;",
        f"{what}.",
        "Same class: how many images keep their predicted class when the window moves by one pixel, right or wrong. In",
        "percent: the original, and the others' differences from it.",
        "",
        "| network | condition | original | stem only | downsampling only | padding-free |",
        "|---|---|---|---|---|---|",
    ]
    for family in _families(found):
        by = _by_variant(found, family)
        seeds = sorted(set(by.get("original", {})) & set(by.get("padfree", {})))
        for key, name in CONDITIONS.items() if seeds else ():
            cells = [spread([by["original"][seed][key] for seed in seeds])]
            for variant in OTHERS:
                cells.append(_paired(by, variant, [seed for seed in seeds if seed in by.get(variant, {})], key))
            lines.append(f"| {family} | {name} | " + " | ".join(cells) + " |")
    return lines


def _paired(by: dict[str, dict[int, Cell]], variant: str, seeds: Sequence[int], key: str) -> str:
    pairs = [by[variant][seed][key] - by["original"][seed][key] for seed in seeds]
    return spread(pairs, sign=True) if pairs else ""


def _families(found: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell["key"]["family"] for cell in found))


def _by_variant(found: Sequence[Cell], family: str) -> dict[str, dict[int, Cell]]:
    by: dict[str, dict[int, Cell]] = {}
    for cell in found:
        if cell["key"]["family"] == family:
            by.setdefault(cell["key"]["variant"], {})[cell["key"]["seed"]] = cell
    return by


def _steps(found: Sequence[Cell]) -> str:
    return " and ".join(str(steps) for steps in sorted({cell["key"]["steps"] for cell in found}))


def picture(found: Sequence[Cell], target: Path) -> None:
    """Draw test accuracy by steps: one panel a network and data set, a line a variant."""
    panels = {}
    for data, family in dict.fromkeys((cell["key"]["data"], cell["key"]["family"]) for cell in found):
        mine = [cell for cell in found if cell["key"]["data"] == data]
        curves = {variant: [cell["curve"] for cell in by.values()] for variant, by in _by_variant(mine, family).items()}
        panels[f"{family}, {data}"] = curves
    draw(panels, target, "batches of 64")
