"""Networks as they are after a little training, for the tests of this folder."""

from __future__ import annotations

import torch
from torch import nn


def lived_in(model: nn.Module, side: int, batches: int = 2) -> nn.Module:
    """The model in eval mode after a little life: affine parameters drawn, norm statistics taken from random images."""
    generator = torch.Generator().manual_seed(0)
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.momentum = None
        if norm.affine:
            norm.weight.data = torch.rand(norm.num_features, generator=generator) + 0.5
            norm.bias.data = torch.randn(norm.num_features, generator=generator) * 0.2
    model.train()
    with torch.no_grad():
        for _ in range(batches):
            model(torch.randn(16, 3, side, side, generator=generator))
    return model.eval()


def drawn(model: nn.Module) -> nn.Module:
    """The model in eval mode with norms of drawn values, none of them near nothing: little rounding in its outputs."""
    generator = torch.Generator().manual_seed(0)
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        weight, bias, mean, var = torch.rand(4, norm.num_features, generator=generator)
        norm.running_mean.copy_(mean * 0.4 - 0.2)
        norm.running_var.copy_(var * 0.5 + 0.5)
        norm.weight.data.copy_(weight * 0.5 + 0.75)
        norm.bias.data.copy_(bias * 0.4 - 0.2)
    return model.eval()
