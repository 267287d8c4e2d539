"""Counters of operations that are worked out from the modules and functions that a forward calls.

`macs`: multiply-adds of conv and linear layers, nothing else.

`thop`: what MobileNet_123 printed (kuan-wang's fork of pytorch-OpCounter): of a convolution C_in / groups times its
outputs times k*k, plus 1 where it has a bias, which is so counted once for every input channel; of a linear layer
(2 in - 1) times its outputs; nothing else.

`tf-profile`: what the document on learned group convolution printed, TensorFlow's profiler of its graph, halved:
2 per multiply-add, 1 per bias add, 2 per batch-norm element, 1 per element of a residual sum, the window times the
outputs of a pool, 1 per element of a product with a mask, and 7 per trainable parameter. The last two are inferred:
with them all nine published figures come out at their printed digits, and no single graph of TensorFlow's was found
that gives the sum.

All of them take a network in eval mode, on any device, and count the image that they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

POOL_FUNCTIONS = (
    torch.nn.functional.max_pool2d,
    torch.max_pool2d,
    torch.nn.functional.max_pool2d_with_indices,
)
_AVERAGE_POOL_FUNCTIONS = (torch.nn.functional.avg_pool2d, torch.nn.functional.adaptive_avg_pool2d)
_SUMS = (
    *(torch.add, torch.Tensor.add, torch.Tensor.add_),
    *(torch.Tensor.__add__, torch.Tensor.__iadd__, torch.Tensor.__radd__),
)
PER_PARAMETER = 7  # of tf-profile, inferred


def macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of conv and linear layers."""
    return _by_module(model, image, lambda module, inputs, output: _macs(module, output))


def thop(model: nn.Module, image: Tensor) -> int:
    """Operations as thop's fork counts them; see the module."""

    def cost(module: nn.Module, inputs: Tensor, output: Tensor) -> int:
        if isinstance(module, nn.Conv2d):
            window = module.kernel_size[0] * module.kernel_size[1] + (module.bias is not None)
            return int(module.in_channels // module.groups * output.numel() * window)
        if isinstance(module, nn.Linear):
            return int(output.numel() * (2 * module.in_features - 1))
        return 0

    return _by_module(model, image, cost)


def tf_profile(model: nn.Module, image: Tensor, params: int, mask_products: int) -> int:
    """Operations as TensorFlow's profiler was printed; see the module.

    Args:
        model: the network, learned group convolutions condensed.
        image: (1, C, H, W).
        params: its trainable parameters.
        mask_products: elements of the dense weights that masks were multiplied with.
    """

    def cost(module: nn.Module, inputs: Tensor, output: Tensor) -> int:
        if isinstance(module, nn.Conv2d | nn.Linear):
            return 2 * _macs(module, output) + (output.numel() if module.bias is not None else 0)
        return 2 * output.numel() if isinstance(module, nn.BatchNorm2d) else 0

    functions = _SumsAndPools()
    with functions:
        layers = _by_module(model, image, cost)
    return (layers + functions.operations + PER_PARAMETER * params + mask_products) // 2


def _macs(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        return output.numel() * module.weight[0].numel()
    return output.numel() * module.in_features if isinstance(module, nn.Linear) else 0


def _by_module(model: nn.Module, image: Tensor, cost: Callable[[nn.Module, Tensor, Tensor], int]) -> int:
    """The sum of a cost over the layers that a forward calls; they take one tensor and give one."""
    total = 0

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        total += cost(module, inputs[0], output)

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return total


class _SumsAndPools(TorchFunctionMode):
    """Adds up elements of sums of two maps, and window times outputs of pools."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.inside = 0  # depth of functions of interest being run: one may call another of them

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func not in (*POOL_FUNCTIONS, *_AVERAGE_POOL_FUNCTIONS, *_SUMS):
            return func(*args, **given)
        self.inside += 1
        try:
            result = func(*args, **given)
        finally:
            self.inside -= 1
        if not self.inside:
            self.operations += _operations(func, args, given, result)
        return result


def _operations(func: Any, args: tuple[Any, ...], given: dict[str, Any], result: Any) -> int:
    if func in _SUMS:
        other = args[1] if len(args) > 1 else given.get("other")
        return int(result.numel()) if isinstance(other, Tensor) and other.dim() > 1 else 0
    output = result[0] if isinstance(result, tuple) else result
    source = args[0] if args else given["input"]
    if func is torch.nn.functional.adaptive_avg_pool2d:
        return int(source.numel())  # its windows cover the map once
    kernel = args[1] if len(args) > 1 else given["kernel_size"]
    height, width = (kernel, kernel) if isinstance(kernel, int) else (kernel[0], kernel[-1])
    return int(output.numel()) * height * width
