"""Accuracy and loss, right under any number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from padfree.cli.status import Tell, silent
from padfree.layers.learned_groups import condensed, learned_group_convs

from .checkpoints import WEIGHTS, Progress, RunError, check_checkpoint, checkpoints, last_whole
from .console import note
from .loaders import eval_loader
from .recipe import Recipe
from .run_folder import read_run


class Scores:
    """Mean loss and top-1 accuracy over images; `compute` puts all processes together.

    Args:
        num_classes: of the logits.
        device: the metrics' states lie there.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        from torchmetrics import SumMetric
        from torchmetrics.classification import MulticlassAccuracy

        self.top1 = MulticlassAccuracy(num_classes, average="micro").to(device)
        self.loss = SumMetric(nan_strategy="disable").to(device)
        self.images = SumMetric(nan_strategy="disable").to(device)

    def update(self, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        """Add a batch: logits (N, classes), targets (N,), and its mean loss."""
        self.top1.update(logits, targets)
        self.loss.update(loss.float() * len(targets))
        self.images.update(len(targets))

    def compute(self) -> tuple[float, float, int]:
        """Mean loss, accuracy in percent, and number of images, over all processes."""
        top1, total, images = self.top1.compute(), self.loss.compute(), int(self.images.compute())
        return float(total) / max(1, images), round(100 * float(top1), 4), images


@torch.no_grad()
def evaluate(model: nn.Module, batches: Any, recipe: Recipe, device: torch.device, tell: Tell = silent) -> Scores:
    """Scores of a network on this process's test batches; the network's mode is put back after it.

    The network is called without its distributed wrapper: processes may have different numbers of
    batches, and only `Scores.compute` makes them meet.
    """
    was_training = model.training
    model.eval()
    scores = Scores(recipe.model.num_classes, device)
    seen = 0
    for images, targets in batches:
        tell(f"testing, {seen:,} images done")
        seen += len(images)
        images, targets = images.to(device), targets.to(device)
        logits = model(images)
        scores.update(logits, targets, cross_entropy(logits.float(), targets))
    model.train(was_training)
    return scores


@dataclass(frozen=True)
class Trained:
    """The network of a run with weights that it was evaluated with.

    Attributes:
        recipe: of the run, with the data where they lie now.
        about: what run.json says.
        progress: of the newest checkpoint that is whole.
        epoch: after which the weights were saved.
        model: on the CPU.
    """

    recipe: Recipe
    about: dict[str, Any]
    progress: Progress
    epoch: int
    model: nn.Module


def trained(folder: Path, checkpoint: str = "best", data_root: str | None = None) -> Trained:
    """Build a run's network with its best or last weights.

    Raises:
        RunError: the folder holds no such checkpoint, or its weights do not fit.
    """
    recipe, about = read_run(folder)
    if data_root is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": data_root})})
    last, progress, faults = last_whole(folder)
    if last is None and faults:
        raise faults[-1]
    for fault in faults:
        note(f"{fault}, and that is taken for the last one")
    best = progress.best
    if best is None:
        raise RunError(f"{folder} has no checkpoint yet: no epoch was finished")
    epoch = best.epoch if checkpoint == "best" else progress.done
    weights = folder / "checkpoints" / f"epoch-{epoch:04}" / WEIGHTS
    if weights.parent != last:
        check_checkpoint(weights.parent)
    model = recipe.build(about["variant"])
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        kept = ", ".join(path.name for path in checkpoints(folder))
        raise RunError(f"{weights} does not fit the network ({error}); there are {kept}") from error
    return Trained(recipe, about, progress, epoch, model)


def evaluate_run(
    folder: Path,
    checkpoint: str = "best",
    *,
    data_root: str | None = None,
    cpu: bool = False,
    as_condensed: bool = False,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Evaluate a run's best or last weights on its test images.

    Args:
        folder: of the run.
        checkpoint: "best" or "last".
        data_root: where the data lie now, if not where the recipe says.
        cpu: leave accelerators alone.
        as_condensed: run learned group convolutions as the standard group convolutions that they become.
        tell: called with what is being done.

    Returns:
        recipe, variant, epoch, top1 (percent), loss, images.

    Raises:
        RunError: the folder holds no such checkpoint, its weights do not fit, or there is nothing to condense.
    """
    from accelerate import Accelerator

    tell(f"reading {folder}")
    found = trained(folder, checkpoint, data_root)
    recipe, about, model = found.recipe, found.about, found.model
    accelerator = Accelerator(cpu=cpu)
    if as_condensed:
        if not learned_group_convs(model):
            raise RunError(f"{folder} is a run of a network without learned group convolutions; leave --condensed out")
        model = condensed(model)
    model.to(accelerator.device)
    batches = eval_loader(accelerator, recipe, tell)
    precision = tested_in(recipe, about, accelerator.device)
    with torch.autocast(accelerator.device.type, dtype=precision, enabled=precision is not None):
        scores = evaluate(model, batches, recipe, accelerator.device, tell)
    loss, top1, images = scores.compute()
    return {
        "recipe": recipe.name,
        "variant": about["variant"],
        "epoch": found.epoch,
        "top1": top1,
        "loss": loss,
        "images": images,
    }


def tested_in(recipe: Recipe, about: dict[str, Any], device: torch.device) -> torch.dtype | None:
    """What a run's network was tested in, where this device can; averaged weights are tested as they are."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(about.get("mixed_precision")))
    if recipe.training.ema_decay is not None or (dtype is torch.float16 and device.type == "cpu"):
        return None
    return dtype
