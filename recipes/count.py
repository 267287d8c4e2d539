"""Parameters and operations of a network under the conventions of the documents.

`bsconv`: the bsconv package's `ModelProfiler`: one per multiply-add, bias adds, 2 per batch-norm
element, 1 per ReLU element and per pool input. It sees modules only, so the inputs of max-pools that
are function calls are counted here and added.

`fvcore`: `fvcore.nn.FlopCountAnalysis`: multiply-adds of conv and linear, plus its norm and
adaptive-pool handlers. Max-pools, additions and averages written as a mean count nothing.

`modules`: conv and linear multiply-adds, conv bias adds, 2 per batch-norm element, adaptive-pool
inputs. Matrix products of attention count nothing (the EfficientFormerV2 rows, inferred).

`macs`, `thop`, `tf-profile`: see counters.py.

All of them count one image, and a learned group convolution as what is left of it after its last condensing
stage: the standard group convolution that it becomes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from padfree.errors import PadfreeError
from padfree.layers.learned_groups import condense_stage, condensed, learned_group_convs

from .counters import POOL_FUNCTIONS, macs, tf_profile, thop

Convention = Literal["bsconv", "fvcore", "modules", "macs", "thop", "tf-profile"]

_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Count:
    """What one network costs for one image.

    Attributes:
        convention: how `flops` was counted.
        params: trainable parameters.
        bare_params: those of them that belong to no conv, linear or norm layer (position embeddings
            and attention bias tables); published figures of ParC and EfficientFormerV2 leave them out.
        flops: operations under the convention.
        conv_linear: multiply-adds of conv and linear layers alone (None under `bsconv` and `modules`).
        downsampling_pool_inputs: inputs of strided max-pools, part of `flops` (`bsconv` only).
    """

    convention: Convention
    params: int
    bare_params: int
    flops: int
    conv_linear: int | None = None
    downsampling_pool_inputs: int | None = None


def count(model: nn.Module, input_side: int, convention: Convention) -> Count:
    """Count a network on a square image of `input_side` pixels.

    The model is left as it is: a copy is run in eval mode, without data (on meta tensors) where the
    counter allows it; fvcore's tracing does not.

    Raises:
        PadfreeError: the convention is unknown, or the network does not run on such an image, or not under it.
    """
    if convention not in get_args(Convention):
        raise PadfreeError(f"no counting convention {convention!r}; there are {', '.join(get_args(Convention))}")
    device = "cpu" if convention == "fvcore" else "meta"
    image = torch.zeros(1, 3, input_side, input_side, device=device)
    conv_linear = pool_inputs = None
    try:
        ghost, mask_products = _deployed(model)
        params, bare = _params(ghost)
        ghost = ghost.to(device).eval()
        if convention == "bsconv":
            flops, pool_inputs = _bsconv(ghost, image)
        elif convention == "fvcore":
            flops, conv_linear = _fvcore(ghost, image)
        elif convention == "modules":
            flops = _modules(ghost, image)
        else:
            conv_linear = macs(ghost, image)
            flops = conv_linear
            if convention == "thop":
                flops = thop(ghost, image)
            elif convention == "tf-profile":
                flops = tf_profile(ghost, image, params, mask_products)
    except Exception as error:  # the network's own code, or a counter that knows no such layer
        why = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        raise PadfreeError(f"{type(model).__name__} cannot be counted by {convention} on 3 channels: {why}") from error
    return Count(convention, params, bare, flops, conv_linear, pool_inputs)


def _deployed(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy whose learned group convolutions are condensed to the end, and the elements of their dense weights."""
    learned = learned_group_convs(model)
    if not learned:
        return copy.deepcopy(model), 0
    ghost = copy.deepcopy(model).cpu()
    while condense_stage(ghost):
        pass
    return condensed(ghost), sum(layer.weight.numel() for layer in learned)


def _params(model: nn.Module) -> tuple[int, int]:
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layered = sum(
        p.numel()
        for module in model.modules()
        if isinstance(module, _WEIGHTED + _NORMS)
        for p in module.parameters(recurse=False)
        if p.requires_grad
    )
    return total, total - layered


def _bsconv(model: nn.Module, image: Tensor) -> tuple[int, int]:
    import bsconv.pytorch

    # its own input is made by a legacy constructor that knows no meta tensors
    profile = type("Profiler", (bsconv.pytorch.ModelProfiler,), {"get_input": lambda *_, **__: image})
    with torch.no_grad(), warnings.catch_warnings(), _PoolInputs() as pools, _pools_in_modules(model, pools):
        warnings.simplefilter("ignore")  # it warns of every kind of layer that it counts as nothing
        profiler = profile(model)
    return int(profiler.total_flop_count) + pools.functional, pools.strided


def _fvcore(model: nn.Module, image: Tensor) -> tuple[int, int]:
    from fvcore.nn import FlopCountAnalysis

    with torch.no_grad():
        analysis = FlopCountAnalysis(model, image)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        kinds = analysis.by_operator()
        return int(analysis.total()), int(kinds["conv"] + kinds["linear"])


def _modules(model: nn.Module, image: Tensor) -> int:
    total = 0

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            pixels = output.numel() // output.shape[1]
            total += pixels * module.weight.numel() + (output.numel() if module.bias is not None else 0)
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.BatchNorm2d):
            total += 2 * output.numel()
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            total += inputs[0].numel()

    handles: list[RemovableHandle] = [module.register_forward_hook(hook) for module in model.modules()]
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return total


class _PoolInputs(TorchFunctionMode):
    """Adds up the input elements of max-pools that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.functional = 0  # of pools outside of a max-pool module
        self.strided = 0  # of pools with a stride over 1, wherever they are
        self.in_modules = 0  # depth of max-pool modules being run
        self.in_pools = 0  # depth of pool functions being run: one may call another of its names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in POOL_FUNCTIONS:
            return func(*args, **(kwargs or {}))
        if not self.in_pools:
            given = dict(zip(("input", "kernel_size", "stride"), args, strict=False)) | (kwargs or {})
            inputs, stride = given["input"].numel(), given.get("stride") or given["kernel_size"]
            self.functional += 0 if self.in_modules else inputs
            self.strided += inputs if stride not in (1, (1, 1), [1, 1]) else 0
        self.in_pools += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.in_pools -= 1


@contextmanager
def _pools_in_modules(model: nn.Module, pools: _PoolInputs) -> Iterator[None]:
    def enter(module: nn.Module, inputs: Any) -> None:
        pools.in_modules += 1

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        pools.in_modules -= 1

    handles: list[RemovableHandle] = []
    for module in model.modules():
        if isinstance(module, _POOLS):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
