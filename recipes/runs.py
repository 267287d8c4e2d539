"""Finished runs, read for a report, and put together with those that differ from them by the seed alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoints import RunError
from .evaluate import Trained, trained
from .run_folder import FREE_KEYS, leaves

# what has to be equal for test images to be the same ones; where they lie is asked too, unless --data-root tells it
_IMAGES = ("dataset", "reader", "eval_split", "eval_samples", "crop_side", "grey", "skip_corrupt")

# what seeds of one another may differ in: where the data are, and which run of the original each goes on from
_FREE = (*(f"data.{key}" for key in FREE_KEYS), "start.checkpoint")


@dataclass(frozen=True)
class FinishedRun:
    """A run that went through all of its epochs.

    Attributes:
        folder: of the run.
        found: its recipe, its figures, and its network with the last weights.
        settings: what it was trained with, by dotted key; runs that are equal in it are seeds of one another.
    """

    folder: Path
    found: Trained
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the recipe."""
        return self.found.recipe.name

    @property
    def variant(self) -> str:
        """Which of the recipe's networks."""
        return str(self.found.about["variant"])

    @property
    def seed(self) -> str:
        """As run.json has it; "?" in one of before it had."""
        return str(self.found.about.get("seed", "?"))


@dataclass(frozen=True)
class Group:
    """Runs that differ by the seed alone.

    Attributes:
        label: what sets them apart from the other groups of a report.
        runs: at least one.
    """

    label: str
    runs: tuple[FinishedRun, ...]


def run_folders(given: Sequence[Path]) -> list[Path]:
    """The run folders that are meant: each itself, or those in it (`compare` writes such a folder).

    Raises:
        RunError: one is neither a run folder nor holds one, or two are the same.
    """
    found: list[Path] = []
    for folder in given:
        inside = sorted(path.parent for path in folder.glob("*/run.json")) if folder.is_dir() else []
        found += inside if inside and not (folder / "run.json").exists() else [folder]
    for at, folder in enumerate(found):
        if folder.resolve() in [other.resolve() for other in found[:at]]:
            raise RunError(f"{folder} is named twice, and would count twice; leave one out")
    return found


def read_runs(folders: Sequence[Path], data_root: str | None = None) -> list[FinishedRun]:
    """Read run folders, and their networks with the last weights.

    Args:
        folders: of the runs.
        data_root: where the data lie now, if not where the recipes say.

    Raises:
        RunError: a folder is no run's, or its run is not finished, damaged, or of other test images than the first.
    """
    runs: list[FinishedRun] = []
    for folder in folders:
        found = trained(folder, "last", data_root)
        done, epochs = found.progress.done, found.recipe.training.epochs
        if done < epochs:
            raise RunError(
                f"{folder} is not finished: {done} of {epochs} epochs; go on with padfree-recipes train --resume, "
                "or leave it out"
            )
        settings = leaves(found.recipe.model_dump(mode="json", exclude={"name", "about", "figures"}))
        for key in _FREE:
            settings.pop(key, None)
        settings["mixed_precision"] = found.about.get("mixed_precision", "no")
        runs.append(FinishedRun(folder, found, settings))
        _check_same_images(runs[0], runs[-1], located=data_root is None)
    return runs


def groups(runs: Sequence[FinishedRun]) -> list[Group]:
    """Runs put together, originals first, else in the order given; seeds in theirs.

    Raises:
        RunError: two runs are the same one, seed included.
    """
    by_key: dict[str, list[FinishedRun]] = {}
    for run in sorted(runs, key=lambda run: run.variant != "original"):
        key = json.dumps([run.name, run.variant, run.settings], sort_keys=True)
        for other in by_key.setdefault(key, []):
            if other.seed == run.seed:
                raise RunError(
                    f"{run.folder} and {other.folder} are the same run, with seed {run.seed}; leave one of them out"
                )
        by_key[key].append(run)
    found = [Group("", tuple(sorted(each, key=lambda run: run.seed.zfill(10)))) for each in by_key.values()]
    return [replace(group, label=_label(group, found)) for group in found]


def _label(group: Group, everything: Sequence[Group]) -> str:
    """The variant; with the recipe where there are several, and settings where these two do not tell it apart."""
    first = group.runs[0]
    several = len({other.runs[0].name for other in everything}) > 1
    label = f"{first.name} {first.variant}" if several else first.variant
    rivals = [other.runs[0].settings for other in everything]
    rivals = [other for other, each in zip(rivals, everything, strict=True) if _same_name(first, each.runs[0])]
    unlike = [key for key in first.settings if any(other.get(key) != first.settings[key] for other in rivals)]
    return ", ".join([label, *(f"{key}={first.settings[key]}" for key in unlike)])


def _same_name(one: FinishedRun, other: FinishedRun) -> bool:
    return (one.name, one.variant) == (other.name, other.variant)


def _check_same_images(first: FinishedRun, run: FinishedRun, located: bool) -> None:
    def images(one: FinishedRun) -> dict[str, Any]:
        data = one.found.recipe.data.model_dump(include={*_IMAGES, *(("root",) if located else ())})
        data["model.num_classes"] = one.found.recipe.model.num_classes
        data["test images"] = one.found.progress.epochs[-1].test_images
        return data

    mine, wanted = images(run), images(first)
    for key in wanted:
        if mine[key] != wanted[key]:
            moved = "; where one data set has moved, --data-root says where it is now" if key == "root" else ""
            raise RunError(
                f"{run.folder} and {first.folder} are of different data sets: {key} is {mine[key]} and {wanted[key]}; "
                f"make a report of each{moved}"
            )
