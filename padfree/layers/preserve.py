"""Values at which a new layer leaves a network what it computed, as far as that can be had without data.

Identity layers as in Net2Net (arXiv:1511.05641), branches that begin with zero as in Fixup (arXiv:1901.09321): exact in
eval mode, and trainable, since no gradient vanishes for good. Norms are known by their tensors, not by their class.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, not its children's; scripted modules have them in tables of their own."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A module's own floating-point parameter or buffer of this name."""
    found = own_tensors(module).get(name)
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def running_norm(module: nn.Module) -> nn.Module | None:
    """The norm with running statistics that a module is or holds (batch norm, frozen or not)."""
    names = ("running_mean", "running_var")
    return next((each for each in module.modules() if all(tensor_of(each, name) is not None for name in names)), None)


@torch.no_grad()
def make_identity(module: nn.Module) -> bool:
    """Let a norm with running statistics give back what it reads, in eval mode; False for all other norms.

    weight = sqrt(running_var + eps), bias = running_mean; a norm without these has its statistics at 0 and 1 - eps.
    """
    norm = running_norm(module)
    if norm is None:
        return False
    mean, variance = tensor_of(norm, "running_mean"), tensor_of(norm, "running_var")
    assert mean is not None and variance is not None
    eps = float(getattr(norm, "eps", 0.0))
    weight, bias = tensor_of(norm, "weight"), tensor_of(norm, "bias")
    if weight is None or bias is None:
        mean.zero_()
        variance.fill_(1.0 - eps)
        for tensor, value in ((weight, 1.0), (bias, 0.0)):
            if tensor is not None:
                tensor.fill_(value)
    else:
        weight.copy_((variance.double() + eps).sqrt())
        bias.copy_(mean)
    return True


@torch.no_grad()
def make_zero(module: nn.Module) -> bool:
    """Let a norm give 0 whatever it reads; False where it has no weight of its own."""
    done = False
    for each in module.modules():
        weight, bias = tensor_of(each, "weight"), tensor_of(each, "bias")
        if weight is not None:
            weight.zero_()
            done = True
            if bias is not None:
                bias.zero_()
    return done


@torch.no_grad()
def make_delta(conv: nn.Conv2d, among: Tensor | None = None) -> None:
    """Let a convolution pass on the centre pixel of each window: of each channel, or `among` channels as a 1x1 does.

    Args:
        conv: of odd sides; depthwise unless `among` is given.
        among: (C_out, C_in / groups, 1, 1).
    """
    row, column = (side // 2 for side in conv.kernel_size)
    conv.weight.zero_()
    if among is None:
        conv.weight[:, 0, row, column] = 1.0
    else:
        conv.weight[:, :, row, column] = among[:, :, 0, 0]


@torch.no_grad()
def make_selection(conv: nn.Conv2d, parts: Iterable[float]) -> None:
    """Let a 1x1 convolution of k C -> C channels give the sum of its k parts of C channels, each times a number."""
    channels = conv.out_channels
    conv.weight.zero_()
    for index, scale in enumerate(parts):
        every = torch.arange(channels, device=conv.weight.device)
        conv.weight[every, every + index * channels, 0, 0] = scale


def shows_training(model: nn.Module) -> bool:
    """Whether a network's norms show that it was trained.

    Running statistics have left 0 and 1, batches were counted, or the weights or biases of a norm differ between
    channels: initialisations give all channels one value. Networks without norms, and weightless ones, show nothing.
    """
    return any(_moved(module) for module in model.modules())


def _moved(module: nn.Module) -> bool:
    own = own_tensors(module)
    if any(tensor.is_meta for tensor in own.values()):
        return False
    counted = own.get("num_batches_tracked")
    if counted is not None and counted.dim() == 0 and int(counted) > 0:
        return True
    for name, start in (("running_mean", 0.0), ("running_var", 1.0)):
        tensor = tensor_of(module, name)
        if tensor is not None and bool((tensor != start).any()):
            return True
    parameters = dict(module.named_parameters(recurse=False))
    learnt = list(parameters.values())
    if "weight" not in parameters or any(tensor.dim() != 1 for tensor in learnt):
        return False  # a norm's parameters have one value a channel each
    return any(tensor.numel() > 1 and bool((tensor != tensor[0]).any()) for tensor in learnt)
