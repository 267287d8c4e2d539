"""Descriptions of new layers: frozen data that builds the layer inside any copy of the model."""

from __future__ import annotations

import abc
import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from padfree.layers.learned_groups import LearnedGroupConv2d
from padfree.layers.like import LastChannelNorm, act_like, norm_like
from padfree.layers.preserve import make_delta, make_identity, make_selection, make_zero
from padfree.layers.separable import BSConvS, BSConvU, nearest_s, nearest_u
from padfree.layers.shortcut import DepthwiseReduction, PoolProjection
from padfree.layers.stem import StemTail
from padfree.record.copies import HOOK_TABLES


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
class Spec(abc.ABC):
    """A new layer as data; `build` makes it on the device, with the dtype and in the mode of a reference.

    Attributes:
        reference: path of the module whose weight gives device and dtype, and which gives the mode.
        child: what a block calls such a child.
    """

    child: ClassVar[str]
    reference: str

    def build(self, model: nn.Module) -> nn.Module:
        """The layer for this copy of the model."""
        return self._like_reference(model, self._layer)

    @abc.abstractmethod
    def _layer(self, model: nn.Module) -> nn.Module:
        """The layer, wherever torch puts it."""

    def copied(self, model: nn.Module) -> tuple[tuple[str, str], ...]:
        """Paths of the activations of this network that the layer has copies of, each with that of what was copied."""
        return ()

    def preserve(self, layer: nn.Module, model: nn.Module) -> None:  # noqa: B027  (a rule's own may have no such values)
        """Give the layer values at which the network computes what it did before, as far as there are such.

        Args:
            layer: what `build` made, in its place.
            model: the network that it is part of.
        """

    def _like_reference(
        self, model: nn.Module, make: Callable[[nn.Module], nn.Module], own: Collection[nn.Module] = ()
    ) -> nn.Module:
        """What `make` makes, like the reference but for the model's `own` modules in it, which stay as they are."""
        reference = model.get_submodule(self.reference)
        weight = next((p for p in reference.parameters() if p.is_floating_point()), None)
        layout = _memory_format(model)
        with torch.device("cpu" if weight is None else weight.device):
            layer = make(model)
        for module in layer.modules():
            if module in own:
                continue
            if weight is not None and isinstance(module, nn.Conv2d):
                module.to(device=weight.device, dtype=weight.dtype)
                module.weight.data = module.weight.data.contiguous(memory_format=layout)
            module.training = reference.training
        return layer


@dataclass(frozen=True)
class PoolProjectionSpec(Spec):
    """A max-pool of stride 2 with this kernel and padding, then a 1x1 conv: see `PoolProjection`."""

    child = "shortcut"
    in_channels: int
    out_channels: int
    kernel: int = 3
    padding: int = 0

    def _layer(self, model: nn.Module) -> nn.Module:
        return PoolProjection(self.in_channels, self.out_channels, self.kernel, self.padding)

    def preserve(self, layer: nn.Module, model: nn.Module) -> None:
        """A shortcut that begins with zero: exact."""
        assert isinstance(layer, PoolProjection)
        with torch.no_grad():
            layer.conv.weight.zero_()


@dataclass(frozen=True)
class DepthwiseReductionSpec(Spec):
    """A 3x3 depthwise conv of stride 2 without padding, then a norm like the one at path `norm`, if any."""

    child = "reduce"
    channels: int
    norm: str | None = None

    def _layer(self, model: nn.Module) -> nn.Module:
        norm = None if self.norm is None else norm_like(model.get_submodule(self.norm), self.channels, with_act=False)
        return DepthwiseReduction(self.channels, norm)

    def preserve(self, layer: nn.Module, model: nn.Module) -> None:
        """The pixel at the centre of each window, which is what the strided 1x1 of before lies nearest to."""
        assert isinstance(layer, DepthwiseReduction)
        make_delta(layer.conv)
        make_identity(layer.norm)


