"""A run's checkpoints, and where they lie in its folder (`run_folder` writes the rest).

    RUN/.lock             held by the process that trains
    RUN/recipe.yaml       the resolved recipe
    RUN/run.json          variant, seed, processes, package versions, command
    RUN/plan.json         what was converted (padding-free variants)
    RUN/metrics.csv       one line an epoch
    RUN/tensorboard/      the same, for TensorBoard
    RUN/checkpoints/epoch-0007/
        weights.safetensors   the evaluated weights (averaged ones, where the recipe averages)
        progress.json         all metrics by epoch, and the checksums of the other files
        ...                   Accelerate's state: model, optimizer, scheduler, random numbers

A checkpoint is written under another name and renamed when it is whole, so a kill at any moment loses
at most the running epoch. The last, the one before it and the best are kept: a run whose last checkpoint
is damaged later goes on from the newest one that is whole.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from padfree.errors import PadfreeError

from .console import note
from .files import write_text
from .integrity import FileSum, check_files, check_readable, file_sum, text_sum

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
    """What progress.json holds: all epochs, the checkpoint's other files, and the checksum of both.

    Checkpoints of before there were checksums have the files' bytes alone, or not even them.
    """

    epochs: tuple[Epoch, ...]
    files: dict[str, FileSum | int] = field(default_factory=dict)
    sha256: str = ""

    def sum(self) -> str:
        """What `sha256` must be."""
        content = asdict(self)
        return text_sum([content["epochs"], content["files"]])


_SAVED = TypeAdapter(_Saved)


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
            saved = _Saved(progress.epochs, {path.name: file_sum(path) for path in sorted(part.iterdir())})
            write_text(part / PROGRESS, json.dumps(asdict(replace(saved, sha256=saved.sum()))))
            _flush([*part.iterdir(), part])
            os.replace(part, final)
            _flush([final.parent])
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(f"cannot write {final}: {_reason(error)}; --resume goes on from the epoch before") from error
    if accelerator.is_main_process:
        write_text(folder / "metrics.csv", table(progress))
        best = progress.best.epoch if progress.best else progress.done
        kept = [f"epoch-{number:04}" for number in (progress.done, progress.done - 1, best)]
        for path in checkpoints(folder):
            if path.name not in kept:
                remove(path)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Any, model: nn.Module, folder: Path) -> None:
    """Put a run's last checkpoint, which `open_run` has checked, back into the accelerator's prepared objects.

    Args:
        accelerator: whose prepared objects are loaded, in every process.
        model: whose weights are evaluated.
        folder: of the run.

    Raises:
        RunError: it is damaged.
    """
    path = checkpoints(folder)[-1]
    try:
        weights, own = load_file(path / WEIGHTS), model.state_dict()
        if {key: value.shape for key, value in weights.items()} != {key: value.shape for key, value in own.items()}:
            raise ValueError(f"{WEIGHTS} is not of this network")
        accelerator.load_state(str(path))
    except Exception as error:  # whatever reading another content as a state brings about
        raise _damaged(path, error) from error


def check_checkpoint(path: Path) -> Progress:
    """Read a checkpoint's figures, and compare all of its files with the checksums that were written with them.

    Without checksums (checkpoints of before there were any) lengths are compared, and states are read.

    Raises:
        RunError: it is damaged.
    """
    saved = _read_saved(path)
    try:
        check_files(path, saved.files)
        if not saved.sha256:
            for file in path.iterdir():
                check_readable(file)
    except Exception as error:  # whatever reading another content as a state brings about
        raise _damaged(path, error) from error
    if not saved.sha256:
        note(f"{path} was written before checkpoints had checksums; it can be read, and more is not known")
    return Progress(saved.epochs)


def last_whole(folder: Path) -> tuple[Path | None, Progress, list[RunError]]:
    """The newest checkpoint of a run that is whole, where it stands, and what is wrong with newer ones."""
    faults: list[RunError] = []
    for path in reversed(checkpoints(folder)):
        try:
            return path, check_checkpoint(path), faults
        except RunError as error:
            faults.append(error)
    return None, Progress(), faults


def _read_saved(path: Path) -> _Saved:
    try:
        saved = _SAVED.validate_json((path / PROGRESS).read_bytes(), strict=True)
        if saved.sha256 and saved.sha256 != saved.sum():
            raise ValueError(f"{PROGRESS} has another checksum than when it was written")
        last = int(path.name.removeprefix("epoch-"))
        if [item.epoch for item in saved.epochs] != [*range(1, last + 1)]:
            raise ValueError(f"{PROGRESS} does not tell the epochs up to this one")
        return saved
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RunError:
    before = [other.name for other in checkpoints(path.parent.parent) if other < path]
    remedy = f"before it there is {before[-1]}" if before else "there is none before it, so train into another folder"
    return RunError(f"{path} is damaged ({_reason(error)}); {remedy}")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return ": ".join([PROGRESS, *(str(part) for part in first["loc"]), first["msg"]])
    text = " ".join(str(error).split())
    if "weights_only" in text or "Weights only" in text:  # torch's advice is to run what the file holds
        return "a file of it holds something other than tensors, numbers and names"
    return text[:200] or type(error).__name__


def table(progress: Progress) -> str:
    """The figures by epoch as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Epoch.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(item) for item in progress.epochs)
    return text.getvalue()


def remove(path: Path) -> None:
    """Remove a folder, a file or a link; never what a link points to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _flush(paths: Iterable[Path]) -> None:
    """Have the system write files and folders out, so that a rename never comes before what it names."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
