"""Learned group convolution (CondenseNet, CVPR 2018), and what becomes of it: a standard group convolution.

A dense convolution learns which inputs each group of its outputs reads. It trains dense; each *condensing stage* masks
for each group the inputs of the smallest weights, until a C-th of them are left. Stages are explicit calls of the
training loop, never a side effect of a forward, so that copies, averages and resumed runs stay what they are:

    for epoch in range(epochs):
        if epoch in stages:
            condense_stage(model)
        ...
            loss = loss + decay * lasso(model)
    deployed = condensed(model)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from padfree.errors import PadfreeError
from padfree.record.copies import HOOK_TABLES, full_copy

CONDENSED = "padfree_condensed"
"""Plain attribute of a network that `condensed` made: the stage of each of its layers."""
_FLOOR = 1e-6  # of a sum of squares under the lasso's root, as CondenseNet has it


class LearnedGroupConv2d(nn.Conv2d):
    """A dense convolution whose outputs, in `learned_groups` groups, come to read a C-th of the inputs each.

    (N, C_in, H, W) -> (N, C_out, H', W'). Output channel n belongs to group n mod G. The buffer `mask` (G, C_in) says
    which inputs a group reads; it is the whole state of the schedule, so a state dict resumes in the middle of it. What
    is masked stays in `weight` as it was, gets no gradient from the output, and is not computed with.

    Args:
        in_channels: C_in, a multiple of `groups` and of `condense_factor`.
        out_channels: C_out, a multiple of `groups`.
        kernel_size: as for `nn.Conv2d`; the published layers are 1x1.
        groups: G, how many groups are learned. (The attribute `groups` is 1: the convolution that runs is dense.)
        condense_factor: C; `stages` = C - 1 calls of `condense_stage` leave each group C_in / C inputs.
        bias: whether outputs have one.
        stride: as for `nn.Conv2d`.
        padding: as for `nn.Conv2d`.
        dilation: as for `nn.Conv2d`.
        padding_mode: as for `nn.Conv2d`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        PadfreeError: the channels cannot be divided so.
    """

    __jit_unused_properties__ = ("kept", "masked", "stage", "stages")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        groups: int = 4,
        condense_factor: int = 4,
        bias: bool = False,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        why = not_divisible(in_channels, out_channels, groups, condense_factor)
        if why:
            raise PadfreeError(f"LearnedGroupConv2d({in_channels}, {out_channels}): {why}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, 1, bias, padding_mode, device, dtype
        )
        self.learned_groups = groups
        self.condense_factor = condense_factor
        self.mask: Tensor  # said here, since TorchScript reads no class's annotation of a buffer
        self.register_buffer("mask", torch.ones(groups, in_channels, dtype=torch.bool, device=device))

    @property
    def stages(self) -> int:
        """How many condensing stages there are: C - 1."""
        return self.condense_factor - 1

    @property
    def stage(self) -> int:
        """How many condensing stages it has been through; read off the mask."""
        return (self.in_channels - self.kept) * self.condense_factor // self.in_channels

    @property
    def kept(self) -> int:
        """How many inputs each group reads.

        Raises:
            PadfreeError: the groups read different numbers of inputs, so that a mask that was loaded is damaged.
        """
        counts = sorted(set(self.mask.sum(1).tolist()))
        if len(counts) != 1:
            raise PadfreeError(f"the groups of a learned group convolution read {counts} inputs; its mask is damaged")
        return int(counts[0])

    @property
    def masked(self) -> int:
        """How many of its weights are masked."""
        if self.mask.is_meta:
            return 0
        return (self.in_channels - self.kept) * self.weight[:, 0].numel()

    def masked_weight(self) -> Tensor:
        """The weight that the forward uses, (C_out, C_in, k, k)."""
        rows = self.mask.repeat(self.out_channels // self.learned_groups, 1)  # row n is that of group n mod G
        masked: Tensor = self.weight * rows[:, :, None, None]
        return masked

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the masked weight."""
        out: Tensor = self._conv_forward(input, self.masked_weight(), self.bias)
        return out

    @torch.no_grad()
    def condense_stage(self) -> None:
        """Mask for each group the C_in / C inputs of the smallest magnitude among those that it still reads.

        An input's magnitude is the sum of the absolute weights with which the group's outputs read it; of equal ones
        the first go. After the last stage nothing happens.
        """
        if self.stage >= self.stages:
            return
        magnitudes = self._by_group(self.weight.abs()).sum((0, 3, 4))
        order = magnitudes.masked_fill(~self.mask, torch.inf).argsort(dim=1, stable=True)
        dropped = order[:, : self.in_channels // self.condense_factor]
        self.mask.scatter_(1, dropped, torch.zeros_like(dropped, dtype=torch.bool))

    def lasso(self) -> Tensor:
        """The group lasso as CondenseNet has it: the sum over groups g and inputs m of ||weights from m to g||_2.

        Zero once the last stage is reached. The sum of squares is at least 1e-6, where its root has no gradient.
        """
        if self.stage >= self.stages:
            return self.weight.new_zeros(())
        squares = self._by_group(self.masked_weight().square()).sum((0, 3, 4))
        return squares.clamp(min=_FLOOR).sqrt().sum()

    def _by_group(self, weight: Tensor) -> Tensor:
        """(C_out / G, G, C_in, k, k), in float32 at least: channel n = j G + g is row j of group g."""
        precise = torch.promote_types(weight.dtype, torch.float32)
        return _split(weight.to(precise), self.learned_groups)

    @torch.no_grad()
    def condensed(self) -> CondensedConv2d:
        """The standard group convolution that computes the same, with the mode and hooks of this layer.

        Possible at every stage; before the last one its groups still share inputs.
        """
        kept, per_group = self.kept, self.out_channels // self.learned_groups
        layer = CondensedConv2d(
            self.in_channels, self.out_channels, self.learned_groups, kept, self, bias=self.bias is not None
        )
        index = self.mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :kept]
        layer.index.copy_(index.flatten())
        rows = _split(self.weight, self.learned_groups).transpose(0, 1)  # (G, C_out / G, C_in, k, k)
        chosen = index[:, None, :, None, None].expand(-1, per_group, -1, *self.kernel_size)
        layer.conv.weight.copy_(rows.gather(2, chosen).flatten(0, 1))
        layer.conv.weight.requires_grad_(self.weight.requires_grad)
        if self.bias is not None:
            assert layer.conv.bias is not None
            layer.conv.bias.copy_(_split(self.bias, self.learned_groups).t().flatten())
            layer.conv.bias.requires_grad_(self.bias.requires_grad)
        for table in HOOK_TABLES:
            layer.__dict__[table] = self.__dict__[table].copy()
        for module in layer.modules():
            module.training = self.training
        return layer

    def extra_repr(self) -> str:
        """Its settings, for `print(model)`."""
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{shape}, learned_groups={self.learned_groups}, condense_factor={self.condense_factor}"


