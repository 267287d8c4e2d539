"""Descriptions of new layers: frozen data that builds the layer inside any copy of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from padfree.layers.like import LastChannelNorm, act_like, norm_like
from padfree.layers.shortcut import DepthwiseReduction, PoolProjection
from padfree.layers.stem import StemTail


def _elu(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> nn.Module:
    return nn.ELU(alpha) if scale == input_scale == 1 else nn.SELU()


def _hardtanh(low: float = -1.0, high: float = 1.0) -> nn.Module:
    return nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(low, high)


FUNCTIONS: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": _elu,
    "leaky_relu": nn.LeakyReLU,
    "hardtanh": _hardtanh,
    "mish": nn.Mish,
    "selu": nn.SELU,
}
"""Modules for activations that a model calls as functions, by ATen name; they take the operation's own settings."""


@dataclass(frozen=True)
class Spec:
    """A new layer.

    Attributes:
        kind: "pool_projection", "depthwise_reduction", "dense_reduction", "norm" or "stem_tail".
        channels: C_in and C_out. kernel, padding: of the pool. stride: of a stem tail.
        norm, act: paths of the modules copied ("" for none); `function` names an activation called as one, with
            `settings`.
        reference: path of the module whose weight gives device and dtype.
        absorbs, residual, preact: see `StemTail`.
        norm_last: the copied norm reads (N, H, W, C).
    """

    kind: str
    channels: tuple[int, int]
    reference: str
    kernel: int = 3
    padding: int = 0
    stride: int = 1
    norm: str = ""
    act: str = ""
    function: str = ""
    settings: tuple[Any, ...] = ()
    absorbs: bool = False
    residual: bool = False
    preact: bool = False
    norm_last: bool = False

    def build(self, model: nn.Module, end: nn.Module | None = None) -> nn.Module:
        """The layer, on the device and with the dtype of its reference, in its mode."""
        reference = model.get_submodule(self.reference)
        layer = self._layer(model, end)
        kept = {} if end is None else {module: module.training for module in end.modules()}
        weight = next((p for p in reference.parameters() if p.is_floating_point()), None)
        layout = _memory_format(model)
        for module in layer.modules():
            if weight is not None and isinstance(module, nn.Conv2d) and module not in kept:
                module.to(device=weight.device, dtype=weight.dtype)
                module.weight.data = module.weight.data.contiguous(memory_format=layout)
            module.training = kept.get(module, reference.training)
        return layer

    def _layer(self, model: nn.Module, end: nn.Module | None) -> nn.Module:
        first, last = self.channels
        weight = next((p for p in model.get_submodule(self.reference).parameters()), None)
        with torch.device(weight.device if weight is not None else "cpu"):
            if self.kind == "pool_projection":
                return PoolProjection(first, last, self.kernel, self.padding)
            if self.kind == "depthwise_reduction":
                return DepthwiseReduction(first, self._norm(model, first, with_act=False))
            if self.kind == "dense_reduction":
                return nn.Conv2d(first, last, 3, stride=2, bias=False)
            if self.kind == "norm":
                return self._norm(model, last, with_act=False) or nn.Identity()
            norms = (self._norm(model, first), self._norm(model, 2 * first if self.preact else first))
            acts = (self._act(model), self._act(model))
            return StemTail(
                first, norms, acts, end, stride=self.stride, absorbs=self.absorbs,
                residual=self.residual, preact=self.preact,
            )  # fmt: skip

    def _norm(self, model: nn.Module, channels: int, with_act: bool = True) -> nn.Module | None:
        if not self.norm:
            return None
        norm = norm_like(model.get_submodule(self.norm), channels, with_act=with_act)
        return LastChannelNorm(norm) if self.norm_last else norm

    def _act(self, model: nn.Module) -> nn.Module | None:
        if self.act:
            inplace = bool(self.norm) or not self.preact
            return act_like(model.get_submodule(self.act), inplace=inplace)
        return FUNCTIONS[self.function](*self.settings) if self.function else None


def _memory_format(model: nn.Module) -> torch.memory_format:
    """The memory format that the model's convolution weights lie in."""
    for parameter in model.parameters():
        if parameter.dim() == 4 and not parameter.is_contiguous():
            if parameter.is_contiguous(memory_format=torch.channels_last):
                return torch.channels_last
            break
    return torch.contiguous_format
