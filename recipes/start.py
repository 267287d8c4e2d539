"""Fine-tuning from a trained network: its weights, converted so that they still count, and the rate to go on with.

    padfree-recipes train photos/resnet --variant original
    padfree-recipes train photos/resnet start.checkpoint=runs/photos/resnet/original-seed0 start.calibrate=true

The original's weights are loaded before the conversion, which keeps what they do as far as it can be kept without data
(`start.init: preserve`); `start.calibrate` fits the rest to training images without their labels (docs/warm-start.md).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import padfree
from padfree.errors import PadfreeError
from padfree.files.checkpoint import load_checkpoint

from .checkpoints import WEIGHTS, RunError, check_checkpoint, checkpoints, last_whole
from .datasets import open_dataset
from .images import readable
from .models import build_model
from .recipe import Recipe
from .run_folder import read_run
from .schema import StartSpec
from .variants import conversion

SHORT, SHORT_SHARE, LONG_SHARE = 1, 0.1, 1 / 3  # epochs, and the part of the recipe's rate for them and for more
_IMAGES = 64  # of a calibration batch: 20 of them are 1,280 images


def started(recipe: Recipe, variant: str, seed: int, accelerator: Any, quiet: bool = False) -> nn.Module:
    """A variant of a recipe's network that goes on from the trained original of `start.checkpoint`.

    Args:
        recipe: with a `start`.
        variant: original (nothing is converted), padfree, stem-only or downsampling-only.
        seed: of the new layers' values, and of the images that calibration sees.
        accelerator: of Accelerate; it is calibrated on its device, and comes back on the CPU, like any other network.
        quiet: no progress bar.

    Raises:
        PadfreeError: there are no such weights, they are of another network, or it cannot be calibrated.
    """
    start = _start(recipe)
    if variant == "efficientformerv2":
        raise PadfreeError("start: variant efficientformerv2 has no way to keep what was trained; leave start out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        original = build_model(recipe.model)
        load_checkpoint(original, weights_file(Path(start.checkpoint).expanduser()))
        if variant == "original":
            return original
        converted = padfree.convert(original, **{**conversion(recipe, variant), "init": start.init})
    if start.calibrate:
        original, converted = (model.to(accelerator.device).eval() for model in (original, converted))
        images = calibration_images(recipe, start.batches, seed, accelerator)
        batches = [batch.to(accelerator.device) for batch in images]
        padfree.calibrate(converted, batches, original=original, progress=not quiet)
    return converted.cpu().train()


def weights_file(path: Path) -> Path:
    """The file of weights that a run folder, a checkpoint of one, or a file stands for.

    Raises:
        RunError: it is a run of a converted network, or has no whole checkpoint.
    """
    if not path.is_dir():
        return path
    if (path / WEIGHTS).is_file():
        check_checkpoint(path)
        folder, chosen = path.absolute().parent.parent, path
    else:
        folder = path
        read_run(folder)  # whose error tells more than that of a missing checkpoint
        last, progress, faults = last_whole(folder)
        if last is None or progress.best is None:
            raise faults[-1] if faults else RunError(f"{folder} has no checkpoint yet: no epoch was finished")
        best = folder / "checkpoints" / f"epoch-{progress.best.epoch:04}"
        chosen = best if best in checkpoints(folder) else last
        check_checkpoint(chosen)
    _, about = read_run(folder)
    if about["variant"] != "original":
        raise RunError(
            f"{folder} is a run of variant {about['variant']}, and start.checkpoint takes the original's weights; "
            f"give a run of --variant original"
        )
    return chosen / WEIGHTS


def calibration_images(recipe: Recipe, batches: int, seed: int, accelerator: Any) -> list[Tensor]:
    """Training images as they are tested, without their labels: `batches` tensors of up to 64 (N, 3, side, side).

    Raises:
        PadfreeError: there are no training images.
    """
    tested = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": recipe.data.eval})})
    dataset = open_dataset(tested, train=True)
    if not isinstance(dataset, IterableDataset):
        dataset = readable(accelerator, recipe, dataset, "training")
    generator = torch.Generator().manual_seed(seed)
    loader: Any = DataLoader(
        dataset,
        batch_size=_IMAGES,
        shuffle=not isinstance(dataset, IterableDataset),
        num_workers=recipe.data.workers,
        generator=generator,
    )
    found = [images for (images, _), _ in zip(loader, range(batches), strict=False)]
    if not found:
        raise PadfreeError("start.calibrate: there are no training images; look at data.train_samples")
    return found


def peak(recipe: Recipe) -> float:
    """The highest learning rate: `start.lr`, or a tenth of the recipe's for one epoch and a third for more."""
    start = _start(recipe)
    if start.lr is not None:
        return start.lr
    return recipe.optimizer.lr * (SHORT_SHARE if recipe.training.epochs <= SHORT else LONG_SHARE)


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of a step: up in a line over `start.warmup_steps`, then half a cosine down to 0.

    Args:
        recipe: with a `start`; its own schedule is not looked at.
        step: from 0, over all epochs.
        steps: of all epochs.
    """
    highest, warmup = peak(recipe), min(_start(recipe).warmup_steps, steps - 1)
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def _start(recipe: Recipe) -> StartSpec:
    if recipe.start is None:
        raise PadfreeError(f"recipe {recipe.name} has no start")
    return recipe.start