class CondensedConv2d(nn.Module):
    """A condensed learned group convolution: chosen inputs, a group convolution, its outputs in their old order.

    (N, C_in, H, W) -> (N, C_out, H', W'). Row g C_out / G + j of the convolution is output channel j G + g.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        groups: G.
        kept: inputs that each group reads.
        like: the convolution whose kernel, stride, padding, dilation, device and dtype it has.
        bias: whether outputs have one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, kept: int, like: nn.Conv2d, *, bias: bool
    ) -> None:
        super().__init__()
        weight = like.weight
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.index: Tensor
        self.register_buffer("index", torch.zeros(groups * kept, dtype=torch.long, device=weight.device))
        self.conv = nn.Conv2d(
            groups * kept, out_channels, like.kernel_size, like.stride, like.padding, like.dilation,  # type: ignore[arg-type]
            groups, bias, like.padding_mode, weight.device, weight.dtype,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """Choose, convolve, shuffle."""
        grouped: Tensor = self.conv(input.index_select(1, self.index))
        batch, channels, height, width = grouped.shape
        shuffled = grouped.reshape(batch, self.groups, channels // self.groups, height, width).transpose(1, 2)
        return shuffled.reshape(batch, channels, height, width)

    def extra_repr(self) -> str:
        """Its settings, for `print(model)`."""
        return f"{self.in_channels}, {self.out_channels}, groups={self.groups}"


def _split(rows: Tensor, groups: int) -> Tensor:
    """(C, ...) -> (C / groups, groups, ...): channel j G + g is row j of group g."""
    return rows.reshape(-1, groups, *rows.shape[1:])


def not_divisible(in_channels: int, out_channels: int, groups: int, condense_factor: int) -> str:
    """Why channels cannot be condensed so, or ""."""
    for name, number in (("groups", groups), ("condense_factor", condense_factor)):
        if type(number) is not int or number < 1:
            return f"{name} is {number!r}; it takes a positive integer"
    divisors = (("in", in_channels, groups), ("in", in_channels, condense_factor), ("out", out_channels, groups))
    for side, channels, divisor in divisors:
        if channels % divisor:
            return f"{channels} {side}put channels are no multiple of {divisor}"
    return ""


def learned_group_convs(model: nn.Module) -> list[LearnedGroupConv2d]:
    """All of a model's, each once."""
    return [module for module in model.modules() if isinstance(module, LearnedGroupConv2d)]


