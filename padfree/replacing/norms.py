"""Statistics of batch norms, estimated anew from images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from padfree.layers.counting import countable, counting, counts
from padfree.record.copies import in_mode


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Give a model's batch norms the mean statistics of these batches, in place; returns how many norms there are.

    Only the norms run in training mode (dropout does not), all batches count alike, and every module's mode and
    momentum are as before afterwards. Norms without running statistics, or frozen ones, have nothing to estimate.
    """
    norms = [module for module in model.modules() if counts(module)]
    with in_mode(model.modules(), False), counting(norms):
        for batch in countable(batches):
            model(batch.clone())  # what the network may write into
    return len(norms)
