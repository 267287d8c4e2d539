"""The layer of a fused network that runs a strided chain in one call of `padfree::chain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from padfree.errors import PadfreeError
from padfree.kernels import fused_chain

TENSORS = ("weight", "bias", "scale", "shift", "point_weight", "point_bias")
SETTINGS = ("ahead", "stride", "padding", "act", "pool", "pool_padding", "merge", "point_act", "residual")


class FusedChain(nn.Module):
    """A strided chain for inference: depthwise convolution, max-pool of the same map, their sum, what follows.

    (N, C, H, W) -> (N, C', h, w); `padfree.kernels.chain_meaning` says what is computed, and what the parts mean. All
    tensors are buffers: nothing in it is trained.

    Args:
        tensors: the operator's tensors by name; those that it may do without can be left out.
        settings: its other arguments by name.
    """

    ahead: str
    stride: int
    padding: int
    act: str
    pool: int
    pool_padding: int
    merge: str
    point_act: str
    residual: str
    weight: Tensor
    point_weight: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor | None], settings: Mapping[str, str | int]) -> None:
        super().__init__()
        for name in TENSORS:
            tensor = tensors.get(name)
            self.register_buffer(name, None if tensor is None else tensor.detach().clone().contiguous())
        for name in SETTINGS:
            setattr(self, name, settings[name])

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain."""
        return fused_chain(
            x, self.ahead, self.weight, self.bias, self.stride, self.padding, self.scale, self.shift, self.act,
            self.pool, self.pool_padding, self.merge, self.point_weight, self.point_bias, self.point_act, self.residual,
        )  # fmt: skip

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse another shape for what was fused.

        Raises:
            PadfreeError: the tensor has another shape than the one it would replace.
        """
        old = self.__dict__.get("_buffers", {}).get(name)
        if old is not None and (not isinstance(value, torch.Tensor) or value.shape != old.shape):
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else value
            raise PadfreeError(
                f"`{name}` of a fused chain has the shape {tuple(old.shape)}, and {found} would be another network; "
                "change the network before padfree.fuse, and fuse it then"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """What it computes, for `print(model)`."""
        parts = [f"{name}={getattr(self, name)!r}" for name in SETTINGS if getattr(self, name) not in ("", 0)]
        weight, point = self.weight, self.point_weight
        outputs = "" if point is None else f" -> {len(point)}"
        return f"{len(weight)}{outputs}, kernel={weight.shape[-1]}, {', '.join(parts)}"