def condense_stage(model: nn.Module) -> int:
    """One condensing stage in all of a model's learned group convolutions; returns in how many one was left.

    Raises:
        PadfreeError: the model has none.
    """
    layers = learned_group_convs(model)
    if not layers:
        raise PadfreeError(
            f"{type(model).__name__} has no LearnedGroupConv2d to condense; "
            'padfree.replace(model, "learned-groups", ...) puts some in'
        )
    waiting = [layer for layer in layers if layer.stage < layer.stages]
    for layer in waiting:
        layer.condense_stage()
    return len(waiting)


def lasso(model: nn.Module) -> Tensor:
    """The sum of `LearnedGroupConv2d.lasso` over a model, to be added to its loss times a small decay.

    CondenseNet takes 1e-5 on ImageNet and 0 on CIFAR.
    """
    terms = [layer.lasso() for layer in learned_group_convs(model)]
    return torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else torch.zeros(())


def condensed(model: nn.Module) -> nn.Module:
    """A copy of a model with standard group convolutions in the place of learned ones; its outputs are equal.

    A layer that is registered under several names stays one layer. A model without any is copied.
    """
    duplicate = full_copy(model)
    if isinstance(duplicate, LearnedGroupConv2d):
        return duplicate.condensed()
    stages = tuple(layer.stage for layer in learned_group_convs(duplicate))
    made: dict[nn.Module, CondensedConv2d] = {}
    for parent in list(duplicate.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, LearnedGroupConv2d):
                if child not in made:
                    made[child] = child.condensed()
                parent._modules[name] = made[child]
    if stages:
        duplicate.__dict__[CONDENSED] = stages
    return duplicate


def condensed_at(model: nn.Module, stages: tuple[int, ...]) -> nn.Module:
    """A copy in the condensed form, with each learned group convolution at such a stage: for weights that are loaded.

    Raises:
        PadfreeError: it has another number of them.
    """
    duplicate = full_copy(model)
    layers = learned_group_convs(duplicate)
    if len(layers) != len(stages):
        raise PadfreeError(f"it has {len(layers)} learned group convolutions, and was condensed with {len(stages)}")
    for layer, stage in zip(layers, stages, strict=True):
        while layer.stage < min(stage, layer.stages):
            layer.condense_stage()
    return condensed(duplicate)
