"""The loss that BSConv-S adds in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from padfree.errors import PadfreeError


def orthonormal_loss(model: nn.Module, alpha: float = 0.1) -> Tensor:
    """Sum of alpha * ||W W^T - I||_F over the projecting 1x1 convs W of bsconv's linear bottlenecks.

    W is `conv3.conv.weight` of every LinearBottleneck, viewed (out, mid). Unlike the `reg_loss` of the
    bsconv package it is always of the weights of the model given. Source: the paper, "BSConv-S
    MobileNetV3".

    Raises:
        PadfreeError: the model has no such block.
    """
    import bsconv.pytorch.mobilenet

    terms = []
    for block in model.modules():
        if isinstance(block, bsconv.pytorch.mobilenet.LinearBottleneck):
            weight = block.conv3.conv.weight.flatten(1)  # (out, mid, 1, 1) -> (out, mid)
            gram = weight @ weight.T
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
    if not terms:
        raise PadfreeError(
            f"{type(model).__name__} has no linear bottleneck of the bsconv package, so there is no "
            f"BSConv-S loss; set training.orthonormal_weight to 0"
        )
    return alpha * torch.stack(terms).sum()
