"""A run's folder and its checkpoints.

    RUN/.lock             held by the process that trains
    RUN/recipe.yaml       the resolved recipe
    RUN/run.json          variant, seed, processes, package versions, command
    RUN/plan.json         what was converted (padding-free variants)
    RUN/metrics.csv       one line an epoch
    RUN/tensorboard/      the same, for TensorBoard
    RUN/checkpoints/epoch-0007/
        weights.safetensors   the evaluated weights (averaged ones, where the recipe averages)
        progress.json         all metrics by epoch, and the sizes of the other files
        ...                   Accelerate's state: model, optimizer, scheduler, random numbers

A checkpoint is written under another name and renamed when it is whole, so a kill at any moment loses
at most the running epoch. The last and the best are kept.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from padfree.errors import PadfreeError

from .files import dump, load, write_text
from .recipe import Recipe

PACKAGES = ("padfree", "torch", "torchvision", "timm", "bsconv", "accelerate", "torchmetrics", "safetensors")
FREE_KEYS = ("root", "workers", "download")  # of `data`: a resumed run may find its data elsewhere
WEIGHTS, PROGRESS = "weights.safetensors", "progress.json"


class RunError(PadfreeError):
    """A run folder is in use, missing, damaged, or of another run."""


@dataclass(frozen=True)
class Epoch:
    """Figures of one epoch; accuracies in percent, all processes together."""

    epoch: int
    lr: float
    train_loss: float
    train_top1: float
    train_images: int
    test_loss: float
    test_top1: float
    test_images: int
    images_per_s: float
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Where a run stands after its last whole epoch."""

    epochs: tuple[Epoch, ...] = ()

    @property
    def done(self) -> int:
        """Number of whole epochs."""
        return len(self.epochs)

    @property
    def best(self) -> Epoch | None:
        """The epoch of the highest test accuracy, the earliest of equals."""
        return max(self.epochs, key=lambda item: item.test_top1, default=None)


@dataclass(frozen=True)
class _Saved:
    """What progress.json holds: all epochs, and the bytes of the checkpoint's other files."""

    epochs: tuple[Epoch, ...]
    files: dict[str, int] = field(default_factory=dict)


_SAVED = TypeAdapter(_Saved)


def open_run(folder: Path, recipe: Recipe, about: dict[str, Any], resume: bool) -> None:
    """Write into a locked folder what the run is; when resuming, check that it is the same run.

    Raises:
        RunError: the folder holds a run and `resume` is not set, or holds another run, or a file that
            is in the way of a checkpoint.
    """
    if (folder / "run.json").exists() or checkpoints(folder):
        if not resume:
            raise RunError(f"{folder} holds a run already; go on with --resume, or give another --out")
        _same_run(folder, recipe, about)
    for path in (folder / "checkpoints").glob("epoch-*"):
        if not path.is_dir():
            raise RunError(f"{path} is a file where a checkpoint's folder belongs; remove it")
    for stale in (folder / "checkpoints").glob(".part-*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if checkpoints(folder):  # a kill may have come between the last checkpoint and its line
        write_text(folder / "metrics.csv", _csv(read_progress(folder)))
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


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (folder / "checkpoints").glob("epoch-*")
    return sorted(path for path in found if re.fullmatch(r"epoch-\d{4,}", path.name) and path.is_dir())


def read_progress(folder: Path) -> Progress:
    """Where a run stands; nothing done where it has no checkpoint.

    Raises:
        RunError: the last checkpoint is damaged.
    """
    saved = checkpoints(folder)
    if not saved:
        return Progress()
    return Progress(_read_saved(saved[-1]).epochs)


def save_checkpoint(accelerator: Any, model: nn.Module, folder: Path, progress: Progress) -> Path:
    """Write the state after an epoch, rename it into place, and remove what is neither last nor best.

    Args:
        accelerator: whose prepared objects are saved, in every process.
        model: whose weights were evaluated.
        folder: of the run.
        progress: with this epoch as its last.

    Raises:
        RunError: it cannot be written, and the checkpoints before are there still.
    """
    part = folder / "checkpoints" / f".part-{progress.done:04}"
    final = folder / "checkpoints" / f"epoch-{progress.done:04}"
    try:
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
            save_file(weights, part / WEIGHTS)
            files = {path.name: path.stat().st_size for path in part.iterdir()}
            write_text(part / PROGRESS, json.dumps(asdict(_Saved(progress.epochs, files))))
            _flush(part)
            os.replace(part, final)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(f"cannot write {final}: {_reason(error)}; --resume goes on from the epoch before") from error
    if accelerator.is_main_process:
        write_text(folder / "metrics.csv", _csv(progress))
        best = progress.best.epoch if progress.best else progress.done
        for path in checkpoints(folder):
            if path.name not in (final.name, f"epoch-{best:04}"):
                shutil.rmtree(path)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Any, model: nn.Module, folder: Path) -> None:
    """Put a run's last checkpoint back into the accelerator's prepared objects, once all of it is known to be there.

    Args:
        accelerator: whose prepared objects are loaded, in every process.
        model: whose weights are evaluated.
        folder: of the run.

    Raises:
        RunError: it is damaged.
    """
    path = checkpoints(folder)[-1]
    saved = _read_saved(path)
    try:
        for name, size in saved.files.items():
            if (found := (path / name).stat().st_size) != size:
                raise ValueError(f"{name} has {found} bytes of {size}")
        weights, own = load_file(path / WEIGHTS), model.state_dict()
        if {key: value.shape for key, value in weights.items()} != {key: value.shape for key, value in own.items()}:
            raise ValueError(f"{WEIGHTS} is not of this network")
        accelerator.load_state(str(path))
    except Exception as error:  # whatever reading another content as a state brings about
        raise _damaged(path, error) from error


def versions() -> dict[str, str]:
    """Versions of the packages a run depends on."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _read_saved(path: Path) -> _Saved:
    try:
        saved = _SAVED.validate_json((path / PROGRESS).read_bytes(), strict=True)
        last = int(path.name.removeprefix("epoch-"))
        if [item.epoch for item in saved.epochs] != [*range(1, last + 1)]:
            raise ValueError(f"{PROGRESS} does not tell the epochs up to this one")
        return saved
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RunError:
    before = any(other < path for other in checkpoints(path.parent.parent))
    remedy = (
        "remove it to go on from the one before" if before else "there is none before it, so train into another folder"
    )
    return RunError(f"{path} is damaged ({_reason(error)}); {remedy}")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return ": ".join([PROGRESS, *(str(part) for part in first["loc"]), first["msg"]])
    return " ".join(str(error).split())[:200] or type(error).__name__


def _same_run(folder: Path, recipe: Recipe, about: dict[str, Any]) -> None:
    before, record = read_run(folder)
    unlike = [key for key, value in about.items() if record.get(key) != value]
    old, new = before.model_dump(exclude={"name"}), recipe.model_dump(exclude={"name"})
    for settings in (old, new):
        for key in FREE_KEYS:
            settings["data"].pop(key)
    unlike += [key for key in new if new[key] != old[key]]
    if unlike:
        raise RunError(
            f"{folder} is another run: {', '.join(unlike)} differ from what is asked for; give another --out"
        )


def _csv(progress: Progress) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Epoch.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(item) for item in progress.epochs)
    return text.getvalue()


def _flush(folder: Path) -> None:
    """Have the system write a folder's files out, so that the rename never comes before them."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
