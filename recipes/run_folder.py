"""A run's folder: what it says about the run, and whether a run that goes on is the same one."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .checkpoints import RunError, checkpoints, last_whole, read_progress, remove, table
from .console import note
from .files import dump, load, write_text
from .recipe import Recipe

PACKAGES = ("padfree", "torch", "torchvision", "timm", "bsconv", "accelerate", "torchmetrics", "safetensors")
# of `data`: a resumed run may find its data elsewhere, or go on without images that became damaged
FREE_KEYS = ("root", "workers", "download", "check_images", "skip_corrupt")
EPOCHS = "training.epochs"  # a resumed run may have more


def open_run(folder: Path, recipe: Recipe, about: dict[str, Any], resume: bool) -> None:
    """Write into a locked folder what the run is; when resuming, check that it is the same run.

    Checkpoints that are damaged are set aside, with a note, where there is a whole one before them.

    Raises:
        RunError: the folder holds a run and `resume` is not set, or holds another run, or a file that
            is in the way of a checkpoint, or no checkpoint that is whole.
    """
    if (folder / "run.json").exists() or checkpoints(folder):
        if not resume:
            raise RunError(f"{folder} holds a run already; go on with --resume, or give another --out")
        _same_run(folder, recipe, about)
    for path in (folder / "checkpoints").glob("epoch-*"):
        if not path.is_dir():
            raise RunError(f"{path} is a file where a checkpoint's folder belongs; remove it")
    for stale in (folder / "checkpoints").glob(".part-*"):
        remove(stale)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    _set_damaged_aside(folder)
    if checkpoints(folder):  # a kill may have come between the last checkpoint and its line
        write_text(folder / "metrics.csv", table(read_progress(folder)))
    write_text(folder / "recipe.yaml", dump(recipe))
    record = {**about, "name": recipe.name, "versions": versions(), "command": sys.argv}
    write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")


def read_run(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a run, under its own name, and what `open_run` wrote about it.

    Raises:
        RunError: it is no run folder.
    """
    path = folder / "recipe.yaml"
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not isinstance(about, dict) or not all(isinstance(about.get(key), str) for key in ("name", "variant")):
            raise ValueError("run.json names no recipe and variant")
        path.stat()  # were it not there, `load` would take it for a recipe's name
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder} is no run folder of padfree-recipes train: {error}; give another folder, or put the file back"
        ) from error
    return load(path).model_copy(update={"name": about["name"]}), about


def versions() -> dict[str, str]:
    """Versions of the packages a run depends on."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _set_damaged_aside(folder: Path) -> None:
    """Leave the newest whole checkpoint as the last one.

    Raises:
        RunError: there are checkpoints, and none is whole.
    """
    path, _, faults = last_whole(folder)
    if path is None and faults:
        raise faults[-1]
    for fault, damaged in zip(faults, reversed(checkpoints(folder)), strict=False):
        aside = damaged.with_name(f"damaged-{damaged.name}")
        if aside.exists():
            remove(aside)
        damaged.rename(aside)
        note(f"{str(fault).partition('; ')[0]}: it is now {aside.name}, and the run goes on from {path}")


def _same_run(folder: Path, recipe: Recipe, about: dict[str, Any]) -> None:
    before, record = read_run(folder)
    old, new = ({**about, **leaves(item.model_dump(exclude={"name"}))} for item in (before, recipe))
    old |= {key: record.get(key) for key in about}
    unlike = [key for key in {**new, **old} if new.get(key) != old.get(key)]
    unlike = [key for key in unlike if key not in {f"data.{free}" for free in FREE_KEYS}]
    if EPOCHS in unlike and new[EPOCHS] > old[EPOCHS]:
        unlike.remove(EPOCHS)
        if not unlike:
            note(f"{folder} was a run of {old[EPOCHS]} epochs, and goes on to {new[EPOCHS]}")
    if unlike:
        told = ", ".join(f"{key} is {new.get(key)} and was {old.get(key)}" for key in unlike)
        more = f" ({EPOCHS} can only grow)" if EPOCHS in unlike else ""
        raise RunError(f"{folder} is another run: {told}{more}; give another --out")


def leaves(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of nested groups by their dotted keys, such as `optimizer.lr`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        found |= inner or {prefix + key: value}
    return found
