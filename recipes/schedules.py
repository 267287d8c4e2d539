"""The optimisers and schedules of recipes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .console import note
from .recipe import Recipe
from .schema import AdamWSpec, StepSpec


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a recipe over all of a network's parameters."""
    spec = recipe.optimizer
    if isinstance(spec, AdamWSpec):
        return torch.optim.AdamW(model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=spec.lr,
        momentum=spec.momentum,
        nesterov=spec.nesterov,
        weight_decay=spec.weight_decay,
    )


def make_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of a recipe, stepped once an epoch; a constant where `start.rate` sets every step's rate."""
    if recipe.start is not None:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    spec = recipe.schedule
    if isinstance(spec, StepSpec):
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(spec.milestones), spec.gamma)
    lowest = spec.final_fraction * recipe.optimizer.lr
    if spec.offset:
        return OffsetCosine(optimizer, recipe.training.epochs, lowest, spec.offset)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.training.epochs, lowest)


class OffsetCosine(torch.optim.lr_scheduler.CosineAnnealingLR):
    """A cosine whose rate of an epoch is that of a later moment of it.

    Args:
        optimizer: whose rates are set.
        T_max: epochs.
        eta_min: the rate after the last of them.
        offset: the moment, from 0 (the epoch's beginning) to 1 (its end).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, T_max: int, eta_min: float, offset: float) -> None:
        self.offset = offset
        super().__init__(optimizer, T_max, eta_min)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the epoch that begins."""
        share = (1 + math.cos(math.pi * (self.last_epoch + self.offset) / self.T_max)) / 2
        return [self.eta_min + (first - self.eta_min) * share for first in self.base_lrs]


def recompute(recipe: Recipe, optimizer: Any, schedule: Any, shown: bool) -> None:
    """Let a cosine that was loaded end with the epochs asked for, from its next epoch on."""
    epochs = recipe.training.epochs
    if not isinstance(schedule, torch.optim.lr_scheduler.CosineAnnealingLR) or schedule.T_max == epochs:
        return
    before = optimizer.param_groups[0]["lr"]
    schedule.T_max = epochs
    moment = schedule.last_epoch + getattr(schedule, "offset", 0.0)
    share = (1 + math.cos(math.pi * moment / epochs)) / 2
    for group, first in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = schedule.eta_min + (first - schedule.eta_min) * share
    if shown:
        rate = optimizer.param_groups[0]["lr"]
        note(f"the cosine schedule is computed anew for {epochs} epochs: it goes on at {rate:g}, and was at {before:g}")
