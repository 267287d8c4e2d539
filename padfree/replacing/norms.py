"""Statistics of batch norms, estimated anew from images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the only common base of torch's batch norms has no public name

from padfree.record.copies import in_mode


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Give a model's batch norms the mean statistics of these batches, in place; returns how many norms there are.

    Only the norms run in training mode (dropout does not), all batches count alike, and every module's mode and
    momentum are as before afterwards. Norms without running statistics have nothing to estimate.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with in_mode(model.modules(), False), in_mode(norms, True):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative mean
            for batch in batches:
                model(batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return len(norms)
