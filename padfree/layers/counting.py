"""Running statistics of batch norms, estimated anew from batches that a network is run on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from padfree.layers.preserve import own_tensors, running_norm


def counts(module: nn.Module) -> bool:
    """Whether a module is a norm that updates its running statistics in train mode: no frozen one, no other module."""
    counted = "num_batches_tracked" in own_tensors(module) and hasattr(module, "momentum")
    return running_norm(module) is module and counted


def countable(batches: Iterable[Tensor]) -> list[Tensor]:
    """Batches of more than one image, if there are any: of a single one a norm behind a global pool has no variance."""
    found = list(batches)
    return [batch for batch in found if len(batch) > 1] or found


@contextmanager
def counting(norms: Iterable[Any]) -> Iterator[None]:
    """Norms in train mode with a cumulative average that begins anew, in which all batches weigh alike.

    The rest of the network is left in its mode. Afterwards modes, momenta and counts of batches are as before; where
    the block fails or runs nothing, so are the statistics.
    """
    listed = [(norm, norm.momentum, norm.training, norm.num_batches_tracked.clone()) for norm in norms]
    kept = [(norm, norm.running_mean.clone(), norm.running_var.clone()) for norm, *_ in listed]
    for norm, *_ in listed:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    done = False
    try:
        yield
        done = True
    finally:
        for (norm, momentum, training, count), (_, mean, variance) in zip(listed, kept, strict=True):
            if not done or int(norm.num_batches_tracked) == 0:
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(variance)
            norm.momentum, norm.training = momentum, training
            norm.num_batches_tracked.copy_(count)
