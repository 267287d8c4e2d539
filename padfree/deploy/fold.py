"""`fuse`: fold each batch norm into the convolution before it, for inference.

    model = padfree.fuse(padfree.convert(model).eval())

The arithmetic is torch.fx's own (`fuse_conv_bn_weights`), in double precision. Where to fold is read off one
recorded forward pass instead of a trace of the whole model, so that the result keeps the model's classes,
methods and generated forwards, and models that torch.fx cannot trace are fused as well.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from padfree.errors import PadfreeError
from padfree.record.copies import bare_copy, full_copy
from padfree.record.inputs import example_inputs
from padfree.record.recording import Recording, record
from padfree.record.trees import first_line
from padfree.types import NEW

__all__ = ["fuse"]

# Classes by name, so that timm need not be imported. A subclass may standardise or quantise its weight, so
# the class must be one of these exactly.
_CONVS = {"torch.nn.modules.conv.Conv2d", "timm.layers.conv2d_same.Conv2dSame"}
_NORMS = {"torch.nn.modules.batchnorm.BatchNorm2d", "torch.nn.modules.batchnorm.SyncBatchNorm"}
_NORM_ACTS = {"timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of the largest output. Rounding stays far below; folding in a wrong place would be off by about 1.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_TOLERANCE_LOW = 0.3


def fuse(model: nn.Module, *, input_size: tuple[int, ...] | None = None) -> nn.Module:
    """A copy of an eval-mode model whose batch norms are folded into the convolutions they follow.

    A norm is folded where it alone reads a plain convolution's output, both run exactly once, share no
    parameters and carry no hooks; every other norm stays. A folded norm becomes an `nn.Identity`, a timm
    norm-with-activation its activation; its keys leave the state dict, and the convolution gains a bias. So
    load weights first, fuse afterwards, and keep the unfused model for training.

    Args:
        model: any network in eval mode, converted or not; it stays untouched.
        input_size: (C, H, W) to look at it with; default: the size it was converted at,
            else that of its `pretrained_cfg`, else (3, 224, 224).

    Returns:
        the fused copy; in float32 its outputs equal the original's to 1e-5 of the largest.

    Raises:
        PadfreeError: part of the model is in training mode, it does not run at that size, it cannot be
            copied, its outputs are not finite, or it does not compute the same when fused.
    """
    if not isinstance(model, nn.Module):
        raise PadfreeError(f"fuse takes a torch.nn.Module, not {type(model).__name__}")
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise PadfreeError(
            f"fuse needs the statistics of eval mode, and `{training[0]}` is in training mode"
            f"{f' (and {len(training) - 1} more)' if len(training) > 1 else ''}; call model.eval() first"
        )
    recording = record(model, input_size)
    fused = full_copy(model)
    for conv_path, norm_path in _pairs(fused, recording):
        _fold(fused, conv_path, norm_path)
    _check(model, fused, recording)
    return fused


def _pairs(model: nn.Module, recording: Recording) -> list[tuple[str, str]]:
    """Paths of convolutions and of the batch norms that can be folded into them."""
    modules = dict(model.named_modules())
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    pairs = []
    for path, calls in recording.calls_of.items():
        conv = modules.get(path)
        if conv is None or _class(conv) not in _CONVS or len(calls) != 1 or len(calls[0].outputs) != 1:
            continue
        value = calls[0].outputs[0]
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
        shared = any(owners[id(p)] > 1 for module in (conv, norm) for p in module.parameters(recurse=False))
        hooked = any(getattr(module, name) for module in (conv, norm) for name in _HOOKS)
        more = any(name.startswith(NEW) for module in (conv, norm) for name, _ in module.named_children())
        if not (shared or hooked or more):  # more: a hybrid tail in the module's own forward
            pairs.append((path, norm_path))
    return pairs


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _foldable(norm: nn.Module) -> bool:
    return _class(norm) in _NORMS | _NORM_ACTS and getattr(norm, "running_mean", None) is not None


def _fold(model: nn.Module, conv_path: str, norm_path: str) -> None:
    """Give the convolution the folded weight and bias, and what is left of the norm its place."""
    conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    assert norm.running_mean is not None and norm.running_var is not None
    old = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, bias, mean, var, scale, shift = (None if t is None else t.detach().double() for t in old)
    new_weight, new_bias = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, scale, shift)  # type: ignore[arg-type]
    like = conv.weight
    layout = {"memory_format": torch.channels_last} if _is_channels_last(like) else {}
    trained = like.requires_grad
    conv.weight = nn.Parameter(new_weight.detach().to(like.dtype).contiguous(**layout), requires_grad=trained)
    conv.bias = nn.Parameter(new_bias.detach().to(like.dtype), requires_grad=trained)
    parent, _, name = norm_path.rpartition(".")
    # Past __setattr__: a generated forward may have locked some of its block's attributes.
    model.get_submodule(parent)._modules[name] = _rest(norm)


def _is_channels_last(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _rest(norm: nn.Module) -> nn.Module:
    """What a norm does besides normalising, its children under their old names."""
    if _class(norm) in _NORMS:
        return nn.Identity().eval()
    kept = [(name, child) for name, child in norm.named_children() if type(child) is not nn.Identity]
    return nn.Sequential(OrderedDict(kept)).eval() if kept else nn.Identity().eval()


def _check(model: nn.Module, fused: nn.Module, recording: Recording) -> None:
    """Compare both on one random input; the hooks of neither fire.

    Raises:
        PadfreeError: they differ, or the fused copy fails.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return
    kinds = [tuple(map(type, example)) for example in example_inputs(model, recording.input_size, meta=False)]
    which = kinds.index(tuple(map(type, recording.example)))
    with torch.no_grad(), torch.random.fork_rng():
        example = list(example_inputs(model, recording.input_size, meta=False))[which]
        expected = _tensors(bare_copy(model)(*example))
        try:
            found = _tensors(bare_copy(fused)(*example))
        except Exception as error:
            raise PadfreeError(
                f"the fused {type(model).__name__} fails ({type(error).__name__}: {first_line(error)}): "
                "its forward asks a folded batch norm for more than to be called"
            ) from error
    for before, after in zip(expected, found, strict=True):
        if not before.isfinite().all():
            raise PadfreeError(
                f"the outputs of {type(model).__name__} itself are not finite; there is nothing to check"
            )
        limit = _TOLERANCE.get(before.dtype, _TOLERANCE_LOW) * max(1.0, float(before.abs().max()))
        difference = float((before - after).abs().max()) if before.numel() else 0.0
        if not difference <= limit:  # nor NaN
            raise PadfreeError(
                f"the fused {type(model).__name__} differs by {difference:.3g}, and at most {limit:.3g} "
                "is rounding; use the unfused model, and please report this one"
            )


def _tensors(tree: Any) -> list[torch.Tensor]:
    """The floating-point tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree] if tree.is_floating_point() else []
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for item in tree for t in _tensors(item)] if isinstance(tree, (list, tuple)) else []
