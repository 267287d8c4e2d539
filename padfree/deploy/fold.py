"""Batch norms folded into the convolutions before them, for inference.

The arithmetic is torch.fx's own (`fuse_conv_bn_weights`), in double precision. Where to fold is read off one
recorded forward pass instead of a trace of the whole model, so that the result keeps the model's classes,
methods and generated forwards, and models that torch.fx cannot trace are fused as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from padfree.deploy.readers import Parameters, hooked
from padfree.deploy.shuffles import shuffled
from padfree.indices import ValueId
from padfree.record.recording import Recording
from padfree.rewrite.forward import acting_class, guarded_class, set_class
from padfree.rewrite.keeping import common, keep, keep_empty
from padfree.rewrite.kept import FOLDED, REST
from padfree.rewrite.reads import without_reads
from padfree.rewrite.refusing import relocked_class
from padfree.types import NEW

# Classes by name, so that timm need not be imported. A subclass may standardise or quantise its weight, so
# the class must be one of these exactly.
_CONVS = {"torch.nn.modules.conv.Conv2d", "timm.layers.conv2d_same.Conv2dSame"}
_NORMS = {"torch.nn.modules.batchnorm.BatchNorm2d", "torch.nn.modules.batchnorm.SyncBatchNorm"}
_NORM_ACTS = {"timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct"}


def fold(model: nn.Module, recording: Recording) -> None:
    """Fold each batch norm of an eval-mode model into the convolution that it follows, in place.

    A norm is folded where it alone reads a plain convolution's output, or that output with its channels shuffled, both
    run exactly once, share no parameters, whose values nothing else in the network reads, and no hooks see what lies
    between; every other norm stays. A folded norm becomes an `nn.Identity`, a timm norm-with-activation its activation;
    its keys leave the state dict, and the convolution gains a bias.

    Args:
        model: in eval mode.
        recording: of one forward of this model, or of one that it is a copy of.
    """
    for conv_path, norm_path, order in _pairs(model, recording):
        _fold(model, conv_path, norm_path, order)


def _pairs(model: nn.Module, recording: Recording) -> list[tuple[str, str, list[int]]]:
    """Paths of convolutions and of the batch norms that can be folded into them, and the order in which channels come.

    A channel shuffle may lie between.
    """
    modules = dict(model.named_modules())
    parameters = Parameters(model, recording)
    pairs = []
    for path, calls in recording.calls_of.items():
        conv = modules.get(path)
        if conv is None or _class(conv) not in _CONVS or len(calls) != 1 or len(calls[0].outputs) != 1:
            continue
        ways, order = shuffled(recording, calls[0].outputs[0])
        value = ways[-1]
        readers = recording.consumers.get(value, [])
        if len(readers) != 1 or value in recording.outputs:
            continue
        op = recording.ops[readers[0]]
        norm_path = recording.calls[op.call].path if op.call >= 0 else ""
        norm = modules.get(norm_path)
        if norm is None or "batch_norm" not in op.kind or len(recording.calls_of[norm_path]) != 1:
            continue
        if recording.calls_of[norm_path][0].inputs != (value,) or not _foldable(norm):
            continue
        both = [(path, conv), (norm_path, norm)]
        names = [f"{at}.{name}" for at, module in both for name, _ in module.named_parameters(recurse=False)]
        alone = all(parameters.read_once(name) for name in names)
        more = any(name.startswith(NEW) for _, module in both for name, _ in module.named_children())
        if alone and not more and not hooked(norm) and not _seen(modules, recording, ways):
            pairs.append((path, norm_path, order))  # more: a hybrid tail in the module's own forward
    return pairs


def _seen(modules: Mapping[str, nn.Module], recording: Recording, values: Iterable[ValueId]) -> bool:
    """Whether a module that returns one of these values has hooks."""
    between = set(values)
    calls = (call for call in recording.calls if not between.isdisjoint(call.outputs))
    return any(hooked(modules[call.path]) for call in calls)


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _foldable(norm: nn.Module) -> bool:
    return _class(norm) in _NORMS | _NORM_ACTS and getattr(norm, "running_mean", None) is not None


def _fold(model: nn.Module, conv_path: str, norm_path: str, order: list[int]) -> None:
    """Give the convolution the folded weight and bias, and what is left of the norm its place.

    The norm's channel c is the convolution's channel order[c].
    """
    conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    assert norm.running_mean is not None and norm.running_var is not None
    old = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, bias, mean, var, scale, shift = (None if t is None else t.detach().double() for t in old)
    places = torch.tensor(order, device=conv.weight.device).argsort()
    mean, var, scale, shift = (None if t is None else t[places] for t in (mean, var, scale, shift))
    new_weight, new_bias = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, scale, shift)  # type: ignore[arg-type]
    like = conv.weight
    layout = {"memory_format": torch.channels_last} if _is_channels_last(like) else {}
    trained = like.requires_grad
    conv.weight = nn.Parameter(new_weight.detach().to(like.dtype).contiguous(**layout), requires_grad=trained)
    conv.bias = nn.Parameter(new_bias.detach().to(like.dtype), requires_grad=trained)
    parent, _, name = norm_path.rpartition(".")
    # Past __setattr__: a generated forward may have locked some of its block's attributes.
    model.get_submodule(parent)._modules[name] = _rest(norm)
    keep(model, conv_path, FOLDED, common(conv_path, norm_path))
    keep_empty(model, norm_path, REST, common(conv_path, norm_path))
    names = norm_path.split(".")
    for depth in range(len(names)):  # what a generated forward asked about the norm is answered for good
        _unlock(model.get_submodule(".".join(names[:depth])), ".".join(names[depth:]))


def _unlock(block: nn.Module, path: str) -> None:
    locked = getattr(type(block), "_padfree_recipe", ("", (), ()))[2]
    kept = tuple(without_reads(dict(locked), [path]).items())
    if kept != locked:
        set_class(block, relocked_class(block, kept))


def _is_channels_last(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _rest(norm: nn.Module) -> nn.Module:
    """What a norm does besides normalising, its children under their old names."""
    if _class(norm) in _NORMS:
        return nn.Identity().eval()
    kept = [(name, child) for name, child in norm.named_children() if acting_class(child) is not nn.Identity]
    if not kept:
        return nn.Identity().eval()
    rest = nn.Sequential(OrderedDict(kept)).eval()
    set_class(rest, guarded_class(rest))  # some may have to stay, as they had to in the norm
    return rest