@dataclass(frozen=True)
class DenseReductionSpec(Spec):
    """A 3x3 conv of stride 2 without padding and bias."""

    child = "dense"
    in_channels: int
    out_channels: int

    def _layer(self, model: nn.Module) -> nn.Module:
        return nn.Conv2d(self.in_channels, self.out_channels, 3, stride=2, bias=False)

    def preserve(self, layer: nn.Module, model: nn.Module) -> None:
        """The centre tap takes over the weights of the 1x1, which goes on as a shortcut that begins with zero."""
        assert isinstance(layer, nn.Conv2d)
        weight = model.get_submodule(self.reference)._parameters.get("weight")
        if weight is not None and weight.shape == (*layer.weight.shape[:2], 1, 1):
            make_delta(layer, weight)
            with torch.no_grad():
                weight.zero_()


@dataclass(frozen=True)
class NormSpec(Spec):
    """A norm of `channels` channels like the one at path `norm`, without an activation of its."""

    child = "norm"
    channels: int
    norm: str

    def _layer(self, model: nn.Module) -> nn.Module:
        return norm_like(model.get_submodule(self.norm), self.channels, with_act=False)

    def preserve(self, layer: nn.Module, model: nn.Module) -> None:
        """An identity, where it has running statistics."""
        make_identity(layer)


@dataclass(frozen=True)
class StemTailSpec(Spec):
    """A hybrid tail: see `StemTail` for `channels`, `stride`, `absorbs`, `residual` and `preact`.

    Attributes:
        norm, act: paths of the modules copied.
        function: ATen name of an activation that is called as a function, with its `settings`.
        norm_last: the copied norm reads (N, H, W, C).
    """

    child = "stem"
    channels: int
    stride: int = 1
    norm: str | None = None
    act: str | None = None
    function: str | None = None
    settings: tuple[Any, ...] = ()
    absorbs: bool = False
    residual: bool = False
    preact: bool = False
    norm_last: bool = False

    def build(self, model: nn.Module, end: nn.Module | None = None) -> nn.Module:
        """The tail; `end` is the module whose place it takes."""
        make = functools.partial(self._layer, end=end)
        return self._like_reference(model, make, own=() if end is None else set(end.modules()))

    def copied(self, model: nn.Module) -> tuple[tuple[str, str], ...]:
        """The activation, and those that are parts of the norm."""
        found = [] if self.act is None else [(self.act, self.act)]
        if self.norm is not None:
            parts = model.get_submodule(self.norm).named_children()
            found += [(f"{self.norm}.{name}", self.norm) for name, part in parts if not any(part.parameters())]
        return tuple(found)

    def _layer(self, model: nn.Module, end: nn.Module | None = None) -> nn.Module:
        second = 2 * self.channels if self.preact else self.channels
        return StemTail(
            self.channels,
            norms=(self._norm(model, self.channels), self._norm(model, second)),
            acts=(self._act(model), self._act(model)),
            end=end,
            stride=self.stride,
            absorbs=self.absorbs,
            residual=self.residual,
            preact=self.preact,
        )

    def preserve(self, layer: nn.Module, model: nn.Module) -> None:
        """An identity, or with a residual a branch that begins with zero.

        With `residual`: exact for all activations with act(0) = 0. Else exact where act(act(x)) = act(x) (ReLU, ReLU6),
        and the norms have running statistics; not in the pre-activation form.
        """
        assert isinstance(layer, StemTail)
        make_delta(layer.conv_dw)
        make_identity(layer.norm1)
        make_identity(layer.norm2)
        if self.residual and self.absorbs and self.stride == 1:  # y + (pool(y) - y); the pool is part of the network
            make_selection(layer.conv_pw, (-1.0, 1.0))
        elif self.residual:
            if self.preact or not make_zero(layer.norm2):
                make_selection(layer.conv_pw, ())
        else:
            make_selection(layer.conv_pw, (0.0, 1.0) if self.absorbs else (1.0, 0.0))

    def _norm(self, model: nn.Module, channels: int) -> nn.Module | None:
        if self.norm is None:
            return None
        norm = norm_like(model.get_submodule(self.norm), channels)
        return LastChannelNorm(norm) if self.norm_last else norm

    def _act(self, model: nn.Module) -> nn.Module | None:
        if self.act is not None:
            inplace = self.norm is not None or not self.preact
            return act_like(model.get_submodule(self.act), inplace=inplace)
        return None if self.function is None else FUNCTIONS[self.function](*self.settings)


