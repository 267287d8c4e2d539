"""Learned group convolutions in training: their condensing stages."""

from __future__ import annotations

import torch
from torch import nn

from padfree.errors import PadfreeError
from padfree.layers.learned_groups import condense_stage, learned_group_convs

from .console import note
from .schema import TrainingSpec


def check_stages(model: nn.Module, settings: TrainingSpec, *, shown: bool) -> None:
    """Compare what a recipe says of learned group convolutions with a network.

    Args:
        model: before its training.
        settings: of the recipe.
        shown: tell about stages that do not come.

    Raises:
        PadfreeError: the network has none, or has fewer stages than the recipe lists.
    """
    layers = learned_group_convs(model)
    asked = "condense_before" if settings.condense_before else "lasso_weight" if settings.lasso_weight else ""
    if asked and not layers:
        raise PadfreeError(
            f"training.{asked} is for learned group convolutions, and {type(model).__name__} has none; leave it out"
        )
    if not layers:
        return
    stages = max(layer.stages for layer in layers)
    if len(settings.condense_before) > stages:
        raise PadfreeError(
            f"training.condense_before lists {len(settings.condense_before)} condensing stages and "
            f"{type(model).__name__} has {stages}"
        )
    come = sum(epoch <= settings.epochs for epoch in settings.condense_before)
    if shown and come < stages:
        note(
            f"{come} of {stages} condensing stages come within {settings.epochs} epochs "
            f"(training.condense_before: {list(settings.condense_before)}); what is counted has had them all"
        )


@torch.no_grad()
def begin_epoch(model: nn.Module, average: nn.Module | None, settings: TrainingSpec, epoch: int) -> None:
    """Run the condensing stages that come before an epoch, and give averaged weights the same masks.

    Args:
        model: the network that trains.
        average: the one that averages its weights, if any.
        settings: of the recipe.
        epoch: from 1.
    """
    stages = settings.condense_before.count(epoch)
    for _ in range(stages):
        condense_stage(model)
    if stages and average is not None:
        # an average of booleans stays true
        for ours, theirs in zip(learned_group_convs(model), learned_group_convs(average), strict=True):
            theirs.mask.copy_(ours.mask)
