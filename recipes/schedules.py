"""The optimisers and schedules of recipes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

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
    return torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, recipe.training.epochs, eta_min=spec.final_fraction * recipe.optimizer.lr
    )


def recompute(recipe: Recipe, optimizer: Any, schedule: Any, shown: bool) -> None:
    """Let a cosine that was loaded end with the epochs asked for, from its next epoch on."""
    epochs = recipe.training.epochs
    if not isinstance(schedule, torch.optim.lr_scheduler.CosineAnnealingLR) or schedule.T_max == epochs:
        return
    before = optimizer.param_groups[0]["lr"]
    schedule.T_max = epochs
    share = (1 + math.cos(math.pi * schedule.last_epoch / epochs)) / 2
    for group, first in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = schedule.eta_min + (first - schedule.eta_min) * share
    if shown:
        rate = optimizer.param_groups[0]["lr"]
        note(f"the cosine schedule is computed anew for {epochs} epochs: it goes on at {rate:g}, and was at {before:g}")