@dataclass(frozen=True)
class SeparableSpec(Spec):
    """A BSConv pair for the dense convolution at `reference`; its depthwise part is a copy of that convolution.

    So it keeps the class (and with it SAME padding), stride, padding, dilation and padding mode. Both parts have its
    dtype, device and `requires_grad`.

    Attributes:
        mid_channels: M' of BSConv-S; None: BSConv-U.
        with_bn: norms behind the 1x1 convolutions, `nn.BatchNorm2d` at its defaults.
        init: "fresh": torch's initial values; "svd": the pair nearest to the convolution's weight, and its bias.
    """

    child = "separable"
    mid_channels: int | None = None
    with_bn: bool = False
    init: str = "fresh"

    def _layer(self, model: nn.Module) -> nn.Module:
        dense = model.get_submodule(self.reference)
        assert isinstance(dense, nn.Conv2d)
        mid, out = self.mid_channels, dense.out_channels
        steps = [("", dense.in_channels, out)] if mid is None else [("1", dense.in_channels, mid), ("2", mid, out)]
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for name, before, after in steps:
            parts[f"pw{name}"] = nn.Conv2d(before, after, 1, bias=False)
            if self.with_bn:
                parts[f"bn{name}"] = nn.BatchNorm2d(after, dtype=dense.weight.dtype)
        parts["dw"] = self._depthwise(dense)
        for name in parts:
            if name != "dw":
                parts[name].requires_grad_(dense.weight.requires_grad)
        if self.init == "svd" and not dense.weight.is_meta:
            factors = nearest_u(dense.weight) if mid is None else nearest_s(dense.weight, mid)
            convs = [part for part in parts.values() if isinstance(part, nn.Conv2d)]
            for conv, values in zip(convs, factors, strict=True):
                conv.weight.data = values.reshape(conv.weight.shape)  # in float64, until it gets the dtype of all
            if self.with_bn:
                _let_through(parts)
        return (BSConvU if mid is None else BSConvS)(parts)

    def _depthwise(self, dense: nn.Conv2d) -> nn.Conv2d:
        """A copy of the convolution with one group a channel."""
        weight, bias = dense.weight, dense.bias
        narrow = nn.Parameter(
            weight.detach().new_empty(dense.out_channels, 1, *dense.kernel_size), weight.requires_grad
        )
        known: dict[int, Any] = {id(dense.__dict__[table]): OrderedDict() for table in HOOK_TABLES}
        conv: nn.Conv2d = copy.deepcopy(dense, {**known, id(weight): narrow})
        conv.in_channels = conv.groups = dense.out_channels
        if self.init == "fresh" or weight.is_meta:
            conv.reset_parameters()
        if bias is not None:
            assert conv.bias is not None
            conv.bias.requires_grad_(bias.requires_grad)
        return conv


def _let_through(parts: Mapping[str, nn.Module]) -> None:
    """Give new norms scales that leave a map as it is in eval mode."""
    for norm in parts.values():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.weight, math.sqrt(1 + norm.eps))


@dataclass(frozen=True)
class LearnedGroupsSpec(Spec):
    """A learned group convolution with the parameters of the dense convolution at `reference`: the same outputs."""

    child = "learned"
    groups: int
    condense_factor: int

    def _layer(self, model: nn.Module) -> nn.Module:
        dense = model.get_submodule(self.reference)
        assert isinstance(dense, nn.Conv2d)
        layer = LearnedGroupConv2d(
            dense.in_channels, dense.out_channels, dense.kernel_size, self.groups, self.condense_factor,  # type: ignore[arg-type]
            dense.bias is not None, stride=dense.stride, padding=dense.padding, dilation=dense.dilation,  # type: ignore[arg-type]
            padding_mode=dense.padding_mode, device=dense.weight.device, dtype=dense.weight.dtype,
        )  # fmt: skip
        layer.weight, layer.bias = dense.weight, dense.bias
        return layer


def _memory_format(model: nn.Module) -> torch.memory_format:
    """The memory format that the model's convolution weights lie in."""
    for parameter in model.parameters():
        if parameter.dim() == 4 and not parameter.is_contiguous():
            if parameter.is_contiguous(memory_format=torch.channels_last):
                return torch.channels_last
            break
    return torch.contiguous_format
