"""The comparison: strided blocks replaced by EfficientFormerV2's downsampling.

Each becomes timm's `efficientformer_v2.Downsample`: a dense 3x3 stride-2 conv with BN, in the last
ones beside attention downsampling. Source: the paper, "EfficientFormerV2 downsampling".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from padfree.errors import PadfreeError

from .schema import EfficientFormerSpec


def replace_downsampling(model: nn.Module, spec: EfficientFormerSpec, input_side: int) -> nn.Module:
    """Replace the blocks in place; channels and map sizes are read off one forward pass.

    Raises:
        PadfreeError: a block is not there, or does not halve a square map.
    """
    from timm.models.efficientformer_v2 import Downsample

    shapes = _shapes(model, spec.blocks, input_side)
    for path in spec.blocks:
        before, after = shapes[path]
        side = before[-1]
        if before[-2] != side or after[-1] != -(-side // 2):
            raise PadfreeError(
                f"block {path!r} maps {tuple(before[-2:])} to {tuple(after[-2:])}; "
                f"EfficientFormerV2's downsampling takes the place of blocks that halve a square map"
            )
        block = Downsample(
            before[1],
            after[1],
            3,
            2,
            1,
            resolution=side,
            use_attn=path in spec.attention,
            norm_layer=nn.BatchNorm2d,
        )
        model.set_submodule(path, block)
    return model


def _shapes(model: nn.Module, paths: tuple[str, ...], input_side: int) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Input and output shapes of the blocks, for one image of `input_side` pixels."""
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    handles = []
    for path in paths:
        try:
            block = model.get_submodule(path)
        except AttributeError as error:
            raise PadfreeError(f"efficientformerv2.blocks: {type(model).__name__} has no {path!r}") from error

        def record(_: nn.Module, inputs: tuple[Any, ...], output: Tensor, path: str = path) -> None:
            shapes[path] = (inputs[0].shape, output.shape)

        handles.append(block.register_forward_hook(record))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, input_side, input_side))
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return shapes
