"""Batches of a recipe's images, for one or several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from padfree.cli.status import Tell, silent
from padfree.errors import PadfreeError

from .datasets import check_dataset, open_dataset
from .images import readable
from .recipe import Recipe


def train_loader(accelerator: Any, recipe: Recipe, progress: Tell = silent) -> Any:
    """Shuffled training batches of this process.

    The recipe's batch size is that of all processes together. The order is a function of the
    accelerator's data seed and of the epoch set with `set_epoch`, whatever the number of processes;
    they share each batch. timm's streaming readers share out their shards themselves.

    Args:
        accelerator: of this process.
        recipe: what it says of the data.
        progress: called with what is being done.

    Raises:
        PadfreeError: the processes cannot share the batch evenly, or the data are not right.
    """
    batch, world = recipe.training.batch_size, accelerator.num_processes
    if batch % world:
        raise PadfreeError(
            f"training.batch_size {batch} cannot be shared by {world} processes; set it to a multiple of {world}"
        )
    progress(_opening(recipe, "training"))
    with accelerator.main_process_first():  # a download is done once
        dataset = open_dataset(recipe, train=True)
    if isinstance(dataset, IterableDataset):
        return _stream(dataset, recipe, batch // world)
    dataset = readable(accelerator, recipe, dataset, "training", progress)
    check_dataset(recipe, dataset, train=True)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=batch,
        shuffle=True,
        drop_last=recipe.data.drop_last,
        num_workers=recipe.data.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    if len(loader) == 0:
        raise PadfreeError(f"{len(dataset)} training images make no batch of {batch}; lower training.batch_size")
    return accelerator.prepare_data_loader(loader)


def eval_loader(accelerator: Any, recipe: Recipe, progress: Tell = silent) -> Any:
    """Test batches of this process: every image in exactly one process, none twice.

    Args:
        accelerator: of this process.
        recipe: what it says of the data.
        progress: called with what is being done.
    """
    world = accelerator.num_processes
    progress(_opening(recipe, "test"))
    with accelerator.main_process_first():
        dataset = open_dataset(recipe, train=False)
    batch = max(1, recipe.training.batch_size // world)
    if isinstance(dataset, IterableDataset):
        return _stream(dataset, recipe, batch)
    dataset = readable(accelerator, recipe, dataset, "test", progress)
    check_dataset(recipe, dataset, train=False)
    mine = Subset(dataset, range(accelerator.process_index, len(dataset), world))
    return DataLoader(
        mine,
        batch_size=batch,
        num_workers=recipe.data.workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a training loader which epoch comes: its order, and what its loading processes draw."""
    source = loader.dataset if isinstance(loader.dataset, IterableDataset) else loader
    if hasattr(source, "set_epoch"):
        source.set_epoch(epoch)
    if loader.generator is not None:  # torch draws the seeds of loading processes from it
        loader.generator.manual_seed(torch.initial_seed() + epoch)


def _opening(recipe: Recipe, split: str) -> str:
    how = "getting" if recipe.data.download else "opening"
    return f"{how} the {split} images of {recipe.data.dataset}"


def _stream(dataset: Any, recipe: Recipe, batch: int) -> DataLoader[Any]:
    dataset.set_loader_cfg(num_workers=recipe.data.workers)
    return DataLoader(dataset, batch_size=batch, num_workers=recipe.data.workers)
